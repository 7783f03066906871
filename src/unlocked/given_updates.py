"""The batches of a replica that runs freely, for its stages in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from .batch import Batch, micro_batches

if TYPE_CHECKING:
    from .session import Trainer


class GivenUpdates:
    """The updates of a replica that runs freely, for its stages here, which come to each at different times."""

    def __init__(self, trainer: Trainer, replica: int, batch: Callable[[int], tuple[int, Tensor, Tensor]]) -> None:
        self._trainer, self._replica, self._batch = trainer, replica, batch
        mine = [worker for worker in trainer.workers if worker.replica == replica]
        self._stages, self._first = len(mine), mine[0].version
        self._made: dict[int, tuple[int, list[Batch], int]] = {}  # with the number of stages that have still to come

    def update(self, k: int, number: int) -> tuple[int, list[Batch]]:
        """The round and the micro-batches of update k, counted from 0, of the batch of this number."""
        began, batches, left = self._made.pop(k) if k in self._made else self._make(k, number)
        if left > 1:
            self._made[k] = (began, batches, left - 1)
        return began, batches

    def _make(self, k: int, number: int) -> tuple[int, list[Batch], int]:
        trainer, update = self._trainer, self._first + k
        began, x, y = self._batch(number)
        x, y = trainer.regularised(self._replica, x, y, update)
        rows = micro_batches(x, y, trainer.accumulate, update * trainer.accumulate, trainer.phase)
        return began, list(rows), self._stages
