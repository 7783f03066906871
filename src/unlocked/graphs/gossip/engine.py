"""The engine of the gossip processes: many seeds at once, every event in its exact order.

Seeds are independent copies of the process, each with its own clocks, so their nodes are different nodes: one array of S·n
rows. What is computed at once is either event k of every seed (many seeds), or a batch of events of disjoint nodes out of the
next events of every seed (few seeds, large graph). Both give bit for bit what one event after the other gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ...errors import InvalidChoice
from ..graph import Floats, Integers
from .events import AnyGraph, Clocks, Piece
from .schedule import disjoint_batches

_AT_ONCE = 4096  # events looked at together where there are few seeds
_MANY = 512  # seeds, from which on one event of each is enough at once
_COLUMNS = 32  # seeds whose events are brought into place together


class Rule(Protocol):
    """What an exchange does. x: (S·n,) or (S·n, d); rows of it are nodes."""

    x: Floats

    def meet(self, i: Integers, j: Integers, times: Floats) -> None:
        """Exchanges between the nodes i[k] and j[k], no node twice, each at its own time."""

    def flush(self, time: float) -> None:
        """Bring all nodes to a common time."""


class Engine:
    """Runs a rule on the clocks of a graph, for many seeds.

    now: the time up to which all events have happened. activations: (S,), events of each seed so far.
    """

    def __init__(self, graph: AnyGraph, rule: Rule, seeds: Sequence[int]) -> None:
        self.rule, self.seeds, self.n = rule, list(seeds), graph.n
        self._done = np.zeros(len(self.seeds), dtype=np.int64)
        self.now, self.activations = 0.0, np.zeros(len(self.seeds), dtype=np.int64)
        self._clocks = Clocks(graph)
        many = len(self.seeds) >= _MANY
        self._width = 1 if many else max(1, min(_AT_ONCE // len(self.seeds), graph.n // 4))
        self._scratch = np.zeros(len(self.seeds) * graph.n, dtype=np.int64)
        self._times, self._ends = np.empty((0, len(self.seeds))), np.empty((2, 0, len(self.seeds)), dtype=np.int64)
        self.load(0)

    def advance(self, until: float) -> None:
        """All events before `until`; then all nodes are at that time. Raises InvalidChoice for a time that has passed."""
        if until < self.now:
            raise InvalidChoice(f"The process is at the time {self.now:g} already; give a later one than {until:g}.")
        for number in range(self._number, self._clocks.block_of(until) + 1):
            if number != self._number:
                self.load(number)
            counts = (self._times[: self._longest] < until).sum(axis=0)
            self._play(self._done, counts)
            self._done = counts
        self.now = until
        self.rule.flush(until)

    @property
    def block_length(self) -> float:
        """Time whose events are held in memory at once."""
        return self._clocks.length

    def errors(self) -> Floats:
        """(S,): ‖πx‖² of each seed, summed over the d components."""
        x = self.rule.x.reshape(len(self.seeds), self.n, -1)
        return np.square(x - x.mean(axis=1, keepdims=True)).sum(axis=(1, 2))

    def load(self, number: int) -> None:
        """Draw the events of a block, to be played from its beginning.

        Columns are seeds; below its last event a column is filled with infinite times.
        """
        size, longest = len(self.seeds), 0
        for first in range(0, size, _COLUMNS):  # through a small array, as writing single columns is slow
            blocks = [self._clocks.block(number, seed) for seed in self.seeds[first : first + _COLUMNS]]
            times, ends = self._rows(blocks)
            ends += np.arange(first, first + len(blocks))[:, None] * self.n
            height, columns = times.shape[1], slice(first, first + len(blocks))
            longest = max(longest, height)
            self._grow(height)
            self._times[:height, columns], self._times[height:, columns] = times.T, np.inf
            self._ends[:, :height, columns] = ends.transpose(0, 2, 1)
        self._number, self._longest = number, longest
        self._done = np.zeros(size, dtype=np.int64)

    def _rows(self, blocks: list[list[Piece]]) -> tuple[Floats, Integers]:
        """(times (b, k), nodes (2, b, k)) of some blocks, one in a row."""
        longest = max(sum(len(piece.times) for piece in pieces) for pieces in blocks)
        times, ends = np.full((len(blocks), longest), np.inf), np.zeros((2, len(blocks), longest), dtype=np.int64)
        for row, pieces in enumerate(blocks):
            begin = 0
            for piece in pieces:
                end = begin + len(piece.times)
                times[row, begin:end] = piece.times
                for side in range(2):
                    np.take(piece.ends[side], piece.edges, out=ends[side, row, begin:end], mode="clip")
                begin = end
        return times, ends

    def _grow(self, height: int) -> None:
        """Room for so many events of each seed; kept from block to block, as new memory costs more than the work."""
        more = height - len(self._times)
        if more > 0:
            self._times = np.pad(self._times, ((0, more), (0, 0)), constant_values=np.inf)
            self._ends = np.pad(self._ends, ((0, 0), (0, more), (0, 0)))

    def _play(self, begin: Integers, end: Integers) -> None:
        """The events begin[s] … end[s] − 1 of the block of every seed s."""
        order = np.argsort(begin - end, kind="stable")  # those with most events first: the others drop out at the end
        counts, size = (end - begin)[order], len(self.seeds)
        places = begin[order] * size + order
        for k in range(0, int(counts[0]), self._width):
            active = int(np.searchsorted(-counts, -k))
            self._window(places[:active] + k * size, counts[:active] - k)
        self.activations += end - begin

    def _window(self, places: Integers, counts: Integers) -> None:
        """The next events of some seeds: one of each, or as many as `_width`."""
        if self._width == 1:
            self._meet(places)
            return
        steps = np.arange(self._width)
        places = (places[:, None] + steps * len(self.seeds))[steps < counts[:, None]]
        i, j = self._ends.reshape(2, -1)[:, places]
        for batch in disjoint_batches(i, j, self._scratch):
            self._meet(places[batch])

    def _meet(self, places: Integers) -> None:
        i, j = self._ends.reshape(2, -1)
        self.rule.meet(i[places], j[places], self._times.ravel()[places])


def rows_of(values: Floats, n: int, seeds: int) -> Floats:
    """Values of (n,), (n, d) for every seed or (S, n, d), one row a node: (S·n,) or (S·n, d), a copy. Raises InvalidChoice."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim == 1:
        x = x[:, None]
    if x.ndim == 2:
        x = np.broadcast_to(x, (seeds, *x.shape))
    if x.ndim != 3 or x.shape[:2] != (seeds, n):
        raise InvalidChoice(
            f"Values of shape {np.shape(values)} do not fit {n} nodes and {seeds} seeds; give ({n},), ({n}, d) for all "
            f"seeds, or ({seeds}, {n}, d)."
        )
    x = x.reshape(seeds * n, -1).copy()
    return x[:, 0].copy() if x.shape[1] == 1 else x
