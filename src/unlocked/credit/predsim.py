"""Local error signals, predsim (Nøkland & Eidnes, 2019; F B.2.2).

    ℓ^j = (1 − β) CE(W^j pool(x^{j+1}), y) + β ‖S(c^j(x^{j+1})) − S(onehot y)‖²

    W^j linear classifier, c^j a convolution (linear map for vectors), S the cosine similarity matrix of the batch's centred
    features (B × B; the norm is averaged over its entries), β the weight of similarity matching.
    Everything else is DGL: each stage is updated from its own ℓ^j; the last one from the network's own loss, unscaled.

Limits: β = 0 is DGL with a linear head. J = 1 is backpropagation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..batch import Batch
from ..chain import Chain, Stage
from ..consensus.base import Weights
from ..heads import HeadReport, PredSimHead
from ..worker import Worker
from .base import Properties, SynchronousCredit, attach_heads
from .dgl import local_step


@dataclass(frozen=True)
class PredSim(SynchronousCredit):
    """Every stage learns from a prediction loss and a similarity-matching loss of its own.

    Args:
        beta: weight β of the similarity-matching part, in [0, 1].
        statistic: what a feature map is reduced to before S: "flatten" (all its values) or "std" (standard deviation per
            channel, as in the authors' implementation).
        budget: as in DGL.
    """

    beta: float = 0.99
    statistic: Literal["flatten", "std"] = "flatten"
    budget: float | None = 0.10

    name: ClassVar[str] = "predsim"
    properties: ClassVar[Properties] = Properties(
        title="Local error signals (Nøkland & Eidnes 2019)",
        source="F B.2.2",
        locks="forward",
        memory="one stage and its head",
        up="Ψ_A",
        down="0",
        delay="0",
        objective="local",
    )
    grouped: ClassVar[bool] = True
    one_backward: ClassVar[bool] = True
    local: ClassVar[bool] = True

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        return attach_heads(chain, PredSimHead(self.beta, self.statistic), self.budget, seed, 0)

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        await local_step(worker, stage, batch, weights)
