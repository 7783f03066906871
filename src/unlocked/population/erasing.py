"""Random Erasing Data Augmentation (Zhong et al., 2020): a box of an image is blotted out.

    with probability p, for each image:   x ← 0 inside a box
    area / (H·W) ~ uniform [0.02, 0.33];  height / width ~ log-uniform [0.3, 3.3];  its place uniform where it fits

Limits: p = 0 changes nothing, p = 1 erases in every image. A box that does not fit is drawn anew, up to ten times; an image
for which none fits stays as it is (fewer than one in 10¹⁰ of images up to twice as wide as high).

Differs from the paper: 0 (the mean of normalised data) stands for random values; the ratio is log-uniform, so that tall and
wide boxes are alike; where a box lies is drawn after its sides, so large ones are as frequent as they were drawn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

AREA = (0.02, 0.33)
RATIO = (0.3, 3.3)
_TRIES = 10


def erase(x: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Of normalised images (B, C, H, W); all at once, the numbers drawn on the CPU, alike for every device."""
    drawn = torch.rand(len(x), 3 + 2 * _TRIES, generator=generator).to(x.device)
    inside = boxes(drawn[:, 1:], x.shape[-2], x.shape[-1]) & (drawn[:, :1, None] < probability)
    return x.masked_fill(inside[:, None], 0)


def boxes(drawn: Tensor, height: int, width: int) -> Tensor:
    """One box for each row of uniform numbers (B, 2 + 2 · tries), as a mask (B, H, W)."""
    place, area, ratio = drawn.split((2, _TRIES, _TRIES), 1)
    low, high = map(math.log, RATIO)
    area = (AREA[0] + (AREA[1] - AREA[0]) * area) * (height * width)
    ratio = (low + (high - low) * ratio).exp()
    tall, wide = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (tall >= 1) & (tall <= height) & (wide >= 1) & (wide <= width)
    first = fits.byte().argmax(1, keepdim=True)
    tall, wide = ((sides * fits).gather(1, first) for sides in (tall, wide))  # none fits: no sides
    rows, columns = _span(place[:, :1], tall, height), _span(place[:, 1:], wide, width)
    return rows[:, :, None] & columns[:, None, :]


def _span(place: Tensor, length: Tensor, side: int) -> Tensor:
    """Where a span of this length lies: a mask (B, side)."""
    begin = torch.minimum((place * (side - length + 1)).floor(), side - length)
    index = torch.arange(side, device=place.device)
    return (index >= begin) & (index < begin + length)
