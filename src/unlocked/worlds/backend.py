"""A mean by the backend's own all-reduce (gloo, NCCL): its order of summing, its speed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import by_dtype


class Reduced:
    """The mean of each tensor over a process group, begun when made; await it for the result."""

    def __init__(self, tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        self._tensors, self._size = list(tensors), group.size()
        self._rows = by_dtype(tensors)
        self._flat = [torch.cat([tensors[k].reshape(-1) for k in row]) for row in self._rows]
        self._works = [dist.all_reduce(flat, group=group, async_op=True) for flat in self._flat]

    def __await__(self) -> Generator[Any, None, list[Tensor]]:
        for work in self._works:
            work.wait()
        return self._means()
        yield  # an awaitable is a generator, though this one never gives way: the backend is waited for

    def _means(self) -> list[Tensor]:
        means = list(self._tensors)
        for row, flat in zip(self._rows, self._flat):
            parts = flat.div_(self._size).split([self._tensors[k].numel() for k in row])
            for k, part in zip(row, parts):
                means[k] = part.view(self._tensors[k].shape)
        return means
