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

from ..chain import Chain
from ..errors import InvalidChoice
from ..flat import flat, put
from ..rules.outer import slow_momentum
from ..worker import Worker
from .averaging.exchange import Sends
from .averaging.rule import Averaging
from .averaging.weights import Averaged, Fragment, Rows
from .base import Properties, Store, Weights


class SlowMomentum(Averaged):
    """x: the weights that the round began with; u: the momentum; a row per dtype each, from the beginning of training on."""

    sends: ClassVar[Sends] = "rows"

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: Averaging, beta: float) -> None:
        super().__init__(worker, chain, store, rule)
        self._beta = beta
        self.x: Rows = []
        self.u: Rows = []
        self._rate, self._rate_before = 0.0, torch.zeros((), dtype=torch.float64)  # of this round, and the one before

    def begin(self) -> Rows:
        """From the weights that training begins with."""
        if not self.x:
            self.x = flat(self.parameters)
            self.u = [row.new_zeros(len(row)) for row in self.x]
        return self.x

    def shared_state(self) -> Rows:
        return [self._rate_before, *self.begin(), *self.u]

    def update(self) -> None:
        self.begin()
        self._rate = float(self.store.optimizer.param_groups[0]["lr"])
        super().update()

    def sent(self, fragment: Fragment) -> Rows:
        return [x - theta for x, theta in zip(self.x, flat(self.parameters))]

    def gain(self, progress: Rows) -> None:
        """Let the momentum have a round's mean progress."""
        rates = self._rate / float(self._rate_before) if self._rate_before else 0.0
        for u, row in zip(self.u, progress):
            slow_momentum(u, row, self._beta, rates)
        self._rate_before = torch.tensor(self._rate, dtype=torch.float64)

    def go_on(self, share: float) -> None:
        """x ← x − s u; the next round begins there."""
        for x, u in zip(self.x, self.u):
            x.sub_(u, alpha=share)
        put(self.x, self.parameters)

    def carried(self) -> dict[str, Any]:
        return super().carried() | {"x": self.x, "u": self.u, "rate": self._rate_before}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        super().load_carried(state)
        self.x, self.u, self._rate_before = list(state["x"]), list(state["u"]), state["rate"]


class _SlowMo(SlowMomentum):
    rule: SlowMo

    def receive(self, fragment: Fragment, mean: Rows, begun: Rows | None) -> None:
        self.gain(mean)
        self.go_on(self.rule.alpha)


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
        return _SlowMo(worker, chain, store, self, self.beta)


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
