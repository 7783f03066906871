"""PAPA: population parameter averaging (Jolicoeur-Martineau et al., 2023; F Example 4, Eq. 6.1).

    θ_n ← OPT_n(θ_n, ∇f_n(θ_n))                                     n = 1..N, each on its own data
    θ_n ← (1 − α γ_t/γ_0) θ_n + (α γ_t/γ_0) θ̄    every T updates     θ̄ = (1/N) Σ_n θ_n

    α: the share of the mean (0.01), as in F Example 4; F Eq. 6.1 and the paper's code write α for what is here 1 − α. γ_t: the
    learning rate of the update just made, γ_0 the one that the schedule scales (torch's initial_lr: α is small during a
    warm-up). T: `period` (10). The distance to the mean Σ‖θ_n − θ̄‖² is multiplied by (1 − α γ_t/γ_0)².

The optimizer's state is not averaged; BatchNorm's statistics are with the policy `batchnorm="average"`, then at every
averaging. `overlap` = τ updates: the exchange goes on while training does, θ_n ← θ_n + α γ_t/γ_0 (θ̄ − θ_n^{t−τ}), which leaves
the mean where it was (the asynchronous version the authors ask for).

Limits: α = 0 is independent training; α = 1 without annealing is local SGD's averaging; N = 1 is ordinary training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..chain import Chain
from ..errors import InvalidChoice
from ..rules.averaging import pull, share_of_rate
from ..worker import Worker
from .averaging.exchange import Sends
from .averaging.rule import Averaging
from .averaging.weights import Averaged, Fragment, Rows, in_place
from .base import Properties, Store, Weights


class _Pulled(Averaged):
    """Independent steps, and now and then a pull to the mean."""

    rule: PAPA
    sends: ClassVar[Sends] = "estimates"

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: PAPA) -> None:
        super().__init__(worker, chain, store, rule)
        self._rates: list[tuple[float, float]] = []

    def update(self) -> None:
        groups = [] if self.store.optimizer is None else self.store.optimizer.param_groups
        self._rates = [(float(group["lr"]), float(group.get("initial_lr", group["lr"]))) for group in groups]
        super().update()

    def receive(self, fragment: Fragment, mean: Rows, begun: Rows | None) -> None:
        shares = self._shares()
        means, starts = in_place(fragment, mean), begun and in_place(fragment, begun)
        for k, (parameter, theta) in enumerate(zip(fragment.parameters, means)):
            start = None if not starts else starts[k]
            pull(parameter.detach(), theta, shares.get(id(parameter), self.rule.alpha), start)

    def _shares(self) -> dict[int, float]:
        """α γ_t/γ_0 of each weight, by its identity: groups may have rates of their own."""
        if not self.rule.anneal or self.store.optimizer is None:
            return {}
        return {
            id(x): share_of_rate(self.rule.alpha, rate, first)
            for group, (rate, first) in zip(self.store.optimizer.param_groups, self._rates)
            for x in group["params"]
        }


@dataclass(frozen=True, kw_only=True)
class PAPA(Averaging):
    """Pull the replicas to their mean every few updates.

    Args:
        alpha: share of the mean, in [0, 1].
        anneal: multiply it by γ_t/γ_0.
        period, staggered, overlap, compression: see averaging/rule.py.
    """

    alpha: float = 0.01
    anneal: bool = True
    period: int | tuple[int, ...] = 10

    name: ClassVar[str] = "papa"
    properties: ClassVar[Properties] = Properties(
        title="PAPA (Jolicoeur-Martineau et al. 2023)",
        source="F Example 4",
        barrier="all replicas, every T updates (overlapped: none until the mean is there)",
        bytes="2(N−1)/N Ψ_P / T",
        replicas="differ, in one basin",
        result="mean of the replicas",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha <= 1.0:
            raise InvalidChoice(
                f"alpha={self.alpha} is no share of the mean; give a number from 0 (independent) to 1 (average; the paper's "
                "0.99 is what the replica keeps: here 0.01)."
            )

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return _Pulled(worker, chain, store, self)
