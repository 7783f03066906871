"""Mixing the samples of a batch: mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019).

    mixup     x ← λ x + (1 − λ) x_π                 y ← λ y + (1 − λ) y_π
    cutmix    x ← x outside a box, x_π inside it    y ← κ y + (1 − κ) y_π

    λ ~ Beta(α, α), one for a batch;  π a permutation of the batch, one for a batch;  the box's sides are √(1 − λ) of the
    image's, its centre is uniform in the image, what is outside the image is cut off;  κ the share of pixels outside the box

Limits: λ = 1 changes nothing. A sample may be its own partner; then it stays as it is.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

Box = tuple[int, int, int, int]  # top, bottom, left, right: rows top … bottom − 1


def mixup(x: Tensor, y: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of x (B, …) and y (B, K), both of a float type."""
    share = _share(alpha, generator)
    partner = _partners(x, generator)
    return _between(x, x.index_select(0, partner), share), _between(y, y[partner], share)


def cutmix(x: Tensor, y: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of images (B, C, H, W) and y (B, K)."""
    share = _share(alpha, generator)
    partner = _partners(x, generator)
    top, bottom, left, right = box(x.shape[-2], x.shape[-1], share, generator)
    mixed = x.clone()
    mixed[..., top:bottom, left:right] = x[..., top:bottom, left:right].index_select(0, partner)
    kept = 1 - (bottom - top) * (right - left) / (x.shape[-2] * x.shape[-1])
    return mixed, _between(y, y[partner], kept)


def box(height: int, width: int, share: float, generator: torch.Generator) -> Box:
    """A box of 1 − `share` of the image's area, less what is cut off at its edges and up to rounding of its sides."""
    bounds = []
    for side in (height, width):
        length = round(side * math.sqrt(1 - share))
        begin = int(torch.randint(side, (), generator=generator)) - length // 2
        bounds += [max(0, begin), min(side, begin + length)]
    top, bottom, left, right = bounds
    return top, bottom, left, right


def _share(alpha: float, generator: torch.Generator) -> float:
    """λ ~ Beta(α, α). PyTorch's own Beta takes no generator."""
    seed = int(torch.randint(1 << 62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def _partners(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randperm(len(x), generator=generator).to(x.device)


def _between(mine: Tensor, other: Tensor, share: float) -> Tensor:
    """share · mine + (1 − share) · other, exact at both ends."""
    return torch.lerp(other, mine, share)
