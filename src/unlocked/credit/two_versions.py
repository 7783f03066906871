"""Pipelines whose micro-batches see the weights of this step or of the one before, and nothing older.

    θ_{t+1} = OPT(θ_t, 1/k Σ_b ∇ℓ(x_b; θ̂_{b,t}))        θ̂_{b,t}^j = θ_t^j or θ_{t−1}^j, as the rule says; θ_{−1} = θ_0

    t step, b = 0..k−1 micro-batches of step t (k is `accumulate`), j stage of J

Stage j does the last J − 1 − j backwards of step t while step t + 1 has begun; so that θ_t is there in time for step t + 1's
last micro-batch everywhere, k must be at least J − 1. Emptying the pipeline changes no number.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from ..batch import Batch
from ..consensus.base import Weights
from ..errors import InvalidChoice, choose
from ..versions import Reading
from ..worker import Worker
from .delayed import Delayed
from .keeping import KeepGraph, Keeping, KeepInput


@dataclass(frozen=True)
class TwoVersions(Delayed):
    """The reading that such rules share.

    Args:
        keep: "graph", or "input" and recompute.
    """

    keep: Literal["graph", "input"] = "graph"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("keep", self.keep, ("graph", "input"))

    @abstractmethod
    def fresh(self, part: int, worker: Worker, parts: int) -> bool:
        """Whether micro-batch `part` of `parts` sees θ_t at this worker's stage."""

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
                f"{self.name} over {worker.stages} stages needs at least {worker.stages - 1} micro-batches per step, "
                f"got {k}; give accumulate={worker.stages - 1} or more."
            )
        step, part = divmod(batch.number, k)
        if part == 0:  # after a step that failed there may be more or fewer updates than steps
            flight.base = worker.version - step if flight.standing is None else flight.standing - (step - 1)
        fresh = self.plain(weights, batch.number) or self.fresh(part, worker, k)
        wanted = flight.base + (step if fresh else max(step - 1, 0))
        known = wanted < worker.version and (flight.standing == wanted or versions.held.get(wanted))
        reading = versions.read(wanted if known else None)
        if part == k - 1:
            if self.stands(worker, k):
                versions.hold(flight.base + step)  # today's: the next step reads it, and an update comes before
                if flight.standing is not None:
                    versions.release(flight.standing)
            flight.standing = flight.base + step
        return reading

    def stands(self, worker: Worker, parts: int) -> bool:
        return not all(self.fresh(part, worker, parts) for part in range(parts))
