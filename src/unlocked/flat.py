"""Several tensors in a row: one for each dtype, and back; rows in parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    """All values in a row, one row for each dtype in the order in which dtypes come; copies."""
    return [torch.cat([tensors[k].detach().reshape(-1) for k in positions]) for positions in by_dtype(tensors)]


def put(rows: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Write the values of such rows into the tensors. Raises ValueError (from zip) if there are more or fewer rows."""
    for x, view in zip(tensors, views(rows, tensors)):
        x.detach().copy_(view)


def blank(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Such rows on the device "meta": their lengths and dtypes only."""
    return [
        torch.empty(sum(tensors[k].numel() for k in positions), dtype=tensors[positions[0]].dtype, device="meta")
        for positions in by_dtype(tensors)
    ]


def by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the tensors of each dtype, in the order in which dtypes come."""
    found: dict[torch.dtype, list[int]] = {}
    for position, x in enumerate(tensors):
        found.setdefault(x.dtype, []).append(position)
    return list(found.values())


def bounds(count: int, size: int) -> list[int]:
    """Where each of `size` parts of `count` values begins, and the end: parts differ by one value at most."""
    return [count * part // size for part in range(size + 1)]


def views(rows: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Such rows seen as tensors of the given shapes, in the given order; nothing is copied."""
    found: list[Tensor] = list(tensors)
    for positions, row in zip(by_dtype(tensors), rows, strict=True):
        parts = row.split([tensors[k].numel() for k in positions])
        for k, part in zip(positions, parts):
            found[k] = part.view(tensors[k].shape)
    return found


def digest(tensors: Iterable[Tensor]) -> str:
    """32 hexadecimal digits that tell whether tensors have the same bits."""
    found = hashlib.blake2b(digest_size=16)
    for x in tensors:
        found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
