"""A method on a simulated cluster without computing anything: shapes only, so thousands of workers are quick."""

from __future__ import annotations

from typing import Any

import torch

from ..batch import Batch
from ..chain import Chain
from ..consensus import Independent
from ..consensus.base import Consensus, Store
from ..credit.base import Credit
from ..errors import InvalidChoice
from ..timeline import Timeline
from ..worker import Place, Worker
from ..worlds.simulated import Simulated
from .costs import Costs
from .ghosts import Ghost, GhostBody, GhostChain, GhostStage
from .hardware import Hardware
from .profile import StageProfile


def simulate(
    credit: Credit,
    consensus: Consensus | None = None,
    *,
    costs: Costs,
    replicas: int = 1,
    steps: int = 1,
    samples: int = 1,
    accumulate: int = 1,
    hardware: Hardware | None = None,
    chain: Chain | None = None,
    phase: int = 0,
    seed: int = 0,
) -> Timeline:
    """The timeline of `steps` updates of a method, in one go, so that nothing waits between updates but what the method says.

    Args:
        costs: of the J stages. replicas: N. samples: in a micro-batch. accumulate: micro-batches per update.
        hardware: default: devices of speed 1, a network that takes no time. chain: the network the costs are of, for rules that
            look at its layers (WASH). phase: which part of the training, for rules that train one stage after the other.

    Raises InvalidChoice for rules that leave the communicating to PyTorch, DoesNotFit.
    """
    rule = consensus if consensus is not None else Independent()
    for part in (credit, rule):
        if part.needs_processes:
            raise InvalidChoice(
                f"{part.name} leaves the communicating to PyTorch, so it cannot be simulated; measure it with "
                "unlocked compare --world distributed."
            )
    if rule.free:
        raise InvalidChoice(
            f"{rule.name}(pairing='available') has no steps that all make, so it cannot be simulated without training; take "
            "pairing='clocks', or train it: unlocked train --world simulated."
        )
    world = Simulated(hardware, costs, tensors=False)
    sizes = rule.sizes(replicas, len(costs))
    even = sizes == [replicas] * len(costs)
    workers = world.mesh(replicas if even else sizes, len(costs), seed)
    if chain is not None:
        for worker in workers:
            worker.arrange(chain.layout)
    blank = None if chain is None else chain.blank("meta")
    bodies = [_body(stage.profile, blank, j) for j, stage in enumerate(costs.stages)]
    stages = {worker.place: _stage(worker, costs, bodies, blank) for worker in workers}
    batches = _batches(costs, steps * accumulate, samples, accumulate, phase)
    programs = []
    for worker in workers:
        stage: Any = stages[worker.place]
        replica: Any = GhostChain({worker.stage: stage}, blank, len(costs))
        store = Store(
            None,  # type: ignore[arg-type]
            accumulate=accumulate,
            overlap=credit.one_backward,
            returns=not credit.local,
            replicas=replicas,
            window=steps,
            delayed=bool(credit.crossing),
        )
        weights = rule.weights(worker, replica, store, seed)
        mine = batches if even else _dealt(rule, worker, batches, replicas, accumulate)
        programs.append((worker, credit.run(worker, stage, weights.taken(mine), weights)))
    world.haunt(stages)
    world.crossing, world.credit = credit.crossing | rule.crossing, credit
    return world.run(programs)


def seconds_per_update(timeline: Timeline, last: int, accumulate: int = 1) -> dict[Place, float]:
    """Seconds from one update to the next at each worker, the mean over its `last` ones of more than as many."""
    ends: dict[Place, dict[int, float]] = {}
    for act in timeline:
        if act.kind == "U":  # what comes with an update in the same step belongs to it
            mine, step = ends.setdefault(Place(act.replica, act.stage), {}), act.micro_batch // accumulate
            mine[step] = max(mine.get(step, 0.0), act.end)
    rows = {place: list(row.values()) for place, row in ends.items()}
    return {place: (row[-1] - row[-1 - last]) / last for place, row in rows.items()}


def _body(profile: StageProfile, chain: Chain | None, j: int) -> GhostBody:
    return GhostBody(None if chain is None else chain[j].body, profile.output, profile.dtype)


def _stage(worker: Worker, costs: Costs, bodies: list[GhostBody], chain: Chain | None) -> GhostStage:
    j = worker.stage
    return GhostStage(
        bodies[j], costs[j].profile.weights, costs[j].profile.head_weights, None if chain is None else chain[j]
    )


def _dealt(rule: Consensus, worker: Worker, batches: list[Batch], replicas: int, accumulate: int) -> list[Batch]:
    """What a rule gives a worker, where the stages have different numbers of them."""
    steps = [batches[k : k + accumulate] for k in range(0, len(batches), accumulate)]
    return [batch for step in steps for batch in rule.batches(worker, dict.fromkeys(range(replicas), step))]


def _batches(costs: Costs, count: int, samples: int, accumulate: int, phase: int) -> list[Batch]:
    first = costs[0].profile
    x: Any = Ghost((samples, *first.input))
    y: Any = Ghost((samples,), torch.int64)
    return [Batch(x, y, number, 1.0 / accumulate, phase) for number in range(count)]
