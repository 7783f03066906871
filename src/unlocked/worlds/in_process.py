"""All workers in this process, interleaved: exact semantics, no clock.

A worker runs until it must wait for a message that is not there; then the next ready one goes on. Nothing is polled and
nothing is copied: a message is a reference. When nobody can go on, the run ends with a sentence that names who waits for
which channel from whom.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..errors import Deadlock, UnlockedError
from ..rng import seed_of
from ..timeline import Act, Timeline
from ..worker import Place, Worker
from .base import Program


class _Wait:
    """Awaited by a worker that cannot go on; `key` is what wakes it, `words` what it says when nothing does."""

    __slots__ = ("key", "words")

    def __init__(self, key: Hashable, words: Callable[[], str]) -> None:
        self.key, self.words = key, words

    def __await__(self) -> Generator[_Wait, None, None]:
        yield self


class _Meeting:
    """One exchange of a group: what each replica brought, and how many have gone again."""

    __slots__ = ("brought", "left", "result")

    def __init__(self) -> None:
        self.brought: dict[int, Any] = {}
        self.left = 0
        self.result: Any = None


class InProcess:
    """The world in which all workers of the mesh share this process and its device."""

    def __init__(self) -> None:
        self._boxes: dict[tuple[Place, Place, str], deque[Tensor]] = defaultdict(deque)
        self._meetings: dict[tuple[int, str, int], _Meeting] = defaultdict(_Meeting)
        self._rounds: dict[tuple[Place, str], int] = defaultdict(int)
        self._ready: deque[tuple[Worker, Program]] = deque()
        self._waiting: dict[Hashable, list[tuple[Worker, Program, _Wait]]] = {}
        self._timeline = Timeline()

    def mesh(
        self,
        replicas: int,
        stages: int,
        seed: int = 0,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
        device: torch.device | None = None,
    ) -> list[Worker]:
        """The workers of a mesh of N replicas × J stages that live here: all of them, replica by replica."""
        places = [Place(replica, stage) for replica in range(replicas) for stage in range(stages)]
        return [
            Worker(self, place, replicas, stages, seed_of(seed, "worker", *place), context, device) for place in places
        ]

    def run(self, programs: Iterable[tuple[Worker, Program]]) -> Timeline:
        """Run every worker's program to its end and return what happened.

        Raises Deadlock when all that are left wait for each other, UnlockedError when a message was never taken, and
        whatever a program raises; the other programs are closed and the mailboxes emptied then.
        """
        self._timeline = Timeline()
        self._ready = deque(programs)
        try:
            while self._ready:
                worker, program = self._ready.popleft()
                self._advance(worker, program)
            if self._waiting:
                raise Deadlock(self._stuck())
            self._check_boxes()
        finally:
            self._clear()
        return self._timeline

    def _advance(self, worker: Worker, program: Program) -> None:
        try:
            wait = program.send(None)
        except StopIteration:
            return
        self._waiting.setdefault(wait.key, []).append((worker, program, wait))

    def _wake(self, key: Hashable) -> None:
        # whoever is woken goes first: a replica's backward ends before the next replica's forward fills the memory
        for worker, program, _ in self._waiting.pop(key, ()):
            self._ready.appendleft((worker, program))

    def _stuck(self) -> str:
        waits = [
            f"{worker.place} waits for {wait.words()}" for row in self._waiting.values() for worker, _, wait in row
        ]
        return "No worker can go on: " + "; ".join(sorted(waits)) + "."

    def _check_boxes(self) -> None:
        for (source, target, channel), box in self._boxes.items():
            if box:
                raise UnlockedError(
                    f"{len(box)} message(s) on channel {channel!r} from {source} to {target} were never taken; "
                    "the method's sends and receives do not match."
                )

    def _clear(self) -> None:
        for _, program in self._ready:
            program.close()
        for row in self._waiting.values():
            for _, program, _ in row:
                program.close()
        self._ready.clear()
        self._waiting.clear()
        self._boxes.clear()
        self._meetings.clear()
        self._rounds.clear()

    # ---- the verbs -------------------------------------------------------------------------------------------------

    async def send(self, here: Worker, there: Place, channel: str, x: Tensor) -> None:
        """Append to the mailbox; wakes a worker that waits for it."""
        key = (here.place, there, channel)
        self._boxes[key].append(x)
        self._record(here, "S", channel, x.numel() * x.element_size(), there)
        if key in self._waiting:
            self._wake(key)

    async def recv(self, here: Worker, there: Place, channel: str, like: Any) -> Tensor:
        """Take the oldest message; waits while there is none."""
        key = (there, here.place, channel)
        box = self._boxes[key]
        while not box:
            await _Wait(key, lambda: f"channel {channel!r} from {there}")
        x = box.popleft()
        self._record(here, "R", channel, x.numel() * x.element_size(), there)
        return x

    async def mean(self, here: Worker, channel: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Ordered mean; bytes are those of a reduce-scatter and an all-gather, 2(N−1)/N of the payload per worker."""
        size = here.replicas.size
        payload = sum(x.numel() * x.element_size() for x in tensors)
        begin = time.perf_counter()
        result = await self._meet(here, channel, tensors, _ordered_mean)
        self._record(here, "M", channel, 2 * (size - 1) * payload // size, None, begin)
        return result

    async def take(self, here: Worker, channel: str, values: Tensor, owners: Tensor) -> Tensor:
        """Only entries whose owner is another replica travel; they are what is counted."""
        rank = here.replicas.rank
        begin = time.perf_counter()
        rows = await self._meet(here, channel, values, torch.stack)
        taken = rows.gather(0, owners[rank : rank + 1]).squeeze(0)
        # a permutation: as many entries leave a replica as come to it
        moved = int((owners[rank] != rank).sum()) * values.element_size()
        self._record(here, "M", channel, moved, None, begin)
        return taken

    async def gather(self, here: Worker, channel: str, x: Tensor) -> list[Tensor]:
        """Everyone's tensor; each worker sends its own to N−1 others."""
        begin = time.perf_counter()
        rows = await self._meet(here, channel, x, list)
        self._record(here, "M", channel, (here.replicas.size - 1) * x.numel() * x.element_size(), None, begin)
        return rows

    async def execute(self, here: Worker, kind: str, function: Callable[..., Any], arguments: tuple) -> Any:
        """Compute now."""
        begin = time.perf_counter()
        result = here.compute(function, arguments)
        self._timeline.acts.append(
            Act(kind, here.replica, here.stage, here.micro_batch, here.version, 0, begin, time.perf_counter())
        )
        return result

    async def until(self, here: Worker, when: float) -> None:
        """There is no clock here: it is always late enough."""

    async def _meet(self, here: Worker, channel: str, brought: Any, join: Callable[[list[Any]], Any]) -> Any:
        """Wait for all replicas of the stage; `join` is applied once to what they brought, in replica order."""
        turn = self._rounds[(here.place, channel)]
        self._rounds[(here.place, channel)] += 1
        key = (here.stage, channel, turn)
        meeting = self._meetings[key]
        meeting.brought[here.replica] = brought
        size = here.replicas.size
        if len(meeting.brought) == size:
            meeting.result = join([meeting.brought[replica] for replica in range(size)])
            self._wake(key)
        while len(meeting.brought) < size:
            await _Wait(key, lambda: self._absent(key, size))
        meeting.left += 1
        if meeting.left == size:
            del self._meetings[key]
        return meeting.result

    def _absent(self, key: tuple[int, str, int], size: int) -> str:
        missing = [str(replica) for replica in range(size) if replica not in self._meetings[key].brought]
        return f"the exchange {key[1]!r} of stage {key[0]} with replica(s) {', '.join(missing)}"

    def _record(
        self, here: Worker, kind: str, channel: str, size: int, there: Place | None, begin: float | None = None
    ) -> None:
        # a message takes no time here, and a meeting's waiting is not work: both are recorded as moments
        now = time.perf_counter() if begin is None else begin
        self._timeline.acts.append(
            Act(kind, here.replica, here.stage, here.micro_batch, here.version, size, now, now, channel, there)
        )


def _ordered_mean(rows: list[Sequence[Tensor]]) -> list[Tensor]:
    """Mean of each tensor over the replicas: summed from replica 0 upwards, then divided, so that every world agrees."""
    means = []
    for column in zip(*rows):
        total = column[0] + column[1]
        for x in column[2:]:
            total += x
        means.append(total.div_(len(column)))
    return means
