"""What all processes of a run put together: that they were told the same, and what they did, on one clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .chain import Chain
from .consensus.base import Store
from .flat import digest as digest_of
from .restore import describe_optimizer, describe_schedule, in_words
from .timeline import Timeline
from .worlds import Distributed, Simulated

if TYPE_CHECKING:
    from .session import Trainer

_STEPS = 20  # of which acts are kept


def fingerprint(trainer: Trainer, chain: Chain) -> dict[str, Any]:
    """What must be alike on all processes before the first step; the weights as a digest."""
    return {
        "credit": in_words(trainer.credit),
        "consensus": in_words(trainer.consensus),
        "mitigation": repr(trainer.mitigation),
        "clip": trainer.clip,
        "accumulate": trainer.accumulate,
        "precision": trainer.precision,
        "batchnorm": trainer.batchnorm,
        "regularisers": repr(trainer.regularisers),
        "the choice of initial weights": trainer.initial,
        "the parameters": sorted([name, list(x.shape), str(x.dtype)] for name, x in chain.state_dict().items()),
        "the initial weights (seed them alike)": digest(chain),
    }


def fingerprint_of_updates(store: Store) -> dict[str, Any]:
    """The same of what updates the weights; options that are no plain values are left out."""
    described = describe_optimizer(store.optimizer)
    defaults = {key: repr(value) for key, value in described["defaults"].items() if not isinstance(value, torch.Tensor)}
    return {"the optimizer": [described["class"], defaults], "the schedule": describe_schedule(store.scheduler)}


def digest(chain: Chain) -> str:
    """Of all parameters and buffers, heads' too."""
    return digest_of([*chain.parameters(), *chain.buffers()])


def measured_steps(trainer: Trainer) -> dict[str, Any]:
    """The acts of the latest steps of all workers on one clock, as RUN/timeline.json has them."""
    world, crew = trainer.world, trainer.crew
    kept = list(trainer.recent)[-_STEPS:]
    acts = [act for timeline in kept for act in timeline]
    if not isinstance(world, Distributed):
        ranks = {worker.place: 0 for worker in trainer.workers}
        merged = Timeline(acts).to_json()
    else:
        ranks = world.ranks
        rows = crew.share(Timeline(acts).to_json())
        offsets = world.crew.offsets
        merged = [_moved(act, offsets[rank]) for rank, row in enumerate(rows) for act in row]
    return {
        "measured": isinstance(world, (Distributed, Simulated)),
        "simulated": isinstance(world, Simulated),
        "ranks": [[*place, rank] for place, rank in ranks.items()],
        "steps": [trainer.steps - len(kept) + 1, trainer.steps],
        "acts": merged,
    }


def recorded_steps(trainer: Trainer) -> list[Timeline]:
    """The latest steps one by one, with the workers of all processes as of the last epoch."""
    if trainer.crew.size == 1 or trainer.measured is None:
        return list(trainer.recent)
    steps: dict[int, list[dict[str, Any]]] = {}
    for act in trainer.measured["acts"]:
        steps.setdefault(act["micro_batch"] // (trainer.accumulate * trainer.credit.parts), []).append(act)
    return [Timeline.from_json(acts) for _, acts in sorted(steps.items())]


def _moved(act: dict[str, Any], seconds: float) -> dict[str, Any]:
    return {**act, "start": act["start"] + seconds, "end": act["end"] + seconds}
