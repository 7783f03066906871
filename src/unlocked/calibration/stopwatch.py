"""A clock that stands still while another program has this thread's core.

A thread that is ready but must wait for its core loses time that has nothing to do with what it computes. Linux counts it
(schedstat); elsewhere this is the wall clock. Sleeping counts: the thread wanted to.
"""

from __future__ import annotations

import contextlib
import os
import time

_FILE = "/proc/thread-self/schedstat"


class Stopwatch:
    """Seconds of the thread that made it."""

    def __init__(self) -> None:
        self._file: int | None = None
        with contextlib.suppress(OSError):
            self._file = os.open(_FILE, os.O_RDONLY)

    def now(self) -> float:
        """Seconds of wall clock, without those spent waiting for a core."""
        before = self._waited()
        while True:
            wall, waited = time.perf_counter(), self._waited()
            if waited == before:
                return wall - waited
            before = waited  # the core was lost between the two readings, so they do not belong together

    def close(self) -> None:
        """Not to be asked any more."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _waited(self) -> float:
        if self._file is None:
            return 0.0
        with contextlib.suppress(OSError, IndexError, ValueError):
            return 1e-9 * int(os.pread(self._file, 128, 0).split()[1])
        return 0.0
