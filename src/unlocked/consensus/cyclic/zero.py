"""Cyclic data parallelism with sharded states: a stage's states are with one replica at a time, and move (F §5.3.4).

    states of stage j    weights (θ_t, and θ_{t−1} while somebody is still to read it), the gradient's sum, the optimizer's
                         state

For N = J replicas each stage is used by exactly one of them in every unit of time, alternately for a forward and a backward.
So its states go, point to point, from whoever has used them to whoever uses them next, in the order of the timeline
(rules/cyclic.py); nothing is broadcast and nothing is held twice. Activations stay where they are: the graph of a forward
holds names of the weights, which are looked up when the states are there again for its backward (versions.py).

Between two steps the states are with replica 0, whose chain is the network; the other replicas' parameters are empty, but
where they are being used. A `Trainer.step` ends when all its micro-batches have had their backward, so the order is that of
one step after the other; many steps in one run (`simulate`) overlap as the timeline says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...chain import Chain
from ...errors import InvalidChoice
from ...flat import flat, put
from ...rules.cyclic import turn, version_read
from ...versions import Reading, Versions, copied, put_in_place
from ...work import work
from ...worker import Place, Worker
from ..base import Store, Weights, unused_optimizer
from .reading import Count, Plan, seen
from .state import drop, dtypes, pack, under_way, unpack


class Use(NamedTuple):
    """One forward or backward of a stage: when it begins (in gradients' times), of which replica and micro-batch."""

    when: float
    replica: int
    number: int
    backward: bool


class Order(NamedTuple):
    """Who uses a stage after whom, and at which place in it a (replica, micro-batch, backward) is."""

    uses: tuple[Use, ...]
    at: Mapping[tuple[int, int, bool], int]


@lru_cache(maxsize=256)
def order(stage: int, replicas: int, stages: int, count: int) -> Order:
    """The order for `count` micro-batches of every replica. At the last stage a forward and its backward are one use."""
    uses = sorted(
        Use(round(m + turn(n, stage, replicas, stages, backward), 9), n, m, backward)
        for m in range(count)
        for n in range(replicas)
        for backward in ((False,) if stage == stages - 1 else (False, True))
    )
    return Order(tuple(uses), {use[1:]: k for k, use in enumerate(uses)})


class Visited(Weights):
    """The weights of one stage as they come to one replica. holding: whether the states are here."""

    def __init__(self, worker: Worker, chain: Chain, store: Store, plan: Plan) -> None:
        super().__init__(worker, chain, store)
        n = worker.replica
        if store.batchnorm == "average" and self.statistics and worker.replicas.size > 1:
            raise InvalidChoice(
                "With form='zero' the replicas are never at a stage together, so their BatchNorm statistics cannot be averaged "
                "after every update; use batchnorm='local' or 'refresh', or another form of cdp."
            )
        self.plan, self.fresh = plan, plan.fresh[n]
        self.stale = [k for k, fresh in enumerate(plan.fresh) if not fresh]
        self.here = Count(worker.stage)
        self.versions = Versions(self.here, self.stage)
        self.holding, self.gradient = n == 0, False
        self.older: int | None = None  # a version that goes with the newest
        self._shapes = [(x.shape, x.dtype) for x in self.parameters]
        self._reading: Reading | None = None
        self.shard = self.optimizer_of = Place(0, worker.stage)
        self.updates = n == 0
        worker.guard, worker.lens = self, self._lens

    # ---- coming and going ------------------------------------------------------------------------------------------

    def _order(self) -> Order:
        worker, window = self.worker, self.store.window * self.store.accumulate
        return order(worker.stage, worker.replicas.size, worker.stages, window)

    def _user(self, backward: bool, later: int) -> int:
        """The replica that uses the states before (−1) or after (1) the use at hand, in the order of this window."""
        uses, at = self._order()
        number = self.worker.micro_batch % (self.store.window * self.store.accumulate)
        return uses[(at[self.worker.replica, number, backward] + later) % len(uses)].replica

    async def _come(self, backward: bool) -> None:
        """Have the states here."""
        if not self.holding:
            await self._receive(self._user(backward, -1))

    async def _go(self, backward: bool) -> None:
        """Send the states to whoever uses them next."""
        to = self._user(backward, 1)
        if to != self.worker.replica:
            await self._send(to)

    async def _send(self, replica: int) -> None:
        peer = self.worker.replicas.peer(replica)
        rows = self.move(self.give)
        states = [] if self.store.optimizer is None else pack(self.store.optimizer, self.parameters)
        header: dict[str, Any] = {
            "newest": self.here.version,
            "older": self.older,
            "gradient": self.gradient,
            "rows": len(rows),
        }
        if self.gradient and self.store.optimizer is not None:
            header["gradients"] = [x.grad is not None for x in self.parameters]
        said = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
        under_way(self.worker)[self.worker.stage] = [said, *rows, *states]
        for x in [said, *rows, *states]:
            await peer.send("cdp-state", x)
        self.move(self.empty)
        self.holding, self.gradient, self.older = False, False, None

    async def _receive(self, replica: int) -> None:
        peer = self.worker.replicas.peer(replica)
        said = await peer.recv("cdp-state")
        rows = [await peer.recv("cdp-state") for _ in range(_read(said)["rows"])]
        if self.store.optimizer is not None:
            rows.append(await peer.recv("cdp-state"))
            rows += [await peer.recv("cdp-state") for _ in range(dtypes(rows[-1]))]
        self._put(said, rows)

    def _put(self, said: Tensor, rows: Sequence[Tensor]) -> None:
        """The states are here."""
        header = _read(said)
        values, states = rows[: header["rows"]], rows[header["rows"] :]
        if states:
            unpack(self.store.optimizer, self.parameters, states[0], states[1:])
        self.here.version, self.older, self.gradient = header["newest"], header["older"], header["gradient"]
        self.move(self.take, header, values)
        self.holding = True
        under_way(self.worker).pop(self.worker.stage, None)

    def _message(self) -> list[Tensor]:
        rows = flat(self.parameters)
        return rows * (1 + (self.older is not None) + self.gradient)

    @work(gives=_message)
    def give(self) -> list[Tensor]:
        """Weights, the older ones, gradients: rows of values."""
        rows = flat(self.parameters)
        if self.older is not None:
            rows += flat(self.versions.kept[self.older])
        return rows + flat([x.grad for x in self.parameters if x.grad is not None]) if self.gradient else rows

    @work()
    def empty(self) -> None:
        """Nothing is here any more."""
        drop(self.store.optimizer, self.parameters)
        self.versions.kept.clear()
        self._drop_gradients()
        with torch.no_grad():
            put_in_place(self.parameters, [x.new_empty(0) for x in self.parameters])

    @work()
    def take(self, header: Mapping[str, Any], rows: Sequence[Tensor]) -> None:
        """The inverse of `give`."""
        each = len({dtype for _, dtype in self._shapes})
        put_in_place(self.parameters, self._filled(rows[:each]))
        if self.older is not None:
            self.versions.kept[self.older] = self._filled(rows[each : 2 * each])
        if self.gradient:
            parameters = [x for x, there in zip(self.parameters, header["gradients"]) if there]
            for x in parameters:
                x.grad = torch.empty_like(x)
            put(
                rows[-len({x.dtype for x in parameters}) :] if parameters else [],
                [x.grad for x in parameters if x.grad is not None],
            )

    def _filled(self, rows: Sequence[Tensor]) -> list[Tensor]:
        values = [torch.empty(shape, dtype=dtype, device=self.worker.device) for shape, dtype in self._shapes]
        put(rows, values)
        return values

    # ---- a micro-batch ---------------------------------------------------------------------------------------------

    async def read(self) -> None:
        if self.worker.version == self.pending == 0:
            await self.plan.begin(self.worker, self.worker.replica)
        await self._come(backward=False)
        wanted = version_read(self.fresh, self.worker.version)
        if wanted != self.here.version and wanted != self.older:
            wanted = self.here.version  # the step before failed, or was another rule's
        self._reading = Reading(wanted)
        self.worker.reading = wanted

    async def before(self, kind: str) -> None:
        """A backward needs the states again."""
        if kind == "B" and not self.worker.last:
            await self._come(backward=True)

    async def after(self, kind: str) -> None:
        """After a forward the states go on, but at the last stage, where the backward follows at once."""
        if kind == "F" and not self.worker.last:
            await self._go(backward=False)

    def _lens(self) -> AbstractContextManager[Any]:
        """What is computed sees the weights that were read."""
        return seen(self.versions, self._reading)

    async def write(self) -> None:
        self._reading = self.worker.reading = None
        self.gradient = True
        if self.worker.replica == (self.stale or [-1])[-1] and self.pending + 1 == self.micro_batches:
            self._drop_older()
        await super().write()
        await self._go(backward=not self.worker.last)

    def _drop_older(self) -> None:
        """Nobody is still to read it."""
        self.older = None
        self.versions.kept.clear()

    async def step(self) -> None:
        owner = self.worker.replica == self.worker.replicas.size - 1
        await self.worker.run("U", self.update if owner else self.skip)
        if owner:
            self.older = self.here.version if self.stale else None
            self.here.version += 1
            self.gradient = False

    @work()
    def skip(self) -> None:
        """The last replica makes the update; the gradient goes on."""
        with unused_optimizer():
            self._step_schedule()

    def update(self) -> None:
        if self.stale:
            self.versions.kept[self.here.version] = copied(self.parameters)
        for x in self.parameters:
            if x.grad is not None:
                x.grad.div_(self.worker.replicas.size)
        super().update()

    # ---- between two steps -----------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """The states come to replica 0."""
        if self.worker.replica == 0 and not self.holding:
            await self._receive(self._order().uses[-1].replica)

    async def realign(self) -> None:
        """All go on from the newest weights, which come to replica 0 from whoever has the states, or off the way."""
        mine = torch.tensor(self.here.version if self.holding else -1)
        versions = [int(x) for x in await self.worker.replicas.gather("cdp-realign", mine)]
        holder = versions.index(max(versions))
        lost = under_way(self.worker).get(self.worker.stage)
        if self.worker.replica == 0 and max(versions) < 0:
            assert lost is not None
            self._put(lost[0], lost[1:])
        elif holder != 0 and self.worker.replica == holder:
            await self._send(0)
        elif holder != 0 and self.worker.replica == 0:
            await self._receive(holder)
        self._drop_gradients()
        self._drop_older()
        self.gradient = False
        newest = await self.worker.replicas.gather("cdp-realign", torch.tensor(self.here.version))
        self.worker.version = int(newest[0])

    def forget(self) -> None:
        super().forget()
        self.gradient = False
        self._reading = self.older = None

    def begin_at(self, version: int) -> None:
        super().begin_at(version)
        self.here.version = version

    def carried(self) -> dict[str, Any]:
        return {"older": self.older, "kept": {str(version): row for version, row in self.versions.kept.items()}}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        if self.holding:
            self.older = state["older"]
            self.versions.kept = {int(version): row for version, row in state["kept"].items()}


def _read(said: Tensor) -> dict[str, Any]:
    """What the first message says of the others."""
    return json.loads(bytes(said.cpu().tolist()))
