"""A program beside a worker's own, in each world.

    in process     begun when it is awaited: nothing goes on beside a computation there. `done` is False until then.
    simulated      at the same time on the clock. What it computes takes its time, but no device's: as on a stream of its own.
    distributed    on a thread of its own with its own mailboxes, so that it goes on while the main thread computes. One thread
                   serves all workers of a process, interleaving their programs as the main thread does.

The program is given a `Companion`: the same place in the mesh, another transport. What it raises is raised where it is awaited.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch.distributed as dist

from ..errors import UnlockedError
from ..timeline import Timeline
from ..worker import Beside, Transport, Worker
from .scheduler import Scheduler, Task, Wait
from .wired import Wired
from .wiring import SIDE

if TYPE_CHECKING:
    from .distributed import Distributed

Program = Callable[[Worker], Coroutine[Any, Any, Any]]


class Companion(Worker):
    """A worker a second time, for what it does beside its own program. It draws no random numbers: the main program does."""

    def __init__(self, worker: Worker, transport: Transport) -> None:
        super().__init__(transport, worker.place, worker.replicas.size, worker.stages, worker.seed, None, worker.device)
        self.version, self.micro_batch = worker.version, worker.micro_batch

    def compute(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Call the function; random state and precision are left as they are."""
        return function(*arguments)

    def beside(self, words: str, program: Program) -> Beside:
        """Raises UnlockedError, in every world."""
        raise _third()


def _third() -> UnlockedError:
    return UnlockedError("A program beside another cannot begin a third; begin it from the worker's own program.")


class Deferred:
    """A program that begins when it is awaited."""

    def __init__(self, begin: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._begin, self.done = begin, False

    def __await__(self) -> Generator[Any, None, Any]:
        result = yield from self._begin().__await__()
        self.done = True
        return result


class Spawned:
    """A task of a world's own scheduler."""

    def __init__(self, scheduler: Scheduler, worker: Worker, words: str, program: Coroutine[Any, Any, Any]) -> None:
        self.done = False
        self._task: Task = scheduler.spawn(worker, self._to_the_end(program), lambda: words)

    async def _to_the_end(self, program: Coroutine[Any, Any, Any]) -> Any:
        result = await program
        self.done = True
        return result

    def __await__(self) -> Generator[Any, None, Any]:
        return self._task.__await__()


class Loss(NamedTuple):
    """A process is lost to this one, and the run may go on without it."""

    rank: int
    sentence: str


class Threaded:
    """A program on the thread beside the main one."""

    def __init__(self, worker: Worker, words: str, program: Program, timeline: Timeline) -> None:
        self.worker, self.words, self.program, self.timeline = worker, words, program, timeline
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def __await__(self) -> Generator[Any, None, Any]:
        while not self.done:
            yield Wait(self, lambda: f"{self.words}, which goes on beside it")  # type: ignore[misc]
        if self.error is not None:
            raise self.error
        return self.result


class SideThread(Wired):
    """The thread of one process. It begins with the first program and ends with the world.

    Messages whose channel ends in `SIDE` are delivered here by the receiving threads (wiring.py).
    """

    def __init__(self, world: Distributed) -> None:
        super().__init__(world.crew, world.wiring)
        self._world = world
        self._events = world.wiring.side_events
        self._thread: threading.Thread | None = None
        self._begun: list[Threaded] = []  # in this run
        self.waits = True

    @property
    def window(self) -> int:
        """The main thread's."""
        return self._world.window

    def begin(self, here: Worker, words: str, program: Program, timeline: Timeline) -> Threaded:
        """From the main thread: run the program here."""
        if self._thread is None:
            self._ranks = self._world.ranks
            self._thread = threading.Thread(target=self._work, name="unlocked beside", daemon=True)
            self._thread.start()
        threaded = Threaded(Companion(here, self), words, program, timeline)
        self._begun.append(threaded)
        self.waits = False  # from this moment on, or a heartbeat might see all asleep
        self._events.put(threaded)
        return threaded

    def refuse_running(self) -> None:
        """The main program has come to its end. Raises UnlockedError if something still goes on beside it."""
        begun, self._begun = self._begun, []
        for threaded in begun:
            if not threaded.done:
                raise UnlockedError(
                    f"{threaded.worker.place} ended while {threaded.words} went on beside it; a method must await what it "
                    "begins."
                )

    def words(self) -> str:
        """Who waits for what."""
        return self._scheduler.stuck()

    def channel(self, name: str) -> str:
        return name + SIDE

    def close(self) -> None:
        """End the thread; what it was doing is dropped."""
        if self._thread is not None:
            self._events.put(END)
            self._thread.join(5.0)

    def _work(self) -> None:
        try:
            while self._handle(self._next()):
                self._scheduler.run_ready()
        finally:
            self._scheduler.close()

    def _next(self) -> Any:
        """The next event. The others may take this thread to wait only while there is none."""
        try:
            return self._events.get_nowait()
        except queue.Empty:
            self._world.idles(self, True)
            event = self._events.get()
            self._world.idles(self, False)
            return event

    def _handle(self, event: Any) -> bool:
        """False: it is over."""
        if event is END:
            return False
        if isinstance(event, Loss):
            self.lose(event.rank)
        elif isinstance(event, Threaded):
            self._timeline = event.timeline
            self._scheduler.start([(event.worker, self._to_the_end(event))])
        elif event is not None:
            source, target, _ = event[0]
            if source != target:  # else it is from the main thread
                self.wiring.arrived(event[0])
            self._deliver(*event)
        return True

    async def _to_the_end(self, threaded: Threaded) -> None:
        try:
            threaded.result = await threaded.program(threaded.worker)
        except Exception as error:
            threaded.error = error
        threaded.done = True
        self._world.events.put(threaded)

    def beside(self, here: Worker, words: str, program: Program) -> Beside:
        """Raises UnlockedError, as a `Companion` does."""
        raise _third()

    def process_group(self, here: Worker, axis: Literal["stages", "replicas"]) -> dist.ProcessGroup:
        """Raises UnlockedError: the backend's own communication is the main program's."""
        raise UnlockedError("A program beside another cannot use PyTorch's own communication; use the worker's verbs.")


END = object()
