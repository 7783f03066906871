"""Tensors of which every process holds a part only (DTensor), seen from outside as the whole ones.

Checkpoints and evaluation know ordinary tensors under the user's names. Between those and the parts stand these functions; all
of them leave ordinary tensors as they are. A DTensor's whole is put together by all processes of its group: *every one of them
must call, with the same tensors in the same order* (replicas that save at the same update do).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Module = TypeVar("Module", bound=nn.Module)


def is_part(x: Tensor) -> bool:
    """Whether `x` is a DTensor."""
    if type(x) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # late: it takes half a second, and most runs have none

    return isinstance(x, DTensor)


@torch.no_grad()
def whole(x: Tensor) -> Tensor:
    """The full tensor, detached: put together from all processes for a DTensor, anything else itself."""
    return x.full_tensor() if is_part(x) else x.detach()  # type: ignore[attr-defined]


def local(x: Tensor) -> Tensor:
    """What this process holds of `x`: its part of a DTensor, anything else itself."""
    return x.to_local() if is_part(x) else x  # type: ignore[attr-defined]


@torch.no_grad()
def put(x: Tensor, value: Tensor) -> None:
    """Copy the whole tensor `value`, which every process must have, into `x`; nothing is sent."""
    x.copy_(part_like(x, value))


def part_like(x: Tensor, value: Tensor) -> Tensor:
    """The whole tensor `value` split as `x` is; itself if `x` is an ordinary tensor."""
    if not is_part(x):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(x, DTensor)
    return distribute_tensor(value.to(x.device), x.device_mesh, x.placements, src_data_rank=None)


def whole_state(value: Any) -> Any:
    """A tree of dictionaries, lists and tuples (an optimizer's state) with every tensor whole."""
    if isinstance(value, Tensor):
        return whole(value)
    if isinstance(value, Mapping):
        return {key: whole_state(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole_state(part) for part in value)
    return value


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict` for a state of whole tensors: what a parameter owns is split as the parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {k: _split(parameters[k], own) for k, own in state["state"].items()}
    optimizer.load_state_dict({**state, "state": parts})


def _split(parameter: Tensor, own: Mapping[str, Any]) -> dict[str, Any]:
    """Momenta and the like have the parameter's shape; a count of steps has not, and stays."""
    return {
        key: part_like(parameter, value) if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for key, value in own.items()
    }


# ---- ordinary copies of distributed modules --------------------------------------------------------------------------


def skeleton(module: Module) -> Module:
    """A copy without values (meta tensors), to be taken before PyTorch's hooks are put on, as those cannot be copied."""
    return copy.deepcopy(module, {id(x): _like(x, torch.empty_like(x, device="meta")) for _, x in _tensors(module)})


def filled(bare: Module, module: nn.Module) -> Module:
    """An ordinary module made as `bare`, with the values of `module`, which may be sharded (then all must call)."""
    values = dict(_tensors(module))
    return copy.deepcopy(bare, {id(x): _like(x, whole(values[name]).clone()) for name, x in _tensors(bare)})


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _like(x: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, x.requires_grad) if isinstance(x, nn.Parameter) else value
