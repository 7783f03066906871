"""PipeDream-2BW: two versions of the weights (Narayanan et al., 2021; F Example 5; B3).

    θ_{t+1} = OPT(θ_t, 1/k Σ_b ∇ℓ(x_b; θ_{t−1}))        θ_{−1} = θ_0, b = 1..k micro-batches of step t

    t step, k micro-batches per step (`accumulate`). All stages use θ_{t−1} for all micro-batches of step t, forward and
    backward.

k must be at least J − 1 (two_versions.py). Emptying the pipeline changes no number.

Limits: J = 1 is gradient descent with a delay of one update. As a pipeline it is cyclic data parallelism v1 (F §5.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..worker import Worker
from .base import Properties
from .two_versions import TwoVersions


@dataclass(frozen=True)
class PipeDream2BW(TwoVersions):
    """Every gradient one update old, on all stages alike.

    Args:
        keep: "graph", or "input" and recompute.
        drain, warm_up: see `Delayed`; in the steps of the warm-up micro-batches see the newest weights.
    """

    name: ClassVar[str] = "pipedream-2bw"
    properties: ClassVar[Properties] = Properties(
        title="PipeDream-2BW (Narayanan et al. 2021)",
        source="F Example 5",
        locks="none in the steady state; a gradient is needed when it can be there",
        memory="J − j micro-batches of own stage, one copy of its weights",
        up="Ψ_A",
        down="Ψ_A",
        delay="1",
        objective="global",
    )
    sees_newest: ClassVar[bool] = False

    def fresh(self, part: int, worker: Worker, parts: int) -> bool:
        return False
