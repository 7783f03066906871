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
from torch import nn

import unlocked as ul
from unlocked.cluster import Cluster
from unlocked.errors import HeadTooLarge

from .alone import Way, step_alone
from .tasks import Task, chain_of, inputs_of
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
        recipe = by_time(task, stages)
        found = [
            improved(recipe, lambda given, local=local: _stage_seconds(task, given, local))[0]
            for local in (False, True)
        ]
    return Splits(*cluster.broadcast(found))


def by_time(task: Task, stages: int) -> dict[str, Any]:
    """The recipe of a chain as `ul.cut` balances it: by the time of the bodies' forward and backward."""
    torch.manual_seed(0)
    recipe = ul.cut(task.network(), stages, like=task.x, balance="time").recipe
    assert recipe is not None
    return recipe


def improved(
    recipe: dict[str, Any], seconds_of: Callable[[dict[str, Any]], list[float]]
) -> tuple[dict[str, Any], list[float]]:
    """A better recipe, if moving pieces finds one, and the seconds of its stages as `seconds_of` measures them."""
    sizes = list(recipe["sizes"])
    seconds = seconds_of(recipe)
    for _ in range(_MOVES if len(sizes) > 1 else 0):
        tried = []
        for row in _moves(sizes, seconds):
            with contextlib.suppress(HeadTooLarge):  # a stage too small for a head is no choice
                tried.append((seconds_of(recipe | {"sizes": row}), row))
        better = min(tried, key=lambda pair: max(pair[0]), default=None)
        if better is None or max(better[0]) > _GAIN * max(seconds):
            break
        seconds, sizes = better
    return recipe | {"sizes": sizes}, seconds


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
    if not local:
        return passing_seconds(task, recipe)
    chain = chain_of(task, recipe, task.dgl)
    return [
        _seconds(hand_written_dgl(nn.ModuleList([chain[j]]), x, task.y))
        for j, x in enumerate(inputs_of(chain, task.x)[:-1])
    ]


def passing_seconds(task: Task, recipe: dict[str, Any], way: Way = "graph", parts: int = 1) -> list[float]:
    """A step of each stage alone that passes gradients down, of `parts` micro-batches; see alone.py."""
    return [_seconds(steps_of(task, recipe, j, way, parts)) for j in range(len(recipe["sizes"]))]


def steps_of(task: Task, recipe: dict[str, Any], j: int, way: Way = "graph", parts: int = 1) -> Callable[[], None]:
    """Steps of stage j of the chain by itself."""
    chain = chain_of(task, recipe)
    x = inputs_of(chain, task.x)[j]
    return step_alone(chain[j], x, task.y, j == 0, j == len(chain) - 1, way, parts)


def _seconds(step: Callable[[], object], repeats: int = 7) -> float:
    """The fastest: splits are compared with each other, and what disturbs only adds."""
    samples = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        step()
        samples.append(time.perf_counter() - begin)
    return min(samples[2:])
