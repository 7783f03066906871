"""A meter of the bytes that autograd keeps for the backward passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType

import torch
from torch import Tensor

from .. import worker
from ..worker import Place

Key = tuple[int, Place | None]  # a storage, and the worker that saved it

_open: list[SavedBytes] = []  # meters that look on; of nested hooks PyTorch asks only the innermost


class SavedBytes:
    """Context manager: counts the bytes of tensors saved for backward while it is open, live and at the peak.

    A storage saved several times counts once; `ignore`d tensors (parameters: they stay anyway) count nothing. `live`
    falls when a graph is freed, so the peak is what an activation memory of exactly these tensors would need.
    `curve` is the list of all values `live` has had. `workers`: the peak of each worker (replica, stage) by itself; what two
    of them save counts for both, as it would if they were apart. `on_save` is told every tensor that is counted.
    It may be opened several times: what is still kept from before counts.

    The saved tensors stay themselves: values and gradients are unchanged. Cost: a Python call per saved tensor.
    """

    def __init__(self, ignore: Iterable[Tensor] = (), on_save: Callable[[Tensor], None] | None = None) -> None:
        self._ignored = _storages(ignore)
        self._disregarded: set[int] = set()
        self._passed: dict[int, int] = {}
        self.on_save = on_save
        self._owners: dict[int, int] = {}
        self._owners_here: dict[Key, int] = {}
        self._live_here: dict[Place, int] = {}
        self.live = 0
        self.peak = 0
        self.curve: list[int] = [0]
        self.workers: dict[Place, int] = {}

    def _pack(self, tensor: Tensor) -> _Saved | Tensor:
        saved = _Saved(tensor)
        if self.count(tensor, saved):
            return saved
        address = tensor.untyped_storage()._cdata
        self._passed[address] = self._passed.get(address, 0) + tensor.numel() * tensor.element_size()
        return tensor

    def disregard(self, tensors: Iterable[Tensor]) -> None:
        """Ignore these as well, as long as they live."""
        for tensor in tensors:
            address = tensor.untyped_storage()._cdata
            self._disregarded.add(address)
            weakref.finalize(tensor.untyped_storage(), self._disregarded.discard, address)

    def passed(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of ignored tensors that were saved, each time they were."""
        return sum(self._passed.get(address, 0) for address in _storages(tensors))

    def holds(self, tensor: Tensor) -> bool:
        """Whether this tensor's storage is among what is saved."""
        return tensor.untyped_storage()._cdata in self._owners

    def restart(self, ignore: Iterable[Tensor]) -> None:
        """Begin a new peak and a new curve at what is kept now."""
        self._ignored = _storages(ignore)
        self.peak, self.curve = self.live, [self.live]
        self.workers = {place: size for place, size in self._live_here.items() if size}

    def count(self, tensor: Tensor, holder: object) -> bool:
        """Count a tensor that is kept until `holder` dies; False if it is one of those that count nothing."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._ignored or address in self._disregarded or size == 0:
            return False
        key = (address, worker.computing)
        if _one_more(self._owners, address):
            self._move(size)
        if _one_more(self._owners_here, key):
            self._move_here(key[1], size)
        if self.on_save is not None:
            self.on_save(tensor)
        weakref.finalize(holder, self._release, key, size)
        return True

    def _release(self, key: Key, size: int) -> None:
        if _one_less(self._owners, key[0]):
            self._move(-size)
        if _one_less(self._owners_here, key):
            self._move_here(key[1], -size)

    def _move(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
        self.curve.append(self.live)

    def _move_here(self, here: Place | None, size: int) -> None:
        if here is not None:
            self._live_here[here] = self._live_here.get(here, 0) + size
            self.workers[here] = max(self.workers.get(here, 0), self._live_here[here])

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        _open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.remove(self)
        self._hooks.__exit__(kind, error, trace)


def count_saved(tensor: Tensor, holder: object) -> None:
    """Tell the meters of a tensor that is kept for a backward until `holder` dies, by other means than autograd's own."""
    for meter in _open:
        meter.count(tensor, holder)


def disregard(tensors: Iterable[Tensor]) -> None:
    """Tell the meters of tensors that are to be ignored as long as their memory is there: weights that came just now."""
    if _open:
        known = list(tensors)
        for meter in _open:
            meter.disregard(known)


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    """By _cdata, not by address: fake and meta tensors have none."""
    return {x.untyped_storage()._cdata for x in tensors}


def _one_more(counts: dict, key: object) -> bool:
    """Whether it is the first."""
    counts[key] = counts.get(key, 0) + 1
    return counts[key] == 1


def _one_less(counts: dict, key: object) -> bool:
    """Whether it was the last."""
    counts[key] -= 1
    if counts[key]:
        return False
    del counts[key]
    return True


class _Saved:
    """Holds one saved tensor; dies with the graph that saved it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _unpack(saved: _Saved | Tensor) -> Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved
