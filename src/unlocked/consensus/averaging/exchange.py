"""The mean over a group of replicas of rows of values, in two halves that may lie updates apart.

    begin   member r owns part r of every row: each member sends part r to member r
    turn    the owner sums what came in the order of the members, divides by their number, and sends the mean to all
    end     everybody puts the parts together

Nothing waits in `begin`; `turn` and `end` wait for what is still on its way. With the three in a row it is an all-reduce:
2(N−1)/N of the payload leaves a member, and the numbers are those of `replicas.mean`. Through a codec both halves travel
encoded, and every member, the owner too, goes on with what was decoded: so all have the same bits. What is encoded is small,
and what the codec leaves out of it is not lost:

    rows        the rows themselves. What is left out is added to the next ones (error feedback).
    progress    what the rows have gained on the last mean, for rows that begin anew from it: x − m. The same feedback.
    estimates   what the others do not know yet of the rows, for rows that go on by themselves: x − x̂, then x̂ ← x̂ + C(x − x̂),
                and the mean of the x̂ is what all get (as in Koloskova, Stich & Jaggi 2019; without feedback, as what was left
                out of x̂ is in the next difference).

m the last mean, x̂ what the others know of this member's rows, C the codec there and back. In the last two the first exchange
travels as it is. The owner's mean is always sent with feedback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ...flat import bounds
from ...rules.compression import wide
from ...rules.mean import ordered_mean
from ...worker import Link, Worker
from .codecs import Codec, ErrorFeedback, pack, unpack

Rows = Sequence[Tensor]
Sends = Literal["rows", "progress", "estimates"]


class Exchange:
    """The exchanges of one group on one pair of channels, one at a time.

    members: their replica numbers, ascending, this one's among them. sends: what goes through the codec, see above. real:
    whether there are values (not only shapes). last: m, or the mean of the x̂.
    """

    def __init__(
        self,
        worker: Worker,
        channel: str,
        members: Sequence[int],
        codec: Codec,
        sends: Sends = "rows",
        real: bool = True,
    ) -> None:
        self._worker, self.channel, self.codec, self._sends, self._real = worker, channel, codec, sends, real
        self._whole = False  # whether this one travels as it is, without the codec
        self.last: list[Tensor] | None = None
        self._known: list[Tensor] | None = None  # x̂
        self.members = list(members)
        self._here = self.members.index(worker.replica)
        self._feedback = ErrorFeedback(codec)
        self._own: list[Tensor] | None = None  # this member's part, and the shapes of all, from `begin` to `turn`
        self._open: set[str] = set()  # channels that are listened to
        self._lengths: list[int] = []
        self._mean: list[Tensor] | None = None  # this member's part of the mean, from `turn` to `end`
        self._early: dict[int, list[Tensor]] = {}  # what was taken before its time, for a checkpoint

    @property
    def size(self) -> int:
        """Members of the group."""
        return len(self.members)

    @property
    def under_way(self) -> bool:
        """Whether one was begun and is not at its end."""
        return self._own is not None or self._mean is not None

    @property
    def plain(self) -> bool:
        """Whether the values travel as they are."""
        return self._whole or self.codec.lossless

    async def mean(self, rows: Rows) -> list[Tensor]:
        """The mean of the rows, (k,) each, over the members; read-only."""
        self._whole = self._first
        if self.size == self._worker.replicas.size and self.plain:
            self._note_whole(rows)
            return self._absolute(list(await self._worker.replicas.mean(self.channel, rows)))
        await self.begin(rows)
        await self.turn()
        return await self.end()

    async def begin(self, rows: Rows) -> None:
        """Send everybody its part of this member's rows."""
        await self._listen(self._parts)
        self._whole = self._first
        self._note_whole(rows)
        rows = rows if self.plain else self._differences(rows)
        self._lengths = [len(row) for row in rows]
        for member, replica in enumerate(self.members):
            parts = [row[begin:end] for row, (begin, end) in self._bounds(rows, member)]
            payloads = [self._encode(f"{member}/{k}", part) for k, part in enumerate(parts)]
            self._note_known(member, payloads, parts)
            if member == self._here:
                self._own = [self._decode(payload, part) for payload, part in zip(payloads, parts)]
            else:
                await self._send(replica, self._parts, payloads)

    async def turn(self) -> None:
        """The mean of this member's part; it goes to everybody."""
        assert self._own is not None
        await self._listen(self._means)
        own, self._own = self._own, None
        columns = [own if m == self._here else await self._take(m, self._parts, own) for m in range(self.size)]
        means = [self._mean_of(rows) for rows in zip(*columns)]
        payloads = [self._encode(f"mean/{k}", mean, feedback=True) for k, mean in enumerate(means)]
        for member, replica in enumerate(self.members):
            if member != self._here:
                await self._send(replica, self._means, payloads)
        self._mean = [self._decode(payload, mean) for payload, mean in zip(payloads, means)]

    async def end(self) -> list[Tensor]:
        """All parts of the mean."""
        assert self._mean is not None
        mine, self._mean = self._mean, None
        columns = [
            mine if m == self._here else await self._take(m, self._means, self._like(m, mine)) for m in range(self.size)
        ]
        return self._absolute([torch.cat(list(parts)) for parts in zip(*columns)])

    # ---- what goes through the codec -------------------------------------------------------------------------------

    @property
    def _first(self) -> bool:
        return self._sends != "rows" and self.last is None

    def _note_whole(self, rows: Rows) -> None:
        if self._whole and not self.codec.lossless and self._sends == "estimates":
            self._known = [row.to(wide(row.dtype), copy=True) for row in rows]

    def _differences(self, rows: Rows) -> Rows:
        before = self._known if self._sends == "estimates" else self.last if self._sends == "progress" else None
        return rows if before is None else [(row - known).to(row.dtype) for row, known in zip(rows, before)]

    def _note_known(self, member: int, payloads: Sequence[list[Tensor]], parts: Rows) -> None:
        """What a member is sent of this one's rows, all know."""
        if self._known is None or self.plain:
            return
        for (known, (begin, end)), payload, part in zip(self._bounds(self._known, member), payloads, parts):
            known[begin:end] += self._decode(payload, part)

    def _absolute(self, means: list[Tensor]) -> list[Tensor]:
        """The mean of the rows, of what was exchanged."""
        if self.codec.lossless or self._sends == "rows":
            return means
        if not self._whole and self.last is not None:
            totals = [last + mean for last, mean in zip(self.last, means)]
        else:
            totals = [mean.to(wide(mean.dtype)) for mean in means]
        self.last = totals
        return [total.to(mean.dtype) for total, mean in zip(totals, means)]

    def _mean_of(self, rows: Sequence[Tensor]) -> Tensor:
        return ordered_mean(rows) if len(rows) > 1 else rows[0]

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _bounds(self, rows: Rows, member: int) -> list[tuple[Tensor, tuple[int, int]]]:
        return [(row, list(pairwise(bounds(len(row), self.size)))[member]) for row in rows]

    def _like(self, member: int, rows: Rows) -> list[Tensor]:
        """Rows as long as a member's parts."""
        lengths = [list(pairwise(bounds(length, self.size)))[member] for length in self._lengths]
        return [row.new_empty(end - begin) for row, (begin, end) in zip(rows, lengths)]

    # ---- messages --------------------------------------------------------------------------------------------------

    @property
    def _parts(self) -> str:
        return f"{self.channel}/parts"

    @property
    def _means(self) -> str:
        return f"{self.channel}/means"

    def _link(self, replica: int) -> Link:
        return self._worker.replicas.peer(replica)

    def _encode(self, name: str, part: Tensor, feedback: bool = False) -> list[Tensor]:
        if not self._real and not self.plain:
            return self.codec.empty(part)
        if self.plain:
            return [part]
        return self._feedback.send(name, part) if feedback or self._sends != "estimates" else self.codec.encode(part)

    def _decode(self, payload: list[Tensor], like: Tensor) -> Tensor:
        return payload[0] if self.plain else self.codec.decode(payload, like) if self._real else like

    async def _listen(self, channel: str) -> None:
        """Open the channels to this member, once: over some links a message leaves only when somebody listens, and whoever
        sent it may not begin the next step but one before."""
        for replica in () if channel in self._open else self.members:
            if replica != self._worker.replica:
                await self._link(replica).arrived(channel)
        self._open.add(channel)

    async def _send(self, replica: int, channel: str, payloads: Sequence[list[Tensor]]) -> None:
        for payload in payloads:
            if sum(x.numel() for x in payload):
                await self._link(replica).send(channel, payload[0] if self.plain else pack(payload))

    async def _take(self, member: int, channel: str, like: Rows) -> list[Tensor]:
        """What a member sent, one row for each of `like`; empty ones were not sent."""
        early = self._early.pop(member, None)
        if early is not None:
            return early
        return [row if row.numel() == 0 else await self._take_one(member, channel, row) for row in like]

    async def _take_one(self, member: int, channel: str, like: Tensor) -> Tensor:
        x = await self._link(self.members[member]).recv(channel, like)
        if self.plain:
            return x
        return self.codec.decode(unpack(x, self.codec.empty(like)), like) if self._real else like

    # ---- between two steps -----------------------------------------------------------------------------------------

    async def collect(self) -> None:
        """Take what is on its way, to be used at its time: so nothing is on its way any more."""
        channel = self._parts if self._own is not None else self._means
        rows = self._own if self._own is not None else self._mean
        if rows is None or self._early:
            return
        for m in range(self.size):
            if m != self._here:
                like = rows if channel == self._parts else self._like(m, rows)
                self._early[m] = await self._take(m, channel, like)

    def forget(self) -> None:
        """Drop what was begun. Not all members may have taken in the same means: the next one travels as it is."""
        self._own = self._mean = None
        self._early = {}
        if self._sends != "rows":
            self.last = self._known = None
            self._feedback = ErrorFeedback(self.codec)

    def carried(self) -> dict[str, Any]:
        """For a checkpoint, after `collect`."""
        return {
            "own": self._own,
            "mean": self._mean,
            "lengths": list(self._lengths),
            "whole": self._whole,
            "last": self.last,
            "known": self._known,
            "early": {str(member): rows for member, rows in self._early.items()},
            "feedback": self._feedback.carried(),
        }

    def load_carried(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self._own, self._mean, self._lengths = state["own"], state["mean"], list(state["lengths"])
        self._whole, self.last, self._known = state["whole"], state["last"], state["known"]
        self._early = {int(member): list(rows) for member, rows in state["early"].items()}
        self._feedback.load_carried(state["feedback"])
