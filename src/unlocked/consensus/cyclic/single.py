"""Cyclic data parallelism on one device: N micro-batches staggered through one model (F §5.3.1).

All replicas have the same parameters (buffers are their own, as in the other forms); what makes a worker replica n is when it
computes, and which version of the weights it sees.
A forward or backward of replica n waits for its turn (`Worker.until`), so that activations live as long as the rule's timeline
says: at most J(N+1)/2 of the N·J stage activations at a time, where forward and backward take equally long.

The versions are those of versions.py: graphs hold names of weights, and θ_{t−1} is copied before the update that ends it, as
long as somebody is still to read it. Messages between replicas have no content: they say that it is the next one's turn to add.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...chain import Chain, Stage
from ...rules.cyclic import turn
from ...versions import Reading, Versions
from ...work import work
from ...worker import Worker
from ..base import Store, unused_optimizer
from .reading import Count, Plan, seen
from .ring import Ring

_MOMENT = 1e-6  # of what is to be done at one time the forwards are first: it is as if they were done side by side


class _Shared(Count):
    """One stage of the one model: its versions, counted by the updates made so far."""

    def __init__(self, number: int, stage: Stage) -> None:
        super().__init__(number)
        self.versions = Versions(self, stage)
        self.versions.keeps = True
        self.total: list[Tensor | None] = []  # of the gradients so far


_SHARED: weakref.WeakValueDictionary[int, _Shared] = weakref.WeakValueDictionary()


class Single(Ring):
    """The weights as replica n sees them."""

    def __init__(self, worker: Worker, chain: Chain, store: Store, plan: Plan) -> None:
        super().__init__(worker, chain, store, plan)
        key = id(self.parameters[0])  # the same one in all replicas; an entry keeps it alive
        first = worker.replica == 0 or store.optimizer is None  # to be made; or where nothing is computed
        known = None if first else _SHARED.get(key)
        self.shared = _SHARED[key] = _Shared(worker.stage, self.stage) if known is None else known
        self.versions = self.shared.versions
        self.versions.parts += self.stage.modules()  # buffers are each replica's own
        self._reading: Reading | None = None
        self._own: list[Tensor | None] = [None] * len(self.parameters)  # gradients
        worker.lens, worker.guard = self._lens, self

    # ---- turns -----------------------------------------------------------------------------------------------------

    async def before(self, kind: str) -> None:
        """Wait for the turn of this replica's forward or backward."""
        worker = self.worker
        if worker.transport.timed:  # a clock has its own order
            return
        if kind == "F" or (kind == "B" and self.store.returns):
            begun = worker.replica if self.plan.staggered else 0
            moment = turn(begun, worker.stage, worker.replicas.size, worker.stages, kind == "B")
            after = _MOMENT if kind == "B" else 0.0
            await worker.until(worker.version * self.store.accumulate + self.pending + moment + after)

    async def after(self, kind: str) -> None:
        """Nothing."""

    @contextlib.contextmanager
    def _lens(self) -> Iterator[None]:
        """What this replica computes between reading and writing sees the weights it has read; gradients are its own."""
        with seen(self.versions, self._reading):
            if self._reading is None:
                yield
                return
            for x, gradient in zip(self.parameters, self._own):
                x.grad = gradient
            try:
                yield
            finally:
                self._own = [x.grad for x in self.parameters]
                self._drop_gradients()

    # ---- reading and writing ---------------------------------------------------------------------------------------

    async def read(self) -> None:
        if self.pending:
            return
        step = self.worker.version
        await super().read()
        if self.store.optimizer is None:
            return
        if self.shown != self.shared.version and self.shown not in self.versions.kept:
            self.shown = self.worker.reading = self.shared.version  # the step before failed
        self._reading = self.versions.read(self.shown)
        if not self.fresh and step > 0:
            self.versions.release(self.shown)  # what the update has held for this forward

    @property
    def gradients_by_dtype(self) -> range:
        return self.messages

    async def reduce(self) -> None:
        if self._reading is not None:
            self.versions.release(self._reading.version)
            self._reading = None
        await super().reduce()

    def _show(self, version: int) -> None:
        self.shown = version

    @work()
    def accept(self, rows: Sequence[Tensor]) -> None:
        """The weights are there already."""

    def _token(self) -> list[Tensor]:
        return [torch.empty(0, dtype=x) for x in dict.fromkeys(x.dtype for x in self.parameters)]

    @work(gives=_token)
    def give(self) -> list[Tensor]:
        """A word that they are there."""
        return self._token()

    def _passed(self, before: Sequence[Tensor]) -> list[Tensor]:
        return [] if self.updates else self._token()

    @work(gives=_passed)
    def add(self, before: Sequence[Tensor]) -> list[Tensor]:
        """Gradients are summed in the order of the replicas."""
        own, self._own = self._own, [None] * len(self.parameters)
        if self.worker.replica == 0:
            self.shared.total = own
        else:
            for x, more in zip(self.shared.total, own):
                if x is not None and more is not None:
                    x.add_(more)
        if not self.updates:
            return self._token()
        for x, gradient in zip(self.parameters, self.shared.total):
            x.grad = None if gradient is None else gradient.div_(self.worker.replicas.size)
        self.shared.total = []
        return []

    async def realign(self) -> None:
        """All go on from the weights that are there."""
        self.newest = self.shown = self.worker.version = self.shared.version

    def forget(self) -> None:
        super().forget()
        self._reading = None
        self._own = [None] * len(self.parameters)

    def begin_at(self, version: int) -> None:
        super().begin_at(version)
        self.shared.version = version
        if not self.fresh and version > 0:
            self.versions.hold(version - 1)

    def carried(self) -> dict[str, Any]:
        return {} if not self.updates else {"kept": {str(version): row for version, row in self.versions.kept.items()}}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        if self.updates:
            self.versions.kept = {int(version): row for version, row in state["kept"].items()}

    def update(self) -> None:
        for fresh in self.plan.fresh:
            if self.plan.newest or not fresh:
                self.versions.hold(self.shared.version)  # for that replica's next forward
        super(Ring, self).update()
        self.shared.version += 1

    @work()
    def leave(self) -> None:
        """The gradients are all replicas' own; nothing is cleared."""
        with unused_optimizer():
            self._step_schedule()
