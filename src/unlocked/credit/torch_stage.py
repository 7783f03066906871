"""A worker's stage as torch.distributed.pipelining wants it. Apart from its rules, because that import takes a second."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import P2POp
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from ..batch import Batch
from ..chain import Stage
from ..consensus.base import Weights
from ..consensus.torch_data_parallel import ReducedInBackward, expect_backward, note
from ..errors import UnlockedError
from ..worker import Place, Worker
from .base import objective

T = TypeVar("T")

SCHEDULES: dict[str, Callable[..., PipelineScheduleSingle]] = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


class _ActingStage(PipelineStage):
    """Torch's stage; every forward and backward of a micro-batch is an act of the worker."""

    def __init__(self, worker: Worker, body: torch.nn.Module, x: Tensor, h: Tensor) -> None:
        group = worker.transport.process_group(worker, "stages")
        super().__init__(body, worker.stage, worker.stages, x.device, x, h, group=group)
        self._worker = worker
        self.first = 0  # number of the batch's first micro-batch
        self.reduces = False  # whether DistributedDataParallel is to reduce in the last backward
        self._asked = (0, 0.0)  # bytes awaited, and since when

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        """The forward of one micro-batch, under its own random numbers."""
        self._worker.at(self.first + fwd_chunk_id)
        if not self.is_first:
            self._received("activation", self._worker.stage - 1)
        forward = functools.partial(super().forward_one_chunk, fwd_chunk_id, *arguments, **options)
        return at_once(self._worker.run("F", forward))

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> None:
        """The backward of one micro-batch."""
        self._worker.at(self.first + bwd_chunk_id)
        if not self.is_last:
            self._received("gradient", self._worker.stage + 1)
        backward = functools.partial(super().backward_one_chunk, bwd_chunk_id, *arguments, **options)
        at_once(self._worker.run("B", backward))

    # torch asks for these right before it waits, or sends; here that is written down

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[P2POp]:
        """The activation's receive."""
        return self._awaited(super().get_fwd_recv_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[P2POp]:
        """The gradient's receive."""
        return self._awaited(super().get_bwd_recv_ops(bwd_chunk_id))

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[P2POp]:
        """The activation's send."""
        return self._sent(super().get_fwd_send_ops(fwd_chunk_id), "activation", self._worker.stage + 1)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[P2POp]:
        """The gradient's send."""
        return self._sent(super().get_bwd_send_ops(bwd_chunk_id), "gradient", self._worker.stage - 1)

    def _awaited(self, operations: list[P2POp]) -> list[P2POp]:
        self._asked = (_bytes(operations), time.perf_counter())
        return operations

    def _received(self, channel: str, stage: int) -> None:
        size, begin = self._asked
        note(self._worker, "R", channel, size, Place(self._worker.replica, stage), begin)

    def _sent(self, operations: list[P2POp], channel: str, stage: int) -> list[P2POp]:
        if operations:
            note(self._worker, "S", channel, _bytes(operations), Place(self._worker.replica, stage))
        return operations

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: dict, last_backward: bool = False) -> Any:
        """Torch does this for a DistributedDataParallel wrapper; here the body itself carries its hooks."""
        if last_backward and self.reduces:
            expect_backward(self.submod)
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)


class Pipeline:
    """A worker's stage and its schedule ("GPipe" or "1F1B"), for batches of one shape.

    x, h: what goes in and comes out for one micro-batch; only shape and type are read, so the stages send no pickles.
    """

    def __init__(self, schedule: str, micro_batches: int, worker: Worker, stage: Stage, x: Tensor, h: Tensor) -> None:
        self._worker, self._stage, self._count = worker, stage, micro_batches
        inside = x if worker.first else _with_gradient(x)
        self._acting = _ActingStage(worker, stage.body, inside, _with_gradient(h))
        # the loss carries its weight already, so torch must not divide
        self._schedule = SCHEDULES[schedule](self._acting, micro_batches, loss_fn=self._loss, scale_grads=False)

    def step(self, batch: Batch, weights: Weights) -> None:
        """All forwards and backwards of one batch; blocks until this stage is done."""
        self._batch = batch
        if isinstance(weights, ReducedInBackward):
            weights.postpone()
            self._acting.reduces = weights.completes
        self._acting.first = batch.number * self._count
        inputs = (batch.x,) if self._worker.first else ()
        targets: dict[str, Any] = {"target": batch.y} if self._worker.last else {}
        self._schedule.step(*inputs, **targets, return_outputs=False)

    def _loss(self, h: Tensor, y: Tensor) -> Tensor:
        part = self._batch._replace(y=y, weight=self._batch.weight / self._count)
        return at_once(self._worker.run("L", objective, self._worker, self._stage, h, part))


def _bytes(operations: list[P2POp]) -> int:
    return sum(operation.tensor.numel() * operation.tensor.element_size() for operation in operations)


def at_once(computation: Awaitable[T]) -> T:
    """The result of a computation that waits for nobody, in a place where `await` cannot stand."""
    steps = computation.__await__()
    try:
        next(steps)
    except StopIteration as done:
        return done.value
    raise UnlockedError("A computation inside torch's schedule waited for another worker; there it may only compute.")


def _with_gradient(x: Tensor) -> Tensor:
    """Says to torch that a gradient comes back for this tensor."""
    return x.detach().requires_grad_()
