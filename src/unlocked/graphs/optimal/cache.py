"""Optimal rates on disk: a JSON file per question in ~/.cache/unlocked/graphs. A file that cannot be used is written anew."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...run_files import write_json
from ..graph import Floats, Graph
from .certificate import Found
from .constraints import Region

VERSION = 1  # of what the solvers compute; raise it when their answers change


@dataclass(frozen=True)
class Entry:
    """What a solver found, and the seconds it took."""

    found: Found
    seconds: float


def folder() -> Path:
    """Where the files are."""
    return Path.home() / ".cache" / "unlocked" / "graphs"


def key(graph: Graph, region: Region, solver: str, tolerance: float) -> str:
    """A digest of all that the answer depends on."""
    digest = hashlib.sha256(f"{VERSION} {graph.n} {solver} {tolerance if solver != 'sdp' else None}".encode())
    rows = region.rows.tocoo()
    for array in (graph.edges, *rows.coords, rows.data, region.bounds, region.free):
        digest.update(f" {len(array)} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def read(key: str, graph: Graph, region: Region) -> Entry | None:
    """What was written for this key; None where there is nothing, or nothing that can be used."""
    try:
        known = json.loads((folder() / f"{key}.json").read_text())
        rates = np.array(known["rates"], dtype=np.float64)
        entry = Entry(Found(rates, float(known["bound"]), int(known["steps"])), float(known["seconds"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return entry if _allowed(rates, graph, region) else None


def _allowed(rates: Floats, graph: Graph, region: Region) -> bool:
    """Whether these are rates of C that connect the graph."""
    if rates.shape != (len(graph),) or not (np.isfinite(rates) & (rates >= 0.0)).all():
        return False
    within = rates[~region.free].max(initial=0.0) == 0.0 and region.gauge(rates) <= 1.0 + 1e-9
    return within and Graph.make(graph.n, graph.edges[rates > 0.0]).connected


def write(key: str, entry: Entry) -> None:
    """Remember it; a folder that cannot be written to is no reason to fail."""
    found = entry.found
    content = {"rates": found.rates.tolist(), "bound": found.bound, "steps": found.steps, "seconds": entry.seconds}
    try:
        write_json(folder() / f"{key}.json", content, indent=None)
    except OSError:
        return
