"""When which edge rings: independent Poisson clocks on the edges, drawn exactly.

    N_ij Poisson process of intensity λ_ij            Oyallon Eq. 5.7

The clocks of all edges together are one Poisson process of rate Σ λ_ij, each event of which is that of the edge ij with
probability λ_ij / Σ λ (superposition). In an interval of length L there are N ~ Poisson(L Σ λ) events; given N they are N
uniform times in order, which are sums of exponential numbers over their total. No sorting, no time step, no approximation.

Time is cut into blocks of one length, and each has a generator of its own, seeded by (seed, number of the block). So the
events of a window do not depend on which windows were asked for before, a resumed run needs the time only, and a long run
needs the memory of one block.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ...errors import InvalidChoice
from ...rng import mix, seed_of
from ..graph import Floats, Graph, Integers

_EXPECTED = 2048  # events of a block; less, and the seeding of generators takes over
_KEPT = 64  # graphs whose tables are kept, where the graph changes


class ChangingGraph(Protocol):
    """A graph that is constant on pieces of time, such as `varying.Varying`."""

    n: int

    def at_time(self, t: float) -> Graph: ...

    def until(self, t: float) -> float: ...


AnyGraph = Graph | ChangingGraph


@dataclass(frozen=True)
class Piece:
    """The events of an interval in which the graph does not change.

    times: (k,) ascending, in [begin, end). edges: (k,), rows of graph.edges. ends: (2, E), graph.edges by columns.
    """

    begin: float
    end: float
    graph: Graph
    times: Floats
    edges: Integers
    ends: Integers


class EdgeTable:
    """Draws an edge with probability λ_ij / Σ λ in constant time (Walker's aliases, 1974)."""

    def __init__(self, graph: Graph) -> None:
        self.total, self.ends = graph.total, np.ascontiguousarray(graph.edges.T)
        share = graph.rates * (len(graph) / self.total) if len(graph) else graph.rates
        self._own, self._other = np.ones(len(graph)), np.arange(len(graph), dtype=np.int64)
        self._uniform = bool(len(graph)) and float(np.ptp(graph.rates)) == 0.0
        if not self._uniform:
            self._pair(share.tolist())

    def _pair(self, share: list[float]) -> None:
        """Cells of equal size: each holds one edge that has too little and the rest of one that has too much."""
        small = [k for k, value in enumerate(share) if value < 1.0]
        large = [k for k, value in enumerate(share) if value >= 1.0]
        while small and large:
            one, other = small.pop(), large.pop()
            self._own[one], self._other[one] = share[one], other
            share[other] -= 1.0 - share[one]
            (small if share[other] < 1.0 else large).append(other)

    def draw(self, generator: np.random.Generator, count: int) -> Integers:
        """(count,): rows of graph.edges."""
        place = generator.random(count) * len(self._own)
        cell = place.astype(np.int64)
        if self._uniform:
            return cell
        return np.where(place - cell < self._own[cell], cell, self._other[cell])


class Clocks:
    """The clocks of a graph, for any seed and any block of time.

    length: of a block; it depends on the graph alone. Raises InvalidChoice where the graph has no edge that ever rings.
    """

    def __init__(self, graph: AnyGraph) -> None:
        self.graph, self.n = graph, graph.n
        self._tables: OrderedDict[int, tuple[Graph, EdgeTable]] = OrderedDict()
        total = self._at(0.0)[0].total
        self.length = max(_EXPECTED, self.n) / total if total > 0 else 1.0

    def block_of(self, time: float) -> int:
        """The block that holds a time ≥ 0."""
        number = int(time // self.length)
        return number + 1 if (number + 1) * self.length <= time else number

    def block(self, number: int, seed: int) -> list[Piece]:
        """The events of one block, a piece for each graph that holds in it."""
        begin, end = number * self.length, (number + 1) * self.length
        pieces: list[Piece] = []
        while begin < end:
            graph, until = self._at(begin)
            stop = min(until, end)
            pieces.append(self._piece(graph, begin, stop, mix(seed_of("clocks", seed), number, len(pieces))))
            begin = stop
        return pieces

    def _at(self, time: float) -> tuple[Graph, float]:
        if isinstance(self.graph, Graph):
            return self.graph, math.inf
        return self.graph.at_time(time), self.graph.until(time)

    def _table(self, graph: Graph) -> EdgeTable:
        if id(graph) not in self._tables:
            self._tables[id(graph)] = graph, EdgeTable(graph)  # the graph is held, so that its id stays its own
            while len(self._tables) > _KEPT:
                self._tables.popitem(last=False)
        return self._tables[id(graph)][1]

    def _piece(self, graph: Graph, begin: float, end: float, seed: int) -> Piece:
        table, generator = self._table(graph), np.random.default_rng(seed)
        count = int(generator.poisson((end - begin) * table.total))
        steps = np.cumsum(generator.standard_exponential(count + 1))
        times = np.minimum(begin + (end - begin) * (steps[:-1] / steps[-1]), np.nextafter(end, begin))
        return Piece(begin, end, graph, times, table.draw(generator, count), table.ends)


def windows(graph: AnyGraph, begin: float, end: float, seed: int) -> list[Piece]:
    """The events of [begin, end), a piece per block and graph. Raises InvalidChoice for times below 0 or in wrong order."""
    if not 0.0 <= begin <= end < math.inf:
        raise InvalidChoice(f"There are no events from {begin:g} to {end:g}; give finite times, 0 ≤ begin ≤ end.")
    clocks = Clocks(graph)
    found = []
    for number in range(clocks.block_of(begin), clocks.block_of(end) + 1):
        for piece in clocks.block(number, seed):
            first, last = np.searchsorted(piece.times, [begin, end])
            if first < last or (piece.begin < end and piece.end > begin):
                times, edges = piece.times[first:last], piece.edges[first:last]
                found.append(
                    replace(piece, begin=max(begin, piece.begin), end=min(end, piece.end), times=times, edges=edges)
                )
    return found


def poisson_events(graph: Graph, begin: float, end: float, seed: int) -> tuple[Floats, Integers]:
    """(times, edges) of all events in [begin, end), in order; edges are rows of graph.edges.

    What a window holds does not depend on how time is cut into windows. Raises InvalidChoice for times below 0 or in wrong
    order.
    """
    pieces = windows(graph, begin, end, seed)
    times = np.concatenate([np.empty(0), *(piece.times for piece in pieces)])
    return times, np.concatenate([np.empty(0, dtype=np.int64), *(piece.edges for piece in pieces)])


def first_events(graph: Graph, count: int, seed: int) -> tuple[Floats, Integers]:
    """(times, edges) of the first so many events after time 0. Raises InvalidChoice for a graph without edges."""
    if not len(graph):
        raise InvalidChoice(f"{graph.name} has no edge, so nothing ever happens on it; give a graph with edges.")
    clocks, times, edges, number = Clocks(graph), [np.empty(0)], [np.empty(0, dtype=np.int64)], 0
    while sum(map(len, times)) < count:
        (piece,) = clocks.block(number, seed)
        times.append(piece.times)
        edges.append(piece.edges)
        number += 1
    return np.concatenate(times)[:count], np.concatenate(edges)[:count]
