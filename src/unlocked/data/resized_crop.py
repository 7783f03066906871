"""`resized-crop`: a random window of random area and aspect ratio, resized to the size of the image.

Szegedy et al., Going Deeper with Convolutions, 2015, section 6; as in Chen et al., A Simple Framework for Contrastive
Learning (SimCLR), 2020, Appendix A. With the distribution of torchvision's RandomResizedCrop, up to ten times:

    area ∼ U(0.08, 1)·H·W,   log ratio ∼ U(log 3/4, log 4/3),   w = √(area·ratio),   h = √(area/ratio), both rounded,

until w ≤ W and h ≤ H; the window then lies anywhere in the image, with equal probability. If none of the ten fits, it is
the largest window of an allowed ratio, in the middle.

Resizing is bilinear, with pixel centres at half numbers, and sees nothing outside of the window. As the window is never
larger than the result, antialiasing would change nothing: what PIL, and torchvision with and without it, compute is the
same but for rounding to bytes, which is left out here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .operation import Operation

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10


class ResizedCrop(Operation):
    """Parameters, int64: top, left, height and width of the window, in pixels."""

    name = "resized-crop"

    def draw(self, count: int, height: int, width: int, numbers: torch.Generator) -> Tensor:
        high, wide = (torch.full((count,), side) for side in _central(height, width))
        open_ = torch.ones(count, dtype=torch.bool)
        for _ in range(ATTEMPTS):
            area, log_ratio = torch.rand(2, count, generator=numbers, dtype=torch.float64)
            area = (SCALE[0] + area * (SCALE[1] - SCALE[0])) * height * width
            ratio = (math.log(RATIO[0]) + log_ratio * math.log(RATIO[1] / RATIO[0])).exp()
            w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
            fits = open_ & (w > 0) & (w <= width) & (h > 0) & (h <= height)
            high, wide = torch.where(fits, h, high), torch.where(fits, w, wide)
            open_ = open_ & ~fits
        place = torch.rand(2, count, generator=numbers, dtype=torch.float64)
        anywhere = [(u * (side - part + 1)).long() for u, side, part in zip(place, (height, width), (high, wide))]
        top = torch.where(open_, (height - high) // 2, anywhere[0])
        left = torch.where(open_, (width - wide) // 2, anywhere[1])
        return torch.stack([top, left, high, wide], dim=1)

    def apply(self, x_BCHW: Tensor, drawn_Bk: Tensor) -> Tensor:
        x = x_BCHW if x_BCHW.dtype == torch.float64 else x_BCHW.float()  # fewer bits would not tell two pixels apart
        rows = _read(drawn_Bk[:, 0], drawn_Bk[:, 2], x.shape[-2], x.dtype)
        columns = _read(drawn_Bk[:, 1], drawn_Bk[:, 3], x.shape[-1], x.dtype)
        grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1)
        resized = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return resized.to(x_BCHW.dtype) if x_BCHW.is_floating_point() else resized


def _read(begin_B: Tensor, length_B: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """(B, side): where each pixel of the result is read along one side, −1 and 1 being the image's borders."""
    begin, length = begin_B.to(dtype)[:, None], length_B.to(dtype)[:, None]
    centre = (torch.arange(side, device=begin_B.device, dtype=dtype) + 0.5) * length / side - 0.5
    pixel = begin + torch.minimum(centre.clamp(min=0), length - 1)  # beyond the outermost centres: those pixels
    return (2 * pixel + 1) / side - 1


def _central(height: int, width: int) -> tuple[int, int]:
    """Height and width of the largest window of an allowed ratio."""
    if width / height < RATIO[0]:
        return round(width / RATIO[0]), width
    if width / height > RATIO[1]:
        return height, round(height * RATIO[1])
    return height, width
