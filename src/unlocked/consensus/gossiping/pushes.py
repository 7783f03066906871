"""Who sends to whom in each round of a rule whose links are directed.

    exponential-one-peer               round k: i → i + 2^(k mod ⌈log₂ n⌉) mod n          (Assran et al. 2019)
    a name of graphs/topologies.py     every edge both ways, in every round
    arcs (i, j)                        i → j, in every round

n replicas. So that all come to agree, each must be reached from every other over the arcs of all rounds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ...errors import InvalidChoice, choose
from ...graphs import Graph

ONE_PEER = "exponential-one-peer"
Arcs = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Pushes:
    """targets[k][i]: the replicas that i sends to in round k, ascending; then from the beginning. `sources`: the converse."""

    targets: tuple[tuple[tuple[int, ...], ...], ...]

    def to(self, replica: int, turn: int) -> tuple[int, ...]:
        """Whom a replica sends to in a round, counted from 0."""
        return self.targets[turn % len(self.targets)][replica]

    def sources(self, replica: int, turn: int) -> tuple[int, ...]:
        """Who sends to it."""
        here = self.targets[turn % len(self.targets)]
        return tuple(i for i, row in enumerate(here) if replica in row)

    def ever(self, replica: int) -> list[int]:
        """Who sends to it in any round."""
        return sorted({i for turn in range(len(self.targets)) for i in self.sources(replica, turn)})


@functools.lru_cache(maxsize=64)
def pushes(graph: str | Arcs, replicas: int) -> Pushes:
    """Those of N replicas. Raises InvalidChoice: an unknown name, arcs that are not possible or do not lead everywhere."""
    if replicas == 1:
        return Pushes((((),),))
    if graph == ONE_PEER:
        hops = [1 << k for k in range((replicas - 1).bit_length())]
        return Pushes(tuple(tuple(((i + hop) % replicas,) for i in range(replicas)) for hop in hops))
    arcs = _both_ways(graph, replicas) if isinstance(graph, str) else _checked(graph, replicas)
    found = Pushes((tuple(tuple(sorted(j for i, j in arcs if i == node)) for node in range(replicas)),))
    _refuse_unreachable(arcs, replicas)
    return found


def _both_ways(name: str, replicas: int) -> list[tuple[int, int]]:
    from ...graphs.topologies import TOPOLOGIES, named

    kind = name.partition("(")[0].strip()
    if "." not in kind:  # else a file
        choose("graph", kind, [*TOPOLOGIES, ONE_PEER])
    return both_ways(named(name, replicas))


def both_ways(graph: Graph) -> list[tuple[int, int]]:
    """Every edge as two arcs."""
    return [arc for i, j, _ in graph.pairs() for arc in ((i, j), (j, i))]


def _checked(given: Arcs, replicas: int) -> list[tuple[int, int]]:
    if not all(isinstance(arc, tuple) and len(arc) == 2 for arc in given):
        raise InvalidChoice(f"graph={given!r} is not possible; give a name, or arcs (i, j): i sends to j.")
    arcs = [(int(i), int(j)) for i, j in given]
    for i, j in arcs:
        if i == j or not (0 <= i < replicas and 0 <= j < replicas) or arcs.count((i, j)) > 1:
            raise InvalidChoice(
                f"The arc {i} → {j} is not possible; replicas are numbered 0 to {replicas - 1}, an arc joins two of them and "
                "is given once."
            )
    return arcs


def _refuse_unreachable(arcs: list[tuple[int, int]], replicas: int) -> None:
    from scipy import sparse  # here, for it takes a third of a second of every start
    from scipy.sparse.csgraph import connected_components

    i, j = np.array(arcs, dtype=np.int64).reshape(-1, 2).T
    matrix = sparse.coo_array((np.ones(len(arcs)), (i, j)), shape=(replicas, replicas))
    if connected_components(matrix, directed=True, connection="strong")[0] > 1:
        raise InvalidChoice(
            f"Not every one of the {replicas} replicas can be reached from every other, so they would never agree; add arcs, "
            f"or give graph={ONE_PEER!r}."
        )
