"""PipeDream-2BW: two versions of the weights (Narayanan et al., 2021; F Example 5; B3).

    θ_{t+1} = OPT(θ_t, 1/k Σ_b ∇ℓ(x_b; θ_{t−1}))        θ_{−1} = θ_0, b = 1..k micro-batches of step t

    t step, k micro-batches per step (`accumulate`). All stages use θ_{t−1} for all micro-batches of step t, forward and
    backward.

Stage j does the last J − 1 − j backwards of step t while step t + 1 has begun; so that θ_t is there in time everywhere, k
must be at least J − 1. Emptying the pipeline changes no number.

Limits: J = 1 is gradient descent with a delay of one update. As a pipeline it is cyclic data parallelism v1 (F §5.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..batch import Batch
from ..consensus.base import Weights
from ..errors import InvalidChoice, choose
from ..versions import Reading
from ..worker import Worker
from .base import Properties
from .delayed import Delayed
from .keeping import KeepGraph, Keeping, KeepInput


@dataclass(frozen=True)
class PipeDream2BW(Delayed):
    """Every gradient one update old, on all stages alike.

    Args:
        keep: "graph", or "input" and recompute.
        drain, warm_up: see `Delayed`; in the steps of the warm-up micro-batches see the newest weights.
    """

    keep: Literal["graph", "input"] = "graph"

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

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("keep", self.keep, ("graph", "input"))

    @property
    def keeps_versions(self) -> bool:
        return True

    @property
    def keeping(self) -> Keeping:
        return KeepGraph("stash") if self.keep == "graph" else KeepInput("stash")

    def reading(self, worker: Worker, weights: Weights, batch: Batch) -> Reading:
        versions, flight, k = weights.versions, weights.flight, weights.store.accumulate
        if worker.stages - 1 > k:
            raise InvalidChoice(
                f"pipedream-2bw over {worker.stages} stages needs at least {worker.stages - 1} micro-batches per step, "
                f"got {k}; give accumulate={worker.stages - 1} or more."
            )
        step, part = divmod(batch.number, k)
        if part == 0:  # after a step that failed there may be more or fewer updates than steps
            flight.base = worker.version - step if flight.standing is None else flight.standing - (step - 1)
        wanted = flight.base + (step if self.plain(weights, batch.number) else max(step - 1, 0))
        known = wanted < worker.version and (flight.standing == wanted or versions.held.get(wanted))
        reading = versions.read(wanted if known else None)
        if part == k - 1:
            versions.hold(flight.base + step)  # today's: the next step reads it, and an update comes before
            if flight.standing is not None:
                versions.release(flight.standing)
            flight.standing = flight.base + step
        return reading
