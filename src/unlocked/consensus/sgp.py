"""SGP: stochastic gradient push, and τ-OSGP, overlapped (Assran et al., 2019, Algorithm 1; FACTS 2.4).

    x_i ← x_i + Δ_i(z_i)              Δ_i(z): what the optimizer does to z with the gradient at z (SGD: −γ ∇f_i(z))
    send p_i x_i, p_i w_i to the out-neighbours of this round, p_i = 1/(1 + their number);  x_i ← p_i x_i,  w_i ← p_i w_i
    x_i ← x_i + Σ_j p_j x_j,   w_i ← w_i + Σ_j p_j w_j              what was sent to i at this update, or τ updates before
    z_i = x_i / w_i

x_i numerators, w_i weight of replica i (1 at first), which make push-sum (rules/push_sum.py); z_i is what is in place: what
gradients are computed at, evaluated, and saved under the network's names. Weight decay is the optimizer's, of z. Σ x_i and
Σ w_i, with what is under way, are conserved by an exchange. While w_i = 1 exactly (exponential-one-peer without overlap: a
replica gets as much as it sends), x_i is z_i and no second copy is kept.

τ `overlap`: messages are taken in τ updates after they were sent, and nobody waits but for those that are late; τ = 0 is
Algorithm 1. The paper's τ-OSGP sends every τ updates: here period=τ, overlap=τ; it also takes in what comes sooner, which here
waits for its time, so that all worlds give the same numbers. τ may not be longer than the period: a replica that shared
several times before it gets anything would have a tiny w, and 1/w multiplies its steps. BatchNorm's statistics with the policy
"average": pushed as weights (gossiping/synchronous.py). After a step that failed what was under way is dropped, and all begin
anew with x = z, w = 1.

Limits: one replica is ordinary training; with a learning rate of 0, z_i → the mean of the first weights: exactly, after log₂ N
rounds of exponential-one-peer for N a power of 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..chain import Chain
from ..errors import InvalidChoice
from ..flat import blank, flat, put
from ..graphs import Graph
from ..rules.push_sum import debiased, kept_share, moved
from ..work import work
from ..worker import Worker
from .averaging.codecs import pack, unpack
from .base import Properties, Store, Weights
from .gossiping.pushes import ONE_PEER, both_ways, pushes
from .gossiping.synchronous import Neighbourly, Rows, Synchronous


class _Pushed(Neighbourly):
    """x: the numerators when they were last exchanged, None while they are what is in place. weight: w.

    since: what was sent at updates up to this one is not waited for. early: what was taken before its time, by source.
    """

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: SGP) -> None:
        super().__init__(worker, chain, store, rule)
        self.rule = rule
        self.pushes = pushes(rule.graph, worker.replicas.size)
        self._sources = self.pushes.ever(worker.replica)
        self.x: Rows | None = None
        self.weight = 1.0
        self._since = 0
        self._early: dict[int, Tensor] = {}

    # ---- who, when -------------------------------------------------------------------------------------------------

    def _targets(self, update: int) -> tuple[int, ...]:
        return self.pushes.to(self.worker.replica, self.rule.turn(update))

    def _sent_to_me(self, update: int) -> tuple[int, ...]:
        """Who sent to this replica at an update, if that was not before `since`."""
        if update <= self._since or not self.rule.due(update):
            return ()
        return self.pushes.sources(self.worker.replica, self.rule.turn(update))

    async def mix(self) -> None:
        now = self.worker.version
        sends = self.rule.due(now) and bool(self._sources)
        sources = self._sent_to_me(now - self.rule.overlap)
        if sends:
            await self.listen(self._sources)
            await self._push(self._targets(now))
        if sends or sources or self.x is not None:
            messages = [await self._take(j) for j in sources]
            await self.worker.run("U", self._receive, messages, sends)

    async def _push(self, targets: Sequence[int]) -> None:
        message = await self.worker.run("U", self._share, len(targets))
        for j in targets:
            await self.worker.replicas.peer(j).send(self._channel, message)

    async def _take(self, source: int) -> Tensor:
        early = self._early.pop(source, None)
        if early is not None:
            return early
        return await self.worker.replicas.peer(source).recv(self._channel, self._blank())

    # ---- what is computed ------------------------------------------------------------------------------------------

    def numerators(self) -> Rows:
        """x now, with what training has made of z since the last exchange."""
        rows = flat(self.averaged)
        return rows if self.x is None else moved(self.x, self.weight, rows)

    def _blank(self, *_: Any) -> Tensor:
        return pack(self._like())

    def _like(self) -> Rows:
        return [torch.empty(1, dtype=torch.float64, device="meta"), *blank(self.averaged)]

    @work(gives=_blank)
    @torch.no_grad()
    def _share(self, targets: int) -> Tensor:
        """What every target gets: w and x, shared; the rest is kept."""
        share = kept_share(targets)
        self.x = self.numerators()
        for row in self.x:
            row.mul_(share)
        self.weight *= share
        return pack([torch.tensor([self.weight], dtype=torch.float64, device=self.x[0].device), *self.x])

    @work()
    @torch.no_grad()
    def _receive(self, messages: Sequence[Tensor], shared: bool) -> None:
        """`shared`: whether x was shared just now; else training has moved z since x was what it is."""
        rows, like = self.x if shared and self.x is not None else self.numerators(), self._like()
        for message in messages:
            weight, *theirs = unpack(message, like)
            for row, other in zip(rows, theirs):
                row.add_(other)
            self.weight += float(weight)
        put(debiased(rows, self.weight), self.averaged)
        self.x = None if self.weight == 1.0 else rows

    # ---- between two steps -----------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Take what is on its way; it is used at its time."""
        now = self.worker.version
        last = now - now % self.rule.period
        for j in self._sent_to_me(last) if last + self.rule.overlap > now else ():
            self._early[j] = await self._take(j)

    def _begin_anew(self) -> None:
        self.x, self.weight, self._since, self._early = None, 1.0, self.worker.version, {}

    def forget(self) -> None:
        super().forget()
        self._begin_anew()

    async def realign(self) -> None:
        await super().realign()
        self._begin_anew()

    def begin_at(self, version: int) -> None:
        super().begin_at(version)
        self._begin_anew()

    def carried(self) -> dict[str, Any]:
        if self.x is None and not self._early:
            return {}
        early = {str(j): message for j, message in self._early.items()}
        return {"x": self.x, "weight": self.weight, "since": self._since, "early": early}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        if not state:
            return
        self.x, self.weight, self._since = state["x"], state["weight"], state["since"]
        self._early = {int(j): message for j, message in state["early"].items()}


@dataclass(frozen=True, kw_only=True)
class SGP(Synchronous):
    """Push to out-neighbours and take in what comes: links may be directed, and change from round to round.

    Args:
        graph: "exponential-one-peer"; a name of an undirected graph, whose edges go both ways; arcs (i, j): i sends to j.
        overlap: updates τ after which a message is taken in, at most the period.
        period: updates from one round to the next.
    """

    graph: Any = ONE_PEER
    overlap: int = 0

    name: ClassVar[str] = "sgp"
    properties: ClassVar[Properties] = Properties(
        title="SGP, stochastic gradient push (Assran et al. 2019)",
        source="FACTS 2.4",
        barrier="who sends to it, every H updates (overlapped: none within τ updates)",
        bytes="d Ψ_P / H, d receivers (1: exponential-one-peer)",
        replicas="differ, close to their mean",
        result="mean of the replicas",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.overlap, int) and 0 <= self.overlap <= self.period):
            raise InvalidChoice(
                f"overlap={self.overlap!r} is not possible with a period of {self.period}: one round at most is under way when "
                f"an update is over; give a number from 0 to {self.period}."
            )

    def _edges_of(self, graph: Graph) -> tuple[tuple[float, ...], ...]:
        return tuple(both_ways(graph))

    def turn(self, update: int) -> int:
        """The round of an update (counted from 1) that is due, from 0."""
        return update // self.period - 1

    @property
    def crossing(self) -> frozenset[str]:
        return frozenset([self.name]) if self.overlap else frozenset()

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return _Pushed(worker, chain, store, self)
