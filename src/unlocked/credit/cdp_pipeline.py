"""Cyclic data parallelism as a pipeline: J devices, N micro-batches (Fournier & Oyallon, 2024; F §5.3.3, Figure 5.2 c.iii).

    θ_{t+1} = OPT(θ_t, (1/N) Σ_n ∇f_n(θ̂_{n,t}))        θ̂_{n,t}^j = θ_t^j if u[n][j] else θ_{t−1}^j,  θ_{−1} = θ_0

    n = 0..N−1 micro-batch of step t (N is `accumulate`), j = 0..J−1 stage; u the rule: "v1" nowhere θ_t, "v2" wherever it can
    be had in time, or a matrix in between

The replicas of cyclic data parallelism become the micro-batches of one 1F1B pipeline, two units of time apart: stage j begins
micro-batch n when it has finished the backward of the one J − 1 − j before it. So θ_t^j is there in time if and only if
n ≥ J − 1 − j; for N = J that is the condition of the other forms (rules/cyclic.py). A backward sees the weights of its forward.

Limits: v1 is `pipedream-2bw`; v2 is `pipedream`, which always sees the newest, with N micro-batches per update; J = 1 with v2
is ordinary training. N must be at least J − 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

from ..rules.cyclic import Fresh, freshness, in_time_of_pipeline, rows_of
from ..worker import Worker
from .base import Properties
from .two_versions import TwoVersions


@dataclass(frozen=True)
class CDPPipeline(TwoVersions):
    """Every gradient at most one update old, by the rule u.

    Args:
        keep: "graph", or "input" and recompute.
        rule: "v1", "v2", N rows (micro-batches) of J truth values (stages), or a function (micro-batch, stage) → bool.
        drain, warm_up: see `Delayed`; in the steps of the warm-up micro-batches see the newest weights.

    Raises InvalidChoice for a rule of another size, or one that cannot be had in time (in the first step).
    """

    rule: Literal["v1", "v2"] | tuple | Callable[[int, int], bool] = "v2"

    name: ClassVar[str] = "cdp-pipeline"
    properties: ClassVar[Properties] = Properties(
        title="Cyclic data parallelism as a pipeline (Fournier & Oyallon 2024)",
        source="F §5.3.3",
        locks="none in the steady state; a gradient is needed when it can be there",
        memory="J − j micro-batches of own stage, one copy of its weights",
        up="Ψ_A",
        down="Ψ_A",
        delay="0 or 1",
        objective="global",
    )
    sees_newest: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rule", rows_of(self.rule, ("v1", "v2")))

    def fresh(self, part: int, worker: Worker, parts: int) -> bool:
        return _matrix(self.rule, parts, worker.stages)[part][worker.stage]


@lru_cache(maxsize=16)
def _matrix(rule: Any, parts: int, stages: int) -> Fresh:
    return freshness(rule, parts, stages, in_time_of_pipeline)
