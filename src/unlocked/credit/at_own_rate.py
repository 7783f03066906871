"""One stage's way through an epoch of asynchronous DGL at its own rate (async_dgl.py): what it sends, takes in and waits for.

    up     labels      number and targets of a micro-batch, then
           activation  its features (an empty tensor: there will be no others in this epoch)
    down   done        to every stage below: this one has made its updates (ends="updates")
           taken       a micro-batch was taken in (ends="updates", where stages take their own time)

A stage takes in everything that has come whenever it is about to choose; so what counts is what was there at that moment. It
waits only with nothing usable in its buffer. One that only passes on is never more than M micro-batches ahead of what the
next has taken in: a forward takes less time than an update, and the others would be overwritten unseen. Every stage ends by
saying so upward and hearing so from below, so nothing is left on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ..batch import Batch
from ..chain import Stage
from ..consensus.base import Weights
from ..modes import modes_kept
from ..work import work
from ..worker import DRAINED, Link, Place, Worker
from .buffering import Buffered, Kept, send_features
from .dgl import learn

if TYPE_CHECKING:
    from .async_dgl import AsyncDGL


class Window(Protocol):
    """What an epoch is to one replica. total: its micro-batches."""

    total: int

    def batch(self, k: int) -> tuple[Tensor, Tensor]:
        """Micro-batch k mod `total` of the epoch, for the first stage, which asks for them in order."""

    @property
    def stopping(self) -> bool:
        """Whether somebody wishes to stop before the end."""

    def turns(self, stage: int) -> Iterator[int] | None:
        """The ticks at which it is this stage's turn; None: it takes its own time."""

    def stepped(self, worker: Worker, samples: int) -> None:
        """A stage has made an update."""


class Taken(NamedTuple):
    """A micro-batch that a stage is about to work on: its input, targets and number."""

    x: Tensor
    y: Tensor
    number: int


@work("forward", gives=lambda stage, x: stage.body.gives(x))
@torch.no_grad()
def forward_only(stage: Stage, x: Tensor) -> Tensor:
    """The stage's output in evaluation mode; the stage is left in the mode it was in."""
    with modes_kept(stage):
        stage.eval()
        return stage.body(x)


class AtOwnRate:
    """The program of one worker for the rest of an epoch."""

    def __init__(self, rule: AsyncDGL, worker: Worker, stage: Stage, weights: Weights, window: Window) -> None:
        self._rule, self._worker, self._stage, self._weights = rule, worker, stage, weights
        self._window = window
        self._memory: Buffered = rule.buffered(weights)
        self._ticks = window.turns(worker.stage)
        self._alike = rule.ends == "updates"
        self._told = self._alike and self._ticks is None  # whether stages tell what they have taken in
        self._unheard = 0  # micro-batches sent of which the next stage has not told so yet
        links = [Link(worker, Place(worker.replica, j)) for j in range(worker.stages)] if self._alike else []
        self._below, self._above = links[: worker.stage], links[worker.stage + 1 :]  # above: those that are not done
        self._count = 0  # micro-batches worked on in this run
        self._over = False  # nothing more comes from below
        self._may_stop = worker.first and self._memory.made < window.total

    async def run(self) -> None:
        """Learn, then forward for those above, then end together."""
        await self._learn()
        if self._alike:
            for link in self._below:
                await link.send("done", torch.zeros(0))
            await self._forward()
        await self._end()

    async def _learn(self) -> None:
        memory, counted = self._memory, self._alike or self._worker.first
        while not (counted and memory.made >= self._window.total):
            await self._turn()
            taken = await self._next(memory.made, fresh=False)
            if taken is not None:
                await self._update(taken)
            elif self._over:
                return

    async def _forward(self) -> None:
        memory = self._memory
        while self._above and not self._over:
            await self._turn()
            if await self._all_done() or await self._ahead():
                continue
            taken = await self._next(self._window.total + memory.forwarded, fresh=True)
            if taken is not None:
                self._worker.at(memory.turns, len(taken.x))
                await self._send(await self._worker.run("F", forward_only, self._stage, taken.x), taken)
                memory.forwarded += 1
                self._count += 1

    async def _all_done(self) -> bool:
        """Whether all stages above have made their updates."""
        for link in list(self._above):
            if await link.arrived("done"):
                await link.recv("done")
                self._above.remove(link)
        return not self._above

    async def _ahead(self) -> bool:
        """Whether the next stage has not taken in enough of what was sent; it has taken in more since, if so."""
        if not self._told:
            return False
        for _ in range(await self._worker.above.arrived("taken" + DRAINED)):
            await self._hear()
        if self._unheard < self._rule.buffer:
            return False
        await self._hear()
        return True

    async def _hear(self) -> None:
        await self._worker.above.recv("taken" + DRAINED)
        self._unheard -= 1

    async def _end(self) -> None:
        worker = self._worker
        await worker.above.send("activation" + DRAINED, torch.zeros(0))
        for link in self._above:
            await link.recv("done")
        while not worker.first and not self._over:
            await self._receive()
        while self._unheard:
            await self._hear()

    # ---- one micro-batch ---------------------------------------------------------------------------------------------

    async def _turn(self) -> None:
        """Wait for this stage's turn, where there are turns."""
        if self._ticks is not None:
            await self._worker.until(float(next(self._ticks)))
        else:
            await self._worker.give_way(self._count)

    async def _next(self, k: int, fresh: bool) -> Taken | None:
        """What to work on: of the data micro-batch k, else what the buffer gives. None: nothing now, or no more."""
        if self._worker.first:
            return self._from_data(k)
        await self._take_in()
        kept = self._memory.take(self._worker, fresh or self._over)
        if kept is not None:
            return Taken(self._memory.features_of(kept, self._weights), kept.y, kept.number)
        if not self._over and self._ticks is None:
            await self._wait()
        return None

    def _from_data(self, k: int) -> Taken | None:
        if self._may_stop and self._count and self._window.stopping:
            self._over = True
            return None
        return Taken(*self._window.batch(k), k)

    async def _update(self, taken: Taken) -> None:
        worker, memory = self._worker, self._memory
        worker.at(memory.turns, len(taken.x))
        batch = Batch(taken.x, taken.y, memory.turns)
        memory.turns += 1

        async def pass_on(h: Tensor) -> None:
            await self._send(h, taken)

        await learn(worker, self._stage, taken.x, batch, self._weights, pass_on)
        memory.made += 1
        self._count += 1
        self._window.stepped(worker, len(taken.x))

    # ---- messages ----------------------------------------------------------------------------------------------------

    async def _send(self, h: Tensor, taken: Taken) -> None:
        """Targets first: when the features are there, everything is."""
        worker = self._worker
        if worker.last:
            return
        await worker.above.send("labels" + DRAINED, torch.tensor(taken.number))
        await worker.above.send("labels" + DRAINED, taken.y)
        await send_features(self._rule.quantise, worker, self._weights, h, DRAINED)
        self._unheard += self._told

    async def _take_in(self) -> None:
        """Everything that has come."""
        for _ in range(0 if self._over else await self._worker.below.arrived("activation" + DRAINED)):
            await self._receive()

    async def _wait(self) -> None:
        begin = self._worker.now
        await self._receive()
        self._memory.waited += self._worker.now - begin

    async def _receive(self) -> None:
        """The next message from below into the buffer."""
        below = self._worker.below
        x = await below.recv("activation" + DRAINED)
        if x.numel() == 0:
            self._over = True
            return
        number, y = int(await below.recv("labels" + DRAINED)), await below.recv("labels" + DRAINED)
        scales = [] if self._rule.quantise == "none" else [await below.recv("activation/scales" + DRAINED)]
        self._memory.replay.put(Kept(number, y, None, [*scales, x]))
        if self._told:
            await below.send("taken" + DRAINED, torch.zeros(0))
