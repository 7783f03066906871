"""What the shapes of a chain say its training takes, to stand beside what was measured.

Per stage: bytes of the parameters (with buffers), of their gradients, of the optimizer's state, and the most that is
kept for backward at once, given which forwards and backwards the method does in which order. Nothing here is measured: of the
step only the order of its acts is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..simulation.costs import Costs, StageCosts
from ..simulation.memory import activation_curves
from ..simulation.profile import STATES, Profile, profile
from ..timeline import BUSY, Timeline

if TYPE_CHECKING:
    from ..session import Trainer

Row = dict[str, Any]


def predicted(trainer: Trainer, timeline: Timeline, samples: int) -> list[Row]:
    """A row for each stage: stage, parameters, gradients, optimizer_state (None if the optimizer is not known), saved.

    `timeline`: the acts of one update, whose batch of `samples` per replica the method may have split. Raises whatever the
    network raises if it cannot run on shapes alone.
    """
    part = _micro_batch(timeline, samples)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=trainer.precision == "bf16")
    with autocast:
        found = profile(trainer.template, sizes=(part, 2 * part) if part > 1 else (2, 4))
    return rows(found, timeline, samples, trainer.weights[0].store.optimizer)


def rows(found: Profile, timeline: Timeline, samples: int, optimizer: torch.optim.Optimizer) -> list[Row]:
    """The same from a profile of the chain."""
    samples = _micro_batch(timeline, samples)
    costs = Costs(tuple(StageCosts({}, stage) for stage in found.stages))
    kept: dict[int, int] = {}
    for place, curve in activation_curves(
        Timeline(act for act in timeline if act.kind in BUSY), costs, samples
    ).items():
        kept[place.stage] = max([kept.get(place.stage, 0), *(size for _, size in curve)])
    states = states_of(optimizer)
    return [
        {
            "stage": j,
            "parameters": stage.profile.parameters,
            "gradients": stage.profile.trained,
            "optimizer_state": None if states is None else states * stage.profile.trained,
            "saved": kept.get(j, 0),
        }
        for j, stage in enumerate(costs.stages)
    ]


def _micro_batch(timeline: Timeline, samples: int) -> int:
    """Samples that go through a stage at once."""
    return samples // max(1, len({act.micro_batch for act in timeline if act.kind == "F"}))


def states_of(optimizer: torch.optim.Optimizer) -> int | None:
    """How many tensors of a weight's size an optimizer of torch keeps for it; None if it is not known."""
    name, options = type(optimizer).__name__.lower(), optimizer.defaults
    if name == "sgd":
        return STATES["momentum" if options.get("momentum") else "sgd"]
    return STATES[name] + _extra(options) if name in STATES else None


def _extra(options: Mapping[str, Any]) -> int:
    return int(bool(options.get("amsgrad")))
