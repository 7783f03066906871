"""Independent replicas: an ensemble (F §6; D1).

    θ_n ← OPT_n(θ_n, ∇f_n(θ_n))         n = 1..N, each on its own data order

Limits: N = 1 is ordinary training. Nothing is sent; the averaged network is at chance unless the replicas share a basin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..chain import Chain
from ..worker import Worker
from .base import Consensus, Properties, Store, Weights


@dataclass(frozen=True)
class Independent(Consensus):
    """Each replica by itself."""

    name: ClassVar[str] = "independent"
    properties: ClassVar[Properties] = Properties(
        title="Independent replicas (ensemble)",
        source="F §6.3 (Baseline)",
        barrier="none",
        bytes="0",
        replicas="differ",
        result="ensemble",
    )

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return Weights(worker, chain, store)
