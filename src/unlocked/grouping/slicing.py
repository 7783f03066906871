"""One group's slice of a layer: the g-th of G equal parts of its output channels (Patel's thesis, sections 3.2.2 and 3.3.2).

    dense (first layer after a boundary)    W_g = W[rows of g, :]
    inside a module                         W_g = √G · W[rows of g, columns of g]

    W weights (outputs, inputs, …) of the layer, g group, G their number. A layer that sees an n-th of its inputs has them
    scaled by √n, so that activations keep their variance whatever the weights' size; no bias is scaled. What works channel
    by channel (BatchNorm, LayerNorm, PReLU) keeps its slice, running statistics too, and is whole before the first layer.

`narrow` knows layers by their type. Another one is made known by `narrow.register(MyLayer)`, as in models.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CannotCut

M = TypeVar("M", bound=nn.Module)


class CannotDivide(CannotCut):
    """A layer with `count` channels (or heads), which the wanted number of groups does not divide."""

    def __init__(self, layer: str, count: int, what: str, groups: int) -> None:
        super().__init__(f"{layer!r} has {count} {what}, which {groups} groups do not divide.")
        self.count = count


@dataclass(frozen=True)
class Share:
    """Which part of a layer is wanted: group `group` of `groups`; `dense`: its input is whole, all groups' channels."""

    group: int
    groups: int
    dense: bool = True

    @property
    def inside(self) -> Share:
        """The share of the layers that follow one with a weight matrix."""
        return replace(self, dense=False)

    @property
    def scale(self) -> float:
        """Of the weights: √(inputs of the whole layer / inputs that are seen)."""
        return 1.0 if self.dense else math.sqrt(self.groups)

    def rows(self, count: int, layer: str, what: str = "channels") -> slice:
        """This group's part of `count` channels; raises CannotDivide."""
        if count % self.groups:
            raise CannotDivide(layer, count, what, self.groups)
        size = count // self.groups
        return slice(self.group * size, (self.group + 1) * size)

    def columns(self, count: int, layer: str) -> slice:
        """The inputs that this group sees of `count`; raises CannotDivide."""
        return slice(None) if self.dense else self.rows(count, layer, "inputs")


class SliceOf(nn.Module):
    """Channels `begin` to `end` of what comes in whole: the residual of a module's first block."""

    def __init__(self, begin: int, end: int) -> None:
        super().__init__()
        self.begin, self.end = begin, end

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) or (B, C) → (B, end − begin, …); (B, T, D) → (B, T, end − begin)."""
        return x[..., self.begin : self.end] if x.dim() == 3 else x[:, self.begin : self.end]


@singledispatch
def narrow(module: nn.Module, share: Share, name: str) -> nn.Module:
    """A new module: this share of `module`, which is not changed. `name`: of the layer, in messages.

    Raises CannotDivide, and CannotCut for a type that is not known.
    """
    raise CannotCut(
        f"{name!r} is a {type(module).__name__}, which has no known slices. Groups can be made of our resnet, vgg, cnn, mlp, "
        "gpt and vit models, and of an nn.Sequential of Conv2d, Linear, BatchNorm, LayerNorm, activations, pooling, Dropout "
        "and Flatten. For anything else write the groups' modules and give their numbers: "
        "Chain([Stage(…), …], like=x, layout=(1, 2, 2, 1))."
    )


def thread(module: M, parts: Iterable[str], share: Share, name: str) -> M:
    """A copy of `module` whose named children, which follow each other in its forward, are narrowed."""
    twin = hollow(module)
    for part in parts:
        child = getattr(module, part)
        setattr(twin, part, narrow(child, share, f"{name}.{part}"))
        share = after(child, share)
    return twin


def after(module: nn.Module, share: Share) -> Share:
    """The share of what follows `module`."""
    return share.inside if any(parameter.dim() >= 2 for parameter in module.parameters()) else share


def sliced(module: M, name: str, value: Tensor | None, scale: float = 1.0) -> None:
    """Put a copy of `value`, scaled, in the place of a parameter or buffer of `module`."""
    old = getattr(module, name)
    if value is None or old is None:
        return
    new = value.detach().clone() if scale == 1.0 else value.detach() * scale
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def hollow(module: M) -> M:
    """A copy of a layer that still has the tensors of the original, to be replaced."""
    memo: dict[int, object] = {id(x): x for x in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, memo)  # type: ignore[arg-type]


@narrow.register
def _convolution(module: nn.Conv2d, share: Share, name: str) -> nn.Module:
    if module.groups != 1:
        raise CannotCut(
            f"{name!r} is a convolution that has {module.groups} groups of its own; only dense ones can be split."
        )
    twin = hollow(module)
    rows, columns = share.rows(module.out_channels, name), share.columns(module.in_channels, name)
    sliced(twin, "weight", module.weight[rows, columns], share.scale)
    sliced(twin, "bias", None if module.bias is None else module.bias[rows])
    twin.out_channels, twin.in_channels = twin.weight.shape[:2]
    return twin


@narrow.register
def _linear(module: nn.Linear, share: Share, name: str) -> nn.Module:
    twin = hollow(module)
    rows, columns = share.rows(module.out_features, name), share.columns(module.in_features, name)
    sliced(twin, "weight", module.weight[rows, columns], share.scale)
    sliced(twin, "bias", None if module.bias is None else module.bias[rows])
    twin.out_features, twin.in_features = twin.weight.shape
    return twin


@narrow.register
def _batch_norm(module: _BatchNorm, share: Share, name: str) -> nn.Module:
    if share.dense:
        return copy.deepcopy(module)
    rows = share.rows(module.num_features, name)
    twin = hollow(module)
    for part in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(module, part)
        sliced(twin, part, None if value is None else value[rows])
    sliced(twin, "num_batches_tracked", module.num_batches_tracked)
    twin.num_features = module.num_features // share.groups
    return twin


@narrow.register
def _layer_norm(module: nn.LayerNorm, share: Share, name: str) -> nn.Module:
    if share.dense:
        return copy.deepcopy(module)
    if len(module.normalized_shape) != 1:
        raise CannotCut(f"{name!r} normalises over {module.normalized_shape}; only one over the channels can be split.")
    rows = share.rows(module.normalized_shape[0], name)
    twin = hollow(module)
    for part in ("weight", "bias"):
        value = getattr(module, part)
        sliced(twin, part, None if value is None else value[rows])
    twin.normalized_shape = (module.normalized_shape[0] // share.groups,)
    return twin


@narrow.register
def _prelu(module: nn.PReLU, share: Share, name: str) -> nn.Module:
    if share.dense or module.num_parameters == 1:
        return copy.deepcopy(module)
    twin = hollow(module)
    sliced(twin, "weight", module.weight[share.rows(module.num_parameters, name)])
    twin.num_parameters = len(twin.weight)
    return twin


@narrow.register
def _sequential(module: nn.Sequential, share: Share, name: str) -> nn.Module:
    if type(module).forward is not nn.Sequential.forward:
        raise CannotCut(
            f"{name!r} is a {type(module).__name__} with a forward of its own, so its layers cannot be split."
        )
    return thread(module, list(module._modules), share, name)


@narrow.register
def _flatten(module: nn.Flatten, share: Share, name: str) -> nn.Module:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise CannotCut(
            f"{name!r} flattens dimensions {module.start_dim} to {module.end_dim}; only 1 to -1 can be split."
        )
    return copy.deepcopy(module)


def _same(module: nn.Module, share: Share, name: str) -> nn.Module:
    return copy.deepcopy(module)


for kind in (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid,
    nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
):  # fmt: skip
    narrow.register(kind, _same)
