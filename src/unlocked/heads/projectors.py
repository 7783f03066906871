"""The projectors of contrastive local learning: Fournier's thesis §3.3, Patel's §4.3.2 ('1c2f', '0c2f').

    1c2f    maps → 3×3 convolution of stride 2, C → C, BatchNorm, ReLU → mean over pixels → C, ReLU → projection
    0c2f    maps → mean over pixels → fully connected C → C, ReLU → projection

Fournier's local projector and Patel's '1c2f' are the same network. Neither thesis says how wide the first fully connected
layer is: here as wide as the features, C, as in SimCLR's own projector. That one, a perceptron of two layers on the pooled
features, is '0c2f'; the last stage always has it. Patel's '0c2f' on maps is pooled first, which the thesis leaves open.

Unlike InfoPro's heads of these names (infopro.py) the convolution always has stride 2 and keeps the number of channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..errors import InvalidChoice
from .reading import mean_row
from .spec import HeadSpec, Kind, channels, convolution


@dataclass(frozen=True)
class ProjectorHead(HeadSpec):
    """`convolutions` × [3×3 convolution of stride 2, BatchNorm, ReLU], mean over pixels, fully connected, ReLU, projection.

    Vectors and sequences have no pixels to convolve over: there only the fully connected layers are left (sequences are
    averaged first). `hidden`: width of convolutions and of the fully connected layer; None: the features' own. Under a budget
    it shrinks.
    """

    convolutions: int = 1
    hidden: int | None = None

    smallest: ClassVar[int] = 4

    def __post_init__(self) -> None:
        if self.convolutions < 0 or (self.hidden is not None and self.hidden < 1):
            raise InvalidChoice(
                f"A projector was given convolutions={self.convolutions}, hidden={self.hidden}; there may be 0 convolutions or "
                "more, and hidden is at least 1, or None for the features' own width."
            )

    @property
    def name(self) -> str:
        return "projector" if self.convolutions else "projector-mlp"

    def paper_width(self, features: Tensor) -> int:
        return channels(features) if self.hidden is None else self.hidden

    def layers(self, features: Tensor, kind: Kind, outputs: int, width: int) -> nn.Module:
        trunk: list[nn.Module] = []
        inputs = channels(features)
        for _ in range(self.convolutions if kind == "maps" else 0):
            trunk += convolution(inputs, width, kernel=3, stride=2)
            inputs = width
        return nn.Sequential(*trunk, *mean_row(kind), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


PROJECTORS: dict[str, ProjectorHead] = {"1c2f": ProjectorHead(), "0c2f": ProjectorHead(convolutions=0)}
"""By the theses' names, as the credit rules take them; among all heads they are 'projector' and 'projector-mlp'."""
