"""Subsampled decoupled SimCLR (Fournier, Patel, Eickenberg, Oyallon & Belilovsky, Preventing Dimensional Collapse in
Contrastive Local Learning with Subsampling, 2023; F Chapter 3, Eq. 3.7-3.8).

    α_il = 1[s_il ≥ T]                  pairs that the stage itself finds similar; s cosine similarity of its projections
    ℓ^j  = 1/2B Σ_i −α_{i,l⁺} log( exp(s_{i,l⁺} / τ) / Σ_{l≠i} α_il exp(s_il / τ) )

    l⁺: the other view of i's image. Everything else is DGSSL (dgssl.py); pairs/subsampled.py has the loss.

Limits: T = −1 is DGSSL, bit for bit. T = 0 for CIFAR-10, −0.4 for STL-10, 0.3 for Fashion-MNIST in the thesis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..pairs import PairLoss, SubsampledNTXent
from .base import Properties
from .contrasting import Contrasting, Replicas
from .dgssl import local_properties


@dataclass(frozen=True)
class SubsampledSimCLR(Contrasting):
    """Every stage learns from those pairs of views that it finds similar.

    Args:
        threshold: T in [−1, 1].
        which: what is left out below T: "both", "positives" or "negatives" alone.
        temperature: τ.
        projector, dimension, replicas: as in DGSSL.
    """

    threshold: float = 0.0
    which: Literal["both", "positives", "negatives"] = "both"
    temperature: float = 0.5
    projector: Any = "1c2f"
    dimension: int = 128
    replicas: Replicas = "together"

    name: ClassVar[str] = "subsampled-simclr"
    properties: ClassVar[Properties] = local_properties(
        "Subsampled decoupled SimCLR (Fournier et al. 2023)",
        "F Eq. 3.7-3.8",
        objective="local, over pairs of views that are similar",
    )
    local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check()
        self.loss_of(0, 1)  # checks it

    def loss_of(self, stage: int, stages: int) -> PairLoss:
        return SubsampledNTXent(self.threshold, self.which, self.temperature)
