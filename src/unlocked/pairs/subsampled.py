"""NT-Xent of similar pairs only (Fournier, Patel, Eickenberg, Oyallon & Belilovsky, 2023; F Eq. 3.7-3.8, §3.3.3).

    α_il = 1[s_il ≥ T]
    L    = 1/2B Σ_i −α_{i,l_i⁺} log( exp(s_{i,l_i⁺} / τ) / Σ_{l≠i} α_il exp(s_il / τ) )

    s_il cosine similarity of the stage's own projections, T threshold; the rest as in nt_xent.py. α has no gradient.

Pairs that the stage finds unlike are left alone, positives and negatives, which keeps dimensions from collapsing. The positive
of a row stands in its denominator too, so each row's term is at least 0.

Limits: T = −1 is NT-Xent. If all negatives of a row are masked, its term is log 1 = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import choose
from .base import Judged, PairLoss, check_pairs
from .contrasting import (
    MEANS,
    at_least,
    check_cosine,
    check_temperature,
    contrast,
    cosines,
    negatives,
    of_partners,
    positives,
    shares,
)

WHICH = ("both", "negatives", "positives")


@dataclass(frozen=True)
class SubsampledNTXent(PairLoss):
    """The formula above.

    Args:
        threshold: T in [-1, 1]; the thesis has 0 for CIFAR-10, -0.4 for STL-10, 0.3 for Fashion-MNIST.
        which: what is masked. 'both'. 'positives': α_{i,l_i⁺} before the logarithm alone; the denominator has all l ≠ i.
            'negatives': α_il of negatives alone; every positive counts, and stays in its denominator even if it is below T
            (by the letter it would drop out, and a row of which nothing is similar would be log of something over 0).
        temperature: τ > 0.
        mean: 'all' divides by 2B whatever was kept, as the thesis does; 'kept' by the number of positives kept.

    Notes: 'positives kept' and 'negatives kept', shares of all of them. Raises InvalidChoice (options), WrongTarget (z).
    """

    threshold: float = 0.0
    which: str = "both"
    temperature: float = 0.5
    mean: str = "all"

    contrasts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_cosine("SubsampledNTXent", "threshold", self.threshold)
        choose("which of SubsampledNTXent", self.which, WHICH)
        check_temperature("SubsampledNTXent", self.temperature)
        choose("mean of SubsampledNTXent", self.mean, MEANS)

    def judge(self, z: Tensor, y: Tensor, oracle: Tensor | None = None) -> Judged:
        check_pairs("SubsampledNTXent", z)
        similar = cosines(z)
        alpha = at_least(similar.detach(), self.threshold)
        every = torch.ones_like(alpha)
        kept = of_partners(alpha if self.which != "negatives" else every)
        among = alpha if self.which != "positives" else every
        among = among & negatives(len(z), z.device) | positives(len(z), z.device)
        return Judged(contrast(similar, self.temperature, kept, among, self.mean), shares(kept, among))
