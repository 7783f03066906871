"""SlowMo: slow momentum over rounds of local SGD (Wang, Tantia, Ballas & Rabbat, 2020, Algorithm 1).

    θ_n   H local updates from x                          x the weights at the beginning of the round, alike on all replicas
    v ← β v + Δ/γ,  Δ = (1/N) Σ_n (x − θ_n)               γ the learning rate
    x ← x − α γ v;   θ_n ← x                              v = 0 at first

Kept here is u = γ v, so that nothing is divided by a learning rate that a schedule has brought to 0 (rules/outer.py). γ is
that of the last update of the round, of the optimizer's first group. The optimizer's state stays local.

Limits: β = 0, α = 1 is local SGD; N = 1 is lookahead (Zhang et al. 2019) with momentum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..chain import Chain
from ..errors import InvalidChoice
from ..flat import flat, put
from ..rules.outer import slow_momentum
from ..worker import Worker
from .averaging.exchange import Sends
from .averaging.rule import Averaging
from .averaging.weights import Averaged, Fragment, Rows
from .base import Properties, Store, Weights


class _SlowMomentum(Averaged):
    """slow: (x, u) a row per dtype. rate: γ of the update just made, and of the round before."""

    rule: SlowMo
    sends: ClassVar[Sends] = "rows"

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: SlowMo) -> None:
        super().__init__(worker, chain, store, rule)
        self._slow: list[tuple[Tensor, Tensor]] | None = None
        self._rate, self._rate_before = 0.0, torch.zeros((), dtype=torch.float64)

    def begin(self) -> list[tuple[Tensor, Tensor]]:
        """From the weights that training begins with."""
        if self._slow is None:
            self._slow = [(row, row.new_zeros(len(row))) for row in flat(self.parameters)]
        return self._slow

    def shared_state(self) -> list[Tensor]:
        return [self._rate_before, *(row for pair in self.begin() for row in pair)]

    def update(self) -> None:
        self.begin()
        self._rate = float(self.store.optimizer.param_groups[0]["lr"])
        super().update()

    def sent(self, fragment: Fragment) -> Rows:
        assert self._slow is not None
        return [x - theta for (x, _), theta in zip(self._slow, flat(self.parameters))]

    def receive(self, fragment: Fragment, mean: Rows, begun: Rows | None) -> None:
        assert self._slow is not None
        rates = self._rate / float(self._rate_before) if self._rate_before else 0.0
        for (x, u), row in zip(self._slow, mean):
            slow_momentum(u, row, self.rule.beta, rates)
            x.sub_(u, alpha=self.rule.alpha)
        self._rate_before = torch.tensor(self._rate, dtype=torch.float64)
        put([x for x, _ in self._slow], self.parameters)

    def carried(self) -> dict[str, Any]:
        slow = None if self._slow is None else [list(pair) for pair in self._slow]
        return super().carried() | {"slow": slow, "rate": self._rate_before}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        super().load_carried(state)
        self._slow = None if state["slow"] is None else [(x, u) for x, u in state["slow"]]
        self._rate_before = state["rate"]


@dataclass(frozen=True, kw_only=True)
class SlowMo(Averaging):
    """Local SGD whose averages move a slow copy of the weights, with momentum.

    Args:
        alpha: slow learning rate, above 0.
        beta: slow momentum, in [0, 1).
        period, staggered, compression: see averaging/rule.py; overlap is not possible (CO2 has it).
    """

    alpha: float = 1.0
    beta: float = 0.7

    name: ClassVar[str] = "slowmo"
    properties: ClassVar[Properties] = Properties(
        title="SlowMo (Wang et al. 2020)",
        source="METHODS D4",
        barrier="all replicas, every H updates",
        bytes="2(N−1)/N Ψ_P / H",
        replicas="differ between averagings",
        result="mean of the replicas",
    )
    shares_data: ClassVar[bool] = True
    needs_equal_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_outer("alpha", self.alpha, "beta", self.beta)
        refuse_overlap(self)

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return _SlowMomentum(worker, chain, store, self)


def check_outer(rate_name: str, rate: float, momentum_name: str, momentum: float) -> None:
    """Raises InvalidChoice for an outer learning rate or momentum that means nothing."""
    if not 0 < rate < float("inf"):
        raise InvalidChoice(f"{rate_name}={rate} is no learning rate; give a number greater than 0.")
    if not 0 <= momentum < 1:
        raise InvalidChoice(f"{momentum_name}={momentum} is no momentum; give a number of at least 0 and below 1.")


def refuse_overlap(rule: Averaging) -> None:
    """Raises InvalidChoice: the rule begins its next round from the mean."""
    if rule.overlap:
        raise InvalidChoice(
            f"{rule.name} begins its next round from the mean, so it cannot go on before that is there; give overlap=0, or "
            "take co2 or diloco(overlap=…)."
        )
