"""Barlow Twins (Zbontar, Jing, Misra, LeCun & Deny, 2021).

    L = Σ_d (1 − C_dd)² + λ Σ_{d≠e} C_de²,        C_de = 1/B Σ_k ẑ_kd ẑ'_ke

    ẑ, ẑ' the first and the second views' projections, each entry minus its mean over the batch and divided by the square root
    of its variance, 1/B Σ (…)², plus ε.

That is the paper's Eq. 2, the correlation, but for ε = 1e-5, which is the authors' code's (and batch normalisation's): an entry
that is the same for all images then correlates with nothing.

Limits: projections of both views alike, with entries uncorrelated and of variance ≫ ε, give 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidChoice
from .base import Judged, PairLoss
from .statistics import off_diagonal, two_views

EPSILON = 1e-5


@dataclass(frozen=True)
class BarlowTwins(PairLoss):
    """The formula above. weight: λ ≥ 0. Raises InvalidChoice (options), WrongTarget (z; or a batch of one image)."""

    weight: float = 0.0051

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise InvalidChoice(
                f"BarlowTwins weighs correlations of different entries; weight={self.weight} is not at least 0."
            )

    def judge(self, z: Tensor, y: Tensor, oracle: Tensor | None = None) -> Judged:
        one, other = two_views("BarlowTwins", z)
        with torch.autocast(z.device.type, enabled=False):
            correlation = standardised(one).T @ standardised(other) / len(one)
            unlike_one = (1 - correlation.diagonal()).square().sum()
            return Judged(unlike_one + self.weight * off_diagonal(correlation.square()).sum(), {})


def standardised(z: Tensor) -> Tensor:
    """ẑ of projections (B, D)."""
    variance, mean = torch.var_mean(z, 0, correction=0)
    return (z - mean) / (variance + EPSILON).sqrt()
