"""Cyclic data parallelism: which weights a replica sees, and when (Fournier & Oyallon; F Chapter 5, Eq. CDP, CDP-v1, CDP-v2).

    θ̂_{n,t}^j = θ_t^j  if u[n][j]  else  θ_{t−1}^j              θ_{−1} = θ_0

    n = 0..N−1   replica; it begins n/N of a gradient's time after replica 0
    j = 0..J−1   stage; t training step. (The thesis counts n and j from 1 and has J = N.)
    u            the rule, a matrix of N × J truth values

One unit of time is the forward or the backward of a stage, so a gradient takes 2J of them:

    forward of stage j in replica n    begins at  2J·t + 2J·n/N + j
    backward                           begins at  2J·t + 2J·n/N + 2J − 1 − j
    update t → t+1 of stage j          is there at the end of replica N−1's backward

So θ_t^j can be had in time by the forward of replica n if and only if  j·N ≥ (N−1−n)·J.  v2 takes it wherever it can be
had (j ≥ N−1−n for J = N), v1 nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InvalidChoice, choose

Rule = Literal["v1", "v2"]
Matrix = Sequence[Sequence[bool | int]]
Fresh = tuple[tuple[bool, ...], ...]
InTime = Callable[[int, int, int, int], bool]


def in_time(replica: int, stage: int, replicas: int, stages: int) -> bool:
    """Whether θ_t of the stage is there when the replica's forward of step t begins."""
    return stage * replicas >= (replicas - 1 - replica) * stages


def in_time_of_pipeline(part: int, stage: int, parts: int, stages: int) -> bool:
    """The same where the replicas are micro-batches of one pipeline, two units of time apart."""
    return part >= stages - 1 - stage


def version_read(fresh: bool, step: int) -> int:
    """The version that a forward of this step sees: t, or t − 1 (0 in the first step: θ_{−1} = θ_0)."""
    return step if fresh else max(step - 1, 0)


def rows_of(rule: Any, names: Sequence[str]) -> Any:
    """The rule as it was given, a matrix as tuples. Raises InvalidChoice for what is no rule."""
    if isinstance(rule, str):
        choose("rule of cyclic data parallelism", rule, names)
    elif not callable(rule):
        try:
            return tuple(tuple(bool(cell) for cell in row) for row in rule)
        except TypeError as error:
            raise InvalidChoice(
                f"rule={rule!r} is no rule; give {', '.join(map(repr, names))}, or one row of truth values (a stage each) for "
                "each replica."
            ) from error
    return rule


def freshness(
    rule: Rule | Matrix | Callable[[int, int], bool], replicas: int, stages: int, in_time: InTime = in_time
) -> Fresh:
    """The rule as a matrix u[n][j] for N replicas and J stages: True for θ_t, False for θ_{t−1}.

    `rule`: "v1", "v2", N rows of J truth values, or a function of (n, j). `in_time`: the condition of the form it is executed
    in. Raises InvalidChoice for a matrix of another size and for a cell that cannot be had in time.
    """
    if isinstance(rule, str):
        choose("rule of cyclic data parallelism", rule, ("v1", "v2"))
        asked = [[rule == "v2" and in_time(n, j, replicas, stages) for j in range(stages)] for n in range(replicas)]
    elif callable(rule):
        asked = [[bool(rule(n, j)) for j in range(stages)] for n in range(replicas)]
    else:
        asked = [[bool(cell) for cell in row] for row in rule]
    if [len(row) for row in asked] != [stages] * replicas:
        raise InvalidChoice(
            f"The rule of cyclic data parallelism needs {replicas} rows (replicas) of {stages} truth values (stages), got rows "
            f"of {[len(row) for row in asked]}."
        )
    for n, row in enumerate(asked):
        for j, fresh in enumerate(row):
            if fresh and not in_time(n, j, replicas, stages):
                raise InvalidChoice(_too_early(n, j, replicas, stages, in_time))
    return tuple(tuple(row) for row in asked)


def _too_early(n: int, j: int, replicas: int, stages: int, in_time: InTime) -> str:
    first = next((m for m in range(replicas) if in_time(m, j, replicas, stages)), None)
    remedy = "no replica has them" if first is None else f"replicas {first} and later have them"
    return (
        f"The rule asks for the newest weights of stage {j} in replica (or micro-batch) {n}, which cannot be had in time: its "
        f"forward there begins before the last replica's backward has completed the update. At stage {j} {remedy} in time; let "
        f"the cell [{n}][{j}] be False."
    )


def turn(replica: int, stage: int, replicas: int, stages: int, backward: bool) -> float:
    """When a forward or backward begins, in gradients' times since the step began."""
    return replica / replicas + ((2 * stages - 1 - stage) if backward else stage) / (2 * stages)


def hand_on(column: Sequence[bool]) -> list[int]:
    """The replicas 0..N−2 in the order in which they need a stage's new weights: `column[n]` says whether n sees them at once.

    Replica N−1 makes them, and gives them to the first.
    """
    others = range(len(column) - 1)
    return [n for n in others if column[n]] + [n for n in others if not column[n]]


def add_share(total: Tensor | None, gradient: Tensor, replicas: int) -> Tensor:
    """Δ + ∇f_n/N, the ring's step (F Algorithm 1, line 30); both of any one shape."""
    share = gradient / replicas
    return share if total is None else torch.add(total, share)
