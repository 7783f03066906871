"""The parameters of every rule that gossips on a graph, and what is refused of them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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
            f"The graph {made.name!r} of {replicas} replicas is not connected, so they would never agree; add an edge between its "
            "parts."
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
        if not isinstance(self.graph, (str, tuple)):
            raise InvalidChoice(
                f"graph={self.graph!r} is not possible; give a name such as 'ring', a tuple of edges (i, j), or a Graph."
            )

    def graph_of(self, replicas: int) -> Graph:
        """The graph of N replicas, its rates per gradient. Raises InvalidChoice."""
        return build(self.graph, replicas, self.rates, float(self.rate))
