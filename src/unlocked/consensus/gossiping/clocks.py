"""The clocks of the edges, drawn before: every edge (i, j) rings at the moments of a Poisson process of rate λ_ij.

All replicas draw the same from (seed, stage), so nobody has to tell whom to meet. They meet in the order of the moments, so
nobody waits in a circle: it is the same exchange in every world.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from ...graphs import Graph
from ...graphs.gossip.events import poisson_events
from ...rng import seed_of


class Ring(NamedTuple):
    """An exchange with a neighbour at a moment, counted in gradients."""

    time: float
    neighbour: int


def rings(graph: Graph, node: int, gradient: int, seed: int, stage: int) -> list[Ring]:
    """Those of a node between the gradients `gradient` and `gradient` + 1, in their order."""
    rows = _drawn(graph, gradient, seed_of(seed, "gossip", stage))
    return [Ring(time, j if node == i else i) for time, i, j in rows if node in (i, j)]


@functools.lru_cache(maxsize=256)  # the replicas of one process ask for the same
def _drawn(graph: Graph, gradient: int, seed: int) -> list[tuple[float, int, int]]:
    """(time, i, j) of all edges."""
    if not len(graph):
        return []
    times, edges = poisson_events(graph, gradient, gradient + 1, seed)
    return [(time, i, j) for time, (i, j) in zip(times.tolist(), graph.edges[edges].tolist())]
