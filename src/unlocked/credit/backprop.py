"""End-to-end backpropagation over stages (F Example 1; Rumelhart, Hinton & Williams, 1986).

    x^{j+1} = f^j(x^j, θ^j)                       forward, stage by stage
    δ^j = (∂f^j/∂x^j)ᵀ δ^{j+1},  Δ^j = (∂f^j/∂θ^j)ᵀ δ^{j+1}     backward, from the last stage down

    j stage, x^j its input, δ^j the gradient of the network's loss with respect to x^j, Δ^j with respect to θ^j.

Limits: the reference; over any split it is `loss.backward()` on the unsplit network. All three locks hold: a stage waits for
those below (forward), above (backward), and updates only after both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..batch import Batch
from ..chain import Stage
from ..consensus.base import Weights
from ..worker import Worker
from .base import Properties, SynchronousCredit, leaf, objective


@dataclass(frozen=True)
class Backprop(SynchronousCredit):
    """The network's own loss, carried down through all stages."""

    name: ClassVar[str] = "backprop"
    properties: ClassVar[Properties] = Properties(
        title="Backpropagation (Rumelhart et al. 1986)",
        source="F Example 1",
        locks="forward, backward, update",
        memory="own stage until its gradient comes; all J stages in one process",
        up="Ψ_A",
        down="Ψ_A",
        delay="0",
        objective="global",
    )
    one_backward: ClassVar[bool] = True

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        x = leaf(worker, await worker.below.recv("activation", batch))
        await weights.read()
        h = await worker.run("F", stage.body, x)
        if worker.last:
            loss = await worker.run("L", objective, worker, stage, h, batch)
            await worker.run("B", torch.autograd.backward, loss)
        else:
            await worker.above.send("activation", h.detach())
            gradient = await worker.above.recv("gradient", h)
            await worker.run("B", torch.autograd.backward, h, gradient)
            del gradient
        del h  # its memory serves the stages below
        if not worker.first:
            assert x.grad is not None
            await worker.below.send("gradient", x.grad)
        del x
        await weights.write()
