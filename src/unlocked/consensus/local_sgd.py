"""Local SGD (Stich, 2019), post-local SGD and hierarchical local SGD (Lin et al., 2020); F §2.1.1.

    θ_n ← OPT_n(θ_n, ∇f_n(θ_n))                           n = 1..N, each on its own shard of the data
    θ_n ← θ̄  every H updates                              θ̄ the mean of all replicas, H: `period`

Post-local: up to update `shared` the gradients are averaged at every update, as in data parallelism. Hierarchical: a tuple of
(period, group size), as in ((2, 2), (8, 4)): every 2 updates the mean of each 2 neighbouring replicas, every 8 that of all 4;
at an update at which several are due, that of the largest groups. `overlap` = τ: θ_n ← θ_n + (θ̄ − θ_n)^{t−τ} when the mean
arrives, so that the training in between is kept.

The optimizer's state: "local" (each keeps its own), "average" (averaged with the weights), "reset" (cleared at an averaging).

Limits: H = 1 with plain SGD is all-reduce; N = 1 is ordinary training.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from ..chain import Chain
from ..errors import InvalidChoice, choose
from ..flat import blank, flat, put
from ..rules.averaging import pull
from ..worker import Worker
from .all_reduce import mean_gradient
from .averaging.codecs import Plain
from .averaging.exchange import Exchange
from .averaging.rule import Averaging
from .averaging.weights import Averaged, Fragment, Rows, in_place
from .base import Properties, Store, Weights
from .shuffling.states import elementwise_states


class _Local(Averaged):
    """Local steps; a fragment for each size of group."""

    rule: LocalSGD

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: LocalSGD) -> None:
        super().__init__(worker, chain, store, rule)
        if rule.hierarchy:
            self.fragments = [self._level(k, *level) for k, level in enumerate(rule.levels(worker.replicas.size))]
        self._states = {
            level.exchange.size: Exchange(worker, f"{rule.name}/state", level.exchange.members, Plain())
            for level in self.fragments
        }
        self._latest = worker.replicas.size  # of the group that averaged last

    def _level(self, k: int, period: int, size: int) -> Fragment:
        first = self.worker.replica // size * size
        members = range(first, first + size)
        exchange = self.exchange_among(members, f"{self.rule.name}/{k}")
        # all levels of a stage by the same: so that a larger group's averaging falls on one of a smaller group's
        offset = self.worker.stage * min(self.rule.periods) // self.worker.stages if self.rule.staggered else 0
        return Fragment(self.parameters, exchange, period, offset)

    async def reduce(self) -> None:
        if self.worker.version < self.rule.shared:
            await mean_gradient(self)

    def due(self, update: int) -> list[Fragment]:
        found = super().due(update) if update > self.rule.shared else []
        return [max(found, key=lambda level: level.exchange.size)] if found else []

    def receive(self, fragment: Fragment, mean: Rows, begun: Rows | None) -> None:
        starts = begun and in_place(fragment, begun)
        for k, (parameter, theta) in enumerate(zip(fragment.parameters, in_place(fragment, mean))):
            pull(parameter.detach(), theta, 1.0, None if not starts else starts[k])
        for level in self.fragments:
            if level.exchange.size < fragment.exchange.size and not level.exchange.under_way:
                level.exchange.last = fragment.exchange.last  # what a larger group has, a smaller one has
        if self.rule.optimizer_state == "reset" and self._real:
            self.store.optimizer.state.clear()

    async def finish(self, fragment: Fragment, mean: Rows, begun: Rows | None) -> None:
        await super().finish(fragment, mean, begun)
        self._latest = fragment.exchange.size
        if self.rule.optimizer_state == "average":
            exchange = self._states[fragment.exchange.size]
            if not self._real:  # counts as one with momentum
                await exchange.mean(blank(self.parameters))
                return
            states = [state for x in self.parameters for state in elementwise_states(self.store.optimizer, x)]
            put(await exchange.mean(flat(states)) if states else [], states)

    def averages_statistics(self) -> bool:
        return self._ended or self.worker.version <= self.rule.shared

    async def average_statistics(self) -> None:
        """Those of the group that has just averaged its weights."""
        if self.store.batchnorm == "average" and self.statistics:
            put(await self._states[self._latest].mean(flat(self.statistics)), self.statistics)


@dataclass(frozen=True, kw_only=True)
class LocalSGD(Averaging):
    """Average the replicas' weights every few updates; an epoch is split among them.

    Args:
        shared: first updates during which gradients are averaged instead, at every one (post-local SGD).
        hierarchy: ((period, group size), …), both growing, the last group all replicas (also written 0); in place of `period`.
        optimizer_state: "local", "average" or "reset".
        period, staggered, overlap, compression: see averaging/rule.py.
    """

    shared: int = 0
    hierarchy: tuple[tuple[int, int], ...] = ()
    optimizer_state: Literal["local", "average", "reset"] = "local"

    name: ClassVar[str] = "local-sgd"
    properties: ClassVar[Properties] = Properties(
        title="Local SGD (Stich 2019)",
        source="F §2.1.1; METHODS D4",
        barrier="all replicas, every H updates (overlapped: none until the mean is there)",
        bytes="2(N−1)/N Ψ_P / H",
        replicas="differ between averagings",
        result="mean of the replicas",
    )
    shares_data: ClassVar[bool] = True
    needs_equal_start: ClassVar[bool] = True
    planned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check_hierarchy()
        super().__post_init__()
        choose("optimizer_state", self.optimizer_state, ("local", "average", "reset"))
        if not (isinstance(self.shared, int) and self.shared >= 0):
            raise InvalidChoice(f"shared={self.shared!r} is no number of updates; give a whole number of at least 0.")
        if self.overlap and self.optimizer_state == "average":
            raise InvalidChoice(
                "An overlapped averaging comes when the optimizer's state has moved on, so the state is not averaged with it; "
                "give overlap=0, or optimizer_state='local'."
            )

    def _check_hierarchy(self) -> None:
        levels = self.hierarchy
        pairs = isinstance(levels, tuple) and all(
            isinstance(level, tuple) and len(level) == 2 and all(isinstance(k, int) and k >= 0 for k in level)
            for level in levels
        )
        growing = pairs and all(a[0] < b[0] and a[1] > 0 and (a[1] < b[1] or not b[1]) for a, b in pairwise(levels))
        if not (growing and all(period >= 1 for period, _ in levels)):
            raise InvalidChoice(
                f"hierarchy={levels!r} is not possible; give ((period, group size), …) with both growing, as in "
                "((2, 2), (8, 4))."
            )

    @property
    def periods(self) -> tuple[int, ...]:
        return tuple(period for period, _ in self.hierarchy) or super().periods

    @property
    def channels(self) -> list[str]:
        names = [f"{self.name}/{k}" for k in range(len(self.hierarchy))] or [self.name]
        return [f"{name}/{half}" for name in names for half in ("parts", "means")]

    def levels(self, replicas: int) -> list[tuple[int, int]]:
        """(period, group size) for N replicas."""
        return [(period, size or replicas) for period, size in self.hierarchy]

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        replicas = worker.replicas.size
        sizes = [size for _, size in self.levels(replicas)]
        if sizes and (sizes[-1] != replicas or any(b % a for a, b in pairwise(sizes))):
            raise InvalidChoice(
                f"hierarchy={self.hierarchy!r} does not fit {replicas} replicas: every group size must divide the next, "
                f"and the last one be {replicas}."
            )
        return _Local(worker, chain, store, self)
