"""The parameters of every rule that gossips on a graph, and what is refused of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from ...errors import InvalidChoice, choose
from ...graphs import Graph
from ..base import Consensus

Edges = tuple[tuple[float, ...], ...]
Rates = Literal["uniform", "degree", "metropolis", "optimal", "given"]


@functools.lru_cache(maxsize=64)
def build(graph: str | Edges, replicas: int, rates: Rates, rate: float) -> Graph:
    """The graph of so many replicas, its rates per gradient. Raises InvalidChoice."""
    from ...graphs.degrees import by_degree, metropolis
    from ...graphs.topologies import named

    if replicas == 1:
        return Graph.make(1, [], [], "one node")
    made = named(graph, replicas) if isinstance(graph, str) else _of_edges(graph, replicas)
    if not made.connected:
        raise InvalidChoice(
            f"The graph {made.name!r} of {replicas} replicas is not connected, so they would never agree; add an edge between "
            "its parts."
        )
    if rates == "given":
        return made
    if rates == "degree":
        made = by_degree(made)
    elif rates == "metropolis":
        made = metropolis(made)
    elif rates == "optimal":
        from ...graphs.optimal import optimal_rates  # it wants an extra

        made = optimal_rates(made).graph
    else:
        made = made.with_rates(1.0)
    return made.at(rate)


def _of_edges(edges: Edges, replicas: int) -> Graph:
    if not all(len(edge) in (2, 3) for edge in edges):
        raise InvalidChoice(f"graph={edges!r} is not possible; give a name, or edges (i, j) or (i, j, rate).")
    pairs = [(int(edge[0]), int(edge[1])) for edge in edges]
    return Graph.make(replicas, pairs, [edge[2] if len(edge) == 3 else 1.0 for edge in edges])


def refuse_no_graph(given: Any) -> None:
    """Raises InvalidChoice for what cannot be a rule's graph."""
    if not isinstance(given, (str, tuple)):
        raise InvalidChoice(
            f"graph={given!r} is not possible; give a name such as 'ring', a tuple of edges (i, j), or a Graph."
        )


@dataclass(frozen=True, kw_only=True)
class OnGraph(Consensus):
    """What rules on a graph share.

    Args:
        graph: of the replicas: a name (`unlocked graph --help` lists them), or edges (i, j) or (i, j, rate), or a `Graph`.
        rates: how often each edge is used: "uniform": alike; "degree", "metropolis": by the degrees of its ends
            (graphs/topologies.py); "optimal": so that the graph mixes fastest (graphs/optimal); "given": as the edges say, in
            exchanges per gradient.
        rate: exchanges per gradient that a replica takes part in, on average (not with "given").
    """

    graph: Any = "ring"
    rates: Rates = "uniform"
    rate: float = 1.0

    shares_data: ClassVar[bool] = True
    counts_updates: ClassVar[bool] = True
    planned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        choose("rates", self.rates, ("uniform", "degree", "metropolis", "optimal", "given"))
        if not (isinstance(self.rate, (int, float)) and 0.0 < self.rate < math.inf):
            raise InvalidChoice(f"rate={self.rate!r} is not possible; give exchanges per gradient, more than 0.")
        if isinstance(self.graph, Graph):
            object.__setattr__(self, "graph", tuple(self.graph.pairs()))
        refuse_no_graph(self.graph)

    def among(self, former: Sequence[int], joined: int, replicas: int) -> Self:
        """The rule of those who go on: of the N replicas the `former` ones, in this order, and so many that join.

        A graph with a name is made for the new number of them, or a ring where that is not possible. Of one given by its
        edges those between the former ones are left; who joins, or would be cut off, gets edges to its neighbours on a ring.
        """
        count = len(former) + joined
        if isinstance(self.graph, str):
            try:
                build(self.graph, count, "uniform", 1.0)
            except InvalidChoice:
                return replace(self, graph="ring" if count > 2 else "complete", rates="uniform")
            return self
        kept = self.graph_of(replicas).among(former)
        made = Graph.make(count, kept.edges, kept.rates) if len(kept) else Graph.make(count, [], [])
        if joined or not made.connected:
            usual = float(kept.rates.mean()) if len(kept) else 1.0
            around = {(min(k, (k + 1) % count), max(k, (k + 1) % count)) for k in range(count)} if count > 1 else set()
            new = sorted(edge for edge in around if edge[0] != edge[1] and not made.rate(*edge))
            if made.connected:
                new = [edge for edge in new if max(edge) >= len(former)]
            made = Graph.make(count, [*made.edges.tolist(), *new], [*made.rates.tolist(), *[usual] * len(new)])
        return replace(self, graph=tuple(made.pairs()), rates="given")

    def graph_of(self, replicas: int) -> Graph:
        """The graph of N replicas, its rates per gradient. Raises InvalidChoice."""
        return build(self.graph, replicas, self.rates, float(self.rate))
