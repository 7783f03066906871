"""All workers in this process, interleaved: exact semantics, no clock.

A worker runs until it must wait for a message that is not there; then the next ready one goes on. Nothing is polled and
nothing is copied: a message is a reference. When nobody can go on, the run ends with a sentence that names who waits for
which channel from whom.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from ..chain import Chain
from ..cluster import Alone
from ..errors import Deadlock, UnlockedError
from ..rng import seed_of
from ..timeline import Timeline
from ..worker import Place, Worker
from .base import Program
from .exchange import mean_bytes, ordered_mean, take_bytes
from .local import bytes_of, places, refuse_untaken
from .meeting import MeetingWorkers
from .scheduler import Scheduler


class _Later:
    """An exchange that begins when it is awaited: in one process nothing can go on beside the computation."""

    def __init__(self, make: Callable[[], Awaitable[Any]]) -> None:
        self._make = make

    def __await__(self) -> Generator[Any, None, Any]:
        return self._make().__await__()


class InProcess(MeetingWorkers):
    """The world in which all workers of the mesh share this process and its device."""

    def __init__(self) -> None:
        super().__init__(Scheduler())
        self.crew = Alone()

    def mesh(
        self,
        replicas: int,
        stages: int,
        seed: int = 0,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
        device: torch.device | None = None,
        chain: Chain | None = None,
    ) -> list[Worker]:
        """The workers of a mesh of N replicas × J stages that live here: all of them, replica by replica."""
        return [
            Worker(self, place, replicas, stages, seed_of(seed, "worker", *place), context, device)
            for place in places(replicas, stages)
        ]

    def run(self, programs: Iterable[tuple[Worker, Program]], charged: bool = True) -> Timeline:
        """Run every worker's program to its end and return what happened.

        Raises Deadlock when all that are left wait for each other, UnlockedError when a message was never taken, and
        whatever a program raises; the other programs are closed and the mailboxes emptied then.
        """
        self._timeline = Timeline()
        self._scheduler.start(programs)
        try:
            self._scheduler.run_ready()
            if not self._scheduler.idle:
                raise Deadlock(f"No worker can go on: {self._scheduler.stuck()}.")
            refuse_untaken(self._boxes)
        finally:
            self._clear()
        return self._timeline

    def _clear(self) -> None:
        self._scheduler.close()
        self._boxes.clear()
        self._forget_meetings()

    def clock(self) -> float:
        """Seconds of wall clock."""
        return time.perf_counter()

    def close(self) -> None:
        """Nothing to close."""

    # ---- the verbs -------------------------------------------------------------------------------------------------

    async def send(self, here: Worker, there: Place, channel: str, x: Tensor) -> None:
        """Append to the mailbox; wakes a worker that waits for it."""
        self.record(here, "S", channel, bytes_of(x), there)
        self._deliver((here.place, there, channel), x)

    async def recv(self, here: Worker, there: Place, channel: str, like: Any) -> Tensor:
        """Take the oldest message; waits while there is none."""
        x = await self._take((there, here.place, channel))
        self.record(here, "R", channel, bytes_of(x), there)
        return x

    async def mean(self, here: Worker, channel: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Ordered mean; bytes are those that would leave the worker if the replicas were apart."""
        begin = time.perf_counter()
        result = await self._meet(here, channel, tensors, mean_of_each)
        self.record(here, "M", channel, mean_bytes(tensors, here.replica, here.replicas.size), None, begin)
        return result

    def begin_mean(self, here: Worker, channel: str, tensors: Sequence[Tensor]) -> Awaitable[Sequence[Tensor]]:
        """The mean, when it is awaited."""
        return _Later(lambda: self.mean(here, channel, tensors))

    def progress(self) -> None:
        """Nothing goes on beside a computation here."""

    async def take(self, here: Worker, channel: str, values: Tensor, owners: Tensor) -> Tensor:
        """Only entries whose owner is another replica travel; they are what is counted."""
        rank = here.replicas.rank
        begin = time.perf_counter()
        rows = await self._meet(here, channel, values, torch.stack)
        taken = rows.gather(0, owners[rank : rank + 1]).squeeze(0)
        self.record(here, "M", channel, take_bytes(values, owners, rank), None, begin)
        return taken

    async def gather(self, here: Worker, channel: str, x: Tensor) -> list[Tensor]:
        """Everyone's tensor; each worker sends its own to N−1 others."""
        begin = time.perf_counter()
        rows = await self._meet(here, channel, x, list)
        self.record(here, "M", channel, (here.replicas.size - 1) * bytes_of(x), None, begin)
        return rows

    def process_group(self, here: Worker, axis: Literal["stages", "replicas"]) -> Any:
        """Raises UnlockedError: there is one process only."""
        raise UnlockedError(
            "PyTorch's own parallel training needs a process per worker; use the distributed world "
            "(unlocked launch --processes …)."
        )


def mean_of_each(rows: list[Sequence[Tensor]]) -> list[Tensor]:
    """The mean over the members of each tensor in the rows they brought."""
    return [ordered_mean(column) for column in zip(*rows)]
