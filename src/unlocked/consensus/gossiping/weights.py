"""Weights that are averaged pair by pair with those of neighbours, while the gradient is computed.

    gradient k → k+1     x ← θ            the gradient of θ            beside it: the exchanges of (k, k+1] on x and x̃
    update               Δ = what the optimizer does to θ;   x ← x + Δ, x̃ ← x̃ + Δ;   θ ← x

So a gradient is of weights that are older than what it is added to, by the exchanges made meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...chain import Chain
from ...flat import blank, flat, put
from ...worker import Beside, Worker
from ..base import Store, Weights
from .clocks import rings
from .copies import Copies, Rows
from .observing import distance_to_mean

if TYPE_CHECKING:
    from ..gossip import Gossip


class Gossiped(Weights):
    """Exchanges at moments drawn before (clocks.py).

    graph: of the replicas. exchanges: how many were made with each neighbour. stale: those while a gradient was computed.
    """

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: Gossip, seed: int) -> None:
        super().__init__(worker, chain, store)
        self.rule, self.seed = rule, seed
        self._real = store.optimizer is not None
        self.graph = rule.graph_of(worker.replicas.size)
        eta, alpha_tilde = rule.parameters(self.graph)
        self.copies = Copies(eta if len(self.graph) else 0.0, alpha_tilde)  # alone there is nothing to speed up
        self._moved_by_forwards = self.statistics if store.batchnorm == "average" else []
        self.averaged: list[Tensor] = [*self.parameters, *self._moved_by_forwards]
        self.exchanges: dict[int, int] = dict.fromkeys(self.graph.neighbours(worker.replica), 0)
        self.stale = 0
        self._statistics: list[Tensor] = []  # when the gradient began
        self._going: Beside | None = None

    # ---- beside a gradient -----------------------------------------------------------------------------------------

    async def read(self) -> None:
        """The first forward of a gradient begins the exchanges beside it, if the gradient comes within the step."""
        if not self.store.delayed:
            self._begin()

    def _begin(self) -> Beside:
        if self._going is None:
            if self._real:
                self.copies.begin(self.averaged, self.worker.version)
                self._statistics = [x.clone() for x in self._moved_by_forwards]
            self._going = self.worker.beside("the exchanges of gossip", self._exchange)
        return self._going

    async def _exchange(self, here: Worker) -> None:
        for time, neighbour in rings(
            self.graph, self.worker.replica, self.worker.version, self.seed, self.worker.stage
        ):
            link = here.replicas.peer(neighbour)
            mine = self.copies.sent(time) if self._real else blank(self.averaged)
            for row in mine:
                await link.send("gossip", row)
            theirs = [await link.recv("gossip", row) for row in mine]
            if self._real:
                self.copies.meet(mine, theirs, time)
            self.exchanges[neighbour] += 1
            self.stale += 1

    # ---- the update ------------------------------------------------------------------------------------------------

    async def step(self) -> None:
        await self._begin()
        self._going = None
        await super().step()

    @torch.no_grad()
    def update(self) -> None:
        before = flat([*self.parameters, *self._statistics]) if self._real else []
        super().update()
        if self._real:
            self._displace(before, self.worker.version + 1)

    def _displace(self, before: Rows, time: float) -> None:
        """What training has made of the weights since, on x and x̃; then x is what is trained."""
        self.copies.displace(before, flat(self.averaged), time)
        put(self.copies.x, self.averaged)

    def averages_statistics(self) -> bool:
        return False  # they are exchanged with the weights

    async def observed(self) -> dict[str, Any]:
        """The distance to the mean, the exchanges with each neighbour so far, and how many came in beside a gradient."""
        found = await distance_to_mean(self.worker, self.parameters)
        return found | {"exchanges": list(self.exchanges.items()), "stale": self.stale}

    # ---- between two steps -----------------------------------------------------------------------------------------

    def forget(self) -> None:
        super().forget()
        self._going = None
        self.copies.tilde = None  # it may have had half of an exchange

    def carried(self) -> dict[str, Any]:
        exchanges = {str(neighbour): count for neighbour, count in self.exchanges.items()}
        return {"tilde": self.copies.tilde, "exchanges": exchanges, "stale": self.stale}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        self.copies.tilde = state.get("tilde")
        self.stale = int(state.get("stale", 0))
        for neighbour, count in state.get("exchanges", {}).items():
            if int(neighbour) in self.exchanges:
                self.exchanges[int(neighbour)] = int(count)
