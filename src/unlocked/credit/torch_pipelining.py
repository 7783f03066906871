"""PyTorch's own pipelines, as baselines: GPipe (Huang et al., 2019) and 1F1B (Narayanan et al., 2019).

    Δ^j = Σ_m b_m/B · ∂ℓ(f^J ∘ … ∘ f^1(x_m), y_m)/∂θ^j          m = 1..M micro-batches of one batch, all on the same weights

    j stage, θ^j its weights, b_m = B/M samples of micro-batch m, ℓ the network's own loss (mean over samples).

GPipe runs all M forwards, then all M backwards; 1F1B begins the backwards as soon as the last stage can, so that stage j keeps
at most J − j + 1 activations (j = 1..J). Schedules, messages and backward are those of `torch.distributed.pipelining`; a worker
only tells it what a stage, a loss and a group of processes are, and records each forward and backward as an act.

Limits: both are backpropagation with accumulate = M, bit for bit: the same sums in the same order, the same dropout. BatchNorm
sees one micro-batch at a time, as it does there. M = 1 is backpropagation.

What it needs: one worker per process, M a divisor of the batch. Shapes are found by sending one micro-batch up the stages when
a new shape of batch comes (torch would exchange them as pickles, and nothing from the network is unpickled here).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..batch import Batch
from ..chain import Stage
from ..consensus.base import Weights
from ..consensus.torch_data_parallel import ReducedInBackward
from ..costs import run_once
from ..errors import InvalidChoice
from ..worker import Worker
from .base import Credit, Properties

if TYPE_CHECKING:
    from .torch_stage import Pipeline

# of each worker's weights, by shape of batch; no state of the training: made again after a resume
_PIPELINES: weakref.WeakKeyDictionary[Weights, dict[Any, Pipeline]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class TorchPipelining(Credit):
    """What GPipe and 1F1B share: all but the schedule.

    Args:
        micro_batches: M ≥ 1, how many equal parts a batch is split into.
    """

    micro_batches: int = 4

    needs_processes: ClassVar[bool] = True
    schedule: ClassVar[str]

    def __post_init__(self) -> None:
        if not isinstance(self.micro_batches, int) or self.micro_batches < 1:
            raise InvalidChoice(
                f"micro_batches={self.micro_batches} is not possible; give a whole number of at least 1 "
                "(a few times the number of stages keeps them busy)."
            )

    async def run(self, worker: Worker, stage: Stage, batches: Iterable[Batch], weights: Weights) -> None:
        for batch in batches:
            self._check(worker, stage, batch, weights)
            pipeline = await self._pipeline(worker, stage, batch, weights)
            await weights.read()
            pipeline.step(batch, weights)
            await weights.write()

    async def _pipeline(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> Pipeline:
        """The pipeline for batches of this shape; every stage makes a new one at the same batch."""
        from .torch_stage import Pipeline  # late: it takes a second

        known = _PIPELINES.setdefault(weights, {})
        shape = (batch.x.shape, batch.x.dtype)
        if shape not in known:
            worker.at(batch.number * self.micro_batches)
            x = await worker.below.recv("example", batch._replace(x=batch.x[: len(batch.x) // self.micro_batches]))
            h = await worker.run("F", run_once, stage.body, x)
            await worker.above.send("example", h)
            known[shape] = Pipeline(self.schedule, self.micro_batches, worker, stage, x, h)
        return known[shape]

    def _check(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        size, count = len(batch.x), self.micro_batches
        if size % count:
            raise InvalidChoice(
                f"{self.name} splits a batch into {count} equal micro-batches; {size} samples cannot be. Give a batch "
                f"size that is a multiple of {count}, or another micro_batches."
            )
        if stage.head is not None and worker.last and isinstance(weights, ReducedInBackward):
            raise InvalidChoice(
                f"{self.name} with PyTorch's data parallelism wants the loss of the last stage on its body's own output, "
                "but that stage has a head. Make the head the end of the body, or take the consensus all-reduce."
            )


@dataclass(frozen=True)
class TorchGPipe(TorchPipelining):
    """`ScheduleGPipe`: all forwards, then all backwards."""

    name: ClassVar[str] = "torch-gpipe"
    schedule: ClassVar[str] = "GPipe"
    properties: ClassVar[Properties] = Properties(
        title="GPipe, PyTorch's (Huang et al. 2019)",
        source="torch.distributed.pipelining",
        locks="forward, backward (per micro-batch), update",
        memory="own stage, all M micro-batches",
        up="Ψ_A",
        down="Ψ_A",
        delay="0",
        objective="global",
    )


@dataclass(frozen=True)
class TorchOneFOneB(TorchPipelining):
    """`Schedule1F1B`: forwards and backwards in turn. Needs micro_batches ≥ J."""

    name: ClassVar[str] = "torch-1f1b"
    schedule: ClassVar[str] = "1F1B"
    properties: ClassVar[Properties] = Properties(
        title="1F1B, PyTorch's (Narayanan et al. 2019)",
        source="torch.distributed.pipelining",
        locks="forward, backward (per micro-batch), update",
        memory="own stage, at most J − j + 1 micro-batches",
        up="Ψ_A",
        down="Ψ_A",
        delay="0",
        objective="global",
    )

    def _check(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        super()._check(worker, stage, batch, weights)
        if self.micro_batches < worker.stages:
            raise InvalidChoice(
                f"{self.name} needs at least as many micro-batches as stages; given are micro_batches="
                f"{self.micro_batches} and {worker.stages} stages. Give micro_batches={worker.stages} or more, or take "
                "torch-gpipe."
            )
