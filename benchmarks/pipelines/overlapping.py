"""How much communication hides behind computation, on a link so slow that it shows (bare loopback is processor work).

    overlap = 1 − (both − max(compute, communication)) / min(compute, communication)

    1: the shorter one is hidden; 0: one after the other. Seconds per step, of the slowest process.

Two things are looked at: DGL's send of an activation (the sender does not wait for it), and the all-reduce of gradients in
buckets that begin during the backward (which can hide behind the backward only) beside one exchange after it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor

import unlocked as ul
from unlocked.batch import Batch
from unlocked.chain import Stage
from unlocked.consensus.base import Weights
from unlocked.credit.base import Properties, SynchronousCredit
from unlocked.worker import Worker
from unlocked.worlds import Distributed

from .balancing import balanced
from .crew import Member
from .tasks import Task, chain_of, inputs_of, sgd
from .variants import Library, stages_alone
from .windows import Variant, play, rates, warm_up
from overhead import hand_written_backprop

_BUCKET_MB = 0.2  # a tenth of the gradients, so that the first exchange begins early in the backward


@dataclass(frozen=True)
class OnlySend(SynchronousCredit):
    """DGL's messages without its computation. h: what stage 0 sends."""

    h: Any = None

    name: ClassVar[str] = "only-send"
    properties: ClassVar[Properties] = ul.credit.DGL.properties

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        if not worker.first:
            await worker.below.recv("activation", batch)
        if not worker.last:
            await worker.above.send("activation", self.h)


@dataclass(frozen=True)
class OnlyMean(SynchronousCredit):
    """All-reduce without a backward: the mean of tensors shaped like the parameters."""

    name: ClassVar[str] = "only-mean"
    properties: ClassVar[Properties] = ul.credit.Backprop.properties

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        await worker.replicas.mean("all-reduce", [parameter.detach() for parameter in stage.parameters()])


def measure_overlap(member: Member, rounds: int, seconds: float) -> dict[str, Any]:
    """Both measurements; called on both processes."""
    found = {"dgl send": _dgl_send(member, rounds, seconds), "all-reduce": _all_reduce(member, rounds, seconds)}
    if member.cluster.chief:
        for name, row in found.items():
            print(f"{name}: " + ", ".join(f"{what} {value:,}" for what, value in row.items()), flush=True)
    return {"overlap": found, "freed_memory_kept": all(member.cluster.share(member.kept))}


def _dgl_send(member: Member, rounds: int, seconds: float) -> dict[str, Any]:
    task = _gpt(16, layers=4)
    recipe = balanced(member.cluster, task, 2).local
    h = inputs_of(chain_of(task, recipe), task.x)[1]
    with ExitStack() as worlds:
        only_send = Library(member, task, recipe, OnlySend(h), worlds, links="gloo")
        dgl = Library(member, task, recipe, task.dgl, worlds, links="gloo")
        variants = [
            stages_alone(member, task, recipe),
            Variant("communication", only_send.step, len(task.x)),
            Variant("both", dgl.step, len(task.x)),
        ]
        times = _seconds_per_step(member, variants, rounds, seconds)
        dgl.check_bytes()
        compute, communication, both = (times[variant.name] for variant in variants)
        return {
            "bytes": h.numel() * h.element_size(),
            "compute_ms": _ms(compute),
            "communication_ms": _ms(communication),
            "both_ms": _ms(both),
            "overlap": _overlap(compute, communication, both),
        }


def _all_reduce(member: Member, rounds: int, seconds: float) -> dict[str, Any]:
    task = _gpt(64, layers=2)
    recipe = balanced(member.cluster, task, 1).passing
    chain = chain_of(task, recipe)
    compute_step = hand_written_backprop(chain, task.x, task.y)
    with ExitStack() as worlds:
        variants = [
            Variant("compute", compute_step, len(task.x), "slowest"),
            _replicas(member, task, recipe, worlds, "communication", OnlyMean(), ul.consensus.Independent()),
            _replicas(
                member, task, recipe, worlds, "buckets", ul.credit.Backprop(), ul.consensus.AllReduce(_BUCKET_MB)
            ),
            _replicas(member, task, recipe, worlds, "at the end", ul.credit.Backprop(), ul.consensus.AllReduce(0)),
        ]
        times = _seconds_per_step(member, variants, rounds, seconds)
    compute, communication = times["compute"], times["communication"]
    return {
        "bytes": sum(4 * parameter.numel() for parameter in chain.parameters()),
        "compute_ms": _ms(compute),
        "communication_ms": _ms(communication),
        **{f"{name.replace(' ', '_')}_ms": _ms(times[name]) for name in ("buckets", "at the end")},
        "overlap": _overlap(compute, communication, times["buckets"]),
        "overlap_at_the_end": _overlap(compute, communication, times["at the end"]),
    }


def _replicas(
    member: Member, task: Task, recipe: dict[str, Any], worlds: ExitStack, name: str, credit: Any, consensus: Any
) -> Variant:
    """Two replicas of the whole network, each with a batch of its own."""
    world = worlds.enter_context(Distributed(member.cluster, links="gloo"))
    session = ul.Trainer(
        chain_of(task, recipe), credit=credit, consensus=consensus, replicas=2, optimizer=sgd, world=world
    )
    both: tuple[list[Tensor], list[Tensor]] = ([task.x, task.x], [task.y, task.y])
    return Variant(name, partial(session.step, *both), len(task.x))


def _seconds_per_step(member: Member, variants: list[Variant], rounds: int, seconds: float) -> dict[str, float]:
    warm_up(member, variants, seconds, steps=2)
    play(member, variants, rounds)
    speed = rates(member, variants)
    return {variant.name: variant.batch / median(speed[variant.name]) for variant in variants}


def _overlap(compute: float, communication: float, both: float) -> float:
    return round(1.0 - (both - max(compute, communication)) / min(compute, communication), 3)


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 1)


def _gpt(batch: int, layers: int) -> Task:
    torch.manual_seed(0)
    x, y = torch.randint(256, (batch, 128)), torch.randint(256, (batch, 128))
    return Task("gpt", "gpt", {"layers": layers}, x, y)
