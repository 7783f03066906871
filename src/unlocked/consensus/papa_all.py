"""Populations that are merged by epochs: PAPA-all = DART, PAPA-2 (Jolicoeur-Martineau et al., 2023; Jain et al., 2023), and
branch-train-merge (Li et al., 2022); F §2.1.1, §6.1.

    PAPA-all, DART    θ_n ← θ̄                      every E epochs (`epochs`), for all n at once
    PAPA-2            θ_n ← (θ_a + θ_b)/2           every E epochs, {a, b} ≠ a pair drawn for each n, uniformly
    BTM               nothing; the branches are merged when training is over (`Trainer.averaged`, or `unlocked soup`)

In the first `shared` epochs, the common phase before the branching (DART, BTM), gradients are averaged at every update. The
optimizers' states stay where they are; BatchNorm's statistics are averaged with the policy `batchnorm="average"`. Whether the
pair may hold n itself is not said in PAPA's paper; here it may.

Limits: E longer than the training is independent training; N = 1 is ordinary training.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..chain import Chain
from ..errors import InvalidChoice
from ..flat import flat, put
from ..rng import generator
from ..work import work
from ..worker import Worker
from .all_reduce import mean_gradient
from .averaging.codecs import codec
from .averaging.exchange import Exchange
from .base import Consensus, Properties, Store, Weights

Rows = list[Tensor]


class _Branches(Weights):
    """Independent training after the common phase."""

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: BTM) -> None:
        super().__init__(worker, chain, store)
        self.rule = rule

    async def reduce(self) -> None:
        if self.epoch < self.rule.shared:
            await mean_gradient(self)

    async def begin_alike(self) -> None:
        if self.epoch < self.rule.shared:  # afterwards the branches are to differ
            await super().begin_alike()

    def averages_statistics(self) -> bool:
        return self.epoch < self.rule.shared


class _Merged(_Branches):
    """Independent training between merges."""

    rule: ByEpochs

    async def end_of_epoch(self) -> None:
        if self.rule.merges_after(self.epoch) and self.worker.replicas.size > 1:
            rows = await self.merged()
            await self.worker.run("U", self._put, rows)
            await self.average_statistics()

    @abstractmethod
    async def merged(self) -> Rows:
        """What the weights become."""

    @work()
    def _put(self, rows: Rows) -> None:
        put(rows, self.parameters)


class _Means(_Merged):
    """All replicas become the mean."""

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: PAPAAll) -> None:
        super().__init__(worker, chain, store, rule)
        self._exchange = Exchange(worker, rule.name, range(worker.replicas.size), codec(rule.compression), "progress")

    async def merged(self) -> Rows:
        return await self._exchange.mean(flat(self.parameters))

    def forget(self) -> None:
        super().forget()
        self._exchange.forget()

    def carried(self) -> dict[str, Any]:
        return {} if self._exchange.codec.lossless else {"exchange": self._exchange.carried()}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        if "exchange" in state:
            self._exchange.load_carried(state["exchange"])


class _Pairs(_Merged):
    """Each replica becomes the mean of a pair."""

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: PAPA2, seed: int) -> None:
        super().__init__(worker, chain, store, rule)
        self._seed = seed

    async def merged(self) -> Rows:
        size, here = self.worker.replicas.size, self.worker.replica
        pairs = drawn_pairs(size, self._seed, self.epoch)
        rows = flat(self.parameters)
        for other in range(size):
            if other != here and here in pairs[other]:
                for row in rows:
                    await self.worker.replicas.peer(other).send(self.rule.name, row)
        first, second = [await self._of(replica, rows) for replica in pairs[here]]
        return [(a + b) / 2 for a, b in zip(first, second)]

    async def _of(self, replica: int, own: Rows) -> Rows:
        if replica == self.worker.replica:
            return own
        return [await self.worker.replicas.peer(replica).recv(self.rule.name, row) for row in own]


def drawn_pairs(replicas: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    """For each of two or more replicas a pair of different ones, ascending, every pair equally likely."""
    source = generator(seed, "papa-2", epoch)
    rows = [sorted(torch.randperm(replicas, generator=source)[:2].tolist()) for _ in range(replicas)]
    return [(a, b) for a, b in rows]


@dataclass(frozen=True, kw_only=True)
class BTM(Consensus):
    """Train together for some epochs, then apart; the mean of the replicas is the result.

    Args:
        shared: first epochs in which gradients are averaged at every update.
    """

    shared: int = 1

    name: ClassVar[str] = "btm"
    properties: ClassVar[Properties] = Properties(
        title="Branch-train-merge (Li et al. 2022)",
        source="F §2.1.1",
        barrier="all replicas, every update of the shared epochs; then none",
        bytes="2(N−1)/N Ψ_P in shared epochs, then 0",
        replicas="differ after the branching",
        result="mean of the replicas, or their ensemble",
    )
    by_epochs: ClassVar[bool] = True
    planned: ClassVar[bool] = False
    counts_updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isinstance(self.shared, int) and self.shared >= 0):
            raise InvalidChoice(f"shared={self.shared!r} is no number of epochs; give a whole number of at least 0.")

    @property
    def needs_equal_start(self) -> bool:  # type: ignore[override]  # of the rule's parameters, here
        return self.shared > 0

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return _Branches(worker, chain, store, self)


@dataclass(frozen=True, kw_only=True)
class ByEpochs(BTM):
    """What the rules that merge every few epochs have in common; see there."""

    epochs: int = 5
    shared: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.epochs, int) and self.epochs >= 1):
            raise InvalidChoice(f"epochs={self.epochs!r} is not possible; give a whole number of epochs of at least 1.")

    def merges_after(self, epoch: int) -> bool:
        """Whether the replicas are merged at the end of this epoch, from 0."""
        return (epoch + 1) % self.epochs == 0 and epoch >= self.shared


@dataclass(frozen=True, kw_only=True)
class PAPAAll(ByEpochs):
    """Replace all replicas by their mean every few epochs.

    Args:
        epochs: from one merge to the next.
        shared: first epochs in which gradients are averaged at every update (DART).
        compression: how values travel; see averaging/rule.py.
    """

    compression: str = "none"

    name: ClassVar[str] = "papa-all"
    properties: ClassVar[Properties] = Properties(
        title="PAPA-all, DART (Jolicoeur-Martineau et al. 2023)",
        source="F §6.3.2",
        barrier="all replicas, every E epochs",
        bytes="2(N−1)/N Ψ_P every E epochs",
        replicas="differ between merges",
        result="mean of the replicas",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        codec(self.compression)

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return _Means(worker, chain, store, self)


@dataclass(frozen=True, kw_only=True)
class PAPA2(ByEpochs):
    """Replace each replica by the mean of a random pair every few epochs.

    Args:
        epochs: from one merge to the next.
        shared: first epochs in which gradients are averaged at every update.
    """

    name: ClassVar[str] = "papa-2"
    properties: ClassVar[Properties] = Properties(
        title="PAPA-2 (Jolicoeur-Martineau et al. 2023)",
        source="F §6.3.1; METHODS D2",
        barrier="pairs of replicas, every E epochs",
        bytes="2(N−1)/N Ψ_P every E epochs",
        replicas="differ",
        result="mean of the replicas",
    )

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return _Pairs(worker, chain, store, self, seed)
