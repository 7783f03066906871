"""A started process: its group, its output, and the threads that wait for both.

As in workers.py, a terminal's Ctrl-C shall reach the parent only, which passes it on once: a child starts in a process group of
its own, with the signals blocked until it is there.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

_GUARD = str(Path(__file__).with_name("guard.py"))
_LAST_WORDS = 0.5  # seconds to read what is in the pipes of a process that has ended


class Said(NamedTuple):
    """A piece of output; `stream` is "stdout" or "stderr"."""

    rank: int
    stream: str
    text: str


class Ended(NamedTuple):
    """A child has ended, and all its output has been read."""

    rank: int


class Asked(NamedTuple):
    """This process was sent a signal."""

    number: int


Event = Said | Ended | Asked


class Child:
    """The process of one rank. Its events go to `report`, from other threads.

    inherit: its standard output is this process's own (a live table works then); else it is read like standard error.
    """

    def __init__(
        self,
        rank: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        report: Callable[[Event], None],
        inherit: bool,
    ) -> None:
        self.rank, self._report = rank, report
        self.code: int | None = None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", _GUARD, str(os.getpid()), *command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=None if inherit else subprocess.PIPE,
                stderr=subprocess.PIPE,
                process_group=0,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pid = self.process.pid
        self._readers = [
            threading.Thread(target=self._read, args=(stream, pipe), daemon=True)
            for stream, pipe in (("stdout", self.process.stdout), ("stderr", self.process.stderr))
            if pipe is not None
        ]
        for thread in [*self._readers, threading.Thread(target=self._await_end, daemon=True)]:
            thread.start()

    def send(self, number: int) -> None:
        """Send a signal to the process itself, unless it has been reaped."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to the process and all of its group; stopped processes die of it, too."""
        if self.code is None:
            _kill_group(self.pid)

    def reap(self) -> int:
        """Wait for the end; returns the exit code, negative for a signal."""
        self.code = self.process.wait()
        return self.code

    def _await_end(self) -> None:
        # not reaped here: while the process is a zombie nobody else can get its number, so the group's is safe to kill
        with contextlib.suppress(ChildProcessError):  # reaped by `reap`, as this process itself gave up
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            _kill_group(self.pid)
        for reader in self._readers:
            reader.join(_LAST_WORDS)
        self._report(Ended(self.rank))

    def _read(self, stream: str, pipe: IO[bytes]) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with pipe:
            while data := os.read(pipe.fileno(), 65536):
                self._report(Said(self.rank, stream, decoder.decode(data)))


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the latter of zombies
        os.killpg(group, signal.SIGKILL)
