"""Cancelling false negatives (Huynh, Kornblith, Walter, Maire & Khademi, 2022; cited in F §3.2.2).

    eliminate   ℓ_i = −log( e_ip / Σ_{l≠i, l∉F_i} e_il )
    attract     ℓ_i = −1/(1 + |F_i|) Σ_{f ∈ {p} ∪ F_i} log( e_if / Σ_{l≠i} e_il )
    L = Σ_i ℓ_i / 2B,    e_il = exp(s_il / τ),    s cosine similarity, p the other view of i's image

F_i are the negatives of i that are held for views of i's class:

    labels      those of the same label: an upper bound, for it reads labels
    top         the k negatives with the greatest score
    threshold   those with a score of at least T

    score of l for i: the greater of l's similarities with the two views of i's image, without gradient.

The paper scores candidates by a support set of further views of the image; here the two views that there are stand for it.

Limits: k = 0, or T above all scores, or labels that all differ, is NT-Xent. 'attract' by labels is supervised contrast (Khosla
et al., 2020). If all negatives are eliminated the loss is log 1 = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InvalidChoice, choose
from ..losses import WrongTarget
from .base import Judged, PairLoss, check_pairs, partners
from .contrasting import at_least, check_cosine, check_temperature, contrast, cosines, negatives, positives, shares

BY = ("labels", "threshold", "top")
CANCEL = ("attract", "eliminate")


@dataclass(frozen=True)
class FalseNegatives(PairLoss):
    """The formula above.

    Args:
        by: how false negatives are found: 'labels', 'top', 'threshold'.
        cancel: 'eliminate' or 'attract'.
        top: k ≥ 0, for 'top'; if there are fewer negatives, all of them.
        threshold: T in [-1, 1], for 'threshold'.
        temperature: τ > 0.

    Notes: 'negatives kept', the share of negatives not held for false. Raises InvalidChoice (options), WrongTarget (z, y).
    """

    by: str = "threshold"
    cancel: str = "eliminate"
    top: int = 8
    threshold: float = 0.7
    temperature: float = 0.5

    contrasts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choose("by of FalseNegatives", self.by, BY)
        choose("cancel of FalseNegatives", self.cancel, CANCEL)
        if not isinstance(self.top, int) or self.top < 0:
            raise InvalidChoice(
                f"FalseNegatives takes the top most similar negatives for false, a whole number of them; given top={self.top}."
            )
        check_cosine("FalseNegatives", "threshold", self.threshold)
        check_temperature("FalseNegatives", self.temperature)

    @property
    def reads_labels(self) -> bool:
        return self.by == "labels"

    def judge(self, z: Tensor, y: Tensor, oracle: Tensor | None = None) -> Judged:
        check_pairs("FalseNegatives", z)
        similar = cosines(z)
        rows, device = len(z), z.device
        false = self._false(similar.detach(), y)
        every = torch.ones(rows, dtype=torch.bool, device=device)
        true = negatives(rows, device) & ~false
        notes = {"negatives kept": shares(every, true)["negatives kept"]}
        if self.cancel == "eliminate":
            return Judged(contrast(similar, self.temperature, every, true | positives(rows, device)), notes)
        return Judged(attraction(similar, self.temperature, false | positives(rows, device)), notes)

    def _false(self, similar: Tensor, y: Tensor) -> Tensor:
        """F as a mask (N, N)."""
        other = negatives(len(similar), similar.device)
        if self.by == "labels":
            return _same_label(y, len(similar)) & other
        score = torch.maximum(similar, similar[partners(len(similar), similar.device)])
        if self.by == "threshold":
            return at_least(score, self.threshold) & other
        count = min(self.top, len(similar) - 2)
        most = score.masked_fill(~other, -2.0).topk(count, 1).indices
        return torch.zeros_like(other).scatter(1, most, True)


def attraction(similar: Tensor, temperature: float, positive: Tensor) -> Tensor:
    """−1/N Σ_i 1/|P_i| Σ_{f ∈ P_i} log( e_if / Σ_{l≠i} e_il ). similar (N, N); positive (N, N) bool: P, none of them empty."""
    with torch.autocast(similar.device.type, enabled=False):
        logits = similar / temperature
        itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        whole = logits.masked_fill(itself, -torch.inf).logsumexp(1)
        return (whole - torch.where(positive, logits, 0.0).sum(1) / positive.sum(1)).mean()


def _same_label(y: Tensor, rows: int) -> Tensor:
    if y.is_floating_point() or y.shape != (rows,):
        raise WrongTarget(
            f"FalseNegatives by labels compares the labels (2B,) of {rows} views, as whole numbers; got {y.dtype} of shape "
            f"{tuple(y.shape)}. Leave out mixup, cutmix and label smoothing, or find false negatives by 'top' or 'threshold'."
        )
    return y[:, None] == y
