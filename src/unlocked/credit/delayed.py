"""Pipelines that are never emptied between updates: gradients of weights that have been updated since (F §2.1.2; B2-B6).

    stage j of J (from 0), micro-batch m;  D_j = hop · (J − 1 − j)  micro-batches in flight
    every turn:   F of the newest micro-batch,   then B of the oldest, once more than D_j are in flight
    an update after every k backwards of the stage itself

    J = 3, hop = 1 (1F1B; the update after each B not shown)         J = 3, hop = 2
    stage 0   F0 F1 F2 B0 F3 B1 F4 B2 …                               F0 F1 F2 F3 F4 B0 F5 B1 …
    stage 1      F0 F1 B0 F2 B1 F3 B2 …                               F0 F1 F2 B0 F3 B1 …
    stage 2         F0 B0 F1 B1 F2 B2 …                               F0 B0 F1 B1 …

With hop = 1 a gradient is needed the moment it can be there; with hop = 2 a turn later, so forward and backward of one turn do
not wait for each other, and messages have a turn to travel. A gradient is D_j/k updates old, once the pipeline is full.

A rule says `hop`, what is kept of a micro-batch (keeping.py), and the order of a turn (`backward_first`: B, then F). Common to
all of them:

    drain     at the end of every epoch ("epoch": before a validation all micro-batches have had their backward) or of training
              ("end"); what is in flight in between is saved with a checkpoint
    warm_up   so many first updates without delay

The gradient of a stage is asked of the stage above as it comes; nobody waits for a whole pipeline, so the numbers do not
depend on how long anything takes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..batch import Batch
from ..chain import Stage
from ..consensus.base import Weights
from ..errors import InvalidChoice, choose
from ..flight import Flight, InFlight
from ..versions import Reading
from ..worker import Worker
from .base import Credit, Held, objective
from .keeping import KeepGraph, Keeping, Messages

Drain = Literal["epoch", "end"]
_LAST = KeepGraph("stash")


@dataclass(frozen=True, kw_only=True)
class Delayed(Credit):
    """The program of every rule with delayed gradients; keyword arguments that all of them take.

    Args:
        drain: when the pipeline is emptied: at the end of every "epoch", or at the "end" of training only.
        warm_up: ≥ 0, updates at the beginning that are done without delay.
    """

    drain: Drain = "epoch"
    warm_up: int = 0

    one_backward: ClassVar[bool] = True
    hop: ClassVar[int] = 1
    backward_first: ClassVar[bool] = False
    sees_newest: ClassVar[bool] = True  # whether a forward sees the newest weights; predicted ones may stand for them

    def __post_init__(self) -> None:
        choose("drain", self.drain, ("epoch", "end"))
        if isinstance(self.warm_up, bool) or not isinstance(self.warm_up, int) or self.warm_up < 0:
            raise InvalidChoice(f"warm_up={self.warm_up} is not possible; give a whole number of updates, 0 or more.")

    @property
    @abstractmethod
    def keeping(self) -> Keeping:
        """What a stage keeps of a micro-batch in flight."""

    @property
    def keeps_versions(self) -> bool:
        """Whether weights are copied before an update that would overwrite what a micro-batch in flight has seen."""
        return False

    @property
    def messages(self) -> tuple[str, ...]:
        """The channels down, with one message on each for every backward."""
        return ("gradient",)

    @property
    def crossing(self) -> frozenset[str]:
        return frozenset(self.messages)

    def held(self, last: bool) -> Held:
        # the last stage's graph is an ordinary one: nothing comes between
        return Held("graph" if last else self.keeping.what, self.keeps_versions, crosses=True)

    def filling(self, stages: int, accumulate: int) -> int:
        # twice the turns in flight: first none has had an update, then each is to have seen other weights
        return self.warm_up + -(-2 * self.hop * (stages - 1) // accumulate)

    def drains(self, last: bool) -> bool:
        return last or self.drain == "epoch"

    def stands(self, worker: Worker, parts: int) -> bool:
        """Whether the next step reads the weights before its first update (`Flight.standing`)."""
        return True

    def depth(self, worker: Worker, weights: Weights, number: int) -> int:
        """D_j: micro-batches that stay in flight after this one's turn."""
        return 0 if self.plain(weights, number) else self.hop * (worker.stages - 1 - worker.stage)

    def plain(self, weights: Weights, number: int) -> bool:
        """Whether this micro-batch belongs to the warm-up, in which nothing is delayed."""
        return number // weights.store.accumulate < self.warm_up

    # ---- the program -----------------------------------------------------------------------------------------------

    async def run(self, worker: Worker, stage: Stage, batches: Iterable[Batch], weights: Weights) -> None:
        flight = self.flight(weights)
        for batch in batches:
            if worker.last:
                await self._at_once(worker, stage, weights, batch)
                continue
            depth = self.depth(worker, weights, batch.number)
            if self.backward_first and depth:
                while len(flight) >= depth:
                    await self._backward(worker, stage, weights)
            await self._forward(worker, stage, weights, batch)
            while len(flight) > depth:
                await self._backward(worker, stage, weights)

    async def empty(self, worker: Worker, stage: Stage, weights: Weights) -> None:
        """Give every micro-batch in flight its backward."""
        flight = self.flight(weights)
        while len(flight):
            await self._backward(worker, stage, weights)

    async def collect(self, worker: Worker, weights: Weights) -> None:
        """Take the messages that are under way to this stage, so that a checkpoint of it holds them."""
        flight = self.flight(weights)
        await worker.below.send("in-flight", torch.tensor(len(flight)))
        if worker.last:
            return
        above = int(await worker.above.recv("in-flight"))
        for _ in range(len(flight) - above - len(flight.received)):
            flight.received.append(await self._from_above(worker))

    def flight(self, weights: Weights) -> Flight:
        """What is in flight at a worker."""
        if weights.flight is None:
            weights.flight = Flight()
            weights.versions.keeps = weights.versions.keeps or self.keeps_versions
        return weights.flight

    def reading(self, worker: Worker, weights: Weights, batch: Batch) -> Reading:
        """The weights that a micro-batch sees: the newest."""
        return weights.versions.read()

    async def _forward(self, worker: Worker, stage: Stage, weights: Weights, batch: Batch) -> None:
        entry, x = await self._begin(worker, weights, batch)
        h = await worker.run("F", self.keeping.forward, worker, stage, weights, entry, x)
        worker.reading = None
        await worker.above.send("activation", h.detach())

    async def _backward(self, worker: Worker, stage: Stage, weights: Weights) -> None:
        entry: InFlight = weights.flight.queue.popleft()
        received = weights.flight.received
        worker.at(entry.number)
        above = received.popleft() if received else await self._from_above(worker)
        below = await worker.run("B", self.keeping.backward, worker, stage, weights, entry, above)
        del above
        await self._end(worker, weights, entry, below)

    async def _at_once(self, worker: Worker, stage: Stage, weights: Weights, batch: Batch) -> None:
        """The last stage: nothing is updated between its forward and its backward."""
        entry, x = await self._begin(worker, weights, batch)
        h = await worker.run("F", self.last.forward, worker, stage, weights, entry, x)
        entry.h = await worker.run("L", objective, worker, stage, h, batch)
        worker.reading = None
        del h, x
        below = await worker.run("B", self.last.backward, worker, stage, weights, weights.flight.queue.popleft(), ())
        await self._end(worker, weights, entry, below)

    async def _begin(self, worker: Worker, weights: Weights, batch: Batch) -> tuple[InFlight, Tensor]:
        """A micro-batch has come: what will be known of it, and the stage's input."""
        worker.at(batch.number)
        x = await worker.below.recv("activation", batch)
        await weights.read()
        plain = self.plain(weights, batch.number)
        entry = InFlight(batch.number, self.reading(worker, weights, batch), plain, batch.weight)
        weights.flight.queue.append(entry)
        worker.reading = entry.reading.version
        return entry, x

    async def _end(self, worker: Worker, weights: Weights, entry: InFlight, below: Messages) -> None:
        """A micro-batch has had its backward."""
        if not worker.first:
            for channel, x in zip(self.messages, below):
                await worker.below.send(channel, x)
        weights.versions.release(entry.reading.version)
        entry.x = entry.h = None  # the update may wait for other replicas; their memory need not
        del below
        await weights.write()

    async def _from_above(self, worker: Worker) -> Messages:
        return tuple([await worker.above.recv(channel) for channel in self.messages])

    @property
    def last(self) -> Keeping:
        """What the last stage keeps: no update comes between its forward and its backward."""
        return _LAST

    # ---- a checkpoint ----------------------------------------------------------------------------------------------

    def revive(self, worker: Worker, stage: Stage, weights: Weights, entry: InFlight, graph: Any) -> None:
        """Make again what a checkpoint cannot hold of a micro-batch in flight."""
        worker.at(entry.number)
        worker.compute(self.keeping.revive, (worker, stage, weights, entry, graph))
