"""The tensors of a stage: what they are, how they are emptied, and filled again.

The tensors stay the same objects, so optimizers, hooks and the chain notice nothing. An emptied one has its shape, and a single
value in memory: NaN, so that whoever looks at it knows.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InvalidChoice

_MAPPED = 64 * 1024  # bytes from which on a tensor gets a mapping of memory of its own


class Form(NamedTuple):
    """How a tensor lies in memory: `extent` values from its first to its last."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    extent: int


def form(x: Tensor) -> Form:
    """Of a tensor that is not emptied."""
    extent = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride()))
    return Form(x.shape, x.stride(), x.dtype, extent)


def contents(stage: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """Parameters, buffers, gradients and optimizer state that are worth emptying: more than one value, not elsewhere."""
    found: dict[int, Tensor] = {}
    for x in _tensors(stage, optimizer):
        if x.numel() > 1 and not x.is_meta:
            found[id(x)] = x
    return list(found.values())


def _tensors(stage: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterable[Tensor]:
    yield from stage.buffers()
    for parameter in stage.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    for state in [] if optimizer is None else optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def refuse_shared_memory(stage: nn.Module, number: int) -> None:
    """Raises InvalidChoice if two tensors of a stage lie in one storage: emptied one by one they would come apart."""
    names: dict[int, str] = {}
    for name, x in [*stage.named_parameters(), *stage.named_buffers()]:
        if not x.is_meta and x.numel() > 1:
            other = names.setdefault(x.untyped_storage()._cdata, name)
            if other != name:
                raise InvalidChoice(
                    f"{other} and {name} of stage {number} are views of one piece of memory, which one stage in memory cannot "
                    "keep so; give each its own (x.clone())."
                )


def row_of(x: Tensor) -> Tensor:
    """The values of a tensor, as they lie in memory, in a row; nothing is copied."""
    return x.detach().as_strided((form(x).extent,), (1,))


def blank(forms: Sequence[Form], device: torch.device) -> list[Tensor]:
    """Rows for tensors of such forms, not initialised."""
    return [_row(one.extent, one.dtype, device) for one in forms]


def _row(extent: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    size = extent * dtype.itemsize
    if device.type != "cpu" or size < _MAPPED:
        return torch.empty(extent, dtype=dtype, device=device)
    # a mapping of its own goes back to the system at once; what malloc is given back it often cannot use for aligned tensors
    row = torch.frombuffer(mmap.mmap(-1, size), dtype=dtype)
    return torch.ops.aten.lift_fresh(row)  # type: ignore[no-any-return]  # by this the meters see new memory (probes/live.py)


@torch.no_grad()
def empty(x: Tensor) -> None:
    """Let go of a tensor's memory."""
    value = float("nan") if x.is_floating_point() or x.is_complex() else 0
    x.set_(torch.full((), value, dtype=x.dtype, device=x.device).expand(x.shape))  # type: ignore[call-overload]


@torch.no_grad()
def fill(x: Tensor, row: Tensor, like: Form) -> None:
    """Give a tensor the memory of a row."""
    x.set_(row.as_strided(like.shape, like.stride))  # type: ignore[call-overload]
