"""Where to stop, when processes are at different steps.

Somebody wishes to stop. Then every process (its heartbeat, so nobody must be between two steps for it) says which step it has
entered last and enters no other until all have said so; all go on to the largest of these steps, and stop there. A process
inside a step may wait for messages of the others up to that very step, so nobody waits for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from .base import Wish


class Agreement:
    """This process's part of it: `enter` is for the main thread, `propose` and `settle` for the heartbeat."""

    def __init__(self) -> None:
        self.stopped_by: Wish | None = None
        self._entered, self._held = -1, False
        self._last: int | None = None
        self._change = threading.Condition()

    def enter(self, step: int, check: Callable[[], None]) -> bool:
        """Go into `step`, or learn that it is not to be (True). `check` is called while waiting, to raise what went wrong."""
        with self._change:
            while self._held and self._last is None:
                self._change.wait(0.2)
                check()
            if self._last is not None and step > self._last:
                return True
            self._entered = step
            return False

    def propose(self, kind: Wish) -> int:
        """The step this process has entered last; it enters no other until `settle`."""
        with self._change:
            self._held, self.stopped_by = True, kind
            return self._entered

    def settle(self, last: int) -> None:
        """All stop after this step; −1: before the first."""
        with self._change:
            self._last = last
            self._change.notify_all()
