"""Node perturbation (Williams, 1992; Werfel, Xie & Seung, 2005): noise at every stage's output, and a loss that tells
whether it was good.

    s_i = (ℓ_i(noisy) − ℓ_i(clean)) / σ           antithetic: (ℓ_i(+ noise) − ℓ_i(− noise)) / 2σ
    ĝ_h^j = (s_i ξ_i^j / B)_i,   ξ^j ~ N(0, 1) of the shape of h^j           θ^j.grad = (∂h^j/∂θ^j)ᵀ ĝ_h^j

i sample of B, j stage, h^j its output, ℓ_i the network's loss of sample i, σ the size of the noise. A backward stays inside the
stage; from above comes one number for each sample. The last stage learns from its exact gradient of the clean pass.

    stage j       x, noisy x̃ ──►  h = f(x),  h̃ = f(x̃) + σ ξ^j  ──►  both go up; ξ is not kept but drawn again
    noise         joint: all stages at once, one noisy pass for all of them | separate: stage by stage, J − 1 of them, of which
                  stage k runs those that began below it

Losses of the samples are those of cross-entropy and of the mean squared error (per_sample.py). Where stages above mix samples
(BatchNorm in training), the scalar of sample i does not see what its noise does to the others, and is disturbed by theirs.
All passes draw the same dropout; BatchNorm's running statistics count the clean one.

Limits: σ → 0: s_i → Σ_k ⟨∂ℓ_i/∂h^k, ξ_i^k⟩, over all stages k under joint noise, over k = j alone under separate; error O(σ),
antithetic O(σ²), none for a loss that is linear (quadratic) in them. Its mean is the gradient; the cross terms k ≠ j of joint
noise have mean zero and add variance. J = 1 is backpropagation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..batch import Batch
from ..chain import Chain, Stage
from ..consensus.base import Weights
from ..errors import choose
from ..heads import HeadReport
from ..modes import statistics_kept
from ..option_types import check_types
from ..work import work
from ..worker import Worker
from .base import Properties, SynchronousCredit, objective
from .guesses import RANDOM, for_weights, random_like
from .mezo import check_displacement
from .per_sample import per_sample, refuse_unknown
from .two_backward import add_gradients, trained


@dataclass(frozen=True)
class NodePerturbation(SynchronousCredit):
    """Every stage learns from what noise at its output does to the loss of each sample.

    Args:
        sigma: σ > 0, the size of the noise.
        antithetic: whether the same noise is also subtracted: one pass more, an error of second order.
        noise: "joint" or "separate".
        guess: what ξ is drawn from, "gaussian" or "rademacher" (±1).

    Raises InvalidChoice; `prepare` also for a network whose loss is not known sample by sample.
    """

    sigma: float = 1e-3
    antithetic: bool = False
    noise: Literal["joint", "separate"] = "joint"
    guess: Literal["gaussian", "rademacher"] = "gaussian"

    name: ClassVar[str] = "node-perturbation"
    properties: ClassVar[Properties] = Properties(
        title="Node perturbation (Williams 1992; Werfel et al. 2005)",
        source="Werfel et al. 2005",
        locks="forward; update waits for a scalar of the network's loss",
        memory="own stage until its scalars come",
        up="(1 + S) Ψ_A; S = 1, 2 antithetic; × j stages below, itself included, if separate",
        down="B scalars; separate: for each stage below",
        delay="0",
        objective="the global gradient's projection on noise at the output",
    )
    awaits: ClassVar[str] = "scalars"
    planned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        check_displacement("sigma", self.sigma)
        choose("noise", self.noise, ("joint", "separate"))
        choose("guess", self.guess, RANDOM)

    @property
    def signs(self) -> tuple[int, ...]:
        """Of the noise in the passes that it needs."""
        return (1, -1) if self.antithetic else (1,)

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        if len(chain) > 1:
            refuse_unknown(chain[-1].loss, self.name)
        return []

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        x = await worker.below.recv("activation", batch)
        await weights.read()
        h, state = await worker.run("F", clean, worker, stage, x)
        await worker.above.send("activation", h.detach())
        noisy = None
        if not worker.first:
            noisy = await worker.run("F", carry, worker, stage, await worker.below.recv("noisy"), state)
        if worker.last:
            if not worker.first:
                await worker.below.send(
                    "scalars", await worker.run("L", differences, self, worker, stage, h, noisy, batch)
                )
            loss = await worker.run("L", objective, worker, stage, h, batch)
            await worker.run("B", torch.autograd.backward, loss)
        else:
            outgoing, state = await worker.run("F", disturb, self, worker, h, noisy)
            await worker.above.send("noisy", outgoing)
            del outgoing
            scalars = await worker.above.recv("scalars")
            if not worker.first:
                others = scalars if self.noise == "joint" else scalars.narrow(0, 0, len(scalars) - 1).contiguous()
                await worker.below.send("scalars", others)
            await worker.run("B", learn, self, worker, stage, h, scalars, state)
        del x, h, noisy
        await weights.write()


@work("forward", gives=lambda worker, stage, x: (stage.body(x), None))
def clean(worker: Worker, stage: Stage, x: Tensor) -> tuple[Tensor, Tensor]:
    """The stage's output with a graph to its weights, and the random state it began with."""
    state = worker.random_state()
    return stage.body(x), state


@work(
    "forward",
    gives=lambda worker, stage, noisy, state: noisy.new_empty(
        (len(noisy), *stage.body(noisy.new_empty(noisy.shape[1:])).shape)
    ),
)
@torch.no_grad()
def carry(worker: Worker, stage: Stage, noisy: Tensor, state: Tensor) -> Tensor:
    """(S, B, …): the output for each of the inputs that were disturbed below."""
    outputs = []
    with statistics_kept(stage.body.modules()):
        for x in noisy:
            worker.set_random_state(state)
            outputs.append(stage.body(x))
    return torch.stack(outputs)


@work(
    "update",
    gives=lambda rule, worker, h, noisy: (
        h.new_empty(
            (len(rule.signs) if noisy is None or rule.noise == "joint" else len(noisy) + len(rule.signs), *h.shape)
        ),
        None,
    ),
)
@torch.no_grad()
def disturb(rule: NodePerturbation, worker: Worker, h: Tensor, noisy: Tensor | None) -> tuple[Tensor, Tensor]:
    """(S, B, …): what goes up, with this stage's noise; and the random state from which that is drawn again."""
    state = worker.random_state()
    xi = random_like(h, rule.guess)
    added = torch.stack([sign * rule.sigma * xi for sign in rule.signs])
    if noisy is None:
        return h + added, state
    return (noisy + added if rule.noise == "joint" else torch.cat([noisy, h + added])), state


@work(
    "head-forward",
    gives=lambda rule, worker, stage, h, noisy, batch: h.new_empty((len(noisy) // len(rule.signs), len(h))),
)
@torch.no_grad()
def differences(rule: NodePerturbation, worker: Worker, stage: Stage, h: Tensor, noisy: Tensor, batch: Batch) -> Tensor:
    """(stages, B), joint (1, B): s_i / B, weighted for accumulation."""
    state = worker.random_state()

    def losses(output: Tensor) -> Tensor:
        worker.set_random_state(state)
        return per_sample(stage.loss, stage.read(output), batch.y)

    with statistics_kept(stage.modules()):
        found = torch.stack([losses(output) for output in noisy])
        found = (found[::2] - found[1::2]) / 2 if rule.antithetic else found - losses(h)
    return found * (batch.weight / (rule.sigma * len(h)))


@work("weight-backward", gives=lambda rule, worker, stage, h, scalars, state: None)
def learn(rule: NodePerturbation, worker: Worker, stage: Stage, h: Tensor, scalars: Tensor, state: Tensor) -> None:
    """The estimate at the output, carried to the stage's weights."""
    worker.set_random_state(state)
    xi = random_like(h, rule.guess)
    estimate = scalars[-1].to(h.dtype).view(-1, *[1] * (h.dim() - 1)) * xi
    add_gradients(stage, for_weights(h, trained(stage), estimate))
