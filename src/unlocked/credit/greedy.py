"""Greedy layer-wise learning (Belilovsky, Eickenberg & Oyallon, 2019; O Algorithm 2, §4.1).

    for j = 1..J:   (θ^j, ω^j) = argmin Σ_n ℓ^j(a^j(f^j(x_n^j, θ^j), ω^j), y_n)      over all epochs, x^j from frozen stages

    j stage, θ^j its weights, a^j its head with weights ω^j, ℓ^j its loss; stages below j are frozen, in evaluation mode.

Limits: J = 1 is backpropagation. J times the epochs are gone through; only one stage is trained at a time, so at any time
the memory is that of one stage. While it trains, nothing of another stage changes, BatchNorm statistics included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..batch import Batch
from ..chain import Chain, Stage
from ..consensus.base import Weights
from ..heads import HeadReport
from ..work import work
from ..worker import Worker
from .base import Properties, SynchronousCredit, attach_heads, local_backward


@work("forward", gives=lambda stage, x: stage.body.gives(x))
@torch.no_grad()
def frozen_forward(stage: Stage, x: Tensor) -> Tensor:
    """The stage's output in evaluation mode, without a graph."""
    if stage.training:
        stage.eval()
    return stage.body(x)


@dataclass(frozen=True)
class Greedy(SynchronousCredit):
    """Stages trained one after the other, each to the end of its own epochs.

    Args: `head` and `budget` as in DGL. `fit(epochs=E)` trains each stage for E epochs.
    """

    head: Any = "mlp"
    budget: float | None = 0.10

    name: ClassVar[str] = "greedy"
    properties: ClassVar[Properties] = Properties(
        title="Greedy layer-wise learning (Belilovsky et al. 2019)",
        source="O Algorithm 2",
        locks="forward; stages wait for the end of training below",
        memory="one stage and its head",
        up="Ψ_A",
        down="0",
        delay="0",
        objective="local, one stage at a time",
    )
    local: ClassVar[bool] = True

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        return attach_heads(chain, self.head, self.budget, seed, 0)

    def phases(self, stages: int) -> int:
        return stages

    def readout(self, phase: int, stages: int) -> int:
        return min(phase, stages - 1)

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        if worker.stage < batch.phase:
            x = await worker.below.recv("activation", batch)
            await worker.above.send("activation", await worker.run("F", frozen_forward, stage, x))
        elif worker.stage == batch.phase:
            x = await worker.below.recv("activation", batch)
            await weights.read()
            h = await worker.run("F", stage.body, x)
            await worker.run("B", local_backward, worker, stage, h, batch)
            await weights.write()
