"""End-to-end backpropagation over stages (F Example 1; Rumelhart, Hinton & Williams, 1986).

    x^{j+1} = f^j(x^j, θ^j)                       forward, stage by stage
    δ^j = (∂f^j/∂x^j)ᵀ δ^{j+1},  Δ^j = (∂f^j/∂θ^j)ᵀ δ^{j+1}     backward, from the last stage down

    j stage, x^j its input, δ^j the gradient of the network's loss with respect to x^j, Δ^j with respect to θ^j.

Limits: the reference; over any split it is `loss.backward()` on the unsplit network. All three locks hold: a stage waits for
those below (forward), above (backward), and updates only after both.

`stacked`: N networks of one stage each in one process compute as one (stacking.py): fewer and larger operations. Between the
two ways numbers differ by rounding, so a resume is bit for bit under True and under False; "measured" measures again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ..batch import Batch
from ..chain import Chain, Stage
from ..consensus.base import Consensus, Weights
from ..errors import InvalidChoice
from ..worker import Worker
from .base import Properties, SynchronousCredit, backward, leaf, objective
from .stacking import Stack, refuse

if TYPE_CHECKING:
    from ..worlds import World


@dataclass(frozen=True)
class Backprop(SynchronousCredit):
    """The network's own loss, carried down through all stages.

    Args:
        stacked: whether the replicas compute as one, by `torch.vmap` over their stacked weights. "measured": if that is
            possible, and faster on the first micro-batch (`Trainer.stack` says). Under True these are refused: networks
            that draw random numbers (dropout) or do what vmap cannot, several stages, several processes, consensus rules
            whose replicas compute at different times. Forward hooks see the stack, and only those of replica 0 run.
    """

    stacked: bool | Literal["measured"] = False

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
    grouped: ClassVar[bool] = True
    one_backward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.stacked not in (True, False, "measured"):
            raise InvalidChoice(f"stacked={self.stacked!r} is not possible; give True, False or 'measured'.")

    def stack(self, chains: Sequence[Chain], consensus: Consensus, world: World) -> Stack | None:
        if not self.stacked or len(chains) == 1:
            return None
        try:
            refuse(chains, consensus, world)
        except InvalidChoice:
            if self.stacked == "measured":
                return None
            raise
        return Stack(
            [chain[0].body for chain in chains],
            None if self.stacked == "measured" else True,
            tried=chains[0].like is not None,
        )

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        if weights.stack is not None and await weights.stack.chosen(worker, batch, weights):
            await weights.stack.step(worker, stage, batch, weights)
            return
        x = leaf(worker, await worker.below.recv("activation", batch))
        await weights.read()
        h = await worker.run("F", stage.body, x)
        if worker.last:
            loss = await worker.run("L", objective, worker, stage, h, batch)
            await worker.run("B", torch.autograd.backward, loss)
        else:
            await worker.above.send("activation", h.detach())
            gradient = await worker.above.recv("gradient", h)
            await worker.run("B", backward, worker, stage, h, gradient)
            del gradient
        del h  # its memory serves the stages below
        if not worker.first:
            assert x.grad is not None
            await worker.below.send("gradient", x.grad)
        del x
        await weights.write()
