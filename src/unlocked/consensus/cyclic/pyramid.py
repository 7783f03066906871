"""Cyclic data parallelism with model parallelism on N(N+1)/2 devices (F §5.3.3, Propositions C.2.2-3).

    stage j has S_j = ⌈N (J − j)/J⌉ devices;  micro-batch m (counted since training began) goes to device m mod S_j

A device holds one stage, and one micro-batch at a time: from the begin of its forward to the end of its backward, 2(J − j)
units of time, in which (for N = J) the other devices of the stage begin one each. So it is busy always, and S_j devices serve
N micro-batches. A micro-batch's activations go to whichever device of the next stage is free: another one in another step,
where S_j does not divide N.

    gradient   each device sums those of its own micro-batches; the sums go from device to device, in the order in which the
               devices end the step; the last one makes the update
    state      of the optimizer: to the device that will end the next step, a whole step ahead. It is the same one if S_j
               divides N
    weights    from the device that has made them on, in the order in which the devices need them
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...chain import Chain
from ...errors import UnlockedError
from ...flat import flat, put
from ...rules.cyclic import version_read
from ...work import work
from ...worker import Link, Place, Sink, Source, Worker
from ..base import Store
from .reading import Plan
from .ring import Ring
from .state import drop, dtypes, pack, under_way, unpack


def devices(replicas: int, stages: int) -> list[int]:
    """S_j for every stage."""
    return [-(-replicas * (stages - j) // stages) for j in range(stages)]


class Device(Ring):
    """The weights of one device: `worker.replica` is its number among those of its stage."""

    def __init__(self, worker: Worker, chain: Chain, store: Store, plan: Plan) -> None:
        super().__init__(worker, chain, store, plan)
        self.count = len(plan.fresh)  # N, micro-batches of a step
        self.size, self.own = worker.replicas.size, worker.replica
        self.rows = devices(self.count, worker.stages)
        self.state_of = 0  # the step whose update the optimizer's state here is for, if it is here
        self._change_hands(0)
        worker.route = self._route

    def _ends(self, step: int) -> int:
        """The device that ends a step, and makes its update."""
        return ((step + 1) * self.count - 1) % self.size

    def _change_hands(self, step: int) -> None:
        """From here on it is about the update of this step."""
        self.updates = self.own == self._ends(step)
        self.optimizer_of = Place(self._ends(step), self.worker.stage)

    def _route(self, micro_batch: int) -> tuple[Link, Link]:
        """The devices below and above that have this micro-batch."""
        worker = self.worker

        def to(stage: int) -> Link:
            return Link(worker, Place(micro_batch % self.rows[stage], stage))

        return (
            Source() if worker.first else to(worker.stage - 1),
            Sink() if worker.last else to(worker.stage + 1),
        )

    # ---- which weights ---------------------------------------------------------------------------------------------

    @property
    def at_step(self) -> int:
        """The training step of the micro-batch at hand."""
        return self.worker.micro_batch // self.count

    def _mine(self, step: int, device: int | None = None) -> range:
        """The micro-batches that this device, or another one, has in a step."""
        begin, own = step * self.count, self.own if device is None else device
        return range(begin + (own - begin) % self.size, begin + self.count, self.size)

    @property
    def micro_batches(self) -> int:
        return len(self._mine(self.at_step))

    async def read(self) -> None:
        if self.count % self.size and self.at_step != self.worker.version:
            raise UnlockedError(
                "A step failed after some stages had been updated, and the devices no longer agree who updates next; go "
                "on from the last checkpoint (Trainer.resume)."
            )
        n = self.worker.micro_batch % self.count
        if self.at_step == 0:
            await self.plan.begin(self.worker, n)
        await self._come_to(version_read(self.plan.fresh[n], self.at_step))
        self.worker.reading = self.shown
        if self.other is not None and self.other[0] < self.wanted_next:
            self.other = None

    @property
    def wanted_next(self) -> int:
        """The oldest version that is still to be read: by what is left of this step, or in the next."""
        step = self.worker.version
        left = [
            m for m in self._mine(step) if m > self.worker.micro_batch or self.worker.micro_batch < step * self.count
        ]
        stale = [m for m in left if not self.plan.fresh[m % self.count]]
        return version_read(not stale, step)

    def _order(self, version: int) -> list[int]:
        """The devices but the one that made it, in the order in which they need a version."""

        def need(device: int) -> int:
            for step in (version, version + 1):
                for m in self._mine(step, device):
                    if step > version or self.plan.fresh[m % self.count]:
                        return m
            raise AssertionError("a device has a micro-batch in every step")

        apart = (self._ends(version - 1), self._apart(version))
        return sorted((d for d in range(self.size) if d not in apart), key=need)

    def _apart(self, version: int) -> int | None:
        """A device that needs a version for an update before it computes with it: it gets it beside the others' row, so that
        nobody there waits for it."""
        end = self._ends(version)
        fresh = any(self.plan.fresh[m % self.count] for m in self._mine(version, end))
        return None if fresh or end == self._ends(version - 1) else end

    async def _take_weights(self) -> None:
        self._show(self.newest)
        order = self._order(self.newest + 1)
        place = order.index(self.own) if self.own in order else len(order)
        inside = 0 < place < len(order)
        giver = self.worker.replicas.peer(order[place - 1] if inside else self._ends(self.newest))
        rows = [await giver.recv("cdp-weights") for _ in self.messages]
        for taker in order[place + 1 : place + 2]:
            await self._send(taker, "cdp-weights", rows)
        self.move(self.accept, rows)
        self.newest = self.shown = self.newest + 1

    @property
    def read_again(self) -> bool:
        return not all(self.plan.fresh[m % self.count] for m in self._mine(self.newest + 1))

    async def _send(self, device: int, channel: str, rows: Sequence[Tensor]) -> None:
        for x in rows:
            await self.worker.replicas.peer(device).send(channel, x)

    # ---- gradients -------------------------------------------------------------------------------------------------

    async def reduce(self) -> None:
        """Add the sums of the devices that end the step before this one, and pass on."""
        self.worker.reading = None
        self._change_hands(self.at_step)
        if self.size == 1:
            return
        end = (self.at_step + 1) * self.count
        order = [m % self.size for m in range(end - self.size, end)]
        place = order.index(self.own)
        before = [] if place == 0 else [await self._from(order[place - 1]) for _ in self.gradients_by_dtype]
        rows = self.move(self.add, before)
        if not self.updates:
            await self._send(order[place + 1], "cdp-gradient", rows)

    def _own_sum(self, before: Sequence[Tensor]) -> list[Tensor]:
        return flat(self.gradients)

    @work(gives=_own_sum)
    def add(self, before: Sequence[Tensor]) -> list[Tensor]:
        """The sum so far, as messages; losses are weighted, so gradients are shares already."""
        own = flat(self.gradients)
        rows = [torch.add(x, y) for x, y in zip(before, own)] if before else own
        if self.updates:
            put(rows, self.gradients)
        return rows

    async def step(self) -> None:
        if self.updates:
            while self.newest < self.worker.version:  # what it computed with may be older
                await self._take_weights()
            await self._take_state(self.worker.version)
        await self.worker.run("U", self.update if self.updates else self.leave)

    async def mix(self) -> None:
        """New weights are handed on, and the optimizer's state, if another device makes the next update."""
        if self.updates:
            self.newest = self.shown = self.worker.version
            if self.size > 1:
                rows, apart = self.move(self.give), self._apart(self.newest)
                for device in [*self._order(self.newest)[:1], *([] if apart is None else [apart])]:
                    await self._send(device, "cdp-weights", rows)
            await self._give_state(self.worker.version)
        self._change_hands(self.worker.version)

    async def _give_state(self, step: int) -> None:
        to = self._ends(step)
        if to == self.own:
            self.state_of = step
        elif self.store.optimizer is not None:  # where nothing is computed there is none
            rows = under_way(self.worker)[self.worker.stage] = pack(self.store.optimizer, self.parameters)
            await self._send(to, "cdp-state", rows)
            drop(self.store.optimizer, self.parameters)

    async def _take_state(self, step: int) -> None:
        """For the update of this step; it may be here."""
        if self.state_of == step or self.store.optimizer is None:
            return
        giver = self.worker.replicas.peer(self._ends(step - 1))
        header = await giver.recv("cdp-state")
        rows = [await giver.recv("cdp-state") for _ in range(dtypes(header))]
        unpack(self.store.optimizer, self.parameters, header, rows)
        under_way(self.worker).pop(self.worker.stage, None)
        self.state_of = step

    # ---- between two steps -----------------------------------------------------------------------------------------

    async def settle(self) -> None:
        while self.newest < self.worker.version:
            await self._take_weights()
        self._show(self.newest)
        self._change_hands(self.worker.version)
        if self.updates:
            await self._take_state(self.worker.version)

    def begin_at(self, version: int) -> None:
        super().begin_at(version)
        self._change_hands(version)
        self.state_of = version

    async def realign(self) -> None:
        """All go on from the newest weights that any device has; whoever has made them sends them again."""
        self._show(self.newest)
        versions = [int(x) for x in await self.worker.replicas.gather("cdp-realign", torch.tensor(self.newest))]
        newest, before = max(versions), self.newest
        giver = versions.index(newest)
        if self.own == giver:
            for device in range(self.size):
                if device != giver:
                    await self._send(device, "cdp-weights", self.give())
        else:
            rows = [await self.worker.replicas.peer(giver).recv("cdp-weights") for _ in self.messages]
            if before < newest:
                self.accept(rows)
        self.newest = self.shown = self.worker.version = newest
        self.other = None  # as in a first step
        self._change_hands(newest)
        if self.updates and self.state_of != newest:
            header, *rows = under_way(self.worker).pop(self.worker.stage)
            unpack(self.store.optimizer, self.parameters, header, rows)
        self.state_of = newest
