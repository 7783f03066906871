"""The process beside the workers: it hosts the rendezvous store, starts them, passes signals on, and notices who dies.

It only ever blocks on one queue, into which the threads that wait for children and the signal handlers put what happens;
timeouts are deadlines (give up on who does not stop), never polls.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch.distributed as dist

from ..cluster.elastic import bury
from ..cluster.heartbeat import report
from ..cluster.rendezvous import Seat
from .children import Asked, Child, Ended, Event, Said
from .voices import Voices

HOST = "127.0.0.1"
SAVE_WITHIN = 120.0  # seconds children may take to stop and save after Ctrl-C or SIGTERM
_KILL_AFTER = 3.0  # seconds between SIGTERM and SIGKILL
_INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class Plan:
    """What to start. `command` goes before the arguments; `threads` per process; `grace` in seconds."""

    command: Sequence[str]
    processes: int
    threads: int
    grace: float
    as_json: bool


class Supervisor:
    """Starts the children of one attempt after another. A context manager that leaves no process and no handler behind."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._children: list[Child] = []
        self._signals: list[int] = []
        self._deadlines: list[tuple[float, Callable[[], None]]] = []
        self._failure: int | None = None
        self._killing = False
        self._voices = Voices(plan.as_json)
        self._handlers = _handled(self._events)

    def __enter__(self) -> Supervisor:
        # listening here and not in TCPStore, which would listen on every interface of the machine
        listener = socket.create_server((HOST, 0))
        self._port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            HOST,
            self._port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=10),
            master_listen_fd=listener.detach(),
        )
        self._handlers.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._handlers.__exit__(None, None, None)

    @property
    def stopping(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self._signals)

    @property
    def changed(self) -> bool:
        """Whether members of the last attempt could be lost or come."""
        return self._registry().check(["elastic/run"])

    def resize(self, processes: int) -> None:
        """Start so many from now on."""
        self._plan = replace(self._plan, processes=processes)

    def attempt(self, arguments: Sequence[str], number: int) -> int:
        """Start all children, wait until all have ended, and return the exit code; `number` counts attempts from 0."""
        self._voices, self._failure, self._deadlines = Voices(self._plan.as_json), None, []
        self._buried: set[int] = set()  # children that died, and the others go on
        self._killing = False
        self._seat = Seat(0, self._plan.processes, HOST, self._port, True, number)
        self._children = []
        try:
            for rank in range(self._plan.processes):
                self._children.append(self._start(rank, arguments))
            while any(child.code is None for child in self._children):
                self._handle(self._next())
        finally:
            self._end_all()  # there is somebody left only if something was raised
            self._voices.finish()
        return self._code()

    def _start(self, rank: int, arguments: Sequence[str]) -> Child:
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._plan.processes),
            "LOCAL_WORLD_SIZE": str(self._plan.processes),
            "MASTER_ADDR": HOST,
            "MASTER_PORT": str(self._port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(self._seat.attempt),
            "OMP_NUM_THREADS": str(self._plan.threads),
        }
        inherit = rank == 0 and not self._plan.as_json
        if not inherit:
            environment["PYTHONUNBUFFERED"] = "1"  # into a pipe it would say nothing until its end
        return Child(rank, [*self._plan.command, *arguments], environment, self._events.put, inherit)

    # ---- what happens ----------------------------------------------------------------------------------------------

    def _next(self) -> Event | None:
        """The next event, or None when a deadline has come."""
        times = [when for when, _ in self._deadlines]
        if self._voices.due is not None:
            times.append(self._voices.due)
        try:
            return self._events.get(timeout=max(0.0, min(times) - time.monotonic()) if times else None)
        except queue.Empty:
            return None

    def _handle(self, event: Event | None) -> None:
        now = time.monotonic()
        if isinstance(event, Said):
            self._voices.hear(*event, now)
        elif isinstance(event, Ended):
            self._ended(self._children[event.rank], now)
        elif isinstance(event, Asked):
            self._asked(event.number, now)
        self._voices.speak(now)
        for deadline in [one for one in self._deadlines if one[0] <= now]:
            self._deadlines.remove(deadline)
            deadline[1]()

    def _ended(self, child: Child, now: float) -> None:
        code = child.reap()
        self._voices.ended(child.rank, now)
        if code == 0 or self._failure is not None or self._killing or self._obeyed(code):
            return
        if self._is_elastic() and (code < 0 or self._registry().check([f"gone/{child.rank}"])):
            self._bury(child, code, now)
            return
        self._failure = child.rank
        reason = self._voices.reason(child.rank)
        sentence = self._tell_survivors(child.rank, _how_it_ended(child, code, reason))
        explained = code == 2 and reason is None and self._voices.has_spoken(child.rank)  # e.g. by a usage message
        if not explained and -code not in self._signals:
            self._voices.announce(sentence, reason, now)
        self._deadlines += [
            (now + self._plan.grace, lambda: self._send_all(signal.SIGTERM)),
            (now + self._plan.grace + _KILL_AFTER, self._kill_all),
        ]

    def _registry(self) -> dist.Store:
        return dist.PrefixStore(self._seat.base, self._store)

    def _is_elastic(self) -> bool:
        """Whether the others can go on without one, and there are others."""
        others = any(child.code is None for child in self._children)
        return others and self._registry().check(["elastic/run"])

    def _bury(self, child: Child, code: int, now: float) -> None:
        """The others go on without this one."""
        sentence = _how_it_ended(child, code, None)
        bury(self._registry(), child.rank, sentence)
        self._buried.add(child.rank)
        self._voices.announce(sentence + " The others go on without it.", None, now)

    def _obeyed(self, code: int) -> bool:
        """Whether this is how a child ends that was asked to."""
        return self.stopping and code in (_INTERRUPTED, -signal.SIGINT)

    def _tell_survivors(self, rank: int, sentence: str) -> str:
        """Put the sentence into the store; returns the one that is there, as a survivor may have known before why."""
        try:
            return report(dist.PrefixStore(self._seat.prefix, self._store), rank, sentence)
        except (RuntimeError, ValueError):  # the store is broken: then the survivors notice that
            return sentence

    def _asked(self, number: int, now: float) -> None:
        """The first signal is passed on; a Ctrl-C after it ends everything at once."""
        self._signals.append(number)
        if len(self._signals) == 1:
            self._send_all(number)
            self._deadlines.append((now + SAVE_WITHIN, self._give_up))
        elif number == signal.SIGINT:
            self._kill_all()

    def _give_up(self) -> None:
        late = ", ".join(str(child.rank) for child in self._children if child.code is None)
        sentence = f"Process(es) {late} did not stop within {SAVE_WITHIN:.0f} s of being asked to, and were killed."
        self._voices.announce(sentence, None, time.monotonic())
        self._kill_all()

    def _send_all(self, number: int) -> None:
        for child in self._children:
            child.send(number)

    def _kill_all(self) -> None:
        self._killing = True
        for child in self._children:
            child.kill()

    def _end_all(self) -> None:
        self._kill_all()
        for child in self._children:
            if child.code is None:
                child.reap()

    def _code(self) -> int:
        if signal.SIGINT in self._signals:
            return _INTERRUPTED
        codes = [child.code or 0 for child in self._children if child.rank not in self._buried]
        if self._failure is not None:
            codes = [child.code or 0 for child in self._children]
        first = codes[self._failure] if self._failure is not None else next((code for code in codes if code), 0)
        return 128 - first if first < 0 else first


def _how_it_ended(child: Child, code: int, reason: str | None) -> str:
    who = f"Process {child.rank} (pid {child.pid})"
    if code >= 0:
        return f"{who} ended with exit code {code}" + (f": {reason}" if reason else ".")
    try:
        name = f" ({signal.Signals(-code).name})"
    except ValueError:  # real-time signals have no name
        name = ""
    return f"{who} was killed by signal {-code}{name}."


@contextlib.contextmanager
def _handled(events: queue.SimpleQueue[Event]) -> Iterator[None]:
    """SIGINT and SIGTERM become events. Only the main thread may set handlers; one who ignores a signal goes on to."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    mine = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        mine = []
    for number in mine:
        signal.signal(number, lambda number, frame: events.put(Asked(number)))
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number])
