"""CO2: local training with the averaging of the round before going on beside it (Sun et al., 2024).

    round t    θ_n = H local updates from x_t                      the mean of round t−1 is on its way meanwhile
    at its end v ← clip(β v + (x_{t−1} − θ̄_{t−1}), φ)               θ̄_{t−1}: the mean of what round t−1 ended with
               x_{t+1} ← x_t − α v/Λ;   θ_n ← x_{t+1}               Λ: the staleness gap

    Λ = 1 + ‖x_t − x_{t−1}‖ / ‖x_{t−1} − θ̄_{t−1}‖                   (rules/outer.py)

The progress x_{t−1} − θ̄_{t−1} was made from x_{t−1} but is taken from x_t; the further these are apart, the less is taken. The
norms are of a stage's weights. Λ is made of what all replicas know, so they stay alike; the paper's text is not among our
sources and its published code has no gap, so this definition is ours. The momentum is kept as u = γ v (see slowmo.py).

When training ends after a round, that round's progress is on its way and in no weights; give it one round more.

Limits: with β = 0, α = 1, no clipping and no penalty, local SGD whose averages come one round late.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..chain import Chain
from ..errors import InvalidChoice
from ..flat import put
from ..rules.outer import clipped, staleness_gap
from ..work import work
from ..worker import Worker
from .averaging.rule import Averaging
from .averaging.weights import Rows
from .base import Properties, Store, Weights
from .slowmo import SlowMomentum, check_outer


class _OneRoundLate(SlowMomentum):
    """before: the weights that the round before this one began with, a row per dtype."""

    rule: CO2

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: CO2) -> None:
        super().__init__(worker, chain, store, rule, rule.beta)
        self._before: Rows = []

    async def mix(self) -> None:
        self._ended = False
        (fragment,) = self.fragments
        now = self.worker.version
        if fragment.started is not None and now == fragment.started + (fragment.period + 1) // 2:
            await fragment.exchange.turn()
        if not fragment.due(now):
            return
        progress = self._rows(fragment)  # of the round that ends here
        late = None if fragment.started is None else await fragment.exchange.end()
        await self.worker.run("U", self._next_round, late)
        fragment.started = now
        await fragment.exchange.begin(progress)
        self._ended = late is not None

    @work()
    @torch.no_grad()
    def _next_round(self, late: Rows | None) -> None:
        """Take in the progress of the round before the one that ends here, and begin the next one."""
        before, self._before = self._before, [x.clone() for x in self.x]
        if late is None:
            put(self.x, self.parameters)
            return
        self.gain(late)
        whole = clipped(_whole(self.u), self.rule.clip)
        for u, part in zip(self.u, whole.split([len(u) for u in self.u])):
            u.copy_(part)
        start = _whole(before)
        gap = staleness_gap(_whole(self.x), start, start - _whole(late)) if self.rule.penalty else 1.0
        self.go_on(self.rule.alpha / gap)

    def carried(self) -> dict[str, Any]:
        return super().carried() | {"before": self._before}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        super().load_carried(state)
        self._before = list(state["before"])


def _whole(rows: Rows) -> Tensor:
    """All values in one row, float64."""
    return torch.cat([row.double() for row in rows])


@dataclass(frozen=True, kw_only=True)
class CO2(Averaging):
    """Local SGD with slow momentum whose averages come one round late, and so need no waiting.

    Args:
        alpha: outer learning rate, above 0.
        beta: outer momentum, in [0, 1).
        clip: largest norm φ of a stage's momentum times the learning rate, or None.
        penalty: divide by the staleness gap Λ.
        period, staggered, compression: see averaging/rule.py. The overlap is the period.
    """

    alpha: float = 1.0
    beta: float = 0.2
    clip: float | None = None
    penalty: bool = True

    name: ClassVar[str] = "co2"
    properties: ClassVar[Properties] = Properties(
        title="CO2 (Sun et al. 2024)",
        source="METHODS D4",
        barrier="none within H updates of each other",
        bytes="2(N−1)/N Ψ_P / H",
        replicas="differ between averagings",
        result="mean of the replicas",
    )
    shares_data: ClassVar[bool] = True
    needs_equal_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_outer("alpha", self.alpha, "beta", self.beta)
        if self.clip is not None and not self.clip > 0:
            raise InvalidChoice(f"clip={self.clip} is no norm; give a number greater than 0, or None.")
        if self.overlap:
            raise InvalidChoice("co2's exchanges overlap with a whole period already; leave out overlap.")

    @property
    def crossing(self) -> frozenset[str]:
        return frozenset(self.channels)

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return _OneRoundLate(worker, chain, store, self)
