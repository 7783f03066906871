"""Delayed parameter updates and weight prediction, ACCO's baselines (Ren et al., 2021: ZeRO-Offload; FACTS 2.6).

    step t     computing                     beside it
    DPU        G_t = Σ ∇ℓ at θ_t             θ_{t+1} = OPT(θ_t, G_{t−1} / S_{t−1})
    WP         G_t = Σ ∇ℓ at θ̂_{t+1}         the same, then θ̂_{t+2} = OPT(θ_{t+1}, G_{t−1} / S_{t−1}), the state put back

    t update; Σ over the samples that all replicas managed, S their number; θ̂_{t+1} the look-ahead: what θ_{t+1} would be if the
    gradient that made θ_t came once more. G_t is applied to θ_{t+1}, so it is one update late under DPU, and read at an
    estimate of θ_{t+1} under WP. The optimizer is split among the replicas (sharded_update.py).

The first step has nothing to apply: θ_1 = θ_0, and no step of the schedule is made. After T steps the network is θ_T, from
T−1 gradients; G_{T−1} is kept for a step T+1 (a checkpoint has it). Under WP the first look-ahead is made in the second step.
Between two steps θ is in place, not θ̂, so both are gathered.

Unequal workers, reported losses and the schedule: as acco.py says.

Mitigations (DPU): gap-aware and delay-compensation see the drift θ_t − θ_{t−1} and act on the mean gradient, before
clipping; staleness-aware is the identity at a delay of 1.

Limits: gradients that do not depend on the weights make both large-batch training, one step late. N = 1 is not ordinary
training: the delay stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..chain import Chain
from ..errors import InvalidChoice
from ..mitigation import Mitigation, WeightPrediction
from ..work import work
from ..worker import Beside, Worker
from .accumulating import Accumulating
from .accumulating_rule import AccumulatingRule, Contributions
from .base import Properties, Store


class _Delayed(Accumulating):
    channel = "dpu"

    def begin(self) -> Beside | None:
        return None if self.kept is None else self.start(f"the update of {self.channel}", self.kept)

    def make(self, samples: int) -> list[list[Tensor]]:
        return [self.commit(samples)]

    def finish(self, arrived: Any) -> None:
        self.kept = self.collect()
        if arrived is not None:
            self.put(arrived[0])


class _Predicted(_Delayed):
    channel = "wp"

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: AccumulatingRule) -> None:
        super().__init__(worker, chain, store, rule)
        self._ahead: list[Tensor] | None = None  # θ̂; θ while θ̂ is in place
        self._swapped = False

    async def prepare(self) -> None:
        if self._ahead is not None:
            await self.worker.run("M", self._look_ahead)

    @work()
    def _look_ahead(self) -> None:
        assert self._ahead is not None
        self.swap(self._ahead)
        self._swapped = True

    def make(self, samples: int) -> list[list[Tensor]]:
        assert self.part is not None
        return [self.commit(samples), self.part.foresee()]

    def _own_rows(self) -> list[list[Tensor]]:
        return super()._own_rows() * 2

    def finish(self, arrived: Any) -> None:
        super().finish(arrived)
        self._ahead = None if arrived is None else arrived[1]
        self._swapped = False

    def forget(self) -> None:
        super().forget()
        if self._swapped and self._ahead is not None:
            self.swap(self._ahead)
            self._swapped = False

    def carried(self) -> dict[str, Any]:
        return super().carried() | {"ahead": self._ahead}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        super().load_carried(state)
        self._ahead = state["ahead"]


@dataclass(frozen=True)
class DPU(AccumulatingRule):
    """Every update uses the gradient of the step before, so that communication is hidden.

    Args:
        contributions: micro-batches of a step that a replica does: None: all; a tuple of whole numbers, one per replica;
            "managed": as many as it has time for (in worlds with a clock, without stages).
        samples_per_schedule_step: the schedule (stepped every update) has made ⌊samples so far / this⌋ steps after each update;
            None: one per update.
    """

    contributions: Contributions = None
    samples_per_schedule_step: int | None = None

    name: ClassVar[str] = "dpu"
    properties: ClassVar[Properties] = Properties(
        title="Delayed parameter update (Ren et al. 2021)",
        source="FACTS 2.6",
        barrier="none while an exchange is shorter than a step",
        bytes="2(N−1)/N Ψ_P",
        replicas="equal, each holds 1/N of the optimizer",
        result="any replica",
    )

    def check_mitigation(self, mitigation: Mitigation) -> None:
        if isinstance(mitigation, WeightPrediction):
            raise InvalidChoice(
                "dpu's forwards see the weights in place, so the mitigation weight-prediction cannot act; use the consensus "
                "rule wp, which predicts them, or gap-aware or delay-compensation with dpu."
            )

    def accumulating(self, worker: Worker, chain: Chain, store: Store) -> Accumulating:
        return _Delayed(worker, chain, store, self)


@dataclass(frozen=True)
class WP(AccumulatingRule):
    """As `dpu`, with gradients at weights predicted by applying the optimizer twice.

    Args: as `DPU`.
    """

    contributions: Contributions = None
    samples_per_schedule_step: int | None = None

    name: ClassVar[str] = "wp"
    properties: ClassVar[Properties] = Properties(
        title="Delayed parameter update with weight prediction",
        source="FACTS 2.6",
        barrier="none while an exchange is shorter than a step",
        bytes="3(N−1)/N Ψ_P",
        replicas="equal, each holds 1/N of the optimizer",
        result="any replica",
    )
    correction: ClassVar[str] = "look-ahead"

    def accumulating(self, worker: Worker, chain: Chain, store: Store) -> Accumulating:
        return _Predicted(worker, chain, store, self)
