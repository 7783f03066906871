"""Coroutines interleaved in one process: who is ready goes on, who waits is woken by a key.

Every world that keeps workers in a process uses it. Besides the workers' programs there are tasks: exchanges that go on beside
a program (an all-reduce beside the backward).
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Hashable, Iterable
from typing import Any, NamedTuple

from ..worker import Worker


class Wait:
    """Awaited by a worker that cannot go on; `key` is what wakes it, `words` what it says when nothing does."""

    __slots__ = ("key", "words")

    def __init__(self, key: Hashable, words: Callable[[], str]) -> None:
        self.key, self.words = key, words

    def __await__(self) -> Generator[Wait, None, None]:
        yield self


class Moment(Wait):
    """Awaited by a worker that lets all go first who are to go on before `when`, or have come to it earlier."""

    __slots__ = ("when",)

    def __init__(self, when: float) -> None:
        super().__init__(self, lambda: f"the moment {when:g}")
        self.when = when


class Running(NamedTuple):
    """A coroutine and whose it is."""

    worker: Worker
    program: Coroutine[Any, Any, None]
    beside: bool  # a task, not the worker's program


class Task:
    """Something that goes on beside a program; await it for its result."""

    def __init__(self, words: Callable[[], str]) -> None:
        self._words = words
        self._done, self._result = False, None

    def finish(self, result: Any) -> None:
        """Its result is there."""
        self._done, self._result = True, result

    def __await__(self) -> Generator[Wait, None, Any]:
        while not self._done:
            yield Wait(self, self._words)
        return self._result


class Scheduler:
    """Ready and waiting coroutines of the workers of this process."""

    def __init__(self) -> None:
        self._ready: deque[Running] = deque()
        self._waiting: dict[Hashable, list[tuple[Running, Wait]]] = {}
        self._later: list[tuple[float, int, Running]] = []  # who waits for a moment, with a number for each
        self._numbers = itertools.count()

    def start(self, programs: Iterable[tuple[Worker, Coroutine[Any, Any, None]]]) -> None:
        """Add the workers' programs."""
        self._ready.extend(Running(worker, program, False) for worker, program in programs)

    def spawn(self, worker: Worker, work: Coroutine[Any, Any, Any], words: Callable[[], str]) -> Task:
        """Run `work` beside the worker's program, up to its first wait at once."""
        task = Task(words)

        async def body() -> None:
            task.finish(await work)
            self.wake(task)

        self._advance(Running(worker, body(), True))
        return task

    def run_ready(self) -> None:
        """Let everybody go on until all wait or are done."""
        while self._ready or self._later:
            if self._ready:
                self._advance(self._ready.popleft())
            else:
                self._advance(heapq.heappop(self._later)[2])

    def run_tasks(self) -> None:
        """Let only tasks go on: called from inside a program's computation."""
        for running in [running for running in self._ready if running.beside]:
            self._ready.remove(running)
            self._advance(running)

    def wake(self, key: Hashable) -> None:
        """Whoever waits for this key is ready."""
        # whoever is woken goes first: a replica's backward ends before the next replica's forward fills the memory
        for running, _ in self._waiting.pop(key, ()):
            self._ready.appendleft(running)

    def awaited(self) -> list[Hashable]:
        """What somebody waits for."""
        return list(self._waiting)

    @property
    def idle(self) -> bool:
        """Nobody is ready and nobody waits."""
        return not self._ready and not self._waiting

    def stuck(self) -> str:
        """Who waits for what."""
        waits = {
            f"{running.worker.place} waits for {wait.words()}"
            for row in list(self._waiting.values())  # a copy: the heartbeat asks while others are woken
            for running, wait in list(row)
        }
        return "; ".join(sorted(waits))

    def close(self) -> None:
        """End all coroutines."""
        for running in self._ready:
            running.program.close()
        for row in self._waiting.values():
            for running, _ in row:
                running.program.close()
        for _, _, running in self._later:
            running.program.close()
        self._ready.clear()
        self._waiting.clear()
        self._later.clear()

    def _advance(self, running: Running) -> None:
        try:
            wait = running.program.send(None)
        except StopIteration:
            return
        self._park(running, wait)

    def _park(self, running: Running, wait: Wait) -> None:
        """It cannot go on now."""
        if isinstance(wait, Moment):
            heapq.heappush(self._later, (wait.when, next(self._numbers), running))
            return
        self._waiting.setdefault(wait.key, []).append((running, wait))
