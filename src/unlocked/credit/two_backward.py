"""The forward gradient by two backward passes: the target, then the guess, projected (F B.1.3). See forward_gradient.py.

    h = f(x)  ──►  above          t_h = ∂(target)/∂h: the stage's own head's, or what comes down
    weight     t = (∂h/∂θ)ᵀ t_h,  G = (∂h/∂θ)ᵀ G_h or random,   θ.grad = Σ ⟨t, u⟩ u
    activity   ĝ_h = Σ ⟨t_h, u⟩ u for every sample,             θ.grad = (∂h/∂θ)ᵀ ĝ_h
    down       global: (∂h/∂x)ᵀ t_h, the exact one; intermediate: (∂h/∂x)ᵀ ∂ℓ/∂h of the stage's own head

One forward, so BatchNorm counts a batch once. Under a shared scalar Σ_j ⟨t^j, G^j⟩ and Σ_j ‖G^j‖² are summed on the way down,
and what they come to goes up again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..chain import Stage
from ..consensus.base import Weights
from ..dropout import InOrder
from ..rules.projection import (
    along,
    basis,
    combined,
    cosine,
    directions,
    dot,
    sample_cosine,
    unit,
    unit_together,
)
from ..work import work
from ..worker import Worker
from .base import leaf, objective
from .guesses import RANDOM, for_weights, guessed_by_random_head, random_like
from .interlocking import head_gradient, through
from .lending import exchange

if TYPE_CHECKING:
    from .forward_gradient import ForwardGradient


async def step(rule: ForwardGradient, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
    """One micro-batch."""
    await exchange(worker, stage, batch, weights)
    x = leaf(worker, await worker.below.recv("activation", batch))
    await weights.read()
    if worker.last:
        h = await worker.run("F", stage.body, x)
        loss = await worker.run("L", objective, worker, stage, h, batch)
        await worker.run("B", torch.autograd.backward, loss)
        if not worker.first and rule.target != "local":
            await worker.below.send("gradient", x.grad)  # type: ignore[arg-type]
        if rule.shared and not worker.first:
            await worker.below.send("sums", x.new_zeros(2))
        await weights.write()
        return
    h, drawn = await worker.run("F", draw_and_forward, rule, stage, x)
    await worker.above.send("activation", h.detach())
    own = await local_gradient(rule, worker, stage, h, batch)
    guess = drawn if drawn is not None else await guessed(rule, worker, stage, h, batch, own)
    target = own if rule.target == "local" else await worker.above.recv("gradient", h)
    if not worker.first and rule.target != "local":
        down = own if rule.target == "intermediate" else target
        await worker.below.send("gradient", await worker.run("B", through, h, x, down))
    found = await worker.run("B", two_gradients, rule, worker, stage, h, target, guess)
    scalar = await _shared_scalar(rule, worker, found) if rule.shared else None
    await worker.run("B", learn, rule, worker, stage, found, scalar)
    del x, h, own, guess, target, found
    await weights.write()


async def local_gradient(rule: ForwardGradient, worker: Worker, stage: Stage, h: Tensor, batch: Batch) -> Tensor | None:
    """Train the head on its own loss; ∂ℓ/∂h of it. None for a stage without one."""
    if stage.head is None:
        worker.leave_out()  # a guess drawn after it is the same whether heads are watched or not
        return None
    return await worker.run("L", head_gradient, worker, stage, h, batch)


async def guessed(
    rule: ForwardGradient, worker: Worker, stage: Stage, h: Tensor, batch: Batch, own: Tensor | None
) -> Guessed:
    """What is guessed of the stage's output, once it is there."""
    if rule.guess in RANDOM:
        return await worker.run("B", draw, rule, h)
    if rule.guess == "local":
        if own is not None and not rule.normalised and batch.weight != 1:
            return (
                own / batch.weight
            )  # the target has the micro-batch's weight; a direction must not have it twice more
        return own  # type: ignore[return-value]  # None only of a head of shapes
    return await worker.run("L", random_head, stage, h, batch, rule.guess == "ntk")


Guessed = Tensor | list[Tensor]


@work("forward", gives=lambda rule, stage, x: (stage.body(x), [] if draws_weights(rule) else None))
def draw_and_forward(rule: ForwardGradient, stage: Stage, x: Tensor) -> tuple[Tensor, list[Tensor] | None]:
    """The stage's output, and the random directions of its weights, which are drawn first (None: another guess)."""
    drawn = draw_weights(rule, stage)
    with InOrder():  # as in forward mode
        return stage.body(x), drawn


def draws_weights(rule: ForwardGradient) -> bool:
    """Whether what is guessed are random directions of weights, which need not wait for the output."""
    return rule.space == "weight" and rule.guess in RANDOM


def draw_weights(rule: ForwardGradient, stage: Stage) -> list[Tensor] | None:
    """Random directions of the weights, where the guess is that."""
    return [random_like(p, rule.guess) for p in trained(stage)] if draws_weights(rule) else None


@work("update", gives=lambda rule, h: h)  # some work, however little: what has none gets no random numbers of its own
def draw(rule: ForwardGradient, h: Tensor) -> Tensor:
    """A random direction of the output."""
    return random_like(h, rule.guess)


@work("head-forward", "head-backward", gives=lambda stage, h, batch, anew: h)
def random_head(stage: Stage, h: Tensor, batch: Batch, anew: bool) -> Tensor:
    """∂ℓ/∂h of the stage's random head."""
    return guessed_by_random_head(stage, h, batch, anew)


class Found(NamedTuple):
    """target, guess (a direction): one entry for each scalar, all for weights; estimate: of the activation's gradients, already
    carried to the weights."""

    target: list[Tensor]
    guess: list[Tensor]
    estimate: list[Tensor] | None
    scalars: str


@work("weight-backward", "weight-backward", gives=lambda rule, worker, stage, h, target, guess: None)
def two_gradients(
    rule: ForwardGradient, worker: Worker, stage: Stage, h: Tensor, target: Tensor, guess: Guessed
) -> Found:
    """Both gradients where they are to be projected; in activity space the estimate, too."""
    parameters = trained(stage)
    if rule.watch:
        _note_cosines(worker, h, parameters, target, guess)
    if rule.space == "activity":
        assert isinstance(guess, Tensor)
        found = sample_directions(rule, guess)
        estimate = combined(along(target, found), found)
        if rule.watch:
            _note_error(worker, [estimate], [target])
        return Found([], [], for_weights(h, parameters, estimate), "sample")
    ts = for_weights(h, parameters, target, keep=True)
    gs = guess if isinstance(guess, list) else for_weights(h, parameters, guess)
    return Found(ts, weight_directions(rule, gs), None, rule.scalars or "tensor")


def trained(stage: Stage) -> list[torch.nn.Parameter]:
    """The body's parameters that are not frozen."""
    return [p for p in stage.body.parameters() if p.requires_grad]


def sample_directions(rule: ForwardGradient, guess: Tensor) -> Tensor:
    """(R, B, …): what each sample's target is projected on."""
    if rule.subspace:
        return basis(guess, None if rule.subspace is True else rule.subspace)
    return directions(guess, rule.normalised, rule.patches, rule.groups)


def weight_directions(rule: ForwardGradient, guesses: list[Tensor]) -> list[Tensor]:
    """What the weights' target is projected on; under a shared scalar the length is that of all stages together."""
    if not rule.normalised or rule.shared:
        return guesses
    return unit_together(guesses) if rule.scalars == "stage" else [unit(g) for g in guesses]


def _estimates(ts: list[Tensor], us: list[Tensor], scalars: str) -> list[Tensor]:
    if scalars == "stage":
        scalar = torch.stack([dot(t, u) for t, u in zip(ts, us)]).sum()
        return [scalar * u for u in us]
    return [dot(t, u) * u for t, u in zip(ts, us)]


def _note_cosines(
    worker: Worker, h: Tensor, parameters: list[torch.nn.Parameter], target: Tensor, guess: Guessed
) -> None:
    """Of the activations (Eq. 4.6, mean over samples) and of the weights (Figure 4.5, mean over tensors)."""
    if isinstance(guess, list):
        gs = guess
    else:
        worker.note("cosine of guess and target, activations", sample_cosine(target, guess))
        gs = for_weights(h, parameters, guess, keep=True)
    ts = for_weights(h, parameters, target, keep=True)
    cosines = torch.stack([cosine(t, g) for t, g in zip(ts, gs)])
    worker.note("cosine of guess and target, weights", cosines.mean())


def _note_error(worker: Worker, estimates: list[Tensor], targets: list[Tensor]) -> None:
    """‖ĝ − t‖² / ‖t‖²: bias² and variance of one estimate together."""
    length = torch.stack([t.square().sum() for t in targets]).sum()
    missed = torch.stack([(e - t).square().sum() for e, t in zip(estimates, targets)]).sum()
    worker.note("squared error of the estimate", missed / torch.where(length > 0, length, 1))


async def _shared_scalar(rule: ForwardGradient, worker: Worker, found: Found) -> Tensor:
    """⟨t, G⟩ over all stages but the last, over ‖G‖² if guesses are normalised."""
    sums = await worker.run("B", _add_sums, found, await worker.above.recv("sums"))
    if worker.first:
        scalar = await worker.run("B", _scalar, rule, sums)
    else:
        await worker.below.send("sums", sums)
        scalar = await worker.below.recv("scalar")
    if worker.stage < worker.stages - 2:
        await worker.above.send("scalar", scalar)
    return scalar


@work(gives=lambda found, sums: sums)
def _add_sums(found: Found, sums: Tensor) -> Tensor:
    dots = sum(dot(t, u) for t, u in zip(found.target, found.guess))
    return sums + torch.stack([torch.as_tensor(dots), torch.stack([dot(u, u) for u in found.guess]).sum()])


@work(gives=lambda rule, sums: sums)
def _scalar(rule: ForwardGradient, sums: Tensor) -> Tensor:
    return sums[0] / torch.where(sums[1] > 0, sums[1], 1) if rule.normalised else sums[0]


@work(gives=lambda rule, worker, stage, found, scalar: None)
def learn(rule: ForwardGradient, worker: Worker, stage: Stage, found: Found, scalar: Tensor | None) -> None:
    """Put the estimate where the optimizer looks for the gradient. scalar: the one that all stages share, if they do."""
    if found.estimate is not None:
        add_gradients(stage, found.estimate)
        return
    if scalar is not None:
        estimates = [scalar * u for u in found.guess]
    else:
        estimates = _estimates(found.target, found.guess, found.scalars)
    if rule.watch:
        _note_error(worker, estimates, found.target)
    add_gradients(stage, estimates)


def add_gradients(stage: Stage, estimates: list[Tensor]) -> None:
    """To what micro-batches of the same update have left."""
    for p, g in zip(trained(stage), estimates, strict=True):
        p.grad = g.detach() if p.grad is None else p.grad + g
