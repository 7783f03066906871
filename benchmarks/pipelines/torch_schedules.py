"""GPipe and 1F1B of torch.distributed.pipelining, written with PyTorch alone, in the same processes on the same split."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import unlocked as ul
from unlocked.chain import Chain

from .crew import Member
from .tasks import Task, chain_of, inputs_of, sgd
from .windows import Variant, play, rates, warm_up

SCHEDULES: dict[str, Any] = {"torch GPipe": ScheduleGPipe, "torch 1F1B": Schedule1F1B}
MICRO_BATCHES = (2, 4, 8)


class TorchPipeline:
    """One stage of the pipeline and its optimizer."""

    def __init__(self, schedule: str, count: int, chain: Chain, rank: int, task: Task) -> None:
        body = chain[rank].body
        self._first, self._last = rank == 0, rank == len(chain) - 1
        self._x, self._y = task.x, task.y
        shapes = inputs_of(chain, task.x[: len(task.x) // count])
        x = shapes[rank] if self._first else _with_gradient(shapes[rank])
        stage = PipelineStage(
            body, rank, len(chain), x.device, input_args=(x,), output_args=(_with_gradient(shapes[rank + 1]),)
        )
        self._schedule = SCHEDULES[schedule](stage, count, loss_fn=ul.losses.cross_entropy)
        parameters: list[nn.Parameter] = list(body.parameters())
        self._optimizer = sgd(parameters)

    def step(self) -> None:
        """One batch and its update; the loss is read where it arises, as everywhere else."""
        self._optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        inputs = (self._x,) if self._first else ()
        targets: dict[str, Any] = {"target": self._y, "losses": losses} if self._last else {}
        self._schedule.step(*inputs, **targets, return_outputs=False)
        self._optimizer.step()
        sum(loss.item() for loss in losses)


def start_torch(member: Member) -> None:
    """The process group of all, on the loopback."""
    store = dist.PrefixStore("benchmark/", member.cluster.own_store())
    dist.init_process_group("gloo", store=store, rank=member.cluster.rank, world_size=member.cluster.size)


def best_schedules(
    member: Member, task: Task, recipe: dict[str, Any], seconds: float
) -> tuple[list[Variant], dict[str, float]]:
    """The best micro-batch count of each schedule, by two windows each; and samples per second of all that were tried."""
    tried: dict[str, dict[str, Variant]] = {}
    for name in SCHEDULES:
        counts = [count for count in MICRO_BATCHES if name == "torch GPipe" or count >= member.cluster.size]
        tried[name] = {f"{name} ×{count}": _variant(member, task, recipe, name, count) for count in counts}
    everyone = [variant for row in tried.values() for variant in row.values()]
    warm_up(member, everyone, seconds)
    play(member, everyone, 2)
    speed = {name: max(row) for name, row in rates(member, everyone).items()}
    best = []
    for name, row in tried.items():
        variant = row[max(row, key=lambda which: speed[which])]
        variant.name, variant.rows = name, []
        best.append(variant)
    return best, speed


def _variant(member: Member, task: Task, recipe: dict[str, Any], name: str, count: int) -> Variant:
    pipeline = TorchPipeline(name, count, chain_of(task, recipe), member.cluster.rank, task)
    return Variant(f"{name} ×{count}", pipeline.step, len(task.x))


def _with_gradient(x: Tensor) -> Tensor:
    """Says to torch that a gradient comes back for this tensor."""
    return x.detach().requires_grad_()
