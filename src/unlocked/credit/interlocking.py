"""Interlocking backpropagation (Gomez et al., 2022; I; FACTS 1.8).

    θ^j ← θ^j − γ ∇_{θ^j} ℓ^{min(j+d, J)}          the head loss d stages above, through stages j+1 … j+d
    ω^j ← ω^j − γ ∇_{ω^j} ℓ^j(a^j(sg[x^{j+1}], ω^j), y)     heads learn from their own loss only

    j = 1..J stage, d distance, θ^j weights, ω^j the head's weights, ℓ^j the head's loss (ℓ^J the network's own).

Schedule. Let u_k be the gradient of ℓ^k where it arises. At stage j the gradients of the heads j, j+1, … come in this order:
its own at once, the others from above as each gets through stage j+1. Each is carried through stage j and sent down *the
moment it is there*, if a stage below still needs it; the last one, of head min(j+d, J), also gives θ^j its gradient:

    J = 4, d = 2      u_k: heads whose gradient the stage carries down      θ^j learns from
    stage 4           u_4                                                   u_4
    stage 3           u_3 (needed by stage 1)  u_4 (by stage 2)             u_4
    stage 2           u_3 (needed by stage 1)                               u_4
    stage 1           –                                                     u_3

So stage j never waits for more than d hops, and a step's critical path does not grow with J.

Limits: d = 0 is DGL. d ≥ J − 1 is backpropagation (heads then only watch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..batch import Batch
from ..chain import Chain, Stage
from ..consensus.base import Weights
from ..errors import InvalidChoice
from ..heads import HeadReport
from ..work import work
from ..worker import Worker
from .base import Properties, SynchronousCredit, attach_heads, backward, detached, leaf, objective
from .lending import exchange


@work("head-forward", "head-backward", gives=lambda worker, stage, h, batch: h)
def head_gradient(worker: Worker, stage: Stage, h: Tensor, batch: Batch) -> Tensor:
    """Train the head on a detached copy of `h` (its gradients are left in place) and return ∂ℓ^j/∂h."""
    copy = h.detach().requires_grad_()
    objective(worker, stage, copy, batch).backward()
    assert copy.grad is not None
    return copy.grad


@work("input-backward", gives=lambda h, x, gradient: x)
def through(h: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with respect to the stage's input; the graph is kept for the next one, weights get nothing."""
    if not h.requires_grad:
        raise detached("a stage")
    return torch.autograd.grad(h, x, gradient, retain_graph=True)[0]


@dataclass(frozen=True)
class Interlocking(SynchronousCredit):
    """Every stage learns from the loss of the head `d` stages above it.

    Args:
        d: distance ≥ 0. 0 is local, J − 1 or more is global.
        head, budget: as in DGL.
        idle_heads: train also the heads that no stage learns from (the first d), as the paper does, to watch their losses;
            False saves their cost.
    """

    d: int = 1
    head: Any = "mlp"
    budget: float | None = 0.10
    idle_heads: bool = True

    name: ClassVar[str] = "interlocking"
    properties: ClassVar[Properties] = Properties(
        title="Interlocking backpropagation (Gomez et al. 2022)",
        source="I",
        locks="forward; backward and update wait for d stages, not J",
        memory="own stage until d gradients came; at most d + 1 stages in flight",
        up="Ψ_A",
        down="min(d, J−1) Ψ_A at most",
        delay="0",
        objective="head d stages above",
    )
    one_backward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.d, int) or self.d < 0:
            raise InvalidChoice(f"d={self.d} is not a distance; give a whole number, 0 (local) to J−1 (global).")

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        return attach_heads(chain, self.head, self.budget, seed, 0 if self.idle_heads else min(self.d, len(chain) - 1))

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        j, target = worker.stage, min(worker.stage + self.d, worker.stages - 1)
        await exchange(worker, stage, batch, weights)
        x = leaf(worker, await worker.below.recv("activation", batch))
        await weights.read()
        h = await worker.run("F", stage.body, x)
        await worker.above.send("activation", h.detach())
        # heads below d are nobody's target: their gradient goes nowhere
        if worker.last or j >= self.d or (self.idle_heads and stage.head is not None):
            gradient = await worker.run("L", head_gradient, worker, stage, h, batch)
        for k in range(max(j, self.d), target):
            if k > j:
                gradient = await worker.above.recv("gradient", h)
            if not worker.first:
                await worker.below.send("gradient", await worker.run("B", through, h, x, gradient))
        if target > j:
            gradient = await worker.above.recv("gradient", h)
        await worker.run("B", backward, worker, stage, h, gradient)
        if not worker.first and self._needed_below(j, target):
            assert x.grad is not None
            await worker.below.send("gradient", x.grad)
        del x, h, gradient  # the update may wait for other replicas; their memory need not
        await weights.write()

    def _needed_below(self, j: int, head: int) -> bool:
        """Whether a stage below j learns from this head: the nearest one that could is j − 1."""
        return head <= j - 1 + self.d
