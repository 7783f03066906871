"""Graphs that change with time (Oyallon §5.1.1, "Time-varying setting").

    χ₁* = sup_t 1/λ₂(Λ(t))                           Oyallon Eq. 5.8
    χ̄₁  = 1/λ₂(Λ̄),   Λ̄ = (1/T) ∫ Λ(t) dt             of the mean graph; χ̄₁ ≤ χ₁*, since λ₂ is concave

Λ(t) is constant on pieces: one graph for a while, then the next. Times count from 0; at a change the new graph holds.

Which one a theorem needs: gossip at t ↦ Λ(t) decays as e^{−t/2χ₁*} and, with χ₂* = sup_t χ₂, DADAO as Theorem 5.3.1 says,
however slow or fast the graphs change. χ̄₁ is what counts when they change fast (a piece much shorter than 1/‖Λ‖): then gossip
is that on the mean graph, as the expected change of every second moment is linear in the rates. If the pieces are not connected
one by one (matchings), χ₁* is infinite and says nothing; χ̄₁ may be finite. With χ̄₁ alone no acceleration holds for all
sequences of graphs (Metelev et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from ..errors import InvalidChoice
from ..rng import seed_of
from .graph import Floats, Graph
from .spectra import chi1, chi2

Draw = Callable[[np.random.Generator], Graph]


@dataclass(frozen=True, eq=False)
class Varying:
    """A graph for every time t ≥ 0; make it by `sequence` or `drawn`.

    n: nodes, the same at all times. lasts: how long the pieces of a cycle last; the last one may last for ever (inf).
    draw: the graph of the k-th piece, k = 0, 1, …, a pure function. drawn_anew: whether a new cycle brings new graphs.
    """

    n: int
    lasts: tuple[float, ...]
    draw: Callable[[int], Graph]
    drawn_anew: bool = False
    name: str = "varying"

    def __post_init__(self) -> None:
        wrong = [time for time in self.lasts if not time > 0] + [time for time in self.lasts[:-1] if math.isinf(time)]
        if not self.lasts or wrong:
            raise InvalidChoice(
                f"Graphs that last {', '.join(f'{time:g}' for time in self.lasts) or 'no time'} are not possible; give a "
                "positive time for each, of which only the last may be infinite."
            )

    @classmethod
    def sequence(cls, graphs: Sequence[Graph], lasts: Sequence[float] | float = 1.0, periodic: bool = True) -> Varying:
        """These graphs one after the other, each for its time; then from the beginning, or (not periodic) the last for ever.

        Raises InvalidChoice: no graph, graphs of different sizes, as many times as graphs not given, a time that is not > 0.
        """
        if len({graph.n for graph in graphs}) != 1:
            raise InvalidChoice(
                "A graph that changes keeps its nodes; give at least one graph, all with as many nodes."
            )
        times = [float(lasts)] * len(graphs) if isinstance(lasts, (int, float)) else [float(time) for time in lasts]
        if len(times) != len(graphs):
            raise InvalidChoice(f"There are {len(graphs)} graphs but {len(times)} times; give one time for each graph.")
        if not periodic:
            times[-1] = math.inf
        kept = tuple(graphs)
        return cls(kept[0].n, tuple(times), lambda k: kept[k % len(kept)], name=kept[0].name)

    @classmethod
    def constant(cls, graph: Graph) -> Varying:
        """One graph for ever."""
        return cls.sequence([graph], math.inf)

    @classmethod
    def drawn(cls, n: int, draw: Draw, every: float = 1.0, seed: int = 0, name: str = "drawn") -> Varying:
        """A new graph of n nodes every so often: draw(generator), with a generator of its own for each piece.

        So the graph at a time does not depend on which times were asked for before. Example, a random tree every 2 units:
        Varying.drawn(16, lambda generator: random_tree(16, generator), every=2.0).
        """

        @lru_cache(maxsize=1024)
        def piece(k: int) -> Graph:
            graph = draw(np.random.default_rng(seed_of(seed, "varying", k)))
            if graph.n != n:
                raise InvalidChoice(f"A graph of {graph.n} nodes was drawn where {n} were announced; keep the nodes.")
            return graph

        return cls(n, (every,), piece, drawn_anew=True, name=name)

    @cached_property
    def _begins(self) -> Floats:
        """(pieces + 1,): when each piece of the first cycle begins, and when the cycle ends."""
        return np.concatenate([[0.0], np.cumsum(self.lasts)])

    @property
    def period(self) -> float:
        """Time after which the graphs come again; infinite if they never do."""
        return math.inf if self.drawn_anew else float(self._begins[-1])

    def at_time(self, t: float) -> Graph:
        """The graph that holds at t ≥ 0. Raises InvalidChoice for a time before 0."""
        return self.draw(self._piece(t))

    def until(self, t: float) -> float:
        """The first change after t; infinite if there is none."""
        return self._begin(self._piece(t) + 1)

    def changes(self, start: float, end: float) -> list[float]:
        """The times of change in (start, end]; where a graph follows itself as well."""
        found = []
        while (start := self.until(start)) <= end and math.isfinite(start):
            found.append(start)
        return found

    def pieces(self, start: float, end: float) -> Iterator[tuple[float, Graph]]:
        """(how long, graph) of each piece of [start, end)."""
        while start < end:
            stop = min(self.until(start), end)
            yield stop - start, self.at_time(start)
            start = stop

    def at(self, exchanges: float) -> Varying:
        """Each graph scaled to so many exchanges of a node per unit of time, on average (`Graph.at`)."""
        return replace(self, draw=lru_cache(maxsize=1024)(lambda k: self.draw(k).at(exchanges)))

    def mean(self, end: float | None = None) -> Graph:
        """The graph of the mean rates over [0, end); None: over one period."""
        end = self._end(end)
        rates: dict[tuple[int, int], float] = {}
        for time, graph in self.pieces(0.0, end):
            share = 1.0 if math.isinf(end) else time / end
            for i, j, rate in graph.pairs():
                rates[i, j] = rates.get((i, j), 0.0) + share * rate
        return Graph.make(self.n, list(rates), list(rates.values()), f"mean of {self.name}")

    def chi1(self, end: float | None = None) -> float:
        """χ₁* = sup χ₁ over the graphs of [0, end) (Eq. 5.8); None: all of them. Infinite if one is not connected."""
        return max(chi1(graph) for _, graph in self.pieces(0.0, self._end(end, held=True)))

    def chi2(self, end: float | None = None) -> float:
        """χ₂* = sup χ₂, as `chi1`."""
        return max(chi2(graph) for _, graph in self.pieces(0.0, self._end(end, held=True)))

    def _end(self, end: float | None, held: bool = False) -> float:
        """Of what is summed up. held: a last graph that stays counts as one piece, after those before it."""
        if end is not None and not end > 0:
            raise InvalidChoice(f"Up to the time {end:g} there is no graph; give a time after 0.")
        if end is not None and (math.isfinite(end) or (held and not self.drawn_anew)):
            return end
        if self.drawn_anew or (len(self.lasts) > 1 and math.isinf(self.period) and not held):
            raise InvalidChoice(f"The graphs of {self.name} never come again; say up to which time, with end=….")
        return self.period

    def _piece(self, t: float) -> int:
        if not t >= 0:
            raise InvalidChoice(f"There is no graph at the time {t:g}; times count from 0.")
        cycle = float(self._begins[-1])
        turns = 0 if math.isinf(cycle) else int(t // cycle)
        inside = np.searchsorted(self._begins[:-1], t - turns * (0.0 if math.isinf(cycle) else cycle), side="right")
        k = turns * len(self.lasts) + int(inside) - 1
        while self._begin(k + 1) <= t:  # rounding
            k += 1
        while self._begin(k) > t:
            k -= 1
        return k

    def _begin(self, k: int) -> float:
        turns, inside = divmod(k, len(self.lasts))
        if math.isinf(self._begins[-1]):
            return float(self._begins[inside]) if not turns else math.inf
        return turns * float(self._begins[-1]) + float(self._begins[inside])


def one_peer_exponential(n: int, every: float = 1.0) -> Varying:
    """Every node has one neighbour at a time: i and i xor 2^k, k = 0, 1, …, log₂ n − 1 (Assran et al. 2019, made undirected).

    One exchange over every edge of every piece, in order, is the exact mean. The mean graph is the hypercube. Raises
    InvalidChoice for an n that is not a power of two.
    """
    if n < 2 or n & (n - 1):
        raise InvalidChoice(f"{n} nodes do not pair up by powers of two; give a power of two, from 2.")
    nodes = range(n)
    rounds = [[(i, i ^ (1 << k)) for i in nodes if i < i ^ (1 << k)] for k in range(n.bit_length() - 1)]
    return Varying.sequence([Graph.make(n, pairs, name="one-peer exponential") for pairs in rounds], every)
