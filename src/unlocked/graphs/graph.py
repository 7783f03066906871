"""A graph of workers: who may exchange with whom, and how often.

    Λ = Σ_{(i,j) ∈ E} λ_ij (e_i − e_j)(e_i − e_j)ᵀ          Oyallon Eq. 5.5

n nodes; E undirected edges, i < j; λ_ij rate of an edge: exchanges over it per unit of time (in training: per gradient of a
worker). A node takes part in Λ_ii = Σ_j λ_ij exchanges per unit of time; Tr Λ = 2 Σ λ_ij counts every exchange at both ends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidChoice

if TYPE_CHECKING:
    from scipy import sparse

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph with a rate per edge.

    Args:
        n: number of nodes, 0 … n − 1.
        edges: (E, 2) int64, i < j, each pair once, in lexicographic order (`make` brings them into it).
        rates: (E,) float64, λ_ij > 0.
        name: for tables and titles.
    """

    n: int
    edges: Integers
    rates: Floats
    name: str = "graph"
    _neighbours: list[list[int]] = field(default_factory=list, repr=False)

    @classmethod
    def make(
        cls,
        n: int,
        edges: Iterable[tuple[int, int]] | Integers,
        rates: Sequence[float] | Floats | float = 1.0,
        name: str = "graph",
    ) -> Graph:
        """A graph from edges in any order and direction, with a rate for each or one for all.

        Raises InvalidChoice: no node, a node that is not there, a loop, an edge twice, a rate that is not a positive number.
        """
        if n < 1:
            raise InvalidChoice(f"A graph of {n} nodes is not possible; give at least 1.")
        rows = [tuple(edge) for edge in edges]
        if not all(len(row) == 2 and all(node == int(node) for node in row) for row in rows):
            raise InvalidChoice("An edge is a pair (i, j) of the numbers of two nodes; give the rates apart.")
        pairs, given = np.array(rows, dtype=np.int64).reshape(-1, 2), np.asarray(rates, dtype=np.float64)
        if given.ndim and given.shape != (len(pairs),):
            raise InvalidChoice(
                f"There are {len(pairs)} edges but rates of the shape {given.shape}; give one rate, or one for each edge."
            )
        values = np.broadcast_to(given, (len(pairs),)).copy()
        _check(n, pairs, values)
        pairs = np.sort(pairs, axis=1)
        order = np.lexsort((pairs[:, 1], pairs[:, 0]))
        pairs, values = pairs[order], values[order]
        double = np.nonzero((pairs[1:] == pairs[:-1]).all(axis=1))[0]
        if len(double):
            i, j = pairs[double[0]]
            raise InvalidChoice(f"The edge {i}-{j} is given twice; give each once, in either direction.")
        return cls(n, pairs, values, name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        same = self.n == other.n and np.array_equal(self.edges, other.edges)
        return same and np.array_equal(self.rates, other.rates)

    def __hash__(self) -> int:
        return hash((self.n, self.edges.tobytes(), self.rates.tobytes()))

    def __len__(self) -> int:
        """Number of edges."""
        return len(self.edges)

    def pairs(self) -> Iterator[tuple[int, int, float]]:
        """(i, j, λ_ij) of every edge."""
        for (i, j), rate in zip(self.edges.tolist(), self.rates.tolist()):
            yield i, j, rate

    def neighbours(self, node: int) -> list[int]:
        """In ascending order."""
        if not self._neighbours:
            lists: list[list[int]] = [[] for _ in range(self.n)]
            for i, j in self.edges.tolist():
                lists[i].append(j)
                lists[j].append(i)
            self._neighbours.extend(sorted(row) for row in lists)
        return self._neighbours[node]

    def rate(self, i: int, j: int) -> float:
        """λ_ij; 0 where there is no edge."""
        found = np.nonzero((self.edges == sorted((i, j))).all(axis=1))[0]
        return float(self.rates[found[0]]) if len(found) else 0.0

    @property
    def degrees(self) -> Integers:
        """(n,): neighbours of each node."""
        return np.bincount(self.edges.ravel(), minlength=self.n).astype(np.int64)

    @property
    def strengths(self) -> Floats:
        """(n,): Λ_ii, exchanges of each node per unit of time."""
        counted = np.bincount(self.edges.ravel(), weights=np.repeat(self.rates, 2), minlength=self.n)
        return np.asarray(counted, dtype=np.float64)

    @property
    def trace(self) -> float:
        """Tr Λ."""
        return 2.0 * float(self.rates.sum())

    @property
    def total(self) -> float:
        """Σ λ_ij: exchanges in the whole graph per unit of time."""
        return float(self.rates.sum())

    @property
    def connected(self) -> bool:
        """Whether every node can be reached from every other."""
        return bool(self.components().max(initial=0) == 0)

    def components(self) -> Integers:
        """(n,): the number of the part each node is in."""
        from scipy import sparse  # half a second that a run without a graph shall not wait
        from scipy.sparse.csgraph import connected_components

        i, j = self.edges.T
        matrix = sparse.coo_array((np.ones(len(i)), (i, j)), shape=(self.n, self.n))
        return connected_components(matrix, directed=False)[1].astype(np.int64)

    def laplacian(self) -> Floats:
        """Λ, (n, n)."""
        return np.asarray(self.sparse_laplacian().toarray(), dtype=np.float64)

    def sparse_laplacian(self) -> sparse.csc_array:
        """Λ, as a sparse matrix."""
        from scipy import sparse

        i, j = self.edges.T
        rows, columns = np.concatenate([i, j, i, j]), np.concatenate([i, j, j, i])
        values = np.concatenate([self.rates, self.rates, -self.rates, -self.rates])
        return sparse.coo_array((values, (rows, columns)), shape=(self.n, self.n)).tocsc()

    def with_rates(self, rates: Sequence[float] | Floats | float) -> Graph:
        """The same edges at other rates, given in the order of `edges`. Raises InvalidChoice."""
        return Graph.make(self.n, self.edges, rates, self.name)

    def scaled(self, factor: float) -> Graph:
        """All rates multiplied by a factor > 0."""
        return self.with_rates(self.rates * factor)

    def at(self, exchanges: float) -> Graph:
        """Scaled so that a node takes part in so many exchanges per unit of time, on average: Tr Λ = n · exchanges."""
        if not len(self):
            raise InvalidChoice("A graph without edges has no rates to scale; give it an edge.")
        return self.scaled(exchanges * self.n / self.trace)

    def without(self, gone: Collection[int]) -> Graph:
        """The same nodes, but no edge of those that are gone: they stay as nodes without neighbours."""
        keep = ~np.isin(self.edges, list(gone)).any(axis=1)
        return replace(self, edges=self.edges[keep], rates=self.rates[keep], _neighbours=[])

    def among(self, nodes: Sequence[int]) -> Graph:
        """The graph of these nodes alone, numbered in the order given."""
        number = {node: k for k, node in enumerate(nodes)}
        kept = [(number[i], number[j], rate) for i, j, rate in self.pairs() if i in number and j in number]
        return Graph.make(len(nodes), [(i, j) for i, j, _ in kept], [rate for *_, rate in kept], self.name)


def _check(n: int, pairs: Integers, rates: Floats) -> None:
    outside = pairs[(pairs < 0) | (pairs >= n)]
    if len(outside):
        raise InvalidChoice(f"An edge leads to node {outside[0]}; nodes are numbered 0 to {n - 1}.")
    loops = pairs[pairs[:, 0] == pairs[:, 1]]
    if len(loops):
        raise InvalidChoice(f"Node {loops[0][0]} has an edge to itself; leave it out.")
    wrong = rates[~(np.isfinite(rates) & (rates > 0))]
    if len(wrong):
        raise InvalidChoice(
            f"A rate of {wrong[0]:g} is not possible; rates are positive numbers, or leave out the edge."
        )
