"""The head of Nøkland & Eidnes, Training neural networks with local error signals (2019): predict and match."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..losses import Loss, PredSim
from .spec import HeadSpec, Kind, MeanOverTokens, at_least_one, channels


@dataclass(frozen=True)
class PredSimHead(HeadSpec):
    """Output (logits, features): a linear prediction, and what the similarity matrix is made of.

    Prediction: maps are averaged over windows until at most `decoder_inputs` values are left, then projected; the
    projection starts at zero (the authors' code zeroes its weight, here its bias too). Features: a 3×3 convolution of
    maps, a linear map of anything else, both without bias, to the stage's own number of channels or to a smaller width
    under a budget. `beta`, `statistic` and `rows` are those of losses.PredSim.
    """

    beta: float = 0.99
    statistic: str = "flatten"
    rows: int = 256
    decoder_inputs: int = 4096

    smallest: ClassVar[int] = 4

    def __post_init__(self) -> None:
        at_least_one(self.name, decoder_inputs=self.decoder_inputs)
        self.loss()  # checks the three options it takes

    @property
    def name(self) -> str:
        return "predsim"

    def paper_width(self, features: Tensor) -> int:
        return channels(features)

    def loss(self) -> Loss:
        return PredSim(self.beta, self.statistic, self.rows)

    def layers(self, features: Tensor, kind: Kind, outputs: int, width: int) -> nn.Module:
        inputs = channels(features)
        if kind != "maps":
            read = MeanOverTokens() if kind == "sequences" else nn.Identity()
            similar: nn.Module = nn.Linear(inputs, width, bias=False)
            return PredictAndMatch(read, nn.Identity(), _zero(nn.Linear(inputs, outputs)), similar)
        kernel = pool_kernel(inputs, (features.shape[2], features.shape[3]), self.decoder_inputs)
        left = inputs * _windows(features.shape[2], kernel[0]) * _windows(features.shape[3], kernel[1])
        pool = nn.Sequential(nn.AvgPool2d(kernel, ceil_mode=True), nn.Flatten())
        similar = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        return PredictAndMatch(nn.Identity(), pool, _zero(nn.Linear(left, outputs)), similar)


class PredictAndMatch(nn.Module):
    """h -> (decoder(pool(read(h))), similar(read(h)))."""

    def __init__(self, read: nn.Module, pool: nn.Module, decoder: nn.Module, similar: nn.Module) -> None:
        super().__init__()
        self.read, self.pool, self.decoder, self.similar = read, pool, decoder, similar

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.read(h)
        return self.decoder(self.pool(h)), self.similar(h)


def pool_kernel(channels: int, sides: tuple[int, int], largest: int) -> tuple[int, int]:
    """The window of the prediction's average pool: height and width double in turn until at most `largest` values of
    `channels` maps are left, or one window covers the map."""
    kernel, axis = [1, 1], 0
    while channels * math.prod(map(_windows, sides, kernel)) > largest and any(k < s for k, s in zip(kernel, sides)):
        if kernel[axis] < sides[axis]:
            kernel[axis] *= 2
        axis = 1 - axis
    return kernel[0], kernel[1]


def _windows(side: int, kernel: int) -> int:
    return math.ceil(side / kernel)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
