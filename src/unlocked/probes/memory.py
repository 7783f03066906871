"""A meter of the bytes that autograd keeps for the backward passes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor


class SavedBytes:
    """Context manager: counts the bytes of tensors saved for backward while it is open, live and at the peak.

    A storage saved several times counts once; `ignore`d tensors (parameters: they stay anyway) count nothing. `live`
    falls when a graph is freed, so the peak is what an activation memory of exactly these tensors would need.
    `curve` is the list of all values `live` has had.

    The saved tensors stay themselves: values and gradients are unchanged. Cost: a Python call per saved tensor.
    """

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignore}
        self._owners: dict[int, int] = {}
        self.live = 0
        self.peak = 0
        self.curve: list[int] = [0]

    def _pack(self, tensor: Tensor) -> _Saved | Tensor:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._ignored or size == 0:
            return tensor
        if address not in self._owners:
            self._owners[address] = 0
            self._move(size)
        self._owners[address] += 1
        saved = _Saved(tensor)
        weakref.finalize(saved, self._release, address, size)
        return saved

    def _release(self, address: int, size: int) -> None:
        self._owners[address] -= 1
        if self._owners[address] == 0:
            del self._owners[address]
            self._move(-size)

    def _move(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
        self.curve.append(self.live)

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)


class _Saved:
    """Holds one saved tensor; dies with the graph that saved it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _unpack(saved: _Saved | Tensor) -> Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved
