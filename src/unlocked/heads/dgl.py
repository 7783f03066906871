"""The heads of Decoupled Greedy Learning (Belilovsky, Eickenberg, Oyallon, 2020): MLP, MLP-SR and CNN.

Their hidden width is the stage's own number of channels C; under a budget it becomes a smaller w, below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..errors import InvalidChoice
from .spec import POOLED, HeadSpec, Kind, at_least_one, channels, convolution, perceptron, to_rows


@dataclass(frozen=True)
class DGLMLPHead(HeadSpec):
    """Average pool to a quarter of each side, then to 2×2, flatten, `depth` × [fully connected → 4w, BatchNorm, ReLU],
    projection. On vectors and tokens: the same without pools, and w for 4w.

    `reductions` > 0 puts that many [1×1 convolution → w, BatchNorm, ReLU] between the two pools: with 3 of them it is
    the paper's MLP-SR ('staged spatial reduction'), which needs maps.
    """

    depth: int = 3
    reductions: int = 0

    smallest: ClassVar[int] = 4

    def __post_init__(self) -> None:
        at_least_one(self.name, depth=self.depth)
        if self.reductions < 0:
            raise InvalidChoice(f"The head 'dgl-mlp' was given reductions={self.reductions}; it must be 0 or more.")

    @property
    def name(self) -> str:
        return "dgl-mlp-sr" if self.reductions else "dgl-mlp"

    def reads(self, kind: Kind) -> bool:
        return kind == "maps" or not self.reductions

    def paper_width(self, features: Tensor) -> int:
        return channels(features)

    def layers(self, features: Tensor, kind: Kind, outputs: int, width: int) -> nn.Module:
        trunk: list[nn.Module] = []
        inputs, hidden = channels(features), width
        if kind == "maps":
            quarter = (math.ceil(features.shape[2] / 4), math.ceil(features.shape[3] / 4))
            trunk.append(nn.AdaptiveAvgPool2d(quarter))
            hidden *= POOLED**2
        for _ in range(self.reductions):
            trunk += convolution(inputs, width, kernel=1)
            inputs = width
        rows, length = to_rows(kind, inputs)
        return nn.Sequential(*trunk, *rows, *perceptron(kind, length, hidden, self.depth, outputs, bias=True))


@dataclass(frozen=True)
class DGLCNNHead(HeadSpec):
    """`depth` × [3×3 convolution → w at full resolution, BatchNorm, ReLU], average pool to 2×2, BatchNorm, flatten,
    projection."""

    depth: int = 2

    smallest: ClassVar[int] = 4

    def __post_init__(self) -> None:
        at_least_one(self.name, depth=self.depth)

    @property
    def name(self) -> str:
        return "dgl-cnn"

    def reads(self, kind: Kind) -> bool:
        return kind == "maps"

    def paper_width(self, features: Tensor) -> int:
        return channels(features)

    def layers(self, features: Tensor, kind: Kind, outputs: int, width: int) -> nn.Module:
        trunk: list[nn.Module] = []
        inputs = channels(features)
        for _ in range(self.depth):
            trunk += convolution(inputs, width, kernel=3)
            inputs = width
        (pool, flatten), length = to_rows(kind, width)
        return nn.Sequential(*trunk, pool, nn.BatchNorm2d(width), flatten, nn.Linear(length, outputs))
