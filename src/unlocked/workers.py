"""A few processes that make runs one after another, and never outlive the one that asked.

A terminal sends Ctrl-C to every process of its foreground group; here only the parent shall get it, and pass it on once,
because a second one means "at once, without saving". So a worker starts with the signal blocked and leaves the group.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .config import RunConfig
from .errors import UnlockedError
from .loop import Interrupted
from .run_files import read_json, write_json, write_text
from .running import Stopper, run

_GRACE = 120.0  # seconds a worker may take to finish its step and save


@dataclass(frozen=True)
class Task:
    """One run to make."""

    config: RunConfig
    folder: Path
    command: str = ""
    processes: int | None = None  # of its own, by `unlocked launch`; None: it is trained in the worker itself


@dataclass(frozen=True)
class Outcome:
    """How a run ended: with a summary, with a sentence about its failure, or interrupted (both None)."""

    task: Task
    summary: dict[str, Any] | None = None
    failed: str | None = None


class Pool:
    """Worker processes, at most `jobs`, each started when there is something for it to do.

    As a context manager it leaves no process behind: on Ctrl-C workers are asked once to save and stop.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._idle: list[_Member] = []
        self._busy: dict[Connection, tuple[_Member, Task]] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        for member, _ in self._busy.values():
            member.interrupt()
        for member in self._idle:
            member.dismiss()
        deadline = time.monotonic() + (_GRACE if kind in (None, KeyboardInterrupt) else 5.0)
        try:
            for member, _ in self._busy.values():
                member.process.join(max(0.0, deadline - time.monotonic()))
            for member in self._idle:
                member.process.join(5.0)
        finally:  # a second Ctrl-C ends the waiting
            for member in [*self._idle, *(member for member, _ in self._busy.values())]:
                if member.process.is_alive():
                    member.process.kill()
                    member.process.join()

    def run(self, tasks: Iterable[Task]) -> Iterator[Task | Outcome | None]:
        """Make all runs. Yields a Task when its run begins, its Outcome when it ends, and None a few times a second."""
        waiting = list(tasks)[::-1]
        while waiting or self._busy:
            while waiting and len(self._busy) < self._jobs:
                task = waiting.pop()
                self._give(task)
                yield task
            for connection in wait(list(self._busy), timeout=0.25):
                assert isinstance(connection, Connection)
                yield self._take(connection)
            yield None

    def _give(self, task: Task) -> None:
        member = self._idle.pop() if self._idle else _Member()
        self._busy[member.connection] = (member, task)
        with contextlib.suppress(BrokenPipeError):  # a dead worker is noticed when its answer is read
            member.connection.send(task)

    def _take(self, connection: Connection) -> Outcome:
        member, task = self._busy[connection]
        try:
            outcome = connection.recv()
        except (EOFError, ConnectionResetError):
            member.process.join()
            del self._busy[connection]
            code = member.process.exitcode
            return Outcome(task, failed=f"The process of this run ended with code {code}; was the memory used up?")
        del self._busy[connection]
        self._idle.append(member)
        return outcome


class _Member:
    """A process and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, os.getpid()), daemon=True)
        resource_tracker.ensure_running()  # it would lift the block if it were started by `start`
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def interrupt(self) -> None:
        """Ask for a stop after the current step, and for the process to end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, signal.SIGINT)
        self.dismiss()

    def dismiss(self) -> None:
        """Let the process end when it has nothing to do."""
        with contextlib.suppress(OSError):
            self.connection.send(None)


class _Wish:
    """Whether somebody wants this process to stop: a signal came, or the parent is gone."""

    def __init__(self, parent: int) -> None:
        self._parent, self._asked = parent, False

    def note(self, number: int, frame: Any) -> None:
        """Signal handler."""
        self._asked = True

    def __call__(self) -> bool:
        return self._asked or os.getppid() != self._parent


def _work(connection: Connection, parent: int) -> None:
    """The life of a worker process: take a task, make the run, answer; end on None."""
    os.setpgrp()
    wish = _Wish(parent)
    signal.signal(signal.SIGINT, wish.note)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while (task := connection.recv()) is not None:
            connection.send(Outcome(task) if wish() else _outcome(task, wish))


def _launched(task: Task, wish: _Wish) -> Outcome:
    """Train on processes of its own: `train --resume` goes on with, or begins, what the folder's config.json says."""
    write_json(task.folder / "config.json", {**task.config.to_json(), "command": task.command})
    launch = [sys.executable, "-m", "unlocked", "launch", "--processes", str(task.processes), "--", "train"]
    options = ["--resume", str(task.folder), "--world", "distributed", "--tensorboard", "off"]
    with (task.folder / "launch.txt").open("w") as log:
        process = subprocess.Popen([*launch, *options], stdout=log, stderr=subprocess.STDOUT)
        told = False
        while process.poll() is None:
            if wish() and not told:
                process.send_signal(signal.SIGINT)
                told = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
    if process.returncode == 0:
        return Outcome(task, summary=read_json(task.folder / "summary.json"))
    if told:
        return Outcome(task)
    said = [line for line in (task.folder / "launch.txt").read_text().splitlines() if line.startswith("error: ")]
    return Outcome(
        task, failed=said[0].removeprefix("error: ") if said else f"It failed; see {task.folder}/launch.txt."
    )


def _outcome(task: Task, wish: _Wish) -> Outcome:
    report = task.folder / "error.txt"
    try:
        report.unlink(missing_ok=True)
        if task.processes is not None:
            return _launched(task, wish)
        return Outcome(task, summary=run(task.config, task.folder, callbacks=[Stopper(wish)], command=task.command))
    except Interrupted:
        return Outcome(task)
    except UnlockedError as error:
        return Outcome(task, failed=str(error))
    except Exception as error:  # whatever it is, the other runs go on; the traceback is kept for whoever looks
        with contextlib.suppress(OSError):
            write_text(report, traceback.format_exc())
        return Outcome(task, failed=f"{type(error).__name__}: {error} (more in {report}).")
