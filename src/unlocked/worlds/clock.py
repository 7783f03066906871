"""A scheduler with a virtual clock: coroutines go on in the order of time, those of one moment in the order they came to it."""

from __future__ import annotations

import heapq
import types
from collections import deque
from collections.abc import Coroutine, Generator, Hashable, Iterable
from typing import Any

from ..worker import Worker
from .scheduler import Running, Scheduler, Wait


@types.coroutine
def until(when: float) -> Generator[float, None, None]:
    """Sleep until the clock says `when` (seconds); not at all if it says so already."""
    yield when


@types.coroutine
def last() -> Generator[None, None, None]:
    """Let everybody else go on who is to do something at this moment."""
    yield None


class Clock(Scheduler):
    """`now` is the time of whoever is going on.

    Whoever is ready now is in the queue of the Scheduler; who is to go on later, in one row for each moment. Many workers that
    do the same are ready at the same moments, so the heap of moments stays small.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._moments: list[float] = []
        self._last: deque[Running] = deque()  # who lets all others of this moment go first
        self._rows: dict[float, list[Running]] = {}

    def start_at(self, programs: Iterable[tuple[float, Worker, Coroutine[Any, Any, None]]]) -> None:
        """Add programs, each with the time at which it begins."""
        for when, worker, program in programs:
            self._go_on_at(when, Running(worker, program, False))

    def run_ready(self) -> None:
        """Let everybody go on, moment by moment, until all wait for something without a time, or are done."""
        while True:
            super().run_ready()
            if self._last and self.now not in self._rows:
                self._ready.append(self._last.popleft())
                continue
            if not self._moments:
                return
            self.now = heapq.heappop(self._moments)
            self._ready.extend(self._rows.pop(self.now))

    def wake_at(self, key: Hashable, when: float) -> None:
        """Whoever waits for this key goes on at `when`."""
        for running, _ in self._waiting.pop(key, ()):
            self._go_on_at(when, running)

    @property
    def idle(self) -> bool:
        """Nobody is ready, waits, or is to go on later."""
        return super().idle and not self._moments

    def close(self) -> None:
        """End all coroutines."""
        super().close()
        for row in [*self._rows.values(), self._last]:
            for running in row:
                running.program.close()
        self._last.clear()
        self._rows.clear()
        self._moments.clear()

    def _go_on_at(self, when: float, running: Running) -> None:
        row = self._rows.get(when)
        if row is None:
            self._rows[when] = [running]
            heapq.heappush(self._moments, when)
        else:
            row.append(running)

    def _park(self, running: Running, wait: Wait | float | None) -> None:
        if wait is None:
            self._last.append(running)
        elif type(wait) is not float:
            super()._park(running, wait)  # type: ignore[arg-type]
        elif wait > self.now:
            self._go_on_at(wait, running)
        else:
            self._ready.append(running)
