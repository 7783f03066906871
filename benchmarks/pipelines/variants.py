"""The ways to train that are compared: one process, this library over processes, PyTorch's pipelines (torch_schedules.py)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

import unlocked as ul
from unlocked.worlds import Distributed

from .balancing import Splits
from .crew import Member
from .tasks import Task, chain_of, flops_of, inputs_of, payload, sgd
from .windows import Variant
from overhead import hand_written_backprop, hand_written_dgl


class Library:
    """This library's Trainer over all processes. Counts what it sends and compares it with the prediction, to the byte."""

    def __init__(
        self,
        member: Member,
        task: Task,
        recipe: dict[str, Any],
        credit: Any,
        worlds: ExitStack,
        links: Any = "auto",
        **options: Any,
    ) -> None:
        world = worlds.enter_context(Distributed(member.cluster, links=links))
        chain = chain_of(task, recipe)
        self.predicted = payload(chain, task, member.cluster.rank, gradients=not isinstance(credit, ul.credit.DGL))
        self.session = ul.Trainer(chain, credit=credit, optimizer=sgd, world=world, **options)
        self.x, self.y = task.x, task.y
        self.heads = [str(head) for head in self.session.heads]

    def step(self) -> None:
        """One update."""
        self.session.step(self.x, self.y)

    def check_bytes(self) -> dict[str, Any]:
        """Payload and wire bytes per step that left this process. Raises AssertionError unless as predicted."""
        steps = self.session.steps
        expected = {channel: size * steps for channel, size in self.predicted.items()}
        found = dict(self.session.bytes_sent)
        assert found == expected, f"{found} bytes were sent in {steps} steps; predicted were {expected}"
        return {"payload": self.predicted, "wire": self.session.timeline.wire_sent()}


def single_variants(member: Member, task: Task, splits: Splits) -> list[Variant]:
    """Hand-written PyTorch loops without this library: one process with one and with all cores, and independent ones."""
    batch, rank = len(task.x), member.cluster.rank
    backprop = hand_written_backprop(chain_of(task, splits.passing), task.x, task.y)
    local = hand_written_dgl(chain_of(task, splits.local, task.dgl), task.x, task.y)
    alone = backprop if rank == 0 else None
    independent = rank < len(member.cores)
    return [
        Variant("1 process, 1 thread", alone, batch),
        Variant(f"1 process, {len(member.cores)} threads", alone, batch, around=member.all_cores),
        Variant("independent backprop", backprop if independent else None, batch, "sum"),
        Variant("independent dgl", local if independent else None, batch, "sum"),
    ]


def stages_alone(member: Member, task: Task, recipe: dict[str, Any]) -> Variant:
    """Every process trains its stage by DGL on a constant input: no messages. What this split allows at best."""
    rank = member.cluster.rank
    chain = chain_of(task, recipe, task.dgl)
    x: Tensor = inputs_of(chain, task.x)[rank]
    return Variant("stages alone", hand_written_dgl(nn.ModuleList([chain[rank]]), x, task.y), len(task.x), "slowest")


def library_variants(member: Member, task: Task, splits: Splits, worlds: ExitStack) -> dict[str, Library]:
    """DGL, interlocking(1) and backprop over the stages."""
    credits = {
        "dgl": task.dgl,
        "interlocking(1)": ul.credit.Interlocking(d=1, head=task.head),
        "backprop": ul.credit.Backprop(),
    }
    return {
        name: Library(member, task, splits.local if name == "dgl" else splits.passing, credit, worlds)
        for name, credit in credits.items()
    }


def step_flops(task: Task, splits: Splits) -> dict[str, int]:
    """Floating-point operations of a step of the whole network, by backprop and by DGL with its heads."""
    backprop = hand_written_backprop(chain_of(task, splits.passing), task.x, task.y)
    local = hand_written_dgl(chain_of(task, splits.local, task.dgl), task.x, task.y)
    return {"backprop": flops_of(backprop), "dgl": flops_of(local)}
