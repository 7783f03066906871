"""Poisson events of a window of time, and which of them may be carried out at once.

Every node computes gradients at rate 1, every edge communicates at its rate; all clocks are independent. Events that touch
different nodes commute, so they are carried out in batches in which no node comes twice (`gossip/schedule.py`); each batch is
one vectorised step, and batch by batch gives exactly what one by one gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..gossip.schedule import disjoint_batches
from ..graph import Floats, Graph, Integers


@dataclass(frozen=True)
class Events:
    """In order of time. time: (E,). ends: (E, 2), the edge's nodes, or twice the node that computes a gradient."""

    time: Floats
    ends: Integers

    @classmethod
    def merged(cls, parts: Sequence[Events]) -> Events:
        """All of them, in order of time."""
        time, ends = np.concatenate([part.time for part in parts]), np.concatenate([part.ends for part in parts])
        order = np.argsort(time, kind="stable")
        return cls(time[order], ends[order])


class Stream:
    """A Poisson process of rate 1 with a uniform mark in [0, 1) for each event; the same however it is asked for."""

    def __init__(self, generator: np.random.Generator, block: int = 4096) -> None:
        self._generator, self._block = generator, block
        self._times, self._marks = np.zeros(0), np.zeros(0)
        self._drawn_to = 0.0

    def take(self, end: float) -> tuple[Floats, Floats]:
        """(times, marks) of the events before `end` that were not yet taken."""
        while self._drawn_to < end:
            times = self._drawn_to + np.cumsum(self._generator.exponential(size=self._block))
            self._drawn_to = float(times[-1])
            self._times = np.concatenate([self._times, times])
            self._marks = np.concatenate([self._marks, self._generator.random(self._block)])
        cut = int(np.searchsorted(self._times, end))
        taken = self._times[:cut], self._marks[:cut]
        self._times, self._marks = self._times[cut:], self._marks[cut:]
        return taken


class Clocks:
    """The clocks of one run: gradients and communications have streams of their own, so that neither changes the other."""

    def __init__(self, seed: int) -> None:
        self._gradients, self._communications = (Stream(child) for child in np.random.default_rng(seed).spawn(2))
        self._exchanged = 0.0  # ∫ total rate dt: the communications' stream counts its time in this

    def gradients(self, nodes: int, end: float) -> Events:
        """Rate 1 for each node, up to `end`."""
        times, marks = self._gradients.take(nodes * end)
        node = (marks * nodes).astype(np.int64)
        return Events(times / nodes, np.stack([node, node], axis=1))

    def communications(self, graph: Graph, factor: float, begin: float, end: float) -> Events:
        """Rate factor · λ_ij for each edge, in [begin, end)."""
        rate = factor * graph.total
        if not rate:
            return Events(np.zeros(0), np.zeros((0, 2), dtype=np.int64))
        before, self._exchanged = self._exchanged, self._exchanged + rate * (end - begin)
        times, marks = self._communications.take(self._exchanged)
        shares = np.cumsum(graph.rates) / graph.total
        edge = np.searchsorted(shares, marks, side="right").clip(max=len(graph) - 1)
        return Events(begin + (times - before) / rate, graph.edges[edge])


@dataclass(frozen=True)
class Batch:
    """Events on different nodes. node: (G,) with the time since its last event; edge: (C, 2) likewise for both ends."""

    node: Integers
    node_waited: Floats
    edge: Integers
    edge_waited: Floats


def batches(events: Events, last: Floats) -> Iterator[Batch]:
    """`last`: (nodes,) time of each node's last event before; is brought up to date."""
    ends, waited = events.ends, _waited(events, last)
    is_edge = ends[:, 0] != ends[:, 1]
    for batch in disjoint_batches(ends[:, 0], ends[:, 1], np.empty(len(last), dtype=np.int64)):
        node, edge = batch[~is_edge[batch]], batch[is_edge[batch]]
        yield Batch(ends[node, 0], waited[node, 0], ends[edge], waited[edge])


def _waited(events: Events, last: Floats) -> Floats:
    """(E, 2): time since the last event of each end."""
    node, time = events.ends.ravel(), np.repeat(events.time, 2)
    order = np.argsort(node, kind="stable")  # by node, then by time: the events are in order of time
    sorted_node, sorted_time = node[order], time[order]
    before = np.concatenate([[0.0], sorted_time[:-1]])
    first = np.concatenate([[True], sorted_node[1:] != sorted_node[:-1]])[: len(node)]
    before = np.where(first, last[sorted_node], before[: len(node)])
    waited = np.empty_like(time)
    waited[order] = sorted_time - before
    own = events.ends[:, 0] == events.ends[:, 1]
    found = waited.reshape(-1, 2)
    found[own, 1] = found[own, 0]  # a gradient's node is listed twice; the first waited for both
    last[sorted_node] = sorted_time  # the last assignment stays
    return found
