"""Hard negatives (Robinson, Chuang, Sra & Jegelka, 2021) and debiased contrast (Chuang et al., 2020).

    ℓ_i = −log( e^{s_ip/τ} / (e^{s_ip/τ} + n G_i) )                n = 2B − 2 negatives
    G_i = max( (E_i − τ⁺ e^{s_ip/τ}) / (1 − τ⁺), e^{−1/τ} )
    E_i = Σ_l w_il e^{s_il/τ} / Σ_l w_il,    w_il = e^{β s_il/τ}    l over the negatives of i
    L   = Σ_i ℓ_i / 2B

    s cosine similarity, τ temperature, β concentration on negatives that are like i, τ⁺ the chance that a negative is of i's
    class. The gradient passes through w too, as in the authors' code, whose w this is; the paper has e^{β s}.

Limits: β = 0 is debiased contrast; β = 0 and τ⁺ = 0 is NT-Xent, if the bound e^{−1/τ} ≤ e^{s/τ} does not bind, which it cannot
then. B = 1 has no negatives; the loss is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InvalidChoice
from .base import Judged, PairLoss, check_pairs
from .contrasting import check_temperature, cosines, negatives, of_partners


@dataclass(frozen=True)
class HardNegatives(PairLoss):
    """The formula above.

    Args:
        beta: β ≥ 0.
        tau_plus: τ⁺ in [0, 1).
        temperature: τ > 0.

    Raises InvalidChoice (options), WrongTarget (z).
    """

    beta: float = 1.0
    tau_plus: float = 0.1
    temperature: float = 0.5

    contrasts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_temperature("HardNegatives", self.temperature)
        if not 0 <= self.beta < math.inf:
            raise InvalidChoice(
                f"HardNegatives weighs negatives by exp(beta·s/τ); beta={self.beta} is not a number of at least 0."
            )
        if not 0 <= self.tau_plus < 1:
            raise InvalidChoice(f"HardNegatives' tau_plus is the chance of a class, in [0, 1); given {self.tau_plus}.")

    def judge(self, z: Tensor, y: Tensor, oracle: Tensor | None = None) -> Judged:
        check_pairs("HardNegatives", z)
        if len(z) == 2:
            return Judged(cosines(z).sum() * 0.0, {})  # a gradient all the same: zero
        similar = cosines(z)
        with torch.autocast(z.device.type, enabled=False):
            logits = similar / self.temperature
            itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
            highest = logits.detach().masked_fill(itself, -math.inf).amax(1, keepdim=True)
            # every e^… of a row is divided by the greatest, so that none overflows
            scaled = (logits - highest).masked_fill(itself, 0.0)
            positive = of_partners(scaled)
            floor = (-1 / self.temperature - highest[:, 0]).exp()
            terms = (positive.exp() + self._others(scaled, positive, floor)).log() - positive
            return Judged(terms.mean(), {})

    def _others(self, scaled: Tensor, positive: Tensor, floor: Tensor) -> Tensor:
        """n G_i (N,), all in the scale of its row."""
        other = negatives(len(scaled), scaled.device)
        weights = (self.beta * scaled).masked_fill(~other, -math.inf).softmax(1)
        expected = (weights * scaled.exp()).sum(1)
        debiased = (expected - self.tau_plus * positive.exp()) / (1 - self.tau_plus)
        return (len(scaled) - 2) * torch.where(debiased < floor, floor, debiased)
