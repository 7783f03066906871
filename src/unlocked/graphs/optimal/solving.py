"""Which rates make accelerated gossip fastest: the front of the solvers."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...errors import InvalidChoice, choose
from ..graph import Floats, Graph
from ..spectra import chi2
from . import cache as caching
from . import first_order, sdp
from .certificate import Found, Point
from .constraints import Constraint, Region

Solver = Literal["auto", "sdp", "first-order"]
SDP_UNTIL = 32  # nodes; beyond it "auto" takes the first-order solver, which is faster there (docs/optimal_rates.md)


@dataclass(frozen=True)
class Optimal:
    """The rates that minimise √(χ₁ χ₂ᴱ) over C, and how sure that is.

    Args:
        graph: with the optimal rates, without the edges that got none.
        value: √(χ₁ χ₂ᴱ) under them, E the edges that were given: those without a rate count with their resistance.
        chi1: χ₁. chi2_fixed: χ₂ᴱ. chi2: χ₂ of `graph`, ≤ χ₂ᴱ: over the edges that have a rate.
        gap: no rates of C are better than value · (1 − gap); proved by duality, see certificate.py.
        dropped: how many edges got no rate.
        solver: which one ran. steps: its iterations. seconds: what it took; when it ran, if this was read from the cache.
    """

    graph: Graph
    value: float
    chi1: float
    chi2_fixed: float
    chi2: float
    gap: float
    dropped: int
    solver: str
    steps: int
    seconds: float


def optimal_rates(
    graph: Graph,
    *,
    constraint: Constraint | None = None,
    solver: Solver = "auto",
    tolerance: float = 1e-3,
    cache: bool = True,
) -> Optimal:
    """Minimise √(χ₁ χ₂ᴱ) over the rates that the constraint allows (Oyallon §5.2, Eq. 5.19 and its relaxation).

    Args:
        graph: its edges E are what counts; of its rates only the trace, and that only without a constraint.
        constraint: see Constraint; None: the trace of the graph.
        solver: "sdp" (n < 64, needs the extra `graphs`, gap about 1e-7), "first-order" (any n), or "auto": the SDP up to
            32 nodes where the extra is installed, else the other.
        tolerance: the relative gap at which the first-order solver may stop. `gap` is larger if its limit of steps came first.
        cache: whether to read and write the result in ~/.cache/unlocked/graphs.

    Raises InvalidChoice: one node, a graph in parts, or a constraint that cannot hold; UnlockedError: a solver that is missing.
    """
    if graph.n < 2:
        raise InvalidChoice("A graph of one node has no rates; give at least 2 nodes.")
    if not 0.0 < tolerance < 1.0:
        raise InvalidChoice(f"tolerance={tolerance} is not possible; give a relative gap between 0 and 1, as 1e-3.")
    region = Region.of(graph, constraint)
    name = _resolve(solver, graph.n)
    key = caching.key(graph, region, name, tolerance)
    known = caching.read(key, graph, region) if cache else None
    if known is None:
        begin = time.perf_counter()
        found = sdp.solve(graph, region) if name == "sdp" else first_order.solve(graph, region, tolerance)
        known = caching.Entry(found, time.perf_counter() - begin)
        if cache:
            caching.write(key, known)
    return _described(graph, region, known.found, name, known.seconds)


def _resolve(solver: str, n: int) -> str:
    choose("solver", solver, ("auto", "sdp", "first-order"))
    if solver == "sdp" and n >= 64:
        raise InvalidChoice(
            f"The SDP of {n} nodes needs too much memory; take solver='first-order', or at most 63 nodes."
        )
    installed = all(importlib.util.find_spec(name) for name in ("cvxpy", "clarabel"))
    return solver if solver != "auto" else "sdp" if n <= SDP_UNTIL and installed else "first-order"


def _described(graph: Graph, region: Region, found: Found, solver: str, seconds: float) -> Optimal:
    point = _without_traces(Point.at(graph.n, graph.edges, found.rates), region)
    kept = point.rates > 0
    after = Graph.make(graph.n, graph.edges[kept], point.rates[kept], graph.name)
    gap = max(0.0, 1.0 - found.bound / point.value)
    return Optimal(
        graph=after,
        value=point.value,
        chi1=point.chi1,
        chi2_fixed=point.chi2_fixed,
        chi2=chi2(after),
        gap=gap,
        dropped=int((~kept).sum()),
        solver=solver,
        steps=found.steps,
        seconds=seconds,
    )


def _without_traces(point: Point, region: Region) -> Point:
    """Rates below 1e-9 of the largest become 0; below 1e-6 too, where the value is none the worse: solvers end inside."""
    for share, worse in ((1e-6, 1e-9), (1e-9, np.inf)):
        rates = np.where(point.rates < share * point.rates.max(), 0.0, point.rates)
        if (rates == point.rates).all() or not Graph.make(len(point.inverse), point.edges[rates > 0]).connected:
            continue
        less = Point.at(len(point.inverse), point.edges, _filled(rates, region))
        if less.value <= point.value * (1.0 + worse):
            return less
    return point


def _filled(rates: Floats, region: Region) -> Floats:
    return rates / region.gauge(rates)
