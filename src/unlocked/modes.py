"""Training and evaluation modes, module by module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def modes_kept(*modules: nn.Module) -> Iterator[None]:
    """Whatever happens inside, every part is afterwards in the mode it was in (a BatchNorm frozen by hand stays frozen)."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def statistics_kept(parts: Iterable[nn.Module]) -> Iterator[None]:
    """A second run of a forward inside changes no buffer of these modules: statistics are those of the first one.

    A BatchNorm in training mode uses its batch's statistics and leaves its running ones alone. Other buffers are put back.
    """
    norms, others = [], []
    for part in parts:
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            norms.append(part)
        elif part._buffers:
            others.append(part)
    tracked = [part for part in norms if part.training and part.track_running_stats]
    for part in tracked:
        part.track_running_stats = False
    try:
        with buffers_kept(others):
            yield
    finally:
        for part in tracked:
            part.track_running_stats = True


@contextlib.contextmanager
def buffers_kept(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever happens inside, the buffers of these modules are afterwards what they were, also those that were replaced."""
    before = [(part, name, x, x.clone()) for part in parts for name, x in part._buffers.items() if x is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, name, x, old in before:
                part._buffers[name] = x.copy_(old)
