"""The blocks of a network as patterns for heads: what they are, and copies of them with weights of their own.

A block is what a cut leaves whole (block_layers.py): a piece with a weight matrix, and the pieces without one that follow it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain as chained
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..costs import run_once
from ..errors import InvalidChoice
from ..models.resnet import ResidualBlock, Step

if TYPE_CHECKING:
    from ..chain import Chain

_POOLS = (nn.MaxPool2d, nn.AvgPool2d)


class Block(NamedTuple):
    """The network's own modules, the stage they are in, and the shapes of one sample before and after them."""

    module: nn.Sequential
    stage: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def halves(self) -> bool:
        """Whether it makes maps smaller."""
        return len(self.before) == len(self.after) == 3 and smaller(self.before, self.after)


def smaller(before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether maps (C, H, W) have at most half the height and width afterwards, rounded up."""
    return all(new < old and new <= (old + 1) // 2 for old, new in zip(before[1:], after[1:]))


def modules_of(body: nn.Module) -> list[nn.Sequential]:
    """The blocks of a stage's body, in order: its own modules, in new sequences."""
    from ..block_layers import _pieces  # cutting needs heads
    from ..cutting import _units

    return [nn.Sequential(*(piece.module for piece in unit)) for unit in _units(_pieces(body))]


def blocks_of(chain: Chain) -> list[Block]:
    """All blocks of a chain that have weights, in order. Shapes are found on shapes alone, with a copy that has no values.

    Raises InvalidChoice if the network does not run so.
    """
    own = [(module, j) for j, stage in enumerate(chain) for module in modules_of(stage.body) if has_matrix(module)]
    blank = chain.blank("meta")
    shadows = [module for stage in blank for module in modules_of(stage.body) if has_matrix(module)]
    before: dict[int, tuple[int, ...]] = {}
    after: dict[int, tuple[int, ...]] = {}
    for k, shadow in enumerate(shadows):
        shadow[0].register_forward_pre_hook(lambda part, given, k=k: before.update({k: _sample(given[0])}))
        shadow[-1].register_forward_hook(lambda part, given, y, k=k: after.update({k: _sample(y)}))
    try:
        run_once(blank, chain.example().to("meta"))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise InvalidChoice(
            "A head that copies the network's blocks needs their shapes, but the network does not run on shapes alone: "
            f"{str(error).splitlines()[0]}. Use another head."
        ) from error
    return [Block(module, j, before[k], after[k]) for k, (module, j) in enumerate(own) if k in before and k in after]


def _sample(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape[1:])


def has_matrix(module: nn.Module) -> bool:
    """Whether there is a weight matrix inside."""
    return any(parameter.dim() > 1 for parameter in module.parameters())


# ---- copies ------------------------------------------------------------------------------------------------------------


def copied(block: nn.Module, fresh: bool = True) -> Any:
    """A copy on torch's current device that shares nothing with the block. `fresh`: every layer draws its weights anew, in
    float32, as its class does (`reset_parameters`); else they are the block's. All of them are to be trained.

    Raises InvalidChoice for a layer that cannot draw its weights.
    """
    device = torch.empty(0).device
    memo: dict[int, Any] = {}
    for x in chained(block.parameters(), block.buffers()):
        values = (
            torch.zeros(x.shape, dtype=_drawn_in(x)) if fresh and isinstance(x, nn.Parameter) else _moved(x, device)
        )
        memo[id(x)] = nn.Parameter(values) if isinstance(x, nn.Parameter) else values
    made = copy.deepcopy(block, memo)
    if fresh:
        redraw(made)
    return made


def _drawn_in(x: Tensor) -> torch.dtype:
    return torch.float32 if x.is_floating_point() else x.dtype


def _moved(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(x, device=device) if device.type == "meta" else x.detach().to(device, copy=True)


def redraw(module: nn.Module) -> None:
    """Every layer inside draws its weights anew, from torch's global generator. Raises InvalidChoice if one cannot."""
    for name, part in module.named_modules():
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if callable(reset):
            reset()
        elif any(True for _ in part.parameters(recurse=False)):
            raise InvalidChoice(
                f"A head copies the architecture of the network's blocks, but a layer of them, {type(part).__name__}"
                f"{f' ({name})' if name else ''}, cannot draw weights of its own: it has no reset_parameters(). Add it, "
                "or use another head."
            )


def adapted(block: Block, inputs: int, halve: bool) -> nn.Module:
    """A fresh copy of a block that reads `inputs` channels, and halves maps or not, whatever the block itself does.

    Residual blocks of this library are made anew. Of any other the first layer is exchanged, and its pools are the only things
    that halve, if it has any. Raises InvalidChoice where the first layer is no plain convolution or linear layer.
    """
    made = copied(block.module)
    first = next(k for k, piece in enumerate(made) if has_matrix(piece))
    if isinstance(made[first], ResidualBlock):
        made[first] = _residual(made[first], inputs, halve)
    else:
        pools = [name for name, part in made.named_modules() if isinstance(part, _POOLS)]
        for name in pools[1 if halve else 0 :]:
            made.set_submodule(name, nn.Identity())
        _exchange_first(made, inputs, 2 if halve and not pools else 1)
    redraw(made)
    return made


def _residual(block: ResidualBlock, inputs: int, halve: bool) -> ResidualBlock:
    """Strided where the network's own blocks are: in the first 3×3 convolution."""
    convolutions = [getattr(block, f"conv{k}") for k in range(1, block.depth + 1)]
    kernels = [one.kernel_size[0] for one in convolutions]
    strided = kernels.index(max(kernels))
    rows = enumerate(zip(convolutions, kernels))
    return ResidualBlock(
        inputs, [Step(one.out_channels, kernel, 2 if halve and k == strided else 1) for k, (one, kernel) in rows]
    )


def first_layer(module: nn.Module) -> nn.Module:
    """The first layer inside that has a weight matrix."""
    return module.get_submodule(_first_name(module))


def _first_name(module: nn.Module) -> str:
    found = (name for name, part in module.named_modules() if any(x.dim() > 1 for x in part.parameters(recurse=False)))
    return next(found)


def _exchange_first(made: nn.Module, inputs: int, stride: int) -> None:
    name, layer = _first_name(made), first_layer(made)
    bias = getattr(layer, "bias", None) is not None
    if type(layer) is nn.Linear:
        made.set_submodule(name, nn.Linear(inputs, layer.out_features, bias))
    elif type(layer) is nn.Conv2d and layer.groups == 1:
        same = {"padding": layer.padding, "dilation": layer.dilation, "padding_mode": layer.padding_mode}
        new = nn.Conv2d(inputs, layer.out_channels, layer.kernel_size, stride, bias=bias, **same)  # type: ignore[arg-type]
        made.set_submodule(name, new)
    else:
        raise InvalidChoice(
            f"A head needs a copy of a block of the network with {inputs} input channels, but its first layer is a "
            f"{type(layer).__name__}, of which no other width can be made. Use a network of one width, or another head."
        )


def shape_after(module: nn.Module, sample: Sequence[int], pattern: nn.Module) -> tuple[int, ...]:
    """The shape of a sample after a copy of `pattern`, found on shapes alone. Raises InvalidChoice if it does not run."""
    with torch.device("meta"):
        shapes = copied(module, fresh=False)
        x = torch.empty(2, *sample, dtype=next(shapes.parameters()).dtype)
    try:
        return _sample(run_once(shapes, x))
    except (RuntimeError, ValueError, IndexError) as error:
        raise InvalidChoice(
            f"A head needs a copy of a block of the network that reads features of shape {tuple(sample)}, and it does not run: "
            f"{str(error).splitlines()[0]}. The block: {' '.join(str(pattern).split())}. Use another head."
        ) from error
