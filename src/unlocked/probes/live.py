"""A meter of all bytes that tensors hold: live, at the peak, over time, of what kind, and whose.

On the CPU every storage that an operation of PyTorch makes is followed until it dies (`LiveBytes`). What the kernels take for
themselves while they run is not seen. On an accelerator its allocator keeps the books (`AllocatorBytes`), of the whole process.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import worker
from ..sharding import local
from ..worker import Place

PARAMETERS, BUFFERS, GRADIENTS = "parameters", "buffers", "gradients"
OPTIMIZER, INPUTS = "optimizer state", "inputs"
SAVED, OTHER = "saved for backward", "other"
CATEGORIES = (PARAMETERS, BUFFERS, OPTIMIZER, GRADIENTS, INPUTS, SAVED, OTHER)


class Share(NamedTuple):
    """Bytes at the worst moment, what they were then by category, and the most there ever was of each category."""

    peak: int
    categories: dict[str, int]
    most: dict[str, int]


class LiveBytes(TorchDispatchMode):
    """Context manager: follows the storages on the CPU that this thread's operations make while it is open.

    Views and in-place operations make none and add nothing. What was there before counts if `register` was told of it.
    When it closes the numbers stand still:

        live, peak    bytes; `start`: those registered
        curve         (seconds since it was opened, live bytes), one entry for each storage made or freed
        categories    what the peak was made of; gradients are those that arrived in the parameters registered
        workers       the same for each worker (replica, stage): storages made in its computations, or registered as its own

    Values and gradients are unchanged. Cost: a Python call per operation. A storage that is resized behind PyTorch's back
    (`untyped_storage().resize_`) counts as it was when last seen. Tensors of several parts (DTensor) count by their local ones;
    what their operations need in between is not seen.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, _Storage] = {}
        self._events: list[tuple[float, _Storage, int]] = []
        self._parameters: list[Tensor] = []
        self.live = self.peak = self.start = 0
        self.curve: list[tuple[float, int]] = []
        self.categories: dict[str, int] = {}
        self.workers: dict[Place, Share] = {}

    def register(self, category: str, tensors: Iterable[Tensor], owner: Place | None = None) -> None:
        """Count tensors that are there already, and their gradients if they are parameters; before the meter is opened."""
        for tensor in tensors:
            self._find(local(tensor), category, owner)
            if category == PARAMETERS and tensor.requires_grad:
                self._parameters.append(tensor)
                if tensor.grad is not None:
                    self._find(local(tensor.grad), GRADIENTS, owner)

    def mark(self, category: str, tensor: Tensor) -> None:
        """Say in hindsight what a storage is that was seen without a category, and that it is the worker's who computes now if
        nobody made it. One not seen counts from now on."""
        found = self._find(local(tensor), category, worker.computing)
        if found is not None and found.category == OTHER:
            found.category, found.owner = category, found.owner or worker.computing

    # ---- following storages --------------------------------------------------------------------------------------------

    def _find(self, x: Tensor, category: str, owner: Place | None) -> _Storage | None:
        """What is known of a tensor's storage; it counts from now on if it is new. None if it takes no memory here."""
        if x.layout is not torch.strided or x.device.type != "cpu":
            return None
        storage = x.untyped_storage()
        size, known = storage.nbytes(), self._alive.get(storage._cdata)
        if known is None:
            if size == 0:
                return None
            known = self._alive[storage._cdata] = _Storage(storage, self._died)
            known.key, known.size, known.category, known.owner = storage._cdata, 0, category, owner
        if size != known.size:
            self._move(known, size - known.size)
        return known

    def _move(self, storage: _Storage, size: int) -> None:
        storage.size += size
        self.live += size
        self.peak = max(self.peak, self.live)
        self._events.append((time.perf_counter(), storage, size))

    def _died(self, storage: _Storage) -> None:
        if self._alive.get(storage.key) is storage:  # another thread may have freed it, and its address be in use again
            del self._alive[storage.key]
        self._move(storage, -storage.size)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._see(func, result)
        elif isinstance(result, (tuple, list)):
            for x in result:
                if isinstance(x, Tensor):
                    self._see(func, x)
        return result

    def _see(self, func: Any, x: Tensor) -> None:
        if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            if not hasattr(x, "_local_tensor"):
                return  # fake tensors and other wrappers hold nothing
            x = x._local_tensor  # a DTensor's own part
        if _makes_storages(func) or x.untyped_storage()._cdata in self._alive:
            self._find(x, OTHER, worker.computing)

    # ---- opening and closing -------------------------------------------------------------------------------------------

    def __enter__(self) -> LiveBytes:
        self.start, self._begin, self._registered = self.live, time.perf_counter(), len(self._events)
        self._hooks = [x.register_post_accumulate_grad_hook(self._gradient) for x in self._parameters]
        super().__enter__()
        return self

    def _gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.mark(GRADIENTS, parameter.grad)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        self._alive.clear()  # with it go the weak references: nothing is followed any more
        self._close_books()

    def _close_books(self) -> None:
        """Replay what happened, now that it is known what each storage was for."""
        whole, of_worker, level = _Book(), dict[Place, _Book](), 0
        self.curve = [(0.0, self.start)]
        for number, (when, storage, size) in enumerate(self._events):
            level += size
            if number >= self._registered:
                self.curve.append((when - self._begin, level))
            whole.move(storage.category, size)
            if storage.owner is not None:
                of_worker.setdefault(storage.owner, _Book()).move(storage.category, size)
        self._events.clear()
        self.categories = whole.at_peak
        self.workers = {place: Share(book.peak, book.at_peak, dict(book.most)) for place, book in of_worker.items()}


class _Storage(weakref.ref):
    """A weak reference to a storage, and what is known of it."""

    __slots__ = ("category", "key", "owner", "size")
    key: int
    size: int
    category: str
    owner: Place | None


class _Book:
    """Bytes by category, now and at the worst moment."""

    def __init__(self) -> None:
        self._now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self._live = self.peak = 0
        self.at_peak: dict[str, int] = {}

    def move(self, category: str, size: int) -> None:
        self._now[category] += size
        self._live += size
        self.most[category] = max(self.most[category], self._now[category])
        if self._live > self.peak:
            self.peak, self.at_peak = self._live, {name: self._now[name] for name in CATEGORIES if self._now[name]}


_making: dict[Any, bool] = {}


def _makes_storages(func: Any) -> bool:
    """Whether an operation's results are new: views and in-place operations give back storages that were there before."""
    known = _making.get(func)
    if known is None:
        schema = getattr(func, "_schema", None)
        results = schema.returns if schema is not None else []
        known = func is torch.ops.aten.lift_fresh.default or all(result.alias_info is None for result in results)
        _making[func] = known
    return known


# ---- accelerators ----------------------------------------------------------------------------------------------------------


class AllocatorBytes:
    """Context manager: what CUDA's allocator says of this process. It knows no curve, no workers, and no categories but
    those registered."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._registered: Counter[str] = Counter()
        self._seen: set[int] = set()
        self.live = self.peak = self.start = 0
        self.curve: list[tuple[float, int]] = []
        self.categories: dict[str, int] = {}
        self.workers: dict[Place, Share] = {}

    def register(self, category: str, tensors: Iterable[Tensor], owner: Place | None = None) -> None:
        """As `LiveBytes.register`."""
        for x in map(local, tensors):
            storage = x.untyped_storage()
            if x.device.type == self._device.type and storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self._registered[category] += storage.nbytes()

    def mark(self, category: str, tensor: Tensor) -> None:
        """Nothing: the allocator does not know what its blocks are for."""

    def __enter__(self) -> AllocatorBytes:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self.start, self._begin = torch.cuda.memory_allocated(self._device), time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.cuda.synchronize(self._device)
        self.live, self.peak = torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        self.curve = [(0.0, self.start), (time.perf_counter() - self._begin, self.live)]
        rest = self.peak - sum(self._registered.values())
        self.categories = {**self._registered, OTHER: max(0, rest)}


Meter = LiveBytes | AllocatorBytes


def live_meter(device: torch.device) -> Meter:
    """The meter for a device."""
    meters: dict[str, Callable[[], Meter]] = {"cuda": lambda: AllocatorBytes(device)}
    return meters.get(device.type, LiveBytes)()
