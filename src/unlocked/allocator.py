"""Let glibc keep freed memory: on CPUs, fresh blocks of many MiB cost far more than reused ones (page faults)."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of <malloc.h>


def keep_freed_memory() -> bool:
    """Ask the C library to serve large tensors from memory it keeps, instead of mapping and unmapping them each step.

    Process-wide, for good; results are the same, resident memory stays at its peak. The command line does it; in a program
    of your own call it once, before training on a CPU. Returns False where the C library is not glibc (nothing is changed).
    """
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 256 * 2**20))
    return all(mallopt(option, value) == 1 for option, value in settings)


def return_freed_memory() -> None:
    """Ask the C library to give the system back what lies free between what is used. Does nothing where it is not glibc."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(ctypes.util.find_library("c")) if sys.platform.startswith("linux") else None
