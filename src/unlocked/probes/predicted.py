"""What the shapes of a chain say its training takes, to stand beside what was measured.

Per stage: bytes of the parameters (with buffers), of their gradients, of the optimizer's state, the most that is kept for
backward at once, and the most of old weights, given which forwards, backwards and updates the method does in which order.
Nothing here is measured: of the step only the order of its acts is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..credit.base import Credit
from ..simulation.costs import Costs, StageCosts
from ..simulation.memory import Curve, activation_curves, version_curves
from ..simulation.profile import STATES, Profile, profile
from ..timeline import BUSY, Timeline
from ..worker import Place

if TYPE_CHECKING:
    from ..session import Trainer

Row = dict[str, Any]


def predicted(trainer: Trainer, timeline: Timeline, samples: int) -> list[Row]:
    """A row for each stage: stage, parameters, gradients, optimizer_state (None if the optimizer is not known), saved,
    versions.

    `timeline`: the acts of one update or of several, each with a batch of `samples` per replica; the method may have split it.
    Raises whatever the network raises if it cannot run on shapes alone.
    """
    part = max(1, samples // (trainer.accumulate * trainer.credit.parts))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=trainer.precision == "bf16")
    with autocast:
        found = profile(trainer.template, sizes=(part, 2 * part) if part > 1 else (2, 4))
    return rows(found, timeline, part, trainer.weights[0].store.optimizer, trainer.credit)


def rows(
    found: Profile, timeline: Timeline, samples: int, optimizer: torch.optim.Optimizer, credit: Credit | None = None
) -> list[Row]:
    """The same from a profile of the chain; `samples` go through a stage at once."""
    costs = Costs(tuple(StageCosts({}, stage) for stage in found.stages))
    busy = Timeline(act for act in timeline if act.kind in BUSY)
    saved = _most(activation_curves(busy, costs, samples, credit))
    versions = _most(version_curves(busy, costs, credit))
    states = states_of(optimizer)
    return [
        {
            "stage": j,
            "parameters": stage.profile.parameters,
            "gradients": stage.profile.trained,
            "optimizer_state": None if states is None else states * stage.profile.trained,
            "saved": saved.get(j, 0),
            "versions": versions.get(j, 0),
        }
        for j, stage in enumerate(costs.stages)
    ]


def _most(curves: Mapping[Place, Curve]) -> dict[int, int]:
    """The highest level at each stage, over the replicas."""
    most: dict[int, int] = {}
    for place, curve in curves.items():
        most[place.stage] = max([most.get(place.stage, 0), *(size for _, size in curve)])
    return most


def states_of(optimizer: torch.optim.Optimizer) -> int | None:
    """How many tensors of a weight's size an optimizer of torch keeps for it; None if it is not known."""
    name, options = type(optimizer).__name__.lower(), optimizer.defaults
    if name == "sgd":
        return STATES["momentum" if options.get("momentum") else "sgd"]
    return STATES[name] + _extra(options) if name in STATES else None


def _extra(options: Mapping[str, Any]) -> int:
    return int(bool(options.get("amsgrad")))
