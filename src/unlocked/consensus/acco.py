"""ACCO: accumulate while you communicate (Nabli, Fournier et al., 2024; F §5.5, Figure 5.5; FACTS 2.6).

    step t     computing                     beside it
    round A    G_t = Σ ∇ℓ at θ_t             estimate   θ̃_{t+1} = OPT(θ_t, G̃_t / S̃_t), the optimizer's state put back
    round B    G̃_{t+1} = Σ ∇ℓ at θ̃_{t+1}     commit     θ_{t+1} = OPT(θ_t, (G̃_t + G_t) / (S̃_t + S_t))

    t update; Σ over the samples that all replicas managed in that round, S their number. G̃_t comes from step t−1, where it
    was read at θ̃_t, the estimate of θ_t. The optimizer is split among the replicas (sharded_update.py).

One `Trainer.step` is one committed update; the first half of its micro-batches (the larger one) is round A. The first step
has no G̃: its estimate is θ_0 itself and its commit uses G_0 alone. After T steps the network is θ_T, and G̃_T, the last round's
sum, is kept for a step T+1 (a checkpoint has it); if none comes, the samples of that half-batch were not used.

Unequal workers (`contributions`): a sum is divided by the number of samples of all, so every sample counts the same.
"managed": a worker ends its round when the exchange beside it is over and it has done at least one micro-batch; the rest of its
share of that round is left out (and counted: `left_out` of its weights). Reported losses are means of what was done. The
learning-rate schedule makes one step per commit, or follows the samples that really went into the weights
(`samples_per_schedule_step`).

Limits: where θ̃_t = θ_t, as for gradients that do not depend on the weights, these are the updates of one large batch, made
of round B of a step and round A of the next one. estimate = 0 (its learning rate is 0) makes θ̃_{t+1} = θ_t: half of every
gradient is then one update late. With SGD and equal halves: θ_{t+1} = θ_t − (η/2)(∇f(θ_t) + ∇f(θ̃_t)),
θ̃_{t+1} = θ_t − η ∇f(θ̃_t). N = 1 is not ordinary training: the estimate stays.

Two exchanges per step: 4(N−1)/N Ψ_P, twice an all-reduce's. They are free while each is shorter than its round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..chain import Chain
from ..errors import InvalidChoice
from ..rules.accumulation import Sum, joined
from ..work import work
from ..worker import Beside, Worker
from .accumulating import Accumulating
from .accumulating_rule import AccumulatingRule, Contributions
from .base import Properties, Store


class _Acco(Accumulating):
    rounds = 2
    channel = "acco"

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: ACCO) -> None:
        super().__init__(worker, chain, store, rule)
        self._scale = rule.estimate
        self._true: list[Tensor] | None = None  # θ_t, while θ̃ is in place

    def begin(self) -> Beside | None:
        if self.whole is not None:
            return self.start("the commit of acco", self.whole)
        return None if self.kept is None else self.start("the estimate of acco", self.kept)

    def make(self, samples: int) -> list[list[Tensor]]:
        assert self.part is not None
        if self.whole is None:
            return [self.part.foresee(self._scale)]
        return [self.commit(samples)]

    @work(gives=lambda self, arrived: Sum([], 0))
    def between(self, arrived: Any) -> Sum:
        """θ̃ into place; G̃ + G."""
        whole = joined(self.kept, self.collect())
        if arrived is not None:
            (self._true,) = arrived
            self.swap(self._true)
        return whole

    def finish(self, arrived: Any) -> None:
        self.kept, self._true = self.collect(), None
        self.put(arrived[0])

    def forget(self) -> None:
        super().forget()
        if self._true is not None:
            self.put(self._true)
        self._true = None


@dataclass(frozen=True)
class ACCO(AccumulatingRule):
    """Every update uses the gradients of two half-batches, one at an estimate of the weights; communication is hidden.

    Args:
        contributions: micro-batches of each round that a replica does: None: all; a tuple of whole numbers, one per replica;
            "managed": as many as it has time for (in worlds with a clock, without stages).
        estimate: learning rate of the estimate, as a multiple of the optimizer's, ≥ 0.
        samples_per_schedule_step: the schedule (stepped every update) has made ⌊samples so far / this⌋ steps after each update;
            None: one per update.

    Needs `accumulate` ≥ 2.
    """

    contributions: Contributions = None
    estimate: float = 1.0
    samples_per_schedule_step: int | None = None

    name: ClassVar[str] = "acco"
    properties: ClassVar[Properties] = Properties(
        title="ACCO (Nabli et al. 2024)",
        source="F §5.5",
        barrier="none while an exchange is shorter than half a step",
        bytes="4(N−1)/N Ψ_P",
        replicas="equal, each holds 1/N of the optimizer",
        result="any replica",
    )
    fewest: ClassVar[int] = _Acco.rounds
    correction: ClassVar[str] = "estimate"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.estimate < float("inf"):
            raise InvalidChoice(f"estimate={self.estimate} is no multiple of a learning rate; give at least 0.")

    def accumulating(self, worker: Worker, chain: Chain, store: Store) -> Accumulating:
        return _Acco(worker, chain, store, self)
