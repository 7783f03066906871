"""Rates of the barbell by symmetry: two cliques of m nodes, joined by a bridge between their gates.

The problem of optimal rates is convex and the barbell's symmetries exchange edges of one class, so the optimum has one rate for
each: a between two nodes that are no gates, g between a gate and its clique, b on the bridge. Λ's eigenvalues are then

    a(m−1) + g     differences within a clique         gm     gate against clique, both cliques alike
    those of [[(m−1)g + 2b, −(m−1)g], [−g, g]]         one clique against the other

and the resistances 1/b, 2/(a(m−1) + g) and 1/(g(m−1)) + (m−2)/((m−1)(a(m−1) + g)).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

from unlocked.graphs import Graph
from unlocked.graphs.topologies import barbell


def optimal_barbell(n: int) -> Graph:
    """The rates that minimise √(χ₁χ₂) for their trace; n even, at least 8."""
    m = n // 2

    def value(rates: np.ndarray) -> float:
        a, g, b = rates
        inside = a * (m - 1) + g
        most = max(1 / b, 2 / inside, 1 / (g * (m - 1)) + (m - 2) / ((m - 1) * inside))
        trace = 2 * b + 4 * (m - 1) * g + 2 * (m - 1) * (m - 2) * a
        return float(trace * np.sqrt(most / eigenvalues(m, a, g, b).min()))

    return _with_classes(n, *_smallest(value, 3))


def fastest_synchronous(n: int) -> Graph:
    """The rates, all positive, that minimise κ = λ_max/λ₂: the fewest synchronous rounds."""
    m = n // 2
    return _with_classes(n, *_smallest(lambda rates: _condition(eigenvalues(m, *rates)), 3))


def double_star(n: int) -> Graph:
    """Of the barbell only the edges at the gates and the bridge, a tree, with the bridge's rate that minimises κ."""
    m = n // 2
    g, b = _smallest(lambda rates: _condition(_of_stars(eigenvalues(m, 0.0, *rates), m)), 2)
    gates = m - 1, m
    edges = [(k, gates[0]) for k in range(m - 1)] + [(gates[1], k) for k in range(m + 1, n)]
    return Graph.make(n, [*edges, gates], [g] * len(edges) + [b], "double star")


def eigenvalues(m: int, a: float, g: float, b: float) -> np.ndarray:
    """(4,): those of Λ besides 0, each once."""
    across = np.linalg.eigvals(np.array([[(m - 1) * g + 2 * b, -(m - 1) * g], [-g, g]])).real
    return np.array([a * (m - 1) + g, g * m, *across])


def _of_stars(values: np.ndarray, m: int) -> np.ndarray:
    """A star of two nodes has no differences among leaves."""
    return values if m > 2 else values[1:]


def _condition(values: np.ndarray) -> float:
    return float(values.max() / values.min())


def _smallest(value: Callable[[np.ndarray], float], classes: int) -> np.ndarray:
    """Rates with the first one fixed at 1: the value does not change with their scale. From several starts, as it has kinks."""

    def of_logs(logs: np.ndarray) -> float:
        return float(np.log(value(np.exp(np.concatenate([[0.0], np.clip(logs, -12, 12)])))))

    best = None
    for start in (0.0, 2.0, 4.0):
        found = minimize(
            of_logs,
            np.full(classes - 1, start),
            method="Nelder-Mead",
            options={"xatol": 1e-10, "fatol": 1e-12, "maxfev": 4000},
        )
        found = minimize(
            of_logs, found.x, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-12, "maxfev": 4000}
        )
        best = found if best is None or found.fun < best.fun else best
    assert best is not None
    return np.exp(np.concatenate([[0.0], np.clip(best.x, -12, 12)]))


def _with_classes(n: int, a: float, g: float, b: float) -> Graph:
    graph, gates = barbell(n), np.array([n // 2 - 1, n // 2])
    touching = np.isin(graph.edges, gates).sum(axis=1)
    return graph.with_rates(np.choose(touching, [np.float64(a), np.float64(g), np.float64(b)]))
