"""The table of a comparison: as rows of numbers, in the terminal, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from .live import in_bytes

_MEANS = (
    "samples_per_second",
    "activation_peak",
    "bytes_up",
    "bytes_down",
    "bytes_replicas",
    "seconds",
    "ensemble",
    "layerwise",
)
_COLUMNS = (
    "method",
    "test accuracy %",
    "ensemble %",
    "samples/s",
    "peak activations",
    "up",
    "down",
    "replicas",
    "seconds",
    "all heads %",
)
_SHORT = ("method", "test\nacc. %", "ens.\n%", "samples\n/s", "peak\nmemory", "up", "down", "repli-\ncas")
_UNITS = (
    "Accuracy: mean ± std over seeds, of the averaged network; ens.: of the replicas' mean prediction. Peak: bytes kept for "
    "backward, of all workers of a process. Up, down: bytes between stages, replicas: among replicas, per update and replica. "
    "All heads: the layerwise ensemble of all stages' heads."
)


def row_of(name: str, replicas: int, summaries: Sequence[dict[str, Any]], failed: Sequence[str]) -> dict[str, Any]:
    """One method over its seeds: means, and the standard deviation of a sample (n − 1) of the accuracy; None if unknown.

    Accuracies are shares, of the averaged network where there are several replicas; bytes are per update and replica.
    `members`: the replicas' own accuracies, one list per run. `failed`: the first sentence of a run that failed. `probed`: if
    accuracies are those of linear probes.
    """
    accuracies = _known(summaries, "accuracy")
    row: dict[str, Any] = {
        "method": name,
        "replicas": replicas,
        "runs": len(summaries),
        "accuracy_mean": fmean(accuracies) if accuracies else None,
        "accuracy_std": stdev(accuracies) if len(accuracies) > 1 else None,
    }
    row |= {key: fmean(values) if (values := _known(summaries, key)) else None for key in _MEANS}
    if any(summary.get("probed") for summary in summaries):
        row["probed"] = True
    row["members"] = [summary["members"] for summary in summaries if summary["members"]]
    return row | {"failed": failed[0] if failed else None}


def _known(summaries: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [summary[key] for summary in summaries if summary.get(key) is not None]


def as_rich(rows: Sequence[dict[str, Any]], width: int) -> Table:
    """For a terminal of that width; 80 columns are enough for the standard methods."""
    gap = 1 if width >= 100 else 0  # beside the one of the box
    caption = _UNITS + _probed(rows)
    table = Table(box=SIMPLE_HEAD, padding=(0, gap, 0, 0), caption=caption, caption_justify="left", show_edge=False)
    for k, heading in enumerate(_SHORT):
        table.add_column(heading, justify="right" if k else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in _cells(row, digits=1)[: len(_SHORT)]))
    return table


def as_markdown(rows: Sequence[dict[str, Any]], command: str, where: str) -> str:
    """The same as Markdown, with the command and where it ran above, and what failed below."""
    lines = ["```", command, "```", "", where, ""]
    lines += ["| " + " | ".join(_COLUMNS) + " |", "|---|" + "---:|" * (len(_COLUMNS) - 1)]
    lines += ["| " + " | ".join(_cells(row, digits=2)) + " |" for row in rows]
    lines += ["", _UNITS + _probed(rows)]
    lines += [f"\n`{row['method']}` failed: {row['failed']}" for row in rows if row["failed"]]
    return "\n".join(lines) + "\n"


def _probed(rows: Sequence[dict[str, Any]]) -> str:
    """Whose accuracy is that of a linear probe; empty if nobody's is."""
    names = [row["method"] for row in rows if row.get("probed")]
    return f" Accuracy of {', '.join(names)}: of a linear probe, for they learned without labels." if names else ""


def _cells(row: dict[str, Any], digits: int) -> list[str]:
    """One text per column; `digits` of the accuracies."""
    if row["failed"] and not row["runs"]:
        return [row["method"], "failed", *[""] * (len(_COLUMNS) - 2)]
    mean, std = row["accuracy_mean"], row["accuracy_std"]
    ensemble, layerwise = (
        "–" if row[key] is None else f"{100 * row[key]:.{digits}f}" for key in ("ensemble", "layerwise")
    )
    accuracy = (
        "–" if mean is None else f"{100 * mean:.{digits}f}" + ("" if std is None else f" ± {100 * std:.{digits}f}")
    )
    return [
        row["method"] + (" (some runs failed)" if row["failed"] else ""),
        accuracy,
        ensemble,
        "–" if row["samples_per_second"] is None else f"{row['samples_per_second']:,.0f}",
        in_bytes(row["activation_peak"]),
        in_bytes(row["bytes_up"]),
        in_bytes(row["bytes_down"]),
        in_bytes(row["bytes_replicas"]),
        "–" if row["seconds"] is None else f"{row['seconds']:.1f}",
        layerwise,
    ]
