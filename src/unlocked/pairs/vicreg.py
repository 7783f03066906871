"""VICReg (Bardes, Ponce & LeCun, 2022).

    L = λ s(z, z') + μ (v(z) + v(z')) + ν (c(z) + c(z'))

    s(z, z') = 1/(B D) Σ_k ‖z_k − z'_k‖²
    v(z)     = 1/D Σ_d max(0, 1 − √(Var(z_·d) + ε))        Var with 1/(B − 1), ε = 1e-4
    c(z)     = 1/D Σ_{d≠e} Cov(z)_de²                      Cov with 1/(B − 1)

    z, z' the projections of the first and of the second views, not normalised.

s is a mean over all entries, as in the paper's Algorithm 1 and the authors' code; its Eq. 5 is D times that. v is whole, as in
the paper; the code halves it.

Limits: views alike, with uncorrelated entries of variance at least 1, give 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidChoice
from .base import Judged, PairLoss
from .statistics import off_diagonal, two_views

EPSILON = 1e-4


@dataclass(frozen=True)
class VICReg(PairLoss):
    """The formula above.

    Args:
        invariance, variance, covariance: λ, μ, ν, all ≥ 0.

    Raises InvalidChoice (options), WrongTarget (z; or a batch of one image).
    """

    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0

    def __post_init__(self) -> None:
        for weight in (self.invariance, self.variance, self.covariance):
            if not 0 <= weight < math.inf:
                raise InvalidChoice(f"VICReg weighs its three terms by numbers of at least 0; given {weight}.")

    def judge(self, z: Tensor, y: Tensor, oracle: Tensor | None = None) -> Judged:
        views = two_views("VICReg", z)
        with torch.autocast(z.device.type, enabled=False):
            apart = (views[0] - views[1]).square().mean()
            narrow = sum((narrowness(view) for view in views), torch.zeros_like(apart))
            tied = sum((redundancy(view) for view in views), torch.zeros_like(apart))
            return Judged(self.invariance * apart + self.variance * narrow + self.covariance * tied, {})


def narrowness(z: Tensor) -> Tensor:
    """v(z) of (B, D)."""
    return (1 - (z.var(0) + EPSILON).sqrt()).relu().mean()


def redundancy(z: Tensor) -> Tensor:
    """c(z) of (B, D)."""
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (len(z) - 1)
    return off_diagonal(covariance.square()).sum() / z.shape[1]
