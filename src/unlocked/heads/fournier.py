"""The heads of Fournier's thesis (2024), section B.1.2: linear, MLP and CNN, kept under 10 % of the stage's FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .spec import HeadSpec, Kind, at_least_one, channels, convolution, norm, perceptron, to_rows


@dataclass(frozen=True)
class LinearHead(HeadSpec):
    """Normalisation, average pool to 2×2, flatten, projection."""

    @property
    def name(self) -> str:
        return "linear"

    def layers(self, features: Tensor, kind: Kind, outputs: int, width: int) -> nn.Module:
        inputs = channels(features)
        rows, length = to_rows(kind, inputs)
        if kind == "maps":
            return nn.Sequential(nn.BatchNorm2d(inputs), *rows, nn.Linear(length, outputs))
        return nn.Sequential(*rows, norm(kind, inputs), nn.Linear(length, outputs))


@dataclass(frozen=True)
class MLPHead(HeadSpec):
    """Average pool to 2×2, flatten, `depth` × [fully connected → `hidden` without bias, normalisation, ReLU],
    projection. On tokens and vectors there is nothing to pool."""

    hidden: int = 1024
    depth: int = 3

    smallest: ClassVar[int] = 8

    def __post_init__(self) -> None:
        at_least_one(self.name, hidden=self.hidden, depth=self.depth)

    @property
    def name(self) -> str:
        return "mlp"

    def paper_width(self, features: Tensor) -> int:
        return self.hidden

    def layers(self, features: Tensor, kind: Kind, outputs: int, width: int) -> nn.Module:
        rows, length = to_rows(kind, channels(features))
        return nn.Sequential(*rows, *perceptron(kind, length, width, self.depth, outputs, bias=False))


@dataclass(frozen=True)
class CNNHead(HeadSpec):
    """1×1 convolution → `channels`, `depth` × [3×3 convolution of stride 2], each with BatchNorm and ReLU; average pool
    to 2×2, flatten, projection."""

    channels: int = 32
    depth: int = 3

    smallest: ClassVar[int] = 4

    def __post_init__(self) -> None:
        at_least_one(self.name, channels=self.channels, depth=self.depth)

    @property
    def name(self) -> str:
        return "cnn"

    def paper_width(self, features: Tensor) -> int:
        return self.channels

    def reads(self, kind: Kind) -> bool:
        return kind == "maps"

    def layers(self, features: Tensor, kind: Kind, outputs: int, width: int) -> nn.Module:
        trunk = convolution(features.shape[1], width, kernel=1)
        for _ in range(self.depth):
            trunk += convolution(width, width, kernel=3, stride=2)
        rows, length = to_rows(kind, width)
        return nn.Sequential(*trunk, *rows, nn.Linear(length, outputs))
