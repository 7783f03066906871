"""D-PSGD: decentralised parallel SGD (Lian et al., 2017, Algorithm 1; FACTS 2.4).

    combine-then-adapt     x_i ← Σ_j W_ij x_j + Δ_i(x_i)             the paper's
    adapt-then-combine     x_i ← Σ_j W_ij (x_j + Δ_j(x_j))           the same two lines in the other order

x_i weights of replica i; Δ_i(x) what its optimizer does to x with the gradient at x (SGD: −γ ∇f_i(x)); W symmetric and doubly
stochastic, W_ij > 0 only for neighbours, so the mean of the weights moves by the mean of the displacements alone. Both orders
take the gradient at x_i, not at the mix. In the first, what is mixed are the weights of before the update: they travel while
the gradient is computed, and are added when it is there. In the second they are sent when the update is made, and waited for.

    W_ij = 1/(1 + max(d_i, d_j))   metropolis (Xiao & Boyd 2004)        1/(1 + max_k d_k)   uniform        d_i neighbours of i

Computed as x_i + Σ_j W_ij (x_j − x_i): the terms of two neighbours cancel to the last bit. BatchNorm's statistics with the
policy "average": mixed as weights (gossiping/synchronous.py).

Limits: one replica is ordinary training; with a learning rate of 0, x_t = Wᵗ x_0, whose distance to the mean shrinks by W's
second largest |eigenvalue|; on the complete graph W = 1/n, so adapt-then-combine is local SGD with as long a period (every
update: for plain SGD, all-reduce), and combine-then-adapt leaves replicas apart by their last displacements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..chain import Chain
from ..errors import InvalidChoice, choose
from ..flat import blank, flat, put
from ..graphs import Graph
from ..graphs.degrees import metropolis
from ..rules.averaging import pull
from ..work import work
from ..worker import Worker
from .averaging.codecs import pack, unpack
from .base import Properties, Store, Weights
from .gossiping.rule import build
from .gossiping.synchronous import Neighbourly, Rows, Synchronous

Order = Literal["combine-then-adapt", "adapt-then-combine"]
_NO_MORE = 1.0 - 1e-9  # |eigenvalue| from which on W brings nobody together


class _Mixed(Neighbourly):
    """shares: W_ij of each neighbour j."""

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: DPSGD) -> None:
        super().__init__(worker, chain, store, rule)
        self.rule = rule
        graph = rule.weighted(worker.replicas.size)
        self.shares = {j: graph.rate(worker.replica, j) for j in graph.neighbours(worker.replica)}
        self._early_to_send = rule.order == "combine-then-adapt"
        self._begun: Rows | None = None  # what was sent
        self._early: dict[int, Tensor] = {}  # what was taken before its time, for a checkpoint

    async def read(self) -> None:
        """The first forward of an update: the weights do not change until then."""
        if self._early_to_send:
            await self._begin(self.worker.version + 1)

    async def step(self) -> None:
        if self._early_to_send:
            await self._begin(self.worker.version + 1)
        await super().step()

    async def mix(self) -> None:
        if not self._early_to_send:
            await self._begin(self.worker.version)
        if self._begun is not None:
            messages = {j: await self._take(j) for j in self.shares}
            await self.worker.run("U", self._combine, messages)
            self._begun = None

    async def _begin(self, update: int) -> None:
        """Send the neighbours what is in place, once for an update that mixes."""
        if self._begun is not None or not self.shares or not self.rule.due(update):
            return
        await self.listen(self.shares)
        self._begun = self.rows()
        for j in self.shares:
            await self.worker.replicas.peer(j).send(self._channel, pack(self._begun))

    async def _take(self, j: int) -> Tensor:
        assert self._begun is not None
        early = self._early.pop(j, None)
        like = pack(self._begun)
        return await self.worker.replicas.peer(j).recv(self._channel, like) if early is None else early

    @work()
    @torch.no_grad()
    def _combine(self, messages: Mapping[int, Tensor]) -> None:
        assert self._begun is not None
        rows, like = flat(self.averaged), blank(self.averaged)
        for j, message in messages.items():
            for row, theirs, begun in zip(rows, unpack(message, like), self._begun):
                pull(row, theirs, self.shares[j], begun)
        put(rows, self.averaged)

    # ---- between two steps -----------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Where a step ends with a forward of the next update, what it sent is taken; it is used at its time."""
        if self._begun is not None:
            self._early = {j: await self._take(j) for j in self.shares}

    def forget(self) -> None:
        super().forget()
        self._begun, self._early = None, {}

    def carried(self) -> dict[str, Any]:
        early = {str(j): message for j, message in self._early.items()}
        return {} if self._begun is None else {"begun": self._begun, "early": early}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        if state:
            self._begun = list(state["begun"])
            self._early = {int(j): message for j, message in state["early"].items()}


@dataclass(frozen=True, kw_only=True)
class DPSGD(Synchronous):
    """Average with all neighbours at every update.

    Args:
        mixing: W_ij: "metropolis" or "uniform" (see above), or "given": as the edges (i, j, W_ij) of `graph` say.
        order: whether the weights of before the update are mixed ("combine-then-adapt") or those of after it.
        graph, period: see gossiping/synchronous.py.
    """

    mixing: Literal["metropolis", "uniform", "given"] = "metropolis"
    order: Order = "combine-then-adapt"

    name: ClassVar[str] = "d-psgd"
    properties: ClassVar[Properties] = Properties(
        title="D-PSGD (Lian et al. 2017)",
        source="FACTS 2.4",
        barrier="neighbours, every H updates",
        bytes="d Ψ_P / H, d neighbours",
        replicas="differ, close to their mean",
        result="mean of the replicas",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("mixing", self.mixing, ("metropolis", "uniform", "given"))
        choose("order", self.order, ("combine-then-adapt", "adapt-then-combine"))

    @property
    def crossing(self) -> frozenset[str]:
        """Credit rules that end a step with the forward of a later update send then."""
        return frozenset([self.name]) if self.order == "combine-then-adapt" else frozenset()

    def weighted(self, replicas: int) -> Graph:
        """The graph of N replicas with the rates W_ij, so that W = I − Λ. Raises InvalidChoice."""
        graph = build(self.graph, replicas, "given", 1.0)
        if self.mixing == "metropolis":
            return metropolis(graph)
        if self.mixing == "uniform":
            return graph.with_rates(1.0 / (1.0 + graph.degrees.max()))
        if graph.strengths.max() > 1.0 + 1e-12:
            raise InvalidChoice(
                f"The given weights of replica {graph.strengths.argmax()} sum to {graph.strengths.max():.6g}; give W_ij that "
                "sum to at most 1 at every replica, the rest is its own."
            )
        if replicas > 1 and np.abs(np.linalg.eigvalsh(graph.laplacian())[1:] - 1.0).max() > _NO_MORE:
            raise InvalidChoice(
                "With the given weights the replicas would never agree: they would swap their weights for ever; give W_ij that "
                "leave some replica a part of its own."
            )
        return graph

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return _Mixed(worker, chain, store, self)
