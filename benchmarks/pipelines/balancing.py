"""Where to cut so that the slowest stage is as fast as can be, measured with all that a stage really does in training.

`ul.cut(balance="time")` measures forward and backward of the bodies. Here stages also update, local ones train their heads and
give no gradient to the stage below; so the cut is improved from there: a piece of the slowest stage goes to a neighbour as
long as that helps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked.chain import Stage
from unlocked.cluster import Cluster
from unlocked.errors import HeadTooLarge

from .tasks import Task, chain_of, inputs_of, sgd
from overhead import hand_written_dgl

_GAIN = 0.98  # a move must make the slowest stage faster than noise would
_MOVES = 6


class Splits(NamedTuple):
    """Recipes of chains cut for stages that pass gradients down, and for stages that learn locally, with heads."""

    passing: dict[str, Any]
    local: dict[str, Any]


def balanced(cluster: Cluster, task: Task, stages: int) -> Splits:
    """The splits as rank 0 measures them while the others wait."""
    found = None
    if cluster.chief:
        torch.manual_seed(0)
        recipe = ul.cut(task.network(), stages, like=task.x, balance="time").recipe
        assert recipe is not None
        found = [recipe | {"sizes": _improve(task, recipe, local)} for local in (False, True)]
    return Splits(*cluster.broadcast(found))


def _improve(task: Task, recipe: dict[str, Any], local: bool) -> list[int]:
    sizes = list(recipe["sizes"])
    seconds = _stage_seconds(task, recipe | {"sizes": sizes}, local)
    for _ in range(_MOVES if len(sizes) > 1 else 0):
        tried = []
        for row in _moves(sizes, seconds):
            with contextlib.suppress(HeadTooLarge):  # a stage too small for a head is no choice
                tried.append((_stage_seconds(task, recipe | {"sizes": row}, local), row))
        better = min(tried, key=lambda pair: max(pair[0]), default=None)
        if better is None or max(better[0]) > _GAIN * max(seconds):
            break
        seconds, sizes = better
    return sizes


def _moves(sizes: list[int], seconds: list[float]) -> list[list[int]]:
    """One piece of the slowest stage to a neighbour."""
    slowest = seconds.index(max(seconds))
    rows = []
    for other in (slowest - 1, slowest + 1):
        if 0 <= other < len(sizes) and sizes[slowest] > 1:
            row = list(sizes)
            row[slowest] -= 1
            row[other] += 1
            rows.append(row)
    return rows


def _stage_seconds(task: Task, recipe: dict[str, Any], local: bool) -> list[float]:
    """A step of each stage alone."""
    chain = chain_of(task, recipe, task.dgl if local else None)
    seconds = []
    for j, x in enumerate(inputs_of(chain, task.x)[:-1]):
        if local:
            step: Callable[[], object] = hand_written_dgl(nn.ModuleList([chain[j]]), x, task.y)
        else:
            step = _passing_step(chain[j], x, task.y, first=j == 0, last=j == len(chain) - 1)
        seconds.append(_seconds(step))
    return seconds


def _passing_step(stage: Stage, x: Tensor, y: Tensor, first: bool, last: bool) -> Callable[[], None]:
    """Forward, backward of a gradient from above (of the loss, in the last stage) down to the input, update."""
    optimizer = sgd(list(stage.parameters()))

    def step() -> None:
        h = stage.body(x if first else x.detach().requires_grad_())
        if last:
            stage.loss(h, y).backward()
        else:
            torch.autograd.backward(h, torch.zeros_like(h))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _seconds(step: Callable[[], object], repeats: int = 7) -> float:
    """The fastest: splits are compared with each other, and what disturbs only adds."""
    samples = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        step()
        samples.append(time.perf_counter() - begin)
    return min(samples[2:])
