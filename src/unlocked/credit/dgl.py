"""Decoupled greedy learning, DGL (Belilovsky, Eickenberg & Oyallon, 2020; O Algorithm 4, F Example 10, P §2.8.1).

    x^{j+1} = f^j(sg[x^j], θ^j)
    (θ^j, ω^j) ← (θ^j, ω^j) − γ ∇_{(θ^j, ω^j)} ℓ^j(a^j(x^{j+1}, ω^j), y)        for every stage j, on every batch

    j stage, θ^j its weights, a^j its head with weights ω^j, ℓ^j its loss, sg stop-gradient, γ learning rate.
    x^{j+1} is sent on before stage j is updated; the last stage uses the network's own classifier and loss.

Limits: J = 1 is backpropagation. No gradient crosses a stage boundary, so nothing ever comes back: backward and update lock
are gone, the forward lock stays.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..batch import Batch
from ..chain import Chain, Stage
from ..consensus.base import Weights
from ..heads import HeadReport
from ..worker import Worker
from .base import Properties, SynchronousCredit, attach_heads, local_backward
from .lending import exchange


async def local_step(worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
    """One micro-batch of a stage that learns from its own loss: receive, forward, pass on, local backward, update."""

    async def pass_on(h: Tensor) -> None:
        await worker.above.send("activation", h)

    await exchange(worker, stage, batch, weights)
    await learn(worker, stage, await worker.below.recv("activation", batch), batch, weights, pass_on)


async def learn(
    worker: Worker,
    stage: Stage,
    x: Tensor,
    batch: Batch,
    weights: Weights,
    pass_on: Callable[[Tensor], Awaitable[None]],
) -> None:
    """The same without the receiving, from the stage's input `x`."""
    await weights.read()
    h = await worker.run("F", stage.body, x)
    await pass_on(h.detach())  # nothing ever comes back
    await worker.run("B", local_backward, worker, stage, h, batch)
    del x, h  # the update may wait for other replicas; their memory need not
    await weights.write()


@dataclass(frozen=True)
class DGL(SynchronousCredit):
    """Every stage learns from the loss of its own head.

    Args:
        head: kind of head for the stages that have none (see heads.py): a name, a head's dataclass, or a function
            (features, outputs) → module.
        budget: largest share of a stage's forward FLOPs that its head may cost; None: no limit.
    """

    head: Any = "mlp"
    budget: float | None = 0.10

    name: ClassVar[str] = "dgl"
    properties: ClassVar[Properties] = Properties(
        title="Decoupled Greedy Learning (Belilovsky et al. 2020)",
        source="O Algorithm 4, F Example 10",
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
        return attach_heads(chain, self.head, self.budget, seed, 0)

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        await local_step(worker, stage, batch, weights)
