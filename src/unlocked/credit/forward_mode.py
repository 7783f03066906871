"""The forward gradient in forward mode: tangents go up with the activations, scalars come back. See forward_gradient.py.

    stage j       x, tangents ẋ of the stages below ──►  h = f(x)  ──►  h, tangents ḣ = (∂f/∂x) ẋ, and its own:
                                                                         weight (∂f/∂θ) u,  activity u itself
    target        global: the last stage has δ = ∂L/∂x of its own exact backward: scalars ⟨δ, ẋ⟩ for every tangent and sample
                  intermediate: the stage above, ⟨∂ℓ/∂h, ḣ⟩ with its own head's gradient; local: the same at home
    back          each stage takes the scalars of its own tangents and hands the others down: ĝ = Σ ⟨t, u⟩ u

A forward leaves no graph behind, and what is sent is let go: in weight space what waits for the scalars is u (as large as the
weights), in activity space u and the stage's input, from which the forward is run again for the backward inside the stage.
Under a shared scalar there is one tangent for all stages, ḣ = (∂f/∂x) ẋ + (∂f/∂θ) G, and Σ_j ‖G^j‖² goes up beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..chain import Stage
from ..consensus.base import Weights
from ..dropout import InOrder
from ..forward_ad import forward_along, push, push_both, push_weights
from ..modes import statistics_kept
from ..rules.projection import combined, dot, one_by_one
from ..work import work
from ..worker import Worker
from .base import leaf, objective
from .guesses import for_weights
from .lending import exchange
from .streams import begun_at
from .two_backward import (
    Guessed,
    add_gradients,
    draw_weights,
    draws_weights,
    guessed,
    local_gradient,
    sample_directions,
    trained,
    weight_directions,
)

if TYPE_CHECKING:
    from .forward_gradient import ForwardGradient


class Own(NamedTuple):
    """A stage's guess as directions (weight: one for each tensor; activity: (R, B, …)), and its tangents (S, B, …)."""

    directions: list[Tensor]
    tangents: Tensor


async def step(rule: ForwardGradient, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
    """One micro-batch."""
    await exchange(worker, stage, batch, weights)
    program = _last if worker.last else _one_scalar if rule.shared else _own_scalars
    await program(rule, worker, stage, await _arrived(worker, batch, weights), batch)
    await weights.write()


async def _arrived(worker: Worker, batch: Batch, weights: Weights) -> Tensor:
    """The stage's input. A name for it in `step` would keep it while the stage waits for its scalars."""
    x = await worker.below.recv("activation", batch)
    await weights.read()
    return x


class Passed(NamedTuple):
    """A forward: the output, the random state it began with (after what was drawn for the weights, if they are guessed so)."""

    h: Tensor
    state: Tensor
    drawn: list[Tensor] | None


@work(
    "forward",
    gives=lambda rule, worker, stage, x: Passed(stage.body(x), torch.empty(0), [] if draws_weights(rule) else None),
)
def forward(rule: ForwardGradient, worker: Worker, stage: Stage, x: Tensor) -> Passed:
    """The stage's output; with a graph to its weights only where a local guess needs to go through it."""
    drawn = draw_weights(rule, stage)
    state = worker.random_state()
    with InOrder(), torch.set_grad_enabled(rule.space == "weight" and drawn is None):
        return Passed(stage.body(x), state, drawn)


async def _guess(rule: ForwardGradient, worker: Worker, stage: Stage, passed: Passed, batch: Batch) -> Heard:
    """Send the output up, train the head, guess."""
    await worker.above.send("activation", passed.h.detach())
    own = await local_gradient(rule, worker, stage, passed.h, batch)
    guess = passed.drawn if passed.drawn is not None else await guessed(rule, worker, stage, passed.h, batch, own)
    return Heard(own, guess)


class Heard(NamedTuple):
    """What a stage knows by itself: the gradient of its head's loss at its output (None without a head), and the guess."""

    own: Tensor | None
    guess: Guessed


async def _last(rule: ForwardGradient, worker: Worker, stage: Stage, x: Tensor, batch: Batch) -> None:
    """The exact gradient, and the derivative of the loss along what the stages below push."""
    x = leaf(worker, x)
    h = await worker.run("F", stage.body, x)
    loss = await worker.run("L", objective, worker, stage, h, batch)
    await worker.run("B", torch.autograd.backward, loss)
    del h, loss
    if worker.first or rule.target == "local":
        return
    tangents = await worker.below.recv("tangents")
    assert x.grad is not None
    if rule.shared:
        norm = await worker.below.recv("norm")
        await worker.below.send("scalars", await worker.run("B", _whole, rule, x.grad, tangents, norm))
        return
    await worker.below.send("scalars", await worker.run("B", derivatives, x.grad, tangents))


@work(gives=lambda gradient, tangents: tangents.new_empty(tangents.shape[:2]))
def derivatives(gradient: Tensor | None, tangents: Tensor) -> Tensor:
    """(S, B): ⟨gradient_b, tangent_sb⟩ for every tangent and sample. (A head of shapes only has no gradient.)"""
    assert gradient is not None
    return (tangents * gradient).flatten(2).sum(2)


@work(gives=lambda rule, gradient, tangents, norm: norm)
def _whole(rule: ForwardGradient, gradient: Tensor, tangents: Tensor, norm: Tensor) -> Tensor:
    scalar = dot(gradient, tangents[0])
    return scalar / torch.where(norm > 0, norm, 1) if rule.normalised else scalar


# ---- a scalar of its own for each tensor, stage or sample --------------------------------------------------------------


async def _own_scalars(rule: ForwardGradient, worker: Worker, stage: Stage, x: Tensor | None, batch: Batch) -> None:
    passed = await worker.run("F", forward, rule, worker, stage, x)
    heard = await _guess(rule, worker, stage, passed, batch)
    state, gradient = passed.state, heard.own
    directions, own = await worker.run("B", begin, rule, worker, stage, x, passed.h, heard.guess, state)
    del passed, heard
    if rule.target == "local":
        scalars = await worker.run("B", derivatives, gradient, own)
    else:
        carried = None
        if not worker.first:
            below = await worker.below.recv("tangents")
            carried = await worker.run("F", carry, rule, worker, stage, x, below, state)
            del below
        others = await _send_up(rule, worker, own, carried, gradient)
        if rule.space == "weight":
            x = None  # as what else was sent, it is not to wait here
        del own, carried, gradient
        scalars = await _of_above(worker, others)
    await worker.run("B", learn, rule, worker, stage, x, directions, scalars, state)


async def _send_up(
    rule: ForwardGradient, worker: Worker, own: Tensor, carried: Tensor | None, gradient: Tensor | None
) -> int | None:
    """Send tangents up. Returns how many of them belong to the stages below; None: nobody below waits for scalars."""
    if carried is not None and rule.target == "intermediate":
        await worker.below.send("scalars", await worker.run("B", derivatives, gradient, carried))
        carried = None
    await worker.above.send("tangents", own if carried is None else torch.cat([carried, own]))
    return None if carried is None else len(carried)


async def _of_above(worker: Worker, others: int | None) -> Tensor:
    """The scalars of the stage's own tangents. Those of the stages below get theirs."""
    scalars = await worker.above.recv("scalars")
    if others is None:
        return scalars
    await worker.below.send("scalars", scalars.narrow(0, 0, others).contiguous())
    return scalars.narrow(0, others, len(scalars) - others)


@work(
    "forward",
    gives=lambda rule, worker, stage, x, tangents, state: stage.body(x).new_empty(
        (len(tangents), *stage.body(x).shape)
    ),
)
def carry(rule: ForwardGradient, worker: Worker, stage: Stage, x: Tensor, tangents: Tensor, state: Tensor) -> Tensor:
    """Tangents of the stages below, pushed through the body, a few at once."""
    if not len(tangents):  # guesses of zero span nothing; only the shape of what they would have given is asked for
        return push(stage.body, x, torch.zeros_like(x)[None])[:0]
    found = []
    for few in tangents.split(rule.at_once):
        worker.set_random_state(state)
        found.append(push(stage.body, x, few))
    return torch.cat(found)


def _as_directions(rule: ForwardGradient, stage: Stage, h: Tensor, guess: Guessed) -> list[Tensor]:
    if rule.space == "activity":
        assert isinstance(guess, Tensor)
        return [sample_directions(rule, guess)]
    return weight_directions(rule, guess if isinstance(guess, list) else for_weights(h, trained(stage), guess))


@work(
    "weight-backward",
    "forward",
    gives=lambda rule, worker, stage, x, h, guess, state: Own(
        [], h.new_empty((begun_at(rule, stage, h, len(h)), *h.shape))
    ),
)
def begin(
    rule: ForwardGradient, worker: Worker, stage: Stage, x: Tensor, h: Tensor, guess: Guessed, state: Tensor
) -> Own:
    """The stage's guess as directions, and the tangents of its output along them."""
    found = _as_directions(rule, stage, h, guess)
    if rule.space == "activity":
        mixed = stage.mixed_above and rule.samples == "exact" and rule.target != "local"
        return Own(found, one_by_one(found[0]) if mixed else found[0])
    names = _names(stage)
    rows = [dict(zip(names, found))] if rule.scalars == "stage" else [{name: u} for name, u in zip(names, found)]
    tangents = []
    for row in rows:
        worker.set_random_state(state)
        tangents.append(push_weights(stage.body, x, row))
    return Own(found, torch.stack(tangents))


@work("forward", "weight-backward", gives=lambda rule, worker, stage, x, directions, scalars, state: None)
def learn(
    rule: ForwardGradient,
    worker: Worker,
    stage: Stage,
    x: Tensor | None,
    directions: list[Tensor],
    scalars: Tensor,
    state: Tensor,
) -> None:
    """The estimate, put where the optimizer looks for the gradient. `scalars` (S, B): of each tangent and sample."""
    if rule.space == "weight":
        sums = scalars.sum(1)
        add_gradients(stage, [sums[0 if rule.scalars == "stage" else k] * u for k, u in enumerate(directions)])
        return
    assert x is not None
    r, b = directions[0].shape[:2]
    per_sample = scalars if len(scalars) == r else scalars.sum(1).view(r, b)
    worker.set_random_state(state)
    with InOrder(), statistics_kept(stage.body.modules()):
        h = stage.body(x.detach())
    add_gradients(stage, for_weights(h, trained(stage), combined(per_sample, directions[0])))


# ---- one scalar for all stages -------------------------------------------------------------------------------------------


async def _one_scalar(rule: ForwardGradient, worker: Worker, stage: Stage, x: Tensor, batch: Batch) -> None:
    tangent, norm = None, None
    if not worker.first:
        tangent, norm = await worker.below.recv("tangents"), await worker.below.recv("norm")
    if draws_weights(rule):
        passed, found, moved, length = await worker.run("F", forward_joining, rule, stage, x, tangent, norm)
        await _guess(rule, worker, stage, passed, batch)
    else:
        passed = await worker.run("F", forward, rule, worker, stage, x)
        heard = await _guess(rule, worker, stage, passed, batch)
        found, moved, length = await worker.run("F", join, rule, worker, stage, x, passed, heard.guess, tangent, norm)
        del heard
    del x, passed, tangent
    await worker.above.send("tangents", moved)
    await worker.above.send("norm", length)
    del moved
    scalar = await worker.above.recv("scalars")
    if not worker.first:
        await worker.below.send("scalars", scalar)
    await worker.run("B", _learn_all, stage, found, scalar)


@work(
    "forward",
    "forward",
    gives=lambda rule, stage, x, tangent, norm: (
        Passed(stage.body(x), torch.empty(0), []),
        [],
        stage.body(x).new_empty((1, *stage.body(x).shape)),
        stage.body(x).new_empty(()),
    ),
)
def forward_joining(
    rule: ForwardGradient, stage: Stage, x: Tensor, tangent: Tensor | None, norm: Tensor | None
) -> tuple[Passed, list[Tensor], Tensor, Tensor]:
    """The forward and its tangent in one pass, where the guess need not wait for the forward."""
    found = draw_weights(rule, stage)
    assert found is not None
    along = None if tangent is None else tangent[0]
    h, moved = forward_along(stage.body, x, along, dict(zip(_names(stage), found)))
    return Passed(h, torch.empty(0), found), found, moved[None], _longer(norm, found)


@work(
    "forward",
    "forward",
    gives=lambda rule, worker, stage, x, passed, guess, tangent, norm: (
        [],
        passed.h.new_empty((1, *passed.h.shape)),
        passed.h.new_empty(()),
    ),
)
def join(
    rule: ForwardGradient,
    worker: Worker,
    stage: Stage,
    x: Tensor,
    passed: Passed,
    guess: Guessed,
    tangent: Tensor | None,
    norm: Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The one tangent, moved on by this stage's guess; the guess; the squared length so far."""
    found = _as_directions(rule, stage, passed.h, guess)
    row = dict(zip(_names(stage), found))
    worker.set_random_state(passed.state)
    moved = push_weights(stage.body, x, row) if tangent is None else push_both(stage.body, x, tangent[0], row)
    return found, moved[None], _longer(norm, found)


def _names(stage: Stage) -> list[str]:
    return [name for name, p in stage.body.named_parameters() if p.requires_grad]


def _longer(norm: Tensor | None, found: list[Tensor]) -> Tensor:
    length = torch.stack([dot(u, u) for u in found]).sum()
    return length if norm is None else norm + length


@work(gives=lambda stage, found, scalar: None)
def _learn_all(stage: Stage, found: list[Tensor], scalar: Tensor) -> None:
    add_gradients(stage, [scalar * u for u in found])
