"""The verbs of workers on several processes: over links where the other is elsewhere, by mailboxes where it is here.

Two threads of a process work with these: the main one (distributed.py) and the one beside it (beside.py), each with mailboxes
of its own.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Awaitable, Sequence
from typing import Any

from torch import Tensor

from ..cluster import Cluster
from ..worker import Place, Worker
from . import exchange
from .local import LocalWorkers, bytes_of, on
from .wiring import Wiring, described


class Wired(LocalWorkers):
    """Workers of one process among several. `window`: what is sent is remembered under it (`Wiring.oldest`)."""

    def __init__(self, crew: Cluster, wiring: Wiring) -> None:
        super().__init__()
        self.crew = crew
        self.wiring = wiring
        self._ranks: dict[Place, int] = {}
        self.meshes = 0

    @property
    @abstractmethod
    def window(self) -> int:
        """The number of the window the process is in."""

    def channel(self, name: str) -> str:
        """What a channel is called on the links."""
        return name

    def untaken(self) -> list[str]:
        """Messages in the mailboxes, but on `crossing` channels."""
        return [
            f"{len(box)} on {described(key)}" for key, box in self._boxes.items() if box and key[2] not in self.crossing
        ]

    def progress(self) -> None:
        """Let what was begun go on; called from inside a computation."""

    # ---- the verbs -------------------------------------------------------------------------------------------------

    async def send(self, here: Worker, there: Place, channel: str, x: Tensor) -> None:
        """Into the link or, if the other lives here, into its mailbox; never waits."""
        begin = time.perf_counter()
        wire = self._put(here, there, channel, x)
        self.record(here, "S", channel, bytes_of(x), there, begin, waited=True, wire=wire)

    async def recv(self, here: Worker, there: Place, channel: str, like: Any) -> Tensor:
        """The oldest message; the act lasts as long as the worker waited for it."""
        begin = time.perf_counter()
        x = await self._get(here, there, channel)
        self.record(here, "R", channel, bytes_of(x), there, begin, waited=True)
        return x

    async def arrived(self, here: Worker, there: Place, channel: str) -> int:
        """As many as are here; it depends on who is faster."""
        key, rank = (there, here.place, self.channel(channel)), self._ranks[there]
        if rank != self.crew.rank:
            self.wiring.listen(key, rank)
        self.progress()
        return len(self._boxes[key])

    def now(self, here: Worker) -> float:
        """Seconds of rank 0's clock."""
        return time.perf_counter() + self.crew.offsets[self.crew.rank]

    def say_first(self, here: Worker, name: str, value: float) -> float:
        """A register in the store."""
        return float(self.wiring.say_first(f"{self.meshes}/{name}", repr(value)))

    async def mean(self, here: Worker, channel: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Mean over the replicas, wherever they live."""
        begin, member = time.perf_counter(), _Member(self, here, channel)
        means = await exchange.mean(member, tensors)
        size = exchange.mean_bytes(tensors, here.replica, here.replicas.size)
        self.record(here, "M", channel, size, None, begin, waited=True, wire=member.wire)
        return means

    def begin_mean(self, here: Worker, channel: str, tensors: Sequence[Tensor]) -> Awaitable[Sequence[Tensor]]:
        """The mean, begun now and going on beside the program."""
        return self._scheduler.spawn(here, self.mean(here, channel, tensors), lambda: f"the exchange {channel!r}")

    async def take(self, here: Worker, channel: str, values: Tensor, owners: Tensor) -> Tensor:
        """Only entries whose owner is another replica travel."""
        begin, member = time.perf_counter(), _Member(self, here, channel)
        taken = await exchange.take(member, values, owners)
        size = exchange.take_bytes(values, owners, here.replica)
        self.record(here, "M", channel, size, None, begin, waited=True, wire=member.wire)
        return taken

    async def gather(self, here: Worker, channel: str, x: Tensor) -> list[Tensor]:
        """Everyone's tensor, in the order of the replicas."""
        begin, member = time.perf_counter(), _Member(self, here, channel)
        rows = await exchange.gather(member, x)
        size = (here.replicas.size - 1) * bytes_of(x)
        self.record(here, "M", channel, size, None, begin, waited=True, wire=member.wire)
        return rows

    async def reduce_scatter(self, here: Worker, channel: str, values: Tensor) -> Tensor:
        """This replica's part of the sum."""
        begin, member = time.perf_counter(), _Member(self, here, channel)
        part = await exchange.reduce_scatter(member, values)
        size = exchange.scatter_bytes(values, here.replica, here.replicas.size)
        self.record(here, "M", channel, size, None, begin, waited=True, wire=member.wire)
        return part

    def lose(self, rank: int) -> None:
        """A process is lost, and the run goes on without it."""
        self._lose([place for place, owner in self._ranks.items() if owner == rank])

    # ---- messages --------------------------------------------------------------------------------------------------

    def _put(self, here: Worker, there: Place, channel: str, x: Tensor) -> int:
        """Send without waiting; returns the bytes on the wire, 0 inside a process."""
        key, rank = (here.place, there, self.channel(channel)), self._ranks[there]
        if rank == self.crew.rank:
            self._deliver(key, x)
            return 0
        if there in self._gone:
            return 0
        return self.wiring.put(key, rank, x, self.window)

    async def _get(self, here: Worker, there: Place, channel: str) -> Tensor:
        key, rank = (there, here.place, self.channel(channel)), self._ranks[there]
        if rank != self.crew.rank:
            self.wiring.listen(key, rank)
        x = await self._take(key)
        self.wiring.taken(key)
        return on(here.device, x)


class _Member:
    """A worker's part in an exchange of its group."""

    def __init__(self, world: Wired, here: Worker, channel: str) -> None:
        self._world, self._here, self._channel = world, here, channel
        self.rank, self.size, self.wire = here.replica, here.replicas.size, 0

    def put(self, to: int, x: Tensor) -> None:
        self.wire += self._world._put(self._here, Place(to, self._here.stage), self._channel, x)

    def get(self, source: int) -> Awaitable[Tensor]:
        return self._world._get(self._here, Place(source, self._here.stage), self._channel)
