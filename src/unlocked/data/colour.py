"""`jitter` and `gray`: random changes of colour, before normalisation.

Chen et al., A Simple Framework for Contrastive Learning (SimCLR), 2020, Appendix A; with the strengths of Fournier's thesis,
Appendix A.1, and Patel's, Figure A.2. On values in [0, 1], with x̄ the luma 0.299 R + 0.587 G + 0.114 B of a pixel:

    brightness   f·x                    f ∼ U(0.6, 1.4)
    contrast     f·x + (1 − f)·mean x̄   f ∼ U(0.6, 1.4), the mean over the image's pixels
    saturation   f·x + (1 − f)·x̄        f ∼ U(0.6, 1.4)
    hue          H + f of HSV, mod 1    f ∼ U(−0.1, 0.1) of a full turn

each clamped to [0, 1]. `jitter` does all four, in an order drawn for each image, with probability 0.8; `gray` puts x̄ into all
three channels, with probability 0.2. These are torchvision's ColorJitter(0.4, 0.4, 0.4, 0.1) and RandomGrayscale, but for the
rounding to bytes after each change, which is left out here; the four changes are computed by kornia.

Limits: 1 or 3 channels. Images of one channel have no colour: `jitter` changes their brightness and contrast, `gray` nothing.
`jitter` clamps, so it has to know the range of values: it wants uint8 images.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from ..errors import BadData, InvalidChoice
from .operation import Operation, as_float

LUMA = (0.299, 0.587, 0.114)


class Jitter(Operation):
    """Parameters, float32: whether at all (0 or 1); f of brightness, contrast, saturation and hue; which of the four (0 to 3)
    comes first, second, third, last. Raises InvalidChoice, when it is made, without kornia."""

    name = "jitter"
    probability = 0.8
    strengths = (0.4, 0.4, 0.4, 0.1)

    def __init__(self) -> None:
        if importlib.util.find_spec("kornia") is None:
            raise InvalidChoice(
                "The augmentation 'jitter' (and 'simclr', of which it is a part) needs kornia, which is not installed; pip "
                "install 'unlocked[ssl]', or leave it out."
            )

    def draw(self, count: int, height: int, width: int, numbers: torch.Generator) -> Tensor:
        drawn = torch.rand(count, 9, generator=numbers)
        spread = (2 * drawn[:, 1:5] - 1) * torch.tensor(self.strengths)
        factors = spread + torch.tensor([1.0, 1.0, 1.0, 0.0])
        return torch.cat([drawn[:, :1] < self.probability, factors, drawn[:, 5:].argsort(dim=1)], dim=1)

    def apply(self, x_BCHW: Tensor, drawn_Bk: Tensor) -> Tensor:
        x = as_float(x_BCHW)
        changed = drawn_Bk[:, 0].nonzero()[:, 0]
        if not len(changed):
            return x
        factors, order = drawn_Bk[changed, 1:5], drawn_Bk[changed, 5:]
        part = x[changed] / 255
        for place in range(4):
            for which, change in enumerate(_changes(part.shape[1])):
                here = (order[:, place] == which).nonzero()[:, 0]
                if len(here):
                    part[here] = change(part[here], factors[here, which])
        return x.index_copy(0, changed, part * 255)

    def check(self, input_shape: tuple[int, ...], dtype: torch.dtype, text: str) -> None:
        _check_channels(self, input_shape, text)
        if dtype != torch.uint8:
            raise BadData(
                f"The augmentation {text!r} changes colours between 0 and 255 and needs images of type uint8, but these are "
                f"{dtype}; give them as bytes, or leave jitter out."
            )


class Gray(Operation):
    """Parameters, int64: whether at all."""

    name = "gray"
    probability = 0.2

    def draw(self, count: int, height: int, width: int, numbers: torch.Generator) -> Tensor:
        return (torch.rand(count, 1, generator=numbers) < self.probability).long()

    def apply(self, x_BCHW: Tensor, drawn_Bk: Tensor) -> Tensor:
        if x_BCHW.shape[1] == 1:
            return x_BCHW
        x = as_float(x_BCHW)
        red, green, blue = (weight * channel for weight, channel in zip(LUMA, x.unbind(1)))
        return torch.where(drawn_Bk.bool()[:, :, None, None], (red + green + blue)[:, None], x)

    def check(self, input_shape: tuple[int, ...], dtype: torch.dtype, text: str) -> None:
        _check_channels(self, input_shape, text)


def _changes(channels: int) -> list[Any]:
    """Brightness, contrast, saturation and hue of images (B, C, H, W) by factors (B,); the first two if C is 1."""
    from kornia import enhance

    def turned(x: Tensor, turn_B: Tensor) -> Tensor:
        return enhance.adjust_hue(x, 2 * math.pi * turn_B)

    changes = [enhance.adjust_brightness_accumulative, enhance.adjust_contrast_with_mean_subtraction]
    return changes if channels == 1 else [*changes, enhance.adjust_saturation_with_gray_subtraction, turned]


def _check_channels(operation: Operation, input_shape: tuple[int, ...], text: str) -> None:
    if input_shape[0] not in (1, 3):
        raise BadData(
            f"The augmentation {text!r} changes colours and needs images of 1 or 3 channels, but these have "
            f"{input_shape[0]}; leave {operation.name} out."
        )
