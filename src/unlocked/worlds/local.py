"""What worlds have in common whose workers compute in this process: mailboxes, the record, the calling of functions."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LostPeer, UnlockedError
from ..timeline import Act, Timeline
from ..worker import Place, Worker
from .scheduler import Scheduler, Wait

Key = tuple[Place, Place, str]  # from, to, channel


class LocalWorkers:
    """Mailboxes of the workers here, first in, first out; what they compute is timed and recorded.

    `crossing`: channels whose messages may be left over when a run ends, to be taken in a later one.
    """

    timed = False

    def __init__(self, scheduler: Scheduler | None = None) -> None:
        self._boxes: dict[Key, deque[Any]] = defaultdict(deque)
        self._scheduler = scheduler if scheduler is not None else Scheduler()
        self._timeline = Timeline()
        self.crossing: frozenset[str] = frozenset()
        self._first: dict[str, float] = {}
        self._gone: set[Place] = set()  # workers from whom no message will come

    def _deliver(self, key: Key, x: Any) -> None:
        """Put into the mailbox; wakes a worker that waits for it."""
        self._boxes[key].append(x)
        self._scheduler.wake(key)

    async def _take(self, key: Key) -> Any:
        """The oldest message; waits while there is none."""
        box = self._boxes[key]
        while not box:
            if key[0] in self._gone:
                raise LostPeer(f"{key[0]} is gone.")
            await Wait(key, lambda: f"channel {key[2]!r} from {key[0]}")
        return box.popleft()

    def _lose(self, places: Collection[Place]) -> None:
        """Whoever waits for a message of these workers is told that none will come."""
        self._gone |= set(places)
        for key in self._scheduler.awaited():
            if isinstance(key, tuple) and key[0] in self._gone:
                self._scheduler.wake(key)

    async def execute(self, here: Worker, kind: str, function: Callable[..., Any], arguments: tuple) -> Any:
        """Compute now."""
        begin = time.perf_counter()
        result = here.compute(function, arguments)
        self._timeline.acts.append(
            Act(kind, here.replica, here.stage, here.micro_batch, here.seen, 0, begin, time.perf_counter())
        )
        return result

    async def until(self, here: Worker, when: float) -> None:
        """Real time goes by itself: nobody waits."""

    async def give_way(self, here: Worker, turn: float) -> None:
        """Nothing to do: who waits for a message lets the others go on."""

    def now(self, here: Worker) -> float:
        """Seconds of this process's clock."""
        return time.perf_counter()

    def say_first(self, here: Worker, name: str, value: float) -> float:
        """As all workers are here, one table of it is enough."""
        return self._first.setdefault(name, value)

    def record(
        self,
        here: Worker,
        kind: str,
        channel: str,
        size: int,
        there: Place | None,
        begin: float | None = None,
        *,
        waited: bool = False,
        wire: int = 0,
    ) -> None:
        """An S, R or M. `waited`: it lasted from `begin` till now; otherwise it is a moment."""
        channel = channel.partition("/")[0]
        start = time.perf_counter() if begin is None else begin
        end = time.perf_counter() if waited else start
        self._timeline.acts.append(
            Act(kind, here.replica, here.stage, here.micro_batch, here.version, size, start, end, channel, there, wire)
        )


def refuse_untaken(boxes: Mapping[Key, Collection[Any]], crossing: Collection[str] = ()) -> None:
    """Raises UnlockedError if a message is left in a mailbox, but on the `crossing` channels."""
    for (source, target, channel), box in boxes.items():
        if box and channel not in crossing:
            raise UnlockedError(
                f"{len(box)} message(s) on channel {channel!r} from {source} to {target} were never taken; "
                "the method's sends and receives do not match."
            )


def bytes_of(x: Tensor) -> int:
    """Payload of a message."""
    return x.numel() * x.element_size()


def sizes(replicas: int | Sequence[int], stages: int) -> list[int]:
    """How many replicas each stage has: the same number, or a row with one for each."""
    return [replicas] * stages if isinstance(replicas, int) else list(replicas)


def places(replicas: int | Sequence[int], stages: int) -> list[Place]:
    """All places of a mesh, replica by replica. `replicas`: N for all J stages, or one number for each stage."""
    rows = sizes(replicas, stages)
    return [Place(replica, stage) for replica in range(max(rows)) for stage in range(stages) if replica < rows[stage]]


def on(device: torch.device | None, x: Tensor) -> Tensor:
    """The tensor where a worker computes."""
    return x if device is None or x.device == device else x.to(device)
