"""What the rules share whose replicas meet their neighbours at given updates: D-PSGD and SGP.

A replica waits for its neighbours, nobody for all. What is averaged are the weights and, with the policy
`batchnorm="average"`, BatchNorm's statistics as if they were weights. The optimizers' states are not exchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...chain import Chain
from ...errors import InvalidChoice
from ...flat import blank, flat
from ...graphs import Graph
from ...worker import Worker
from ..base import Consensus, Store, Weights
from .observing import distance_to_mean, summary
from .rule import refuse_no_graph

Rows = list[Tensor]


class Neighbourly(Weights):
    """averaged: the tensors that are exchanged, in rows, one for each dtype, which travel as one message of bytes."""

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: Synchronous) -> None:
        super().__init__(worker, chain, store)
        self._real = store.optimizer is not None
        self._channel = rule.name
        self._open = False
        self.averaged: Rows = [*self.parameters, *(self.statistics if store.batchnorm == "average" else [])]

    def rows(self) -> Rows:
        """Copies of what is in place, or only their shapes."""
        return flat(self.averaged) if self._real else blank(self.averaged)

    async def listen(self, sources: Iterable[int]) -> None:
        """Open the channels to this replica, once: over some links a message leaves only when somebody listens."""
        for source in () if self._open else sources:
            await self.worker.replicas.peer(source).arrived(self._channel)
        self._open = True

    def averages_statistics(self) -> bool:
        return False  # they are exchanged with the weights

    async def observed(self) -> dict[str, Any]:
        """The distance to the mean."""
        return await distance_to_mean(self.worker, self.parameters)


@dataclass(frozen=True, kw_only=True)
class Synchronous(Consensus):
    """What these rules share.

    Args:
        graph: of the replicas: a name (`unlocked graph --help` lists them), edges, or a `Graph`.
        period: updates from one exchange to the next.
    """

    graph: Any = "ring"
    period: int = 1

    shares_data: ClassVar[bool] = True
    counts_updates: ClassVar[bool] = True
    planned: ClassVar[bool] = False
    needs_equal_start: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.graph, Graph):
            object.__setattr__(self, "graph", self._edges_of(self.graph))
        refuse_no_graph(self.graph)
        if not (isinstance(self.period, int) and self.period >= 1):
            raise InvalidChoice(
                f"period={self.period!r} is not possible; give a whole number of updates of at least 1."
            )

    def told(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return summary(rows)

    def _edges_of(self, graph: Graph) -> tuple[tuple[float, ...], ...]:
        return tuple(graph.pairs())

    def due(self, update: int) -> bool:
        """Whether there is an exchange at this update (counted from 1)."""
        return update % self.period == 0

    def cycle(self, stages: int) -> int:
        return self.period
