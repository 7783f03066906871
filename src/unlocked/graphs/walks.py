"""Random walks on a graph, whose commute times are its resistances (Oyallon §5.1.2, "commute time").

    p(k|i) = λ_ik / Λ_ii                             the walk's next node
    H_ij = 1 + Σ_k p(k|i) H_kj,   H_jj = 0           hitting time: expected steps from i to j (Eq. 5.12)
    H_ij + H_ji = Tr Λ · R_ij                        commute time (Chandra et al. 1996)

The text's Eq. 5.17 has 2 Tr Λ · R_ij. That is a slip, not a convention, as Tr Λ · R_ij does not change when Λ is scaled: its Λ
sums over both directions of an edge, hence the ½Λ of Eq. 5.13-5.16; there the constant is 2 dᵀ1, d_i = Σ_k λ_ik, and as
Tr Λ = 2 dᵀ1 for that Λ, no factor is left. Here every edge is summed once: Λ_ii = d_i, R_ij is twice as large, Tr Λ = dᵀ1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg, sparse

from ..errors import InvalidChoice
from .graph import Floats, Graph, Integers
from .spectra import resistances


@dataclass(frozen=True)
class Simulated:
    """mean: of the walks' numbers of steps; error: the standard error of that mean; walks: how many."""

    mean: float
    error: float
    walks: int


def commute_times(graph: Graph) -> Floats:
    """(n, n): expected steps from i to j and back, Tr Λ · R_ij; infinite between parts that are not connected."""
    found = resistances(graph)
    part = graph.components()
    inside = np.bincount(part, weights=graph.strengths)[part]  # a walk knows only its own part's Tr Λ
    return np.where(np.isinf(found), np.inf, inside[:, None] * np.where(np.isinf(found), 0.0, found))


def hitting_times(graph: Graph) -> Floats:
    """(n, n): H_ij, by solving Eq. 5.12 for every j: Λ without j times H_·j is d. Needs no resistance, so it can test them.

    Raises InvalidChoice for a graph that is not connected.
    """
    if not graph.connected:
        raise InvalidChoice("Walks do not reach every node of a graph that is not connected; join its parts.")
    matrix, found = graph.laplacian(), np.zeros((graph.n, graph.n))
    for j in range(graph.n):
        rest = np.delete(np.arange(graph.n), j)
        found[rest, j] = linalg.solve(matrix[np.ix_(rest, rest)], graph.strengths[rest], assume_a="pos")
    return found


def simulated_commute_time(graph: Graph, i: int, j: int, walks: int = 1000, seed: int = 0) -> Simulated:
    """Steps of so many walks from i to j and back, all at once, each until it is back.

    Raises InvalidChoice: a node that is not there, two that no walk joins, fewer than two walks.
    """
    if not (0 <= i < graph.n and 0 <= j < graph.n):
        raise InvalidChoice(f"There is no walk from {i} to {j}; nodes are numbered 0 to {graph.n - 1}.")
    part = graph.components()
    if part[i] != part[j]:
        raise InvalidChoice(f"No walk leads from {i} to {j}; take two nodes of one part of the graph.")
    if walks < 2:
        raise InvalidChoice(f"{walks} walks have no error bar; give at least 2.")
    if i == j:
        return Simulated(0.0, 0.0, walks)
    generator = np.random.default_rng(seed)
    steps = _steps_to(graph, i, j, walks, generator) + _steps_to(graph, j, i, walks, generator)
    return Simulated(float(steps.mean()), float(steps.std(ddof=1) / np.sqrt(walks)), walks)


def _steps_to(graph: Graph, start: int, end: int, walks: int, generator: np.random.Generator) -> Integers:
    """(walks,): steps until each walk first comes to `end`."""
    matrix = _adjacency(graph)
    until, first = np.cumsum(matrix.data), matrix.indptr
    before = np.concatenate([[0.0], until])[first]  # (n + 1,): the rates of all rows above
    here, steps = np.full(walks, start), np.zeros(walks, dtype=np.int64)
    going = np.arange(walks)
    while len(going):
        row = here[going]
        drawn = before[row] + generator.random(len(going)) * (before[row + 1] - before[row])
        entry = np.searchsorted(until, drawn, side="right").clip(first[row], first[row + 1] - 1)
        here[going] = matrix.indices[entry]
        steps[going] += 1
        going = going[here[going] != end]
    return steps


def _adjacency(graph: Graph) -> sparse.csr_array:
    """λ_ij, (n, n)."""
    i, j = graph.edges.T
    both = np.concatenate([i, j]), np.concatenate([j, i])
    return sparse.coo_array((np.tile(graph.rates, 2), both), shape=(graph.n, graph.n)).tocsr()
