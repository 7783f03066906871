"""Residual networks: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2015).

ResNet-18, -34 and -50: table 1; ResNet-32 and -110 for CIFAR: section 4.2 with n = 5 and 18. Where the shape changes, the
shortcut is a 1×1 convolution with BatchNorm (option B of section 4.1; the paper's CIFAR networks pad with zeros instead,
option A: there ResNet-32 has 2,752 parameters fewer). The bottleneck halves the image in its 3×3 convolution. The small-image
stem and the variant without shortcuts are those of Fournier's thesis, appendix B.1.1; `width` is the factor k of its B.2.1;
the stem for STL-10 (5×5, stride 2, no pooling) is that of its A.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import choose
from .blocks import ConvBlock, PooledClassifier, convolution, scaled
from .pieces import Layered
from .recipe import require_image, require_positive, with_recipe

STEMS = ("small", "large", "stl")


class Design(NamedTuple):
    """One line of a ResNet table: blocks per group, channels per group, and the kind of block."""

    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    bottleneck: bool


RESNET18 = Design((2, 2, 2, 2), (64, 128, 256, 512), bottleneck=False)
RESNET32 = Design((5, 5, 5), (16, 32, 64), bottleneck=False)
RESNET110 = Design((18, 18, 18), (16, 32, 64), bottleneck=False)
RESNET34 = Design((3, 4, 6, 3), (64, 128, 256, 512), bottleneck=False)
RESNET50 = Design((3, 4, 6, 3), (64, 128, 256, 512), bottleneck=True)
EXPANSION = 4  # a bottleneck puts out four times its inner channels


class Step(NamedTuple):
    """One convolution of a block: its output channels, kernel size and stride."""

    channels: int
    kernel: int
    stride: int


class ResidualBlock(nn.Module):
    """ReLU(F(x) + shortcut(x)), F = convolution-BatchNorm pairs with ReLU between them (equations 1 and 2).

    The layers are called conv1, norm1, conv2, ...; the shortcut is the identity unless the shape changes.
    """

    def __init__(self, inputs: int, steps: Sequence[Step]) -> None:
        super().__init__()
        self.depth = len(steps)
        channels, stride = inputs, 1
        for index, step in enumerate(steps, start=1):
            self.add_module(f"conv{index}", convolution(channels, *step))
            self.add_module(f"norm{index}", nn.BatchNorm2d(step.channels))
            channels, stride = step.channels, stride * step.stride
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != inputs:
            self.shortcut = nn.Sequential(convolution(inputs, channels, 1, stride), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H', W')."""
        h = x
        for index in range(1, self.depth + 1):
            h = getattr(self, f"norm{index}")(getattr(self, f"conv{index}")(h))
            if index < self.depth:
                h = torch.relu(h)
        return torch.relu(h + self.shortcut(x))


class ResNet(Layered):
    """Stem, blocks, pooled classifier; each is a piece. Without shortcuts each convolution is a piece."""

    def __init__(self, input_shape: Sequence[int], classes: int, design: Design, width: float, skip: bool, stem: str):
        super().__init__()
        first = scaled(design.channels[0], width)
        self.stem = stem_of(input_shape[0], first, stem)
        parts: list[nn.Module] = []
        channels = first
        for steps in block_steps(design, width):
            if skip:
                parts.append(ResidualBlock(channels, steps))
            else:
                inputs = [channels, *(step.channels for step in steps)]
                parts += [ConvBlock(before, *step) for before, step in zip(inputs, steps)]
            channels = steps[-1].channels
        self.blocks = nn.ModuleList(parts)
        self.classifier = PooledClassifier(channels, classes)


@with_recipe
def resnet18(
    input_shape: Sequence[int], classes: int, width: float = 1.0, skip: bool = True, stem: str = "small"
) -> ResNet:
    """ResNet-18, (B, *input_shape) → (B, classes); 8 basic blocks of 2 convolutions.

    `width` multiplies all channels (rounded, at least 1); `skip=False` has no shortcuts and 16 one-convolution blocks;
    `stem` is "small" (3×3, stride 1), "large" (7×7, stride 2, then 3×3 max-pooling, stride 2) or "stl" (5×5, stride 2). Images
    of at least 5×5 pixels (large stem: 17×17, stl: 9×9). Raises InvalidChoice for a bad option or input shape.
    """
    return _resnet("resnet18", RESNET18, input_shape, classes, width, skip, stem)


@with_recipe
def resnet32(
    input_shape: Sequence[int], classes: int, width: float = 1.0, skip: bool = True, stem: str = "small"
) -> ResNet:
    """ResNet-32 for CIFAR, (B, *input_shape) → (B, classes); 15 basic blocks with 16, 32 and 64 channels.

    Options as for `resnet18` (without shortcuts: 30 one-convolution blocks). Images of at least 3×3 pixels (large stem:
    9×9). Raises InvalidChoice for a bad option or input shape.
    """
    return _resnet("resnet32", RESNET32, input_shape, classes, width, skip, stem)


@with_recipe
def resnet110(
    input_shape: Sequence[int], classes: int, width: float = 1.0, skip: bool = True, stem: str = "small"
) -> ResNet:
    """ResNet-110 for CIFAR, (B, *input_shape) → (B, classes); 54 basic blocks with 16, 32 and 64 channels.

    Options and smallest images as for `resnet32` (without shortcuts: 108 one-convolution blocks). Raises InvalidChoice for a
    bad option or input shape.
    """
    return _resnet("resnet110", RESNET110, input_shape, classes, width, skip, stem)


@with_recipe
def resnet34(
    input_shape: Sequence[int], classes: int, width: float = 1.0, skip: bool = True, stem: str = "small"
) -> ResNet:
    """ResNet-34, (B, *input_shape) → (B, classes); 16 basic blocks of 2 convolutions.

    Options as for `resnet18` (without shortcuts: 32 one-convolution blocks). Images of at least 5×5 pixels (large stem:
    17×17). Raises InvalidChoice for a bad option or input shape.
    """
    return _resnet("resnet34", RESNET34, input_shape, classes, width, skip, stem)


@with_recipe
def resnet50(
    input_shape: Sequence[int], classes: int, width: float = 1.0, skip: bool = True, stem: str = "small"
) -> ResNet:
    """ResNet-50, (B, *input_shape) → (B, classes); 16 bottleneck blocks of 3 convolutions.

    Options as for `resnet18` (without shortcuts: 48 one-convolution blocks). Images of at least 5×5 pixels (large stem:
    17×17). Raises InvalidChoice for a bad option or input shape.
    """
    return _resnet("resnet50", RESNET50, input_shape, classes, width, skip, stem)


def _resnet(
    name: str, design: Design, input_shape: Sequence[int], classes: int, width: float, skip: bool, stem: str
) -> ResNet:
    require_design(name, design, input_shape, width, stem)
    return ResNet(input_shape, classes, design, width, skip, stem)


def require_design(name: str, design: Design, input_shape: Sequence[int], width: float, stem: str) -> None:
    """Refuse an unknown stem, an image that the design makes too small, and a width that is not positive."""
    choose(f"stem of {name}", stem, STEMS)
    halvings = len(design.blocks) - 1 + {"small": 0, "large": 2, "stl": 1}[stem]
    require_image(name, input_shape, smallest=2 ** (halvings - 1) + 1)  # each halving still finds two pixels
    require_positive(name, width=width)


def stem_of(inputs: int, outputs: int, kind: str) -> nn.Sequential:
    """The layers before the first block: (B, inputs, H, W) → (B, outputs, H', W'); see STEMS."""
    kernel, stride = {"small": (3, 1), "large": (7, 2), "stl": (5, 2)}[kind]
    layers = [convolution(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs), nn.ReLU()]
    if kind == "large":
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    return nn.Sequential(*layers)


def block_steps(design: Design, width: float) -> Iterator[list[Step]]:
    """The convolutions of each block, in order."""
    for group, (count, base) in enumerate(zip(design.blocks, design.channels)):
        channels = scaled(base, width)
        for index in range(count):
            stride = 2 if group > 0 and index == 0 else 1
            if design.bottleneck:
                yield [Step(channels, 1, 1), Step(channels, 3, stride), Step(EXPANSION * channels, 1, 1)]
            else:
                yield [Step(channels, 3, stride), Step(channels, 3, 1)]
