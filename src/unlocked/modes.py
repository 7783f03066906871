"""Training and evaluation modes, module by module."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def modes_kept(*modules: nn.Module) -> Iterator[None]:
    """Whatever happens inside, every part is afterwards in the mode it was in (a BatchNorm frozen by hand stays frozen)."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


_PARTS: weakref.WeakKeyDictionary[nn.Module, list[nn.Module]] = weakref.WeakKeyDictionary()


def parts_of(module: nn.Module) -> list[nn.Module]:
    """All modules inside, itself included, found once: of a stage, which keeps its make."""
    if module not in _PARTS:
        _PARTS[module] = list(module.modules())
    return _PARTS[module]


@contextlib.contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """A second run of a forward inside changes no buffer: statistics are those of the first one.

    A BatchNorm in training mode uses its batch's statistics and leaves its running ones alone. Other buffers are put back.
    """
    parts = parts_of(module)
    tracked = [
        part
        for part in parts
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training and part.track_running_stats
    ]
    others = [part for part in parts if part._buffers and not isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for part in tracked:
        part.track_running_stats = False
    try:
        with buffers_kept([x for part in others for x in part._buffers.values() if x is not None]):
            yield
    finally:
        for part in tracked:
            part.track_running_stats = True


@contextlib.contextmanager
def buffers_kept(buffers: Iterable[Tensor]) -> Iterator[None]:
    """Whatever happens inside, the buffers are afterwards what they were."""
    before = [(x, x.clone()) for x in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, old in before:
                x.copy_(old)
