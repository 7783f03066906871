"""All workers in this process, interleaved: exact semantics, no clock.

A worker runs until it must wait for a message that is not there; then the next ready one goes on. Nothing is polled and
nothing is copied: a message is a reference. When nobody can go on, the run ends with a sentence that names who waits for
which channel from whom.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from ..chain import Chain
from ..cluster import Alone
from ..errors import Deadlock, UnlockedError
from ..rng import seed_of
from ..rules.mean import ordered_mean, ordered_sum
from ..timeline import Timeline
from ..worker import Beside, Place, Worker
from .base import Program
from .beside import Companion, Deferred
from .exchange import bounds, mean_bytes, scatter_bytes, take_bytes
from .local import bytes_of, places, refuse_untaken, sizes
from .meeting import MeetingWorkers
from .scheduler import Moment, Scheduler
from .streams import Stream, Streams


class _Later:
    """An exchange that begins when it is awaited: in one process nothing can go on beside the computation."""

    def __init__(self, make: Callable[[], Awaitable[Any]]) -> None:
        self._make = make

    def __await__(self) -> Generator[Any, None, Any]:
        return self._make().__await__()


class InProcess(MeetingWorkers):
    """The world in which all workers of the mesh share this process and its device.

    Args:
        streams: True: every worker has a CUDA stream of its own, so that stages compute side by side on one device
            (streams.py); the numbers are the same. Or what makes streams, for tests.

    Raises InvalidChoice in `run` if streams were asked for and the workers are not on a CUDA device.
    """

    def __init__(self, streams: bool | Callable[[torch.device | None, bool], Stream] = False) -> None:
        self._streams = None if streams is False else Streams() if streams is True else Streams(streams)
        super().__init__(self._streams or Scheduler())
        self.crew = Alone()

    @property
    def uses_streams(self) -> bool:
        """Whether workers compute side by side."""
        return self._streams is not None

    def mesh(
        self,
        replicas: int | Sequence[int],
        stages: int,
        seed: int = 0,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
        device: torch.device | None = None,
        chain: Chain | None = None,
    ) -> list[Worker]:
        """The workers of a mesh of N replicas × J stages that live here: all of them, replica by replica.

        Messages that were left over for a mesh before are gone: a world serves one at a time.
        """
        self._boxes.clear()
        self._first.clear()
        size = sizes(replicas, stages)
        return [
            Worker(self, place, size[place.stage], stages, seed_of(seed, "worker", *place), context, device)
            for place in places(replicas, stages)
        ]

    def run(self, programs: Iterable[tuple[Worker, Program]], charged: bool = True) -> Timeline:
        """Run every worker's program to its end and return what happened.

        Raises Deadlock when all that are left wait for each other, UnlockedError when a message was never taken (those on
        `crossing` channels may wait for a later run), and whatever a program raises; the other programs are closed and the
        mailboxes emptied then.
        """
        self._timeline = Timeline()
        programs = list(programs)
        self._scheduler.start(programs)
        try:
            with self._side_by_side([worker for worker, _ in programs]):
                self._scheduler.run_ready()
            if not self._scheduler.idle:
                raise Deadlock(f"No worker can go on: {self._scheduler.stuck()}.")
            refuse_untaken(self._boxes, self.crossing)
        except BaseException:
            self._boxes.clear()
            raise
        finally:
            self._scheduler.close()
            self._forget_meetings()
        return self._timeline

    def _side_by_side(self, workers: list[Worker]) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._streams is None or not workers else self._streams.running(workers)

    def clock(self) -> float:
        """Seconds of wall clock."""
        return time.perf_counter()

    def close(self) -> None:
        """Nothing to close."""

    # ---- the verbs -------------------------------------------------------------------------------------------------

    async def send(self, here: Worker, there: Place, channel: str, x: Tensor) -> None:
        """Append to the mailbox; wakes a worker that waits for it."""
        self.record(here, "S", channel, bytes_of(x), there)
        moment = None if self._streams is None else self._streams.of(here).mark()
        self._deliver((here.place, there, channel), (x, moment))

    async def recv(self, here: Worker, there: Place, channel: str, like: Any) -> Tensor:
        """Take the oldest message; waits while there is none."""
        x, moment = await self._take((there, here.place, channel))
        self._after(here, moment, [x])
        self.record(here, "R", channel, bytes_of(x), there)
        return x

    async def arrived(self, here: Worker, there: Place, channel: str) -> int:
        """As many as are in the mailbox."""
        return len(self._boxes[(there, here.place, channel)])

    async def until(self, here: Worker, when: float) -> None:
        """Whoever waits for an earlier moment, or came to this one earlier, goes on first; nothing lasts any time here."""
        await Moment(round(when, 9))

    def _after(self, here: Worker, moment: Any, tensors: Iterable[Tensor]) -> None:
        """This worker goes on to use what another has made by then."""
        if self._streams is not None:
            stream = self._streams.of(here)
            stream.wait(moment)
            for x in tensors:
                stream.use(x)

    async def _joined(self, here: Worker, channel: str, brought: Any, join: Callable[[list[Any]], Any]) -> Any:
        """Meet, and what came of it; on streams, after all that was brought was computed."""
        if self._streams is None:
            return await self._meet(here, channel, brought, join)
        streams = self._streams

        def joined(rows: list[tuple[Any, Any]]) -> tuple[Any, Any]:
            for row, moment in rows:  # the last one to come joins, on its own stream
                self._after(here, moment, _tensors(row))
            return join([row for row, _ in rows]), streams.of(here).mark()

        result, moment = await self._meet(here, channel, (brought, streams.of(here).mark()), joined)
        self._after(here, moment, _tensors(result))
        return result

    async def mean(self, here: Worker, channel: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Ordered mean; bytes are those that would leave the worker if the replicas were apart."""
        begin = time.perf_counter()
        result = await self._joined(here, channel, tensors, mean_of_each)
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
        rows = await self._joined(here, channel, values, torch.stack)
        taken = rows.gather(0, owners[rank : rank + 1]).squeeze(0)
        self.record(here, "M", channel, take_bytes(values, owners, rank), None, begin)
        return taken

    async def gather(self, here: Worker, channel: str, x: Tensor) -> list[Tensor]:
        """Everyone's tensor; each worker sends its own to N−1 others."""
        begin = time.perf_counter()
        rows = await self._joined(here, channel, x, list)
        self.record(here, "M", channel, (here.replicas.size - 1) * bytes_of(x), None, begin)
        return rows

    async def reduce_scatter(self, here: Worker, channel: str, values: Tensor) -> Tensor:
        """This replica's part of the sum; each worker sends all but its own."""
        begin, rank, size = time.perf_counter(), here.replica, here.replicas.size
        total = await self._joined(here, channel, values, ordered_sum)
        self.record(here, "M", channel, scatter_bytes(values, rank, size), None, begin)
        return own_part(total, rank, size)

    def beside(self, here: Worker, words: str, program: Callable[[Worker], Coroutine[Any, Any, Any]]) -> Beside:
        """When it is awaited."""
        return Deferred(lambda: program(Companion(here, self)))

    def process_group(self, here: Worker, axis: Literal["stages", "replicas"]) -> Any:
        """Raises UnlockedError: there is one process only."""
        raise UnlockedError(
            "PyTorch's own parallel training needs a process per worker; use the distributed world "
            "(unlocked launch --processes …)."
        )


def _tensors(given: Any) -> Iterable[Tensor]:
    return [given] if isinstance(given, Tensor) else given


def own_part(values: Tensor, rank: int, size: int) -> Tensor:
    """The part of `values` (k,) that is member `rank`'s."""
    begin, end = bounds(len(values), size)[rank : rank + 2]
    return values[begin:end]


def mean_of_each(rows: list[Sequence[Tensor]]) -> list[Tensor]:
    """The mean over the members of each tensor in the rows they brought."""
    return [ordered_mean(column) for column in zip(*rows)]
