"""Keeps the process from growing by memory that is free but not given back.

What a stage allocates and frees while it computes (gradients, an optimizer's temporaries) leaves holes in the C library's heap,
and it often cannot use a hole for a tensor of the very same size, which it wants aligned. Stage by stage this would add up to
what one stage in memory is to save. So when the resident set has grown by three times a stage's size since it was last
cleaned, it is cleaned again; more often would cost more page faults than it is worth.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..allocator import return_freed_memory

_STATM = Path("/proc/self/statm")


class Heap:
    """Looked after at moments when the same things are in memory: between two stages."""

    def __init__(self) -> None:
        self._least: int | None = None  # resident at the first such moment after a cleaning; None: the next one is it
        self._readable = _STATM.exists()

    def look_after(self, size: int) -> None:
        """Give free memory back if there is more of it than three stages of `size` bytes beyond what one leaves."""
        if not self._readable:
            return
        resident = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if self._least is None:
            self._least = resident
        elif resident > self._least + 3 * size:
            return_freed_memory()
            self._least = None
