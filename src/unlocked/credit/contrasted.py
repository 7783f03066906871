"""What self-supervised rules compute in the two passes of an update (contrasting.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import Batch
from ..chain import Stage
from ..consensus.base import Weights
from ..errors import InvalidChoice
from ..modes import statistics_kept
from ..probes.memory import count_saved
from ..work import work
from ..worker import Worker
from .base import backward, reported
from .keeping import unchanged
from .oracle import Oracle


class Part:
    """A micro-batch between the two passes. dz: ∂L/∂z, once it is known; random: states before body and head."""

    h: Tensor | None = None
    z: Tensor | None = None
    dz: Tensor | None = None
    oracle: Tensor | None = None

    def __init__(self, batch: Batch, x: Tensor) -> None:
        self.batch, self.x = batch, x
        self.random: list[Tensor] = []


def refuse_odd(batch: Batch) -> None:
    """Raises InvalidChoice for a micro-batch that cannot be pairs of views."""
    if len(batch.x) % 2:
        raise InvalidChoice(
            f"A micro-batch has {len(batch.x)} rows, which are no pairs of views; train on data with augment='simclr' (or "
            "'views+…'), or give both views of an image one after the other, in batches whose images accumulate (and the "
            "number of replicas) divides."
        )


@work("forward", gives=lambda worker, stage, x, part: stage.body(x))
def forward_only(worker: Worker, stage: Stage, x: Tensor, part: Part) -> Tensor:
    """The body's output without a graph; the input is kept."""
    part.random.append(worker.random_state())
    count_saved(x, part)
    with torch.no_grad(), unchanged(worker, x):
        return stage.body(x)


@work("head-forward", gives=lambda worker, stage, part, dimension: part.h.new_empty((len(part.h), dimension)))
def project(worker: Worker, stage: Stage, part: Part, dimension: int) -> Tensor:
    """The projections of the stage's output."""
    return stage.read(part.h)  # type: ignore[arg-type]


@work("head-forward", gives=project.gives)  # type: ignore[attr-defined]
def project_only(worker: Worker, stage: Stage, part: Part, dimension: int) -> Tensor:
    """The same without a graph."""
    part.random.append(worker.random_state())
    with torch.no_grad():
        return project(worker, stage, part, dimension)


@work(gives=Oracle.gives, network=Oracle.on_shapes)
def seen_by(oracle: Oracle, x: Tensor) -> Tensor:
    """The oracle's projections."""
    return oracle(x)


@work(gives=lambda weights, column: column[0].new_empty((sum(map(len, column)), *column[0].shape[1:])))
def joined(column: Sequence[Tensor]) -> Tensor:
    """The rows of all micro-batches, without gradient and in at least float32."""
    rows = torch.cat([part.detach() for part in column])
    return rows.to(torch.promote_types(rows.dtype, torch.float32)) if rows.is_floating_point() else rows


@work()
def judge(worker: Worker, stage: Stage, parts: Sequence[Part], gathered: Sequence[Sequence[Tensor]]) -> None:
    """Tell loss and notes, and leave ∂L/∂z in the parts: N times it, where the gradients of N replicas will be averaged."""
    loss, (views, labels, oracle) = stage.loss, gathered
    rank = worker.replicas.rank if len(views) > 1 else 0
    own = views[rank].detach().requires_grad_()
    every = torch.cat([*views[:rank], own, *views[rank + 1 :]])
    y, seen = (torch.cat(list(rows)) if rows else None for rows in (labels, oracle))
    judged = loss.judge(every, y, seen)  # type: ignore[attr-defined]
    reported(worker, judged.loss, parts[0].batch._replace(weight=1.0))
    for name, value in judged.notes.items():
        worker.note(name, value)
    (gradient,) = torch.autograd.grad(judged.loss, own)
    if len(views) > 1:
        gradient = gradient * len(views)
    for part, rows in zip(parts, gradient.split([len(part.batch.x) for part in parts])):
        part.dz = rows


def _through(worker: Worker, stage: Stage, weights: Weights, part: Part, gradient: Tensor) -> None:
    top = part.h if part.z is None else part.z
    assert top is not None
    backward(worker, stage, top, gradient.to(top.dtype))


def _again(worker: Worker, stage: Stage, weights: Weights, part: Part, gradient: Tensor) -> None:
    with statistics_kept(weights.versions.parts):
        worker.set_random_state(part.random[0])
        top = stage.body(part.x)
        if part.dz is not None:
            worker.set_random_state(part.random[1])
            top = stage.read(top)
    backward(worker, stage, top, gradient.to(top.dtype))


@work("head-backward", "weight-backward")
def through_local(worker: Worker, stage: Stage, weights: Weights, part: Part, gradient: Tensor) -> None:
    """Backward through the graph of pass 1, to the stage's weights."""
    _through(worker, stage, weights, part, gradient)


@work("head-backward", "backward")
def through(worker: Worker, stage: Stage, weights: Weights, part: Part, gradient: Tensor) -> None:
    """The same to its input, too."""
    _through(worker, stage, weights, part, gradient)


@work("forward", "head-forward", "head-backward", "weight-backward")
def again_local(worker: Worker, stage: Stage, weights: Weights, part: Part, gradient: Tensor) -> None:
    """Forward again, and backward to the stage's weights."""
    _again(worker, stage, weights, part, gradient)


@work("forward", "head-forward", "head-backward", "backward")
def again(worker: Worker, stage: Stage, weights: Weights, part: Part, gradient: Tensor) -> None:
    """The same to its input, too."""
    _again(worker, stage, weights, part, gradient)
