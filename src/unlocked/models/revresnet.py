"""Reversible residual networks as in PETRA: ResNets with two streams, each as wide as the ResNet.

Rivaud, Fournier, Pumir, Belilovsky, Eickenberg, Oyallon, "PETRA: Parallel End-to-end Training with Reversible
Architectures" (2024), after Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network" (2017).

    block           (x, x̃) → (x̃ + F(x), x)               reversible, see reversible.py
    down-sampling   (x, x̃) → (P(x̃) + F(x), S(x))         not reversible: the first block of a group that changes the shape
    head            linear layer on the means over the pixels of both streams

F: the convolutions of the ResNet's block, each followed by BatchNorm and ReLU (so F ends in a ReLU, and none follows the
addition); P: 1×1 convolution with BatchNorm; S: for basic blocks the first half of F, ReLU(BN₁(conv₁(x))), computed once;
for bottlenecks a 1×1 convolution with BatchNorm of its own. Both streams start as the stem's output.

As in the authors' code the blocks' convolutions have biases, although BatchNorm takes them out again; they start at 0, and
the stem is that of resnet.py, without one. A bottleneck's first group changes the channels, so its first block is
of the down-sampling kind with stride 1. Not reversible are thus the stem, the head, and 3 (basic) or 4 (bottleneck) blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..reversible import Coupling, Split, halves
from .blocks import ConvBlock, PooledClassifier, convolution, scaled
from .pieces import Layered
from .recipe import with_recipe
from .resnet import RESNET18, RESNET34, RESNET50, Design, Step, block_steps, require_design, stem_of


class DownSampling(nn.Module):
    """(x, x̃) → (P(x̃) + F(x), S(x)), where the shape changes: (B, 2·inputs, H, W) → (B, 2·outputs, H', W').

    `separate`: whether S is a convolution of its own; otherwise it is F's first part.
    """

    def __init__(self, inputs: int, steps: Sequence[Step], separate: bool) -> None:
        super().__init__()
        self.function = _function(inputs, steps)
        self.shortcut = _projection(inputs, steps)
        self.second = _projection(inputs, steps) if separate else None

    def forward(self, z: Tensor) -> Tensor:
        """cat[x, x̃] → cat[P(x̃) + F(x), S(x)], along the channels."""
        x, other = halves(z, 1)
        begun = self.function[0](x)
        value = self.function[1:](begun)
        second = begun if self.second is None else self.second(x)
        return torch.cat([self.shortcut(other) + value, second], 1)


class RevResNet(Layered):
    """Stem with the split into two streams, blocks, pooled classifier; each is a piece."""

    def __init__(self, input_shape: Sequence[int], classes: int, design: Design, width: float, stem: str) -> None:
        super().__init__()
        channels = scaled(design.channels[0], width)
        self.stem = nn.Sequential(*stem_of(input_shape[0], channels, stem), Split())
        parts: list[nn.Module] = []
        for steps in block_steps(design, width):
            keeps_shape = channels == steps[-1].channels and all(step.stride == 1 for step in steps)
            if keeps_shape:
                parts.append(Coupling(_function(channels, steps)))
            else:
                parts.append(DownSampling(channels, steps, separate=design.bottleneck))
            channels = steps[-1].channels
        self.blocks = nn.ModuleList(parts)
        _add_biases(self.blocks)
        self.classifier = PooledClassifier(2 * channels, classes)


@with_recipe
def revresnet18(input_shape: Sequence[int], classes: int, width: float = 1.0, stem: str = "small") -> RevResNet:
    """RevResNet-18, (B, *input_shape) → (B, classes); 8 basic blocks, 5 of them reversible; 10 pieces.

    `width` multiplies all channels (rounded, at least 1); `stem` is "small" (3×3, stride 1) or "large" (7×7, stride 2, then
    3×3 max-pooling, stride 2). Images of at least 5×5 pixels (large stem: 17×17). Raises InvalidChoice for a bad option
    or input shape.
    """
    return _revresnet("revresnet18", RESNET18, input_shape, classes, width, stem)


@with_recipe
def revresnet34(input_shape: Sequence[int], classes: int, width: float = 1.0, stem: str = "small") -> RevResNet:
    """RevResNet-34, (B, *input_shape) → (B, classes); 16 basic blocks, 13 of them reversible; 18 pieces.

    Options, smallest images and errors as for `revresnet18`.
    """
    return _revresnet("revresnet34", RESNET34, input_shape, classes, width, stem)


@with_recipe
def revresnet50(input_shape: Sequence[int], classes: int, width: float = 1.0, stem: str = "small") -> RevResNet:
    """RevResNet-50, (B, *input_shape) → (B, classes); 16 bottleneck blocks, 12 of them reversible; 18 pieces.

    Options, smallest images and errors as for `revresnet18`.
    """
    return _revresnet("revresnet50", RESNET50, input_shape, classes, width, stem)


def _revresnet(
    name: str, design: Design, input_shape: Sequence[int], classes: int, width: float, stem: str
) -> RevResNet:
    require_design(name, design, input_shape, width, stem)
    return RevResNet(input_shape, classes, design, width, stem)


def _function(inputs: int, steps: Sequence[Step]) -> nn.Sequential:
    sizes = [inputs, *(step.channels for step in steps)]
    return nn.Sequential(*(ConvBlock(before, *step) for before, step in zip(sizes, steps)))


def _projection(inputs: int, steps: Sequence[Step]) -> nn.Sequential:
    outputs, stride = steps[-1].channels, max(step.stride for step in steps)
    return nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def _add_biases(blocks: nn.Module) -> None:
    for module in blocks.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
