"""Groups that err differently: a penalty on the likeness of what they say of the wrong classes (Patel 2023, §3.2.4, Eq. 1).

    p̂ = (p ⊙ m_y) / ‖p ⊙ m_y‖₁        p = softmax(z / T)
    φ_a = λ Σ_{b≠a} cos(p̂_a, sg[p̂_b])        mean over the samples

z logits (B, K) of a group, T temperature, m_y zero at the label and 1 elsewhere, a, b groups of one depth, sg stop-gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..losses import WrongTarget

EPSILON = 1e-8  # keeps p̂ finite where a group is certain of the label


def wrong_classes(logits_BK: Tensor, y_B: Tensor, temperature: float = 1.0) -> Tensor:
    """p̂ (B, K): the predicted probabilities without the label's, rows that sum to 1. The last dimension is K, y has the others.

    Every label must be a class index: there are no ignored positions. Raises WrongTarget.
    """
    if y_B.dtype != torch.int64 or logits_BK.shape[:-1] != y_B.shape:
        raise WrongTarget(
            "The diversity of groups is that of what they say of the wrong classes, and needs one int64 label for each row of "
            f"scores {tuple(logits_BK.shape)}; got {y_B.dtype} of shape {tuple(y_B.shape)}. Leave out mixup, cutmix and label "
            "smoothing, or take diversity=0, as for regression."
        )
    p = torch.softmax(logits_BK / temperature, dim=-1)
    p = p.scatter(-1, y_B.unsqueeze(-1), 0.0)
    return p / p.sum(-1, keepdim=True).clamp_min(EPSILON)


def diversity_penalty(own_BK: Tensor, others: Sequence[Tensor], weight: float) -> Tensor:
    """φ_a of one group: `own_BK` is its p̂, `others` those of the other groups, from which no gradient is taken."""
    return weight * sum(
        (F.cosine_similarity(own_BK, other.detach(), dim=-1).mean() for other in others), torch.zeros(())
    )
