"""What losses of the statistics of a batch share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import WrongTarget
from .base import check_pairs


def two_views(loss: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """First and second views (B, D) each, in at least float32. Raises WrongTarget, also for a batch of one image."""
    check_pairs(loss, z)
    if len(z) == 2:
        raise WrongTarget(
            f"{loss} compares the statistics of a batch, and a batch of one image has none. Take a batch size of at least 2 "
            "(and one that leaves no remainder of 1), or a contrastive loss."
        )
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return wide[0::2], wide[1::2]


def off_diagonal(square: Tensor) -> Tensor:
    """(D, D) with zeros on the diagonal."""
    return square - torch.diag(square.diagonal())
