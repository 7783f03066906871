"""Weights that train by themselves and meet those of the other replicas now and then.

    updates    …  t                 t + ⌈τ/2⌉        t + τ  …                t ≡ offset (mod H), H period, τ overlap
               begin an exchange    turn             end: take the mean in

A stage's weights are one fragment, or several that are exchanged at different updates (streaming DiLoCo). What travels is what
`sent` says, what is done with the mean is `receive`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...chain import Chain
from ...flat import blank, flat, views
from ...work import work
from ...worker import Worker
from ..base import Store, Weights
from .codecs import Plain, codec
from .exchange import Exchange, Sends
from .rule import Averaging

Rows = list[Tensor]


class Fragment:
    """Weights that are exchanged together, and their exchange: when it is due, and what it is at.

    begun: what this replica had when it began.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], exchange: Exchange, period: int, offset: int) -> None:
        self.parameters, self.exchange = list(parameters), exchange
        self.period, self.offset = period, offset % period
        self.started: int | None = None  # the update at which it began
        self.begun: Rows | None = None

    def due(self, update: int) -> bool:
        """Whether an exchange begins after this update (counted from 1)."""
        return update >= self.period and update % self.period == self.offset

    def forget(self) -> None:
        """Drop the exchange that was begun."""
        self.started = self.begun = None
        self.exchange.forget()

    def carried(self) -> dict[str, Any] | None:
        """For a checkpoint; None if there is nothing to keep."""
        if self.started is None and self.exchange.codec.lossless:
            return None
        return {"started": self.started, "begun": self.begun, "exchange": self.exchange.carried()}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self.started, self.begun = state["started"], state["begun"]
        self.exchange.load_carried(state["exchange"])


class Averaged(Weights):
    """Subclasses say what is sent and what is done with the mean (`sent`, `receive`).

    sends: what of it goes through a codec (exchange.py).
    """

    sends: ClassVar[Sends] = "progress"

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: Averaging) -> None:
        super().__init__(worker, chain, store)
        self.rule, self._real = rule, store.optimizer is not None
        self._codec = codec(rule.compression) if worker.replicas.size > 1 else Plain()  # of one, nothing travels
        period = rule.period_of(worker.stage, worker.stages)
        offset = rule.offset_of(worker.stage, worker.stages)
        rows = self.split()
        self.fragments = [
            Fragment(row, self.exchange(k), period, offset + k * period // len(rows))
            for k, row in enumerate(rows)
            if row
        ]
        self._ended = False  # whether an exchange came to its end with the last update

    def split(self) -> list[list[nn.Parameter]]:
        """The fragments. Here: one."""
        return [self.parameters]

    def exchange(self, k: int) -> Exchange:
        """That of fragment k: with all replicas, on channels of its own, as several may be under way."""
        channel = f"{self.rule.name}/{k}" if k else self.rule.name
        return self.exchange_among(range(self.worker.replicas.size), channel)

    def exchange_among(self, members: Sequence[int], channel: str) -> Exchange:
        """One with these replicas."""
        return Exchange(self.worker, channel, members, self._codec, self.sends, self._real)

    # ---- what a rule says ------------------------------------------------------------------------------------------

    def sent(self, fragment: Fragment) -> Rows:
        """What is averaged, a row per dtype. Here: the weights."""
        return flat(fragment.parameters)

    def receive(self, fragment: Fragment, mean: Rows, begun: Rows | None) -> None:
        """Take the mean in; `begun`: what this replica had sent, if it has trained since. Called without gradients.

        Here: nothing, for rules that say themselves when (CO2)."""

    # ---- when ------------------------------------------------------------------------------------------------------

    async def mix(self) -> None:
        self._ended = False
        now = self.worker.version
        for fragment in self.fragments:
            await self._go_on(fragment, now)
        for fragment in self.due(now):
            await self._begin(fragment, now)

    def due(self, update: int) -> list[Fragment]:
        """The fragments whose exchange begins after this update (counted from 1)."""
        return [fragment for fragment in self.fragments if fragment.due(update)]

    async def _begin(self, fragment: Fragment, now: int) -> None:
        rows = self._rows(fragment)
        if self.rule.overlap == 0:
            await self.finish(fragment, await fragment.exchange.mean(rows), None)
            return
        fragment.started, fragment.begun = now, rows
        await fragment.exchange.begin(rows)

    async def _go_on(self, fragment: Fragment, now: int) -> None:
        if fragment.started is None:
            return
        if now == fragment.started + (self.rule.overlap + 1) // 2:
            await fragment.exchange.turn()
        if now == fragment.started + self.rule.overlap:
            begun, fragment.started, fragment.begun = fragment.begun, None, None
            await self.finish(fragment, await fragment.exchange.end(), begun)

    async def finish(self, fragment: Fragment, mean: Rows, begun: Rows | None) -> None:
        """An exchange has come to its end."""
        self._ended = True
        await self.worker.run("U", self._receive, fragment, mean, begun)

    @work()
    @torch.no_grad()
    def _receive(self, fragment: Fragment, mean: Rows, begun: Rows | None) -> None:
        self.receive(fragment, mean, begun)

    def averages_statistics(self) -> bool:
        return self._ended

    # ---- rows ------------------------------------------------------------------------------------------------------

    def _rows(self, fragment: Fragment) -> Rows:
        return self.sent(fragment) if self._real else blank(fragment.parameters)

    # ---- between two steps -----------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Take what is on its way; it is used at its time."""
        for fragment in self.fragments:
            await fragment.exchange.collect()

    def shared_state(self) -> Sequence[Tensor]:
        """Tensors of the rule's own that are alike on all replicas; begun here, if training has not. Here: none."""
        return ()

    async def realign(self) -> None:
        """Some replicas may have taken in a mean before a step failed, others not: all go on from replica 0's state."""
        await super().realign()
        for x in self.shared_state():
            x.copy_((await self.worker.replicas.gather("realign", x))[0])

    def forget(self) -> None:
        super().forget()
        for fragment in self.fragments:
            fragment.forget()

    def carried(self) -> dict[str, Any]:
        rows = [fragment.carried() for fragment in self.fragments]
        return {} if rows == [None] * len(rows) else {"fragments": rows}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        for fragment, entries in zip(self.fragments, state.get("fragments", [])):
            if entries is not None:
                fragment.load_carried(entries)


def in_place(fragment: Fragment, rows: Rows) -> list[Tensor]:
    """The rows seen in the shapes of the fragment's weights."""
    return views(rows, fragment.parameters)
