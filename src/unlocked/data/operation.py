"""What a random change of images is: parameters drawn for a whole epoch, applied to one batch after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Operation(ABC):
    """One random change of images (B, C, H, W); `normalised` says whether it works on them after normalisation."""

    name: ClassVar[str]
    normalised: ClassVar[bool] = False

    @abstractmethod
    def draw(self, count: int, height: int, width: int, numbers: torch.Generator) -> Tensor:
        """(count, k) parameters, int64 or float32, one row per epoch position."""

    @abstractmethod
    def apply(self, x_BCHW: Tensor, drawn_Bk: Tensor) -> Tensor:
        """The changed batch, of the same shape; the given one is left as it was. What makes values that bytes cannot hold
        gives float32 for bytes; every other type stays."""

    def check(self, input_shape: tuple[int, ...], dtype: torch.dtype, text: str) -> None:  # noqa: B027  # most work on all
        """BadData, naming the augmentation `text`, unless it can work on images (C, H, W) of this type."""


def as_float(x: Tensor) -> Tensor:
    """Whole numbers as float32; what is of a float type already is given back."""
    return x if x.is_floating_point() else x.float()
