"""How many directions features use: numbers of a covariance's eigenvalues λ_1 ≥ λ_2 ≥ …, p_i = λ_i / Σ λ.

    effective rank         exp(− Σ p_i ln p_i)        (Roy & Vetterli, The effective rank, 2007, there of singular values)
    participation ratio    (Σ λ)² / Σ λ² = 1 / Σ p_i²

Limits: both are k if k eigenvalues are equal and the others 0, whatever the scale and the basis; the second is never larger.
"""

from __future__ import annotations

import torch
from torch import Tensor


def eigenvalues(covariance: Tensor) -> Tensor:
    """Of a covariance (d, d), the largest first; what rounding made negative is 0."""
    return torch.linalg.eigvalsh(covariance.double()).flip(0).clamp(min=0)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalised eigenvalues; 0 if all are 0."""
    share = _shares(values)
    return float(torch.special.entr(share).sum().exp()) if len(share) else 0.0


def participation_ratio(values: Tensor) -> float:
    """(Σ λ)² / Σ λ²; 0 if all are 0."""
    share = _shares(values)
    return float(1 / share.square().sum()) if len(share) else 0.0


def singular_values(values: Tensor) -> Tensor:
    """√(λ_i / λ_1): the centred features' singular values over the largest; none if all are 0."""
    return (values / values[0]).sqrt() if len(_shares(values)) else values[:0]


def _shares(values: Tensor) -> Tensor:
    total = values.sum()
    return values / total if total > 0 else values[:0]
