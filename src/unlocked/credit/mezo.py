"""MeZO (Malladi, Gao, Nichani, Damian, Lee, Chen & Arora, "Fine-tuning language models with just forward passes", 2023,
Algorithm 1); the estimator is SPSA (Spall, 1992).

    s_k = (L(θ + ε z_k) − L(θ − ε z_k)) / 2ε,   z_k ~ N(0, 1) for all weights of all stages       θ ← θ − γ/K Σ_k s_k z_k

θ weights, L the network's loss on a micro-batch, ε the displacement, K `samples`, γ learning rate. One scalar for the whole
network; z_k is never stored but drawn again from its seed, and no graph is kept: memory is that of inference.

As a pipeline: a stage runs its body twice for each k, with θ + ε z on the activation that was displaced below and with θ − ε z
on the other, and sends both on. Nothing waits between two k; at the end the last stage's K scalars come down the chain.

Where this differs from Algorithm 1. The paper adds ε z to the weights in place, then −2 ε z, then ε z: without rounding θ would
be back, with it θ drifts. Here weights that are displaced are new tensors (torch.func.functional_call): θ keeps every bit, for
one copy of a stage's weights while a pass runs. Both passes of a pair draw the same dropout. BatchNorm uses the statistics of
the batch in every pass, and counts one of them, that of θ + ε z_1; others are not counted (modes.statistics_kept). The loss of
the record is the mean over the 2K passes, L(θ) + O(ε²). A network in half precision needs a larger ε, or L's difference is
rounding.

Limits: L quadratic in θ: s = ⟨∇L, z⟩ whatever ε is. ε → 0: s = ⟨∇L, z⟩ + O(ε²), the forward gradient with one scalar for all
weights, E s z = ∇L. The mean square error over ‖∇L‖² is (d + 1)/K for d weights, so it is for fine-tuning, where the loss
varies in few directions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..batch import Batch
from ..chain import Chain, Stage
from ..consensus.base import Weights
from ..errors import InvalidChoice, choose
from ..modes import statistics_kept
from ..option_types import check_types
from ..work import work
from ..worker import Worker
from .base import Held, Properties, SynchronousCredit, reported
from .guesses import RANDOM, random_like


def check_displacement(name: str, value: float) -> None:
    """Raises InvalidChoice for a displacement that is no positive number."""
    if not (math.isfinite(value) and value > 0):
        raise InvalidChoice(f"{name}={value} is no displacement; give a small number above 0, such as 0.001.")


def check_count(name: str, value: int) -> None:
    """Raises InvalidChoice for a count that is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidChoice(f"{name}={value!r} is not possible; give a whole number of at least 1.")


@dataclass(frozen=True)
class MeZO(SynchronousCredit):
    """All weights learn from one difference of two losses.

    Args:
        epsilon: ε > 0, how far the weights are displaced.
        samples: K ≥ 1, directions that are averaged; each costs two forwards.
        guess: what z is drawn from: "gaussian" (the paper) or "rademacher" (±1, Spall's choice).

    Raises InvalidChoice.
    """

    epsilon: float = 1e-3
    samples: int = 1
    guess: Literal["gaussian", "rademacher"] = "gaussian"

    name: ClassVar[str] = "mezo"
    properties: ClassVar[Properties] = Properties(
        title="MeZO (Malladi et al. 2023)",
        source="Malladi et al. 2023, Algorithm 1; Spall 1992",
        locks="forward; update waits for a scalar of the network's loss",
        memory="none; one copy of a stage's weights",
        up="2K Ψ_A",
        down="K scalars",
        delay="0",
        objective="the global gradient's projection on a random direction",
    )
    awaits: ClassVar[str] = "scalars"
    planned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        check_displacement("epsilon", self.epsilon)
        check_count("samples", self.samples)
        choose("guess", self.guess, RANDOM)

    def remarks(self, chain: Chain, batch_size: int) -> list[str]:
        weights = sum(p.numel() for stage in chain for p in stage.parameters() if p.requires_grad)
        longer = math.sqrt((weights + self.samples + 1) / self.samples)
        return [
            f"With {weights:,} weights and samples={self.samples} an estimate is about {longer:,.0f} times as long as the "
            f"gradient, nearly all of it noise; learning rates of other rules are too large, up to {longer**2:,.0f} times."
        ]

    def held(self, last: bool) -> Held:
        return Held("nothing")

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        bodies: list[Tensor] = []
        heads: list[Tensor | None] = []
        losses: list[Tensor] = []
        for k in range(self.samples):
            body: Tensor | None = None
            head: Tensor | None = None
            for sign in (1, -1):
                x = await worker.below.recv("activation", batch)
                if not bodies and sign == 1:
                    await weights.read()
                how = (sign * self.epsilon, self.guess)
                h, body = await worker.run("F", displaced, worker, stage.body, x, *how, body, k == 0 and sign == 1)
                if worker.last:
                    loss, head = await worker.run(
                        "L", judged, worker, stage, h, batch, *how, head, k == 0 and sign == 1
                    )
                    losses.append(loss)
                await worker.above.send("activation", h)
            bodies.append(body)  # type: ignore[arg-type]  # two passes have run
            heads.append(head)
        if worker.last:
            scalars = await worker.run("B", slopes, self, worker, losses, batch)
        else:
            scalars = await worker.above.recv("scalars")
        await worker.below.send("scalars", scalars)
        await worker.run("B", learn, self, worker, stage, bodies, heads, scalars)
        await weights.write()


def _drawn(module: nn.Module, guess: str) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """The weights of a module that are not frozen, with z from the worker's random state, one after the other."""
    for name, p in module.named_parameters():
        if p.requires_grad:
            yield name, p, random_like(p, guess)


@work("forward", gives=lambda worker, module, x, step, guess, state, counted: (module(x), None))
@torch.no_grad()
def displaced(
    worker: Worker, module: nn.Module, x: Tensor, step: float, guess: str, state: Tensor | None, counted: bool
) -> tuple[Tensor, Tensor]:
    """The output of `module` with weights θ + `step` z, and the random state from which z is drawn again.

    state: that of the other pass of a pair; None: a new direction. counted: whether BatchNorm's statistics count this pass.
    """
    if state is None:
        state = worker.random_state()
    else:
        worker.set_random_state(state)
    moved = {name: p + step * z for name, p, z in _drawn(module, guess)}
    with contextlib.nullcontext() if counted else statistics_kept(module.modules()):
        return functional_call(module, moved, (x,)), state


@work("head-forward", gives=lambda worker, stage, h, batch, step, guess, state, counted: (h.new_empty(()), None))
@torch.no_grad()
def judged(
    worker: Worker,
    stage: Stage,
    h: Tensor,
    batch: Batch,
    step: float,
    guess: str,
    state: Tensor | None,
    counted: bool,
) -> tuple[Tensor, Tensor | None]:
    """The network's loss, with the last stage's head displaced if there is one; and the random state of that."""
    if stage.head is None:
        return stage.judge(h, batch), None
    output, state = displaced(worker, stage.head, h, step, guess, state, counted)
    return stage.judge(output, batch), state


@work(gives=lambda rule, worker, losses, batch: losses[0].new_empty((rule.samples,)))
def slopes(rule: MeZO, worker: Worker, losses: list[Tensor], batch: Batch) -> Tensor:
    """s_k / K of losses (plus, minus, plus, …), weighted for accumulation. Raises NonFiniteLoss."""
    pairs = torch.stack(losses).view(rule.samples, 2)
    reported(worker, pairs.mean(), batch)
    return (pairs[:, 0] - pairs[:, 1]) * (batch.weight / (2 * rule.epsilon * rule.samples))


@work("update", gives=lambda rule, worker, stage, bodies, heads, scalars: None)
@torch.no_grad()
def learn(
    rule: MeZO,
    worker: Worker,
    stage: Stage,
    bodies: list[Tensor],
    heads: list[Tensor | None],
    scalars: Tensor,
) -> None:
    """Σ_k s_k z_k, put where the optimizer looks for the gradient."""
    for module, states in ((stage.body, bodies), (stage.head, heads)):
        for state, scalar in zip(states, scalars):
            if module is None or state is None:
                continue
            worker.set_random_state(state)
            for _, p, z in _drawn(module, rule.guess):
                g = scalar.to(z.dtype) * z
                p.grad = g if p.grad is None else p.grad + g
