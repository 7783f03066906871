"""NT-Xent of the pairs that are easy for an oracle (Fournier et al., 2023; F Eq. 3.3-3.4, §3.2.2, A.4).

    β⁺_i = 1[s̃_{i,l_i⁺} ≥ T⁺]        β⁻_il = 1[s̃_il ≤ T⁻]
    L    = 1/2B Σ_i −β⁺_i log( exp(s_{i,l_i⁺} / τ) / Σ_{l≠i} β⁻_il exp(s_il / τ) )

    s̃ cosine similarities of the projections of an oracle, a network trained before; the rest as in nt_xent.py. β has no
    gradient.

By the letter of Eq. 3.4 the positive stands in the denominator only if the oracle finds it unlike, s̃ ≤ T⁻; with T⁻ < T⁺ a
positive that is kept never does. Then the term of a row may be below 0, and a row without a negative would be log of something
over 0: it is left out.

Limits: T⁺ = −1, T⁻ = 1 is NT-Xent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import choose
from .base import Judged, PairLoss, check_pairs
from .contrasting import (
    MEANS,
    at_least,
    at_most,
    check_cosine,
    check_temperature,
    contrast,
    cosines,
    judged_by,
    negatives,
    of_partners,
    positives,
    shares,
    unless_lost,
)


@dataclass(frozen=True)
class OracleNTXent(PairLoss):
    """The formula above.

    Args:
        positive: T⁺ in [-1, 1].
        negative: T⁻ in [-1, 1].
        temperature: τ > 0.
        positive_in_denominator: False: as the formula says. True: always, as in NT-Xent, so that terms are at least 0.
        mean: 'all' divides by 2B whatever was kept, as the thesis does; 'kept' by the number of rows that have a term.

    Notes: 'positives kept' and 'negatives kept', shares of all of them. Raises InvalidChoice (options), WrongTarget (z and
    oracle).
    """

    positive: float = 0.7
    negative: float = 0.3
    temperature: float = 0.5
    positive_in_denominator: bool = False
    mean: str = "all"

    contrasts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_cosine("OracleNTXent", "positive", self.positive)
        check_cosine("OracleNTXent", "negative", self.negative)
        check_temperature("OracleNTXent", self.temperature)
        choose("mean of OracleNTXent", self.mean, MEANS)

    @property
    def reads_oracle(self) -> bool:
        return True

    def judge(self, z: Tensor, y: Tensor, oracle: Tensor | None = None) -> Judged:
        check_pairs("OracleNTXent", z)
        compared = judged_by("OracleNTXent", oracle, z)
        kept, among = easy(compared, self.positive, self.negative, self.positive_in_denominator)
        loss = contrast(cosines(z), self.temperature, kept, among, self.mean)
        return Judged(unless_lost(loss, compared), shares(kept, among))


def easy(similar: Tensor, positive: float, negative: float, positive_in_denominator: bool) -> tuple[Tensor, Tensor]:
    """β⁺ (N,) and β⁻ (N, N), the latter without i itself, of similarities (N, N) without gradient."""
    rows, device = len(similar), similar.device
    among = at_most(similar, negative) & (negatives(rows, device) | positives(rows, device))
    if positive_in_denominator:
        among = among | positives(rows, device)
    return of_partners(at_least(similar, positive)), among
