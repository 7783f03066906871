"""ZeRO-DP with trees of messages (Rajbhandari et al., 2020; F §5.3.4, Figure 5.2 d.i): what cyclic ZeRO improves on.

    stage j belongs to replica j mod N, which keeps its weights and its optimizer's state and makes its updates

    before every F and B of stage j   its weights go from the owner to all replicas, down a binomial tree
    after the backward                the gradients are summed up the same tree, to the owner

    N = 8, owner 0:   0→1,   0→2 1→3,   0→4 1→5 2→6 3→7        ⌈log2 N⌉ rounds, a replica sends one message in each

A step sends 2 (N−1) Ψ_P for weights and (N−1) Ψ_P for gradients, all replicas together: 1.5 times a ring's all-reduce.

Limits: a baseline to be counted, and to be right. A replica that is no owner does not free a stage's weights between
its uses, so that what comes before a backward is what it has already; the timeline says when they could be freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...chain import Chain
from ...consensus.base import Consensus, Properties, Store, Weights
from ...flat import flat, put
from ...work import work
from ...worker import Link, Worker

WEIGHTS, GRADIENTS = "zero-weights", "zero-gradient"


def parent(node: int) -> int:
    """Who a node of a binomial tree gets its message from; the root is 0."""
    return node - (1 << (node.bit_length() - 1))


def children(node: int, size: int) -> list[int]:
    """Whom it sends to, in the order of the rounds."""
    row = (node + (1 << k) for k in range(node.bit_length(), (size - 1).bit_length()))
    return [child for child in row if child < size]


class Visiting(Weights):
    """The weights of one stage, at its owner or as they come to another replica."""

    def __init__(self, worker: Worker, chain: Chain, store: Store) -> None:
        super().__init__(worker, chain, store)
        size = worker.replicas.size
        self._owner = worker.stage % size
        self.updates = worker.replica == self._owner
        node = (worker.replica - self._owner) % size
        self._children = [self._peer(child) for child in children(node, size)]
        self._parent = None if self.updates else self._peer(parent(node))
        worker.guard = self

    def _peer(self, node: int) -> Link:
        replicas = self.worker.replicas
        return replicas.peer((node + self._owner) % replicas.size)

    async def before(self, kind: str) -> None:
        """A forward or backward needs the weights."""
        if kind in ("F", "B"):
            rows = await self._come()
            for child in self._children:
                for x in rows:
                    await child.send(WEIGHTS, x)
            if kind == "F" and self._parent is not None:
                await self.worker.run("U", self.accept, rows)

    async def after(self, kind: str) -> None:
        """Nothing."""

    async def _come(self) -> list[Tensor]:
        if self._parent is None:
            return await self.worker.run("U", self.give)
        return [await self._parent.recv(WEIGHTS) for _ in {x.dtype for x in self.parameters}]

    async def reduce(self) -> None:
        """Sum the gradients of the nodes below, and pass on."""
        for child in reversed(self._children):
            await self.worker.run(
                "U", self.add, [await child.recv(GRADIENTS) for _ in {x.dtype for x in self.gradients}]
            )
        if self._parent is not None:
            for x in await self.worker.run("U", self.total):
                await self._parent.send(GRADIENTS, x)

    async def step(self) -> None:
        await self.worker.run("U", self.update if self.updates else self.leave)

    @property
    def gradients(self) -> list[Tensor]:
        """Of all weights that had a part in the loss."""
        return [x.grad for x in self.parameters if x.grad is not None]

    # ---- the storage -----------------------------------------------------------------------------------------------

    def _as_rows(self) -> list[Tensor]:
        return flat(self.parameters)

    @work(gives=_as_rows)
    def give(self) -> list[Tensor]:
        """The weights as messages."""
        return flat(self.parameters)

    @work()
    def accept(self, rows: Sequence[Tensor]) -> None:
        """Have these weights in place."""
        put(rows, self.parameters)

    @work(gives=_as_rows)
    def total(self) -> list[Tensor]:
        """The sum of the gradients so far, as messages."""
        return flat(self.gradients)

    @work()
    def add(self, rows: Sequence[Tensor]) -> None:
        """Add another replica's sum."""
        own = self.gradients
        put([x + y for x, y in zip(flat(own), rows)], own)

    @work()
    def leave(self) -> None:
        """The owner makes the update."""
        self._drop_gradients()

    def update(self) -> None:
        for x in self.gradients:
            x.div_(self.worker.replicas.size)
        super().update()


@dataclass(frozen=True)
class ZeroDP(Consensus):
    """Sharded states that are broadcast, to be compared with `CDP(form="zero")`. For training take
    `torch-fully-shard`."""

    name: ClassVar[str] = "zero-dp"
    properties: ClassVar[Properties] = Properties(
        title="ZeRO-DP with trees of messages (Rajbhandari et al. 2020)",
        source="F §5.3.4",
        barrier="all replicas, at every use of a stage",
        bytes="3(N−1)/N Ψ_P",
        replicas="equal, a stage's weights at its owner between two uses",
        result="the owners' stages",
    )
    shares_data: ClassVar[bool] = True
    one_at_a_time: ClassVar[bool] = True

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return Visiting(worker, chain, store)


__all__ = ["GRADIENTS", "WEIGHTS", "ZeroDP", "children", "parent"]
