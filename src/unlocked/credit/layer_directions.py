"""What a stage of local_forward_gradient.py computes: directions, their scalars, and what the weights learn from them.

The forward leaves nothing but the shapes of its layers' outputs. Directions are drawn again from their random states wherever
they are needed, so that only one layer's are there at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..chain import Stage
from ..costs import run_once
from ..dropout import InOrder
from ..forward_ad import push
from ..modes import statistics_kept
from ..rules.projection import along, combined, one_by_one, slices
from ..work import work
from ..worker import Worker
from .base import detached
from .forward_mode import derivatives
from .guesses import random_like
from .layers_inside import Inside, Layer, acting, learning, look_inside, outputs_like

if TYPE_CHECKING:
    from .local_forward_gradient import LocalForwardGradient

_known: WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], Inside]] = WeakKeyDictionary()


def inside(body: nn.Module, x: Tensor) -> Inside:
    """`look_inside`, once for every body and choice of what is frozen."""
    trained = tuple(name for name, p in body.named_parameters() if p.requires_grad)
    if body not in _known or _known[body][0] != trained:
        _known[body] = trained, look_inside(body, x)
    return _known[body][1]


def products(rule: LocalForwardGradient, body: nn.Module, x: Tensor, batch_size: int) -> int:
    """Jacobian-vector products of a stage in one step."""
    what, outputs = inside(body, x), list[Tensor]()
    with outputs_like(body, what.layers, outputs):
        run_once(body, x)
    each = batch_size if what.mixes and rule.samples == "exact" else 1
    return each * sum(len(_parts(rule, z)) for z in outputs)


def _parts(rule: LocalForwardGradient, u: Tensor) -> Tensor:
    """(R, B, …): the slices of a direction."""
    return slices(u, rule.patches, rule.groups) if rule.patches * rule.groups > 1 else u[None]


@dataclass
class Seen:
    """What the forward of a stage leaves. x: its input; state: the random state it began with; outputs: of its layers, shapes
    only; directions: the random state from which each layer's is drawn again; scalars: of each layer, (R, B)."""

    x: Tensor
    state: Tensor
    inside: Inside
    outputs: list[Tensor]
    directions: list[Tensor] = field(default_factory=list)
    scalars: list[Tensor] = field(default_factory=list)


@work("forward", gives=lambda worker, stage, x: (stage.body(x), None))
@torch.no_grad()
def forward(worker: Worker, stage: Stage, x: Tensor) -> tuple[Tensor, Seen]:
    """The stage's output, without a graph."""
    what, state, outputs = inside(stage.body, x), worker.random_state(), list[Tensor]()
    with InOrder(), outputs_like(stage.body, what.layers, outputs):
        return stage.body(x), Seen(x, state, what, outputs)


class _Moved(nn.Module):
    """A body as a function of what is added to the outputs of some calls of its layers."""

    def __init__(self, rule: LocalForwardGradient, body: nn.Module, seen: Seen, first: int) -> None:
        super().__init__()
        self.body, self._rule, self._seen, self._first = body, rule, seen, first

    def forward(self, *offsets: Tensor) -> Tensor:
        def move(call: int, layer: Layer, output: Tensor) -> Tensor:
            if not 0 <= call - self._first < len(offsets):
                return output
            return output + _on(self._rule, layer, output, offsets[call - self._first])

        with InOrder(), acting(self.body, self._seen.inside.layers, move):
            return self.body(self._seen.x)


def _on(rule: LocalForwardGradient, layer: Layer, z: Tensor, u: Tensor) -> Tensor:
    """u where a ReLU that follows is on."""
    return torch.where(z > 0, u, 0) if rule.mask and layer.rectified else u


def _drawn(rule: LocalForwardGradient, worker: Worker, like: Tensor, state: Tensor) -> Tensor:
    worker.set_random_state(state)
    return random_like(like, rule.guess)


def _draw(rule: LocalForwardGradient, worker: Worker, seen: Seen) -> None:
    """Settle every layer's direction, by the random state it is drawn from."""
    for like in seen.outputs:
        seen.directions.append(worker.random_state())
        random_like(like, rule.guess)


@work("forward", gives=lambda rule, worker, stage, seen, gradient: None)
def forward_scalars(rule: LocalForwardGradient, worker: Worker, stage: Stage, seen: Seen, gradient: Tensor) -> None:
    """Every layer's scalars, by forward mode. `gradient`: ∂ℓ^j/∂h."""
    _draw(rule, worker, seen)
    for call, like in enumerate(seen.outputs):
        parts = _parts(rule, _drawn(rule, worker, like, seen.directions[call]))
        apart = seen.inside.mixes and rule.samples == "exact"
        moved = _Moved(rule, stage.body, seen, call)
        worker.set_random_state(seen.state)
        tangents = push(moved, torch.zeros_like(parts[0]), one_by_one(parts) if apart else parts)
        found = derivatives(gradient, tangents)
        seen.scalars.append(found.sum(1).view(parts.shape[:2]) if apart else found)


@work("forward", "input-backward", gives=lambda rule, worker, stage, seen, gradient: None)
def backward_scalars(rule: LocalForwardGradient, worker: Worker, stage: Stage, seen: Seen, gradient: Tensor) -> None:
    """The same by a backward through the body."""
    _draw(rule, worker, seen)
    offsets = [torch.zeros_like(like).requires_grad_() for like in seen.outputs]
    worker.set_random_state(seen.state)
    with statistics_kept(stage.body.modules()):
        h = _Moved(rule, stage.body, seen, 0)(*offsets)
    if not h.requires_grad:
        raise detached(f"stage {worker.stage}")
    targets = torch.autograd.grad(h, offsets, gradient, allow_unused=True)
    for like, state, target in zip(seen.outputs, seen.directions, targets):
        parts = _parts(rule, _drawn(rule, worker, like, state))
        seen.scalars.append(gradient.new_zeros(parts.shape[:2]) if target is None else along(target, parts))


@work("forward", "weight-backward", gives=lambda rule, worker, stage, seen: None)
@torch.no_grad()
def learn(rule: LocalForwardGradient, worker: Worker, stage: Stage, seen: Seen) -> None:
    """Each layer's estimate at its output, carried to its own weights."""

    def estimate(call: int, layer: Layer, z: Tensor) -> Tensor:
        now = worker.random_state()
        u = _drawn(rule, worker, seen.outputs[call], seen.directions[call])
        worker.set_random_state(now)
        return combined(seen.scalars[call].to(u.dtype), _parts(rule, _on(rule, layer, z, u)))

    worker.set_random_state(seen.state)
    body = stage.body
    with InOrder(), statistics_kept(body.modules()), learning(body, seen.inside.layers, estimate) as found:
        body(seen.x)
    for name, slope in found.items():
        p = body.get_parameter(name)
        p.grad = slope if p.grad is None else p.grad + slope
