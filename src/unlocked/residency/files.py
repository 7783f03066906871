"""Bytes of tensors in files, with a checksum: what was damaged is noticed and said."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UnlockedError


class DamagedFile(UnlockedError, OSError):
    """A file that is not as it was written, or cannot be read or written; the sentence says which and what to do."""


class Label(NamedTuple):
    """What is known of a file's contents: bytes, and their checksum."""

    size: int
    checksum: int


def raw(x: Tensor) -> memoryview:
    """The bytes of a row of values on the CPU, in place."""
    return memoryview(x.view(torch.uint8).numpy())  # type: ignore[arg-type]  # arrays are buffers


def checksum_of(rows: Iterable[Tensor]) -> int:
    """Σ_k (2k + 1) Σ words of row k, modulo 2⁶⁴, words of 8 bytes: several times as fast as a CRC-32, as sums need no order."""
    total = 0
    for k, row in enumerate(rows):
        part = raw(row)
        whole = len(part) // 8 * 8
        words = int(np.frombuffer(part[:whole], np.uint64).sum(dtype=np.uint64))
        total += (2 * k + 1) * (words + int.from_bytes(part[whole:], "little"))
    return total % 2**64


def write(descriptor: int, rows: Sequence[Tensor]) -> Label:
    """Write rows one after the other, from the beginning of the file. Raises OSError."""
    begin = 0
    for part in map(raw, rows):
        while part:
            written = os.pwrite(descriptor, part, begin)
            begin, part = begin + written, part[written:]
    os.ftruncate(descriptor, begin)
    return Label(begin, checksum_of(rows))


def read(descriptor: int, rows: Sequence[Tensor], label: Label, where: str) -> None:
    """Fill rows from the beginning of the file. Raises DamagedFile unless they are what was written, OSError."""
    size = os.fstat(descriptor).st_size
    if size != label.size:
        raise DamagedFile(
            f"{where} has {size:,} bytes, but {label.size:,} were written; something else has changed it. Go on from the last "
            "checkpoint."
        )
    begin = 0
    for part in map(raw, rows):
        while part and (count := os.preadv(descriptor, [part], begin)):
            begin, part = begin + count, part[count:]
    if (begin, checksum_of(rows)) != label:
        raise DamagedFile(
            f"{where} is damaged: what was read is not what was written, as its checksum tells. Go on from the last "
            "checkpoint, and look at the disk."
        )
