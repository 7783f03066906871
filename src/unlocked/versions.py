"""A stage's weights under names, for forwards whose backward comes after updates.

Version v of a stage's weights is what they are after v updates. A forward has a `Reading`: the version it saw. What its
backward sees when the weights have been updated since is one of three semantics, chosen by the method and never left to chance:

    stash      the version of the forward. It is copied once, before the update that would overwrite it, for all its readers.
    current    today's weights, with the activations of the forward.
    snapshot   the version of the forward, copied at the forward by the graph itself. The numbers of `stash`, other memory: one
               copy of what the backward needs for every forward in flight; `stash` has one of everything for every version.

How: a graph never holds the weights themselves. A hook puts a name in their place, and asks this store for them in the
backward. So a write that autograd does not see (`parameter.data.add_`, the silent fourth semantics) changes no gradient
but where the method asks for today's weights. Buffers are copied at the forward in all three. Not seen by hooks: what a custom
autograd.Function keeps as an attribute instead of with save_for_backward.
"""

from __future__ import annotations

import contextlib
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .errors import UnlockedError
from .probes.memory import count_saved

Semantics = Literal["stash", "current", "snapshot"]


class Reading:
    """The weights that one forward saw: their version; `weights` if they are none of the stage's own (predicted ones)."""

    __slots__ = ("version", "weights")

    def __init__(self, version: int, weights: list[Tensor] | None = None) -> None:
        self.version, self.weights = version, weights


class Updates(Protocol):
    """Who counts the updates of a stage's weights; a worker, as a rule. stage: for messages. version: today's."""

    stage: int
    version: int


class Versions:
    """The versions of one stage's trained weights.

    parameters: those weights, in the order of every list of weights here. parts: the stage's modules. keeps: whether a
    version that is read from is copied before an update. held: how many read from each version. kept: the copies.
    """

    def __init__(self, updates: Updates, module: nn.Module) -> None:
        self.updates = updates
        self.parameters = [x for x in module.parameters() if x.requires_grad]
        self.keeps = False
        self.held: Counter[int] = Counter()
        self.kept: dict[int, list[Tensor]] = {}
        self._today: list[Tensor] | None = None  # while others are in place
        self.parts = list(module.modules())
        self._pointers: list[int] = []
        self._own = _NOWHERE

    # ---- holding ---------------------------------------------------------------------------------------------------

    def read(self, version: int | None = None) -> Reading:
        """A forward begins at this version (default: today's), which stays to be had until it is released."""
        reading = Reading(self.updates.version if version is None else version)
        self.hold(reading.version)
        return reading

    def hold(self, version: int) -> None:
        """Somebody will ask for this version, which may be yet to come."""
        self.held[version] += 1

    def release(self, version: int) -> None:
        """One of those will no more."""
        self.held[version] -= 1
        if self.held[version] <= 0:
            del self.held[version]
            self.kept.pop(version, None)

    def before_update(self) -> None:
        """Copy today's weights if somebody still reads from them; called before anything writes to them."""
        now = self.updates.version
        if self.keeps and self.held.get(now):
            self.kept[now] = copied(self.parameters)

    def forget(self) -> None:
        """Nobody reads any more."""
        self.put_back()
        self.held.clear()
        self.kept.clear()

    @property
    def copies(self) -> int:
        """Bytes of the versions that are kept beside today's."""
        return sum(x.numel() * x.element_size() for row in self.kept.values() for x in row)

    # ---- computing -------------------------------------------------------------------------------------------------

    def weights(self, reading: Reading) -> Sequence[Tensor]:
        """What this forward saw."""
        if reading.weights is not None:
            return reading.weights
        return self.today() if reading.version == self.updates.version else self._old(reading.version)

    def today(self) -> list[Tensor]:
        """The newest weights, whatever is in place."""
        return self._today or [x.detach() for x in self.parameters]

    def _old(self, version: int) -> list[Tensor]:
        if version not in self.kept:
            raise UnlockedError(
                f"Version {version} of the weights of stage {self.updates.stage} was asked for, but only "
                f"{sorted({*self.kept, self.updates.version})} are there; hold a version before the update that ends it."
            )
        return self.kept[version]

    def own(self) -> _Addresses:
        """Where the weights in place are."""
        pointers = [x.data_ptr() for x in self.parameters]
        if pointers != self._pointers:  # they have not moved, as a rule
            self._pointers, self._own = pointers, _Addresses(self.parameters)
        return self._own

    def buffers(self) -> list[Tensor]:
        """The module's buffers as they are now."""
        return [x for part in self.parts for x in part._buffers.values() if x is not None]

    def is_today(self, reading: Reading) -> bool:
        """Whether these are the weights in place."""
        return reading.weights is None and reading.version == self.updates.version

    @contextlib.contextmanager
    def in_place(self, reading: Reading) -> Iterator[None]:
        """The parameters hold the weights of the reading inside; gradients arrive at the parameters, whatever the version.

        A graph made inside may be differentiated outside only if it was made under `saving`.
        """
        self.put(reading)
        try:
            yield
        finally:
            self.put_back()

    def put(self, reading: Reading) -> None:
        """Let the parameters hold the weights of the reading until `put_back`; see `in_place`."""
        if not self.is_today(reading):
            self._today = [x.detach() for x in self.parameters]
            self._put(self.weights(reading))

    def put_back(self) -> None:
        """Let the parameters hold the newest weights."""
        if self._today is not None:
            self._put(self._today)
            self._today = None

    def _put(self, values: Sequence[Tensor]) -> None:
        put_in_place(self.parameters, values)

    @contextlib.contextmanager
    def saving(self, reading: Reading, semantics: Semantics, again: Sequence[Any] | None = None) -> Iterator[Saved]:
        """Graphs made inside keep weights by these semantics. `again`: what another run of the same forward had kept."""
        saved = Saved(self, reading, semantics, again)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            yield saved
        if again is not None and len(saved) != len(again):
            raise RuntimeError(f"it keeps {len(saved)} tensors, not {len(again)}")


def copied(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Their values, which later writes leave alone."""
    return [x.detach().clone() for x in parameters]


@torch.no_grad()
def put_in_place(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Let the parameters hold these values, which are not copied: a later write to a parameter writes to them."""
    for x, value in zip(parameters, values):
        x.set_(value)  # type: ignore[call-overload]


class _Name:
    """Stands for a weight: which one, which part of it, and of which version (None: today's)."""

    __slots__ = ("__weakref__", "index", "offset", "size", "stride", "version")

    def __init__(self, index: int, version: int | None, x: Tensor, offset: int) -> None:
        self.index, self.version, self.offset = index, version, offset
        self.size, self.stride = x.size(), x.stride()


class _Kept:
    """Holds an activation; dies with the graph that saved it."""

    __slots__ = ("__weakref__", "written", "x")

    def __init__(self, x: Tensor) -> None:
        self.x, self.written = x.detach(), x._version  # with its graph it would keep itself alive


class Saved:
    """What one forward keeps for its backward, in the order in which it was kept."""

    def __init__(self, versions: Versions, reading: Reading, semantics: Semantics, again: Sequence[Any] | None) -> None:
        self._versions, self._reading, self._semantics = versions, reading, semantics
        self._again = None if again is None else list(again)
        self._order: list[weakref.ref] = []
        self._own = versions.own()
        given = reading.weights or versions.kept.get(reading.version)
        self._given_weights: Sequence[Tensor] = given or ()
        self._given = _Addresses(given) if given else _NOWHERE
        buffers = versions.buffers()
        self._buffers = _Addresses(buffers) if buffers else _NOWHERE

    def __len__(self) -> int:
        return len(self._order)

    def pack(self, x: Tensor) -> _Name | _Kept:
        """A weight becomes a name; anything else is kept."""
        entry = self._entry(x)
        self._order.append(weakref.ref(entry))
        return entry

    def _entry(self, x: Tensor) -> _Name | _Kept:
        address = x.data_ptr()
        own = self._own.find(address)
        index = own if own is not None else self._given.find(address)
        if index is None:
            return self._counted(x if self._buffers.find(address) is None else x.clone())
        weight = self._versions.parameters[index] if own is not None else self._given_weights[index]
        if weight.dtype != x.dtype:
            return self._counted(x.clone())  # its bits read as something else
        offset = (address - weight.data_ptr()) // x.element_size()
        if self._semantics == "current":
            return _Name(index, None, x, offset)
        if own is None:  # of a version that nobody writes to
            return _Kept(self._before(weight.as_strided(x.size(), x.stride(), weight.storage_offset() + offset)))
        if self._semantics == "snapshot":
            return self._counted(x.clone())
        return _Name(index, self._reading.version, x, offset)

    def _counted(self, x: Tensor) -> _Kept:
        entry = _Kept(self._before(x))
        count_saved(entry.x, entry)
        return entry

    def _before(self, x: Tensor) -> Tensor:
        """What was kept in place of `x` when this forward ran for the first time."""
        known = None if self._again is None else self._again[len(self._order)]
        if known is None:
            return x
        if known.shape != x.shape or known.dtype != x.dtype:
            raise RuntimeError(f"it keeps {tuple(x.shape)} {x.dtype} where {tuple(known.shape)} {known.dtype} was kept")
        return known.to(x.device)

    def unpack(self, entry: _Name | _Kept) -> Tensor:
        """The weight a name stands for; or what was kept, unchanged."""
        if isinstance(entry, _Kept):
            if entry.x._version != entry.written:
                raise UnlockedError(
                    "An activation was changed in place between its forward and its backward; use operations that are not "
                    "in place (inplace=False) in this stage."
                )
            return entry.x
        today = entry.version is None or entry.version == self._versions.updates.version
        own: Sequence[Tensor] = self._versions.parameters if today else self._versions._old(entry.version or 0)
        x = own[entry.index].detach()
        return x.as_strided(entry.size, entry.stride, x.storage_offset() + entry.offset)

    def kept(self, without: Tensor) -> list[Tensor | None]:
        """The activations in order, for a checkpoint; None for weights, for what is gone, and for parts of `without`."""
        known = without.untyped_storage()._cdata
        entries = [reference() for reference in self._order]
        return [
            entry.x if isinstance(entry, _Kept) and entry.x.untyped_storage()._cdata != known else None
            for entry in entries
        ]


class _Addresses:
    """Which of several tensors an address lies in."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        rows = sorted((x.data_ptr(), x.data_ptr() + x.nbytes, index) for index, x in enumerate(tensors) if x.nbytes)
        self._starts = [start for start, _, _ in rows]
        self._ends = [end for _, end, _ in rows]
        self._indices = [index for _, _, index in rows]

    def find(self, address: int) -> int | None:
        """The tensor's index."""
        k = bisect_right(self._starts, address) - 1
        return self._indices[k] if k >= 0 and address < self._ends[k] else None


_NOWHERE = _Addresses(())
