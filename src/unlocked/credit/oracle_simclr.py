"""Decoupled SimCLR with oracle subsampling (Fournier et al. 2023; F §3.2.2, Eq. 3.3-3.4, A.4).

    β⁺_i = 1[s̃_{i,l⁺} ≥ T⁺],   β⁻_il = 1[s̃_il ≤ T⁻]             s̃: similarities of the projections of an oracle, trained before
    ℓ^j  = 1/2B Σ_i −β⁺_i log( exp(s_{i,l⁺} / τ) / Σ_{l≠i} β⁻_il exp(s_il / τ) )

    Everything else is DGSSL (dgssl.py); pairs/oracle.py has the loss.

Which pairs are easy does not depend on the stage, so the oracle sees each batch once, at stage 0, and its projections go up
with the activations.

Limits: T⁺ = −1, T⁻ = 1 is DGSSL, bit for bit. T⁺ = 0.7, T⁻ = 0.3 in the thesis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..pairs import OracleNTXent, PairLoss
from .asking_oracle import AskingOracle
from .base import Properties
from .contrasting import Replicas
from .dgssl import local_properties
from .oracle import Oracle


@dataclass(frozen=True)
class OracleSimCLR(AskingOracle):
    """Every stage learns from those pairs of views that are easy for an oracle.

    Args:
        oracle: the folder of a run of simclr, or a module x → projections (B, E); frozen. See oracle.py.
        positive, negative: T⁺ and T⁻ in [−1, 1].
        temperature: τ.
        projector, dimension, replicas: as in DGSSL.
    """

    oracle: Any = None
    positive: float = 0.7
    negative: float = 0.3
    temperature: float = 0.5
    projector: Any = "1c2f"
    dimension: int = 128
    replicas: Replicas = "together"

    name: ClassVar[str] = "oracle-simclr"
    properties: ClassVar[Properties] = local_properties(
        "Decoupled SimCLR with an oracle (Fournier et al. 2023)",
        "F Eq. 3.3-3.4",
        up="Ψ_A and the oracle's projections",
        objective="local, over pairs of views that an oracle finds easy",
    )
    local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check()
        self.loss_of(0, 1)  # checks it

    def loss_of(self, stage: int, stages: int) -> PairLoss:
        return OracleNTXent(self.positive, self.negative, self.temperature)

    @property
    def oracle_rows(self) -> Oracle:
        return self._oracle
