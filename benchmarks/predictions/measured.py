"""What the distributed world takes: seconds of a step in windows, and bytes kept for the backward."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import unlocked as ul
from unlocked.calibration.crew import Member
from unlocked.chain import Chain
from unlocked.probes.memory import SavedBytes
from unlocked.worlds import Distributed

from .methods import Cut, Method
from .quiet import play_quietly
from pipelines.tasks import Task, sgd
from pipelines.windows import Variant, warm_up


class Training:
    """A method on both processes."""

    def __init__(self, member: Member, task: Task, method: Method, chain: Chain, worlds: ExitStack) -> None:
        world = worlds.enter_context(Distributed(member.cluster))
        self._trainer = ul.Trainer(
            copy.deepcopy(chain),
            credit=method.credit,
            consensus=method.consensus,
            replicas=method.replicas,
            optimizer=sgd,
            world=world,
        )
        self._batch = [task.x] * method.replicas, [task.y] * method.replicas

    def step(self) -> None:
        """One update."""
        self._trainer.step(*self._batch)

    def saved(self) -> dict[str, int]:
        """Most bytes that each worker here keeps for its backward in a step."""
        fixed = [x for chain in self._trainer.chains for x in (*chain.parameters(), *chain.buffers())]
        with SavedBytes(ignore=fixed) as meter:
            self.step()
        return {f"{place.replica}.{place.stage}": size for place, size in meter.workers.items()}


def measure(
    member: Member,
    task: Task,
    cuts: dict[Cut, Chain],
    chosen: list[Method],
    rounds: int,
    seconds: float,
    patience: float,
) -> dict[str, dict[str, Any]]:
    """By method: steps of a window, seconds of a step in each, how busy others were then, the bytes kept by each worker.

    All processes call it.
    """
    with ExitStack() as worlds:
        trainings = [Training(member, task, method, cuts[method.cut], worlds) for method in chosen]
        variants = [Variant(method.name, training.step, len(task.x)) for method, training in zip(chosen, trainings)]
        saved = [training.saved() for training in trainings]
        warm_up(member, variants, seconds)
        busy = play_quietly(member, variants, rounds, patience)
    return {
        variant.name: {
            "steps": variant.steps,
            "seconds": [wall / steps for steps, _, wall in variant.rows],
            "others": busy[variant.name],
            "saved": kept,
        }
        for variant, kept in zip(variants, saved)
    }
