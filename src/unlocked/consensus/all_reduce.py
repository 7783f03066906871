"""Synchronous data parallelism by all-reduce (F Example 2).

    θ ← OPT(θ, (1/N) Σ_n ∇f_n(θ))

    N replicas, f_n the loss of replica n on its own shard of the batch. The replicas stay equal (BatchNorm statistics apart).

Limits: N = 1 is ordinary training; N equal shards are one big batch (without BatchNorm, which sees its own shard only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..chain import Chain
from ..worker import Worker
from .base import Consensus, Properties, Store, Weights


class _MeanGradient(Weights):
    async def reduce(self) -> None:
        # a parameter without a gradient here may have one in no replica: the programs are the same
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        means = await self.worker.replicas.mean("all-reduce", gradients)
        if self.worker.replicas.size > 1:
            for gradient, mean in zip(gradients, means):
                gradient.copy_(mean)


@dataclass(frozen=True)
class AllReduce(Consensus):
    """Every update uses the mean gradient of all replicas; an epoch is split among them."""

    name: ClassVar[str] = "all-reduce"
    properties: ClassVar[Properties] = Properties(
        title="Data parallelism",
        source="F Example 2",
        barrier="all replicas, every update",
        bytes="2(N−1)/N Ψ_P",
        replicas="equal",
        result="any replica",
    )
    shares_data: ClassVar[bool] = True

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return _MeanGradient(worker, chain, store)
