"""DGSSL with layerwise loss modification, DGSSL-LLM (P §4.2.2, Algorithms 5-7; §4.3.3).

    μ   = images whose two views have S ≥ α        Ω_a = rows k with S(a, k) ≤ β
    L   = 1/(2|μ|) Σ_{a of an image in μ} −log( exp(S(a, b) / τ) / Σ_{k≠a, k∈Ω_a} exp(S(a, k) / τ) )

    S cosine similarity, b the other view of a's image, α and β the stage's thresholds, τ temperature.

Stage j of K takes the μ^(K−j) easiest of the positives and of the negatives, the last one all: `ratios`. What thresholds that
means is read off the similarities that a network trained before gives to a set of pairs: `thresholds`. So problems get harder
with depth. Where subsampling (subsampled.py) keeps negatives that are like, this keeps those that are unlike.

By the letter of Algorithm 5 the denominator has the positive only if S(a, b) ≤ β. A row whose denominator is empty would be log
of something over 0: it is left out, of the sum and of |μ|.

Limits: α = −1, β = 1 is NT-Xent. Sample ratio 1 gives these thresholds to every stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InvalidChoice, choose
from .base import Judged, PairLoss, check_pairs
from .contrasting import MEANS, check_cosine, check_temperature, contrast, cosines, judged_by, shares, unless_lost
from .oracle import easy

BY = ("oracle", "stage")
ORDERS = ("decreasing", "increasing")


@dataclass(frozen=True)
class EasyNTXent(PairLoss):
    """The formula above.

    Args:
        alpha: α in [-1, 1], or one for each stage from the first. -1 keeps all positives.
        beta: β in [-1, 1], or one for each stage. 1 keeps all negatives, which is the thesis' 'positives only'.
        by: whose similarities are compared with α and β: 'stage': the stage's own, as in Algorithm 5; 'oracle': the oracle's.
        temperature: τ > 0.
        positive_in_denominator: False: as the formula says. True: always, as in NT-Xent.
        mean: 'kept' divides by 2|μ|, as the thesis does; 'all' by 2B.

    Notes: 'positives kept' and 'negatives kept', shares of all of them. Raises InvalidChoice (options), WrongTarget (z and
    oracle).
    """

    alpha: float | tuple[float, ...] = -1.0
    beta: float | tuple[float, ...] = 1.0
    by: str = "stage"
    temperature: float = 0.5
    positive_in_denominator: bool = False
    mean: str = "kept"

    contrasts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            for one in value if isinstance(value, tuple) else (value,):
                check_cosine("EasyNTXent", name, one)
        choose("by of EasyNTXent", self.by, BY)
        check_temperature("EasyNTXent", self.temperature)
        choose("mean of EasyNTXent", self.mean, MEANS)

    @property
    def reads_oracle(self) -> bool:
        return self.by == "oracle"

    def at(self, stage: int, stages: int) -> EasyNTXent:
        """With the thresholds of one stage. Raises InvalidChoice unless there are as many as stages."""
        return replace(
            self, alpha=_of_stage("alpha", self.alpha, stage, stages), beta=_of_stage("beta", self.beta, stage, stages)
        )

    def judge(self, z: Tensor, y: Tensor, oracle: Tensor | None = None) -> Judged:
        check_pairs("EasyNTXent", z)
        if isinstance(self.alpha, tuple) or isinstance(self.beta, tuple):
            raise InvalidChoice(
                "EasyNTXent has thresholds for each stage: take those of one by loss.at(stage, stages) first."
            )
        similar = cosines(z)
        compared = judged_by("EasyNTXent", oracle, z) if self.by == "oracle" else similar.detach()
        kept, among = easy(compared, self.alpha, self.beta, self.positive_in_denominator)
        loss = contrast(similar, self.temperature, kept, among, self.mean)
        return Judged(unless_lost(loss, compared), shares(kept, among))


def _of_stage(name: str, values: float | tuple[float, ...], stage: int, stages: int) -> float:
    if not isinstance(values, tuple):
        return values
    if len(values) != stages:
        raise InvalidChoice(
            f"EasyNTXent got {len(values)} values of {name} for {stages} stages; give one for each, or a single one for all."
        )
    return values[stage]


def ratios(ratio: float, stages: int, order: str = "increasing") -> list[float]:
    """The share of pairs μ^(K−j) that stage j = 1 … K keeps; μ in (0, 1].

    order: of difficulty with depth. 'increasing': the last stage keeps all. 'decreasing': the first one, μ^(j−1).
    Raises InvalidChoice.
    """
    choose("order of difficulty", order, ORDERS)
    if not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise InvalidChoice(
            f"A sample ratio is a share of pairs in (0, 1]; given {ratio!r}. The thesis takes 0.81 to 0.97."
        )
    if stages < 1:
        raise InvalidChoice(f"There must be at least one stage to keep pairs for; given stages={stages}.")
    kept = [ratio ** (stages - j) for j in range(1, stages + 1)]
    return kept if order == "increasing" else kept[::-1]


def thresholds(
    positive: Tensor | Sequence[float], negative: Tensor | Sequence[float], positives: float, negatives: float
) -> tuple[float, float]:
    """(α, β) with which the share `positives` of positive pairs has S ≥ α, and `negatives` of negative pairs has S ≤ β.

    positive, negative: similarities of a sample of pairs, any shape. Of n pairs the least number is kept that is not below the
    share, and never fewer than one; pairs just as similar as the last of them are kept too. Share 1 gives α = −1, β = 1, which
    keeps also what the sample does not show. Raises InvalidChoice.
    """
    for name, share in (("positives", positives), ("negatives", negatives)):
        if not 0 < share <= 1:
            raise InvalidChoice(f"The share of {name} to keep must be in (0, 1]; given {share}.")
    return -_largest_kept("positive", -torch.as_tensor(positive), positives), _largest_kept(
        "negative", torch.as_tensor(negative), negatives
    )


def _largest_kept(name: str, similar: Tensor, share: float) -> float:
    """The value at which, counted from the least, the share is reached."""
    if share == 1:
        return 1.0
    flat = similar.detach().flatten()
    if len(flat) == 0 or not bool(flat.isfinite().all()):
        fault = "there are none" if len(flat) == 0 else "some are not finite"
        raise InvalidChoice(
            f"Thresholds are read off similarities of {name} pairs, and {fault}. Give a batch of at least two images, judged "
            "by a trained network."
        )
    wanted = max(1, math.ceil(share * len(flat) - 1e-9))  # 0.07 of 100 are 7, whatever the product's last digit
    return max(-1.0, min(1.0, float(flat.double().kthvalue(wanted).values)))
