"""Cyclic data parallelism on N devices: gradients and weights go round a ring, point to point (F §5.3.2, Algorithm 1).

    read     θ_{t+1}^j, if this replica sees it at once, or θ_t^j; whoever gets weights hands them on
    write    Δ^j ← Δ^j + ∇^j f_n / N;   replica n < N−1 sends Δ^j to n + 1, replica N−1 updates and hands θ^j on

Every worker is a stage j of a replica n. The optimizer's state is with replica N−1, which makes all updates. A replica keeps
one version of its weights; what it does not need yet waits in the mailbox (or, between two steps, beside them: `settle`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...chain import Chain
from ...flat import flat, put
from ...rules.cyclic import add_share, hand_on, version_read
from ...versions import copied, put_in_place
from ...work import work
from ...worker import Place, Worker
from ..base import Store, Weights, unused_optimizer
from .reading import Plan

CROSSING = frozenset({"cdp-weights", "cdp-state"})


class Ring(Weights):
    """The weights of one stage of one replica.

    newest: the version of the newest weights that have come here. shown: that of the parameters. other: a version that is kept
    beside them, because it is still to be read or not yet.
    """

    def __init__(self, worker: Worker, chain: Chain, store: Store, plan: Plan) -> None:
        super().__init__(worker, chain, store)
        n, count = worker.replica, worker.replicas.size
        self.plan, self.fresh = plan, plan.fresh[n] and not plan.newest
        self.newest = self.shown = 0
        self.other: tuple[int, list[Tensor]] | None = None
        self.updates = n == count - 1
        self.optimizer_of = Place(count - 1, worker.stage)
        order = hand_on(plan.fresh)
        place = -1 if self.updates else order.index(n)
        self._giver = worker.replicas.peer(order[place - 1] if place > 0 else count - 1)
        self._taker = worker.replicas.peer(order[place + 1]) if place + 1 < len(order) else None

    # ---- before a forward ------------------------------------------------------------------------------------------

    async def read(self) -> None:
        """Have the weights in place that the rule says; all micro-batches of an update see the same."""
        if self.pending:
            return
        if self.worker.version == 0:
            await self.plan.begin(self.worker, self.worker.replica)
        await self._come_to(self.wanted_next)
        if self.plan.newest:
            await self._take_what_is_there()
            self._show(self.newest)
        self.worker.reading = self.shown
        if self.other is not None and self.other[0] < self.shown:
            self.other = None

    async def _come_to(self, wanted: int) -> None:
        while self.newest < wanted:
            await self._take_weights()
        self._show(wanted)

    async def _take_what_is_there(self) -> None:
        while not self.updates and self.newest < self.worker.version and await self._giver.arrived("cdp-weights"):
            await self._take_weights()

    async def _take_weights(self) -> None:
        """The next version; it is handed on, and put into the parameters."""
        self._show(self.newest)
        rows = [await self._giver.recv("cdp-weights") for _ in self.messages]
        await self._give(rows)
        self.move(self.accept, rows)
        self.newest = self.shown = self.newest + 1

    async def _give(self, rows: Sequence[Tensor]) -> None:
        if self._taker is not None:
            for x in rows:
                await self._taker.send("cdp-weights", x)

    @property
    def wanted_next(self) -> int:
        """The version that the next step reads."""
        return version_read(self.fresh, self.worker.version)

    @property
    def messages(self) -> range:
        """How many messages a version takes: one for each dtype."""
        return range(len({x.dtype for x in self.parameters}))

    # ---- the storage -----------------------------------------------------------------------------------------------

    @work()
    def accept(self, rows: Sequence[Tensor]) -> None:
        """Newer weights; those in place are kept if they are still to be read."""
        if self.newest >= self.wanted_next:
            self._keep()
        put(rows, self.parameters)

    def _keep(self) -> None:
        self.other = (self.newest, copied(self.parameters))

    def _gives(self) -> list[Tensor]:
        return flat(self.parameters)

    @work(gives=_gives)
    def give(self) -> list[Tensor]:
        """The weights as messages."""
        return flat(self.parameters)

    def _show(self, version: int) -> None:
        """Let the parameters hold this version, the newest or the one beside it; if that is not there, the newest.

        It is not there after a step that failed, and for a run that goes on from another rule's checkpoint.
        """
        if version == self.shown:
            return
        if self.other is not None and self.other[0] == version:
            mine = [x.detach() for x in self.parameters]
            put_in_place(self.parameters, self.other[1])
            self.other = (self.shown, mine)
        self.shown = version

    # ---- after a backward ------------------------------------------------------------------------------------------

    async def reduce(self) -> None:
        """Add this replica's part of the gradient to that of the replicas before it, and pass it on."""
        n, last = self.worker.replica, self.worker.replicas.size - 1
        self.worker.reading = None
        before = [] if n == 0 else [await self._from(n - 1) for _ in self.gradients_by_dtype]
        rows = self.move(self.add, before)
        for x in rows:
            await self.worker.replicas.peer(n + 1).send("cdp-gradient", x)
        assert n < last or not rows

    async def _from(self, replica: int) -> Tensor:
        return await self.worker.replicas.peer(replica).recv("cdp-gradient")

    @property
    def gradients(self) -> list[Tensor]:
        """Of all weights that had a part in the loss: the same ones in every replica, since the programs are the same."""
        return [x.grad for x in self.parameters if x.grad is not None]

    @property
    def gradients_by_dtype(self) -> range:
        """How many messages they take."""
        return range(len({x.dtype for x in self.gradients}))

    def _sums(self, before: Sequence[Tensor]) -> list[Tensor]:
        return [] if self.updates else flat(self.gradients)

    @work(gives=_sums)
    def add(self, before: Sequence[Tensor]) -> list[Tensor]:
        """The sum so far, as messages; the replica that updates puts it into its gradients."""
        own, size = flat(self.gradients), self.worker.replicas.size
        rows = [add_share(before[k] if before else None, x, size) for k, x in enumerate(own)]
        if not self.updates:
            return rows
        put(rows, self.gradients)
        return []

    async def step(self) -> None:
        """The update, where the optimizer's state is."""
        await self.worker.run("U", self.update if self.updates else self.leave)

    def update(self) -> None:
        self._show(self.newest)
        self.other = None
        if self.read_again:
            self._keep()
        super().update()

    @property
    def read_again(self) -> bool:
        """Whether the newest version is still to be read when there is a newer one."""
        return not self.fresh

    @work()
    def leave(self) -> None:
        """Another worker makes the update."""
        self._drop_gradients()
        with unused_optimizer():
            self._step_schedule()

    async def mix(self) -> None:
        """New weights are handed on."""
        if self.updates:
            self.newest = self.shown = self.worker.version
            if self._taker is not None:
                await self._give(self.move(self.give))

    # ---- between two steps -----------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """All take the weights that are under way."""
        while self.newest < self.worker.version:
            await self._take_weights()
        self._show(self.newest)

    async def realign(self) -> None:
        """All go on from the newest weights of the replica that updates, as in a first step; it sends them again."""
        self._show(self.newest)
        updated = await self.worker.replicas.gather("cdp-realign", torch.tensor(self.newest))
        self.worker.version = int(updated[-1])
        if self.updates:
            await self._give(self.give())
        elif self.newest < self.worker.version:
            self.newest = self.shown = self.worker.version - 1  # it may lack several, of which this is the last
            await self._take_weights()
        else:
            await self._give([await self._giver.recv("cdp-weights") for _ in self.messages])  # it has them
        self.other = None

    def begin_at(self, version: int) -> None:
        super().begin_at(version)
        self.newest = self.shown = version

    def carried(self) -> dict[str, Any]:
        return {"other": None if self.other is None else list(self.other)}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        self.other = None if state["other"] is None else (state["other"][0], state["other"][1])
