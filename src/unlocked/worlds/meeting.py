"""Exchanges of a group whose members all live in this process: they meet, and the last one to come joins what they brought."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from ..worker import Worker
from .local import LocalWorkers
from .scheduler import Scheduler, Wait

MeetingKey = tuple[int, str, int]  # stage, channel, how many were before


class Meeting:
    """One exchange: what each replica brought, how many have gone again, and when it is over (by a world with a clock)."""

    __slots__ = ("brought", "left", "over", "result")

    def __init__(self) -> None:
        self.brought: dict[int, Any] = {}
        self.left = 0
        self.result: Any = None
        self.over = 0.0


class MeetingWorkers(LocalWorkers):
    """Workers that meet. `_hold` is the world's: what happens once all are there."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler)
        self._meetings: dict[MeetingKey, Meeting] = defaultdict(Meeting)
        self._rounds: dict[tuple[Any, str], int] = defaultdict(int)

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
            await self._hold(here, key, meeting)
        while len(meeting.brought) < size:
            await Wait(key, lambda: self._absent(key, size))
        meeting.left += 1
        if meeting.left == size:
            del self._meetings[key]
        return meeting.result

    async def _hold(self, here: Worker, key: MeetingKey, meeting: Meeting) -> None:
        """All have come: the others go on."""
        self._scheduler.wake(key)

    def _absent(self, key: MeetingKey, size: int) -> str:
        missing = [str(replica) for replica in range(size) if replica not in self._meetings[key].brought]
        named = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        return f"the exchange {key[1]!r} of stage {key[0]} with replica(s) {named}"

    def _forget_meetings(self) -> None:
        self._meetings.clear()
        self._rounds.clear()
