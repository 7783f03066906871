"""NT-Xent, the loss of SimCLR (Chen, Kornblith, Norouzi & Hinton, 2020; F Eq. 3.1-3.2, P Algorithm 3).

    L = 1/2B Σ_i −log( exp(s_{i,l_i⁺} / τ) / Σ_{l≠i} exp(s_il / τ) )

    s_il cosine similarity of the projections z_i and z_l, l_i⁺ the other view of i's image, τ temperature.

Limits: B = 1 has no negatives; the loss is 0. Projections that are all the same give log(2B − 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Judged, PairLoss, check_pairs
from .contrasting import check_temperature, contrast, cosines


@dataclass(frozen=True)
class NTXent(PairLoss):
    """The formula above. temperature: τ > 0. Raises InvalidChoice (options), WrongTarget (z)."""

    temperature: float = 0.5

    contrasts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_temperature("NTXent", self.temperature)

    def judge(self, z: Tensor, y: Tensor, oracle: Tensor | None = None) -> Judged:
        check_pairs("NTXent", z)
        similar = cosines(z)
        every = torch.ones(len(z), dtype=torch.bool, device=z.device)
        return Judged(contrast(similar, self.temperature, every, ~torch.diag(every)), {})
