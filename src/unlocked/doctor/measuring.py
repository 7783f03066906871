"""How fast the links between two processes are, and how their clocks differ: little programs in the library's own verbs.

The mesh has a replica per process and one stage, so worker r is rank r and any two are peers. Pairs are measured one after
the other, so that they do not disturb each other.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from ..cluster import Cluster
from ..worker import Link, Worker
from ..worlds.distributed import Distributed
from .connections import Connection, neighbours

_ROUNDS = 40
_MESSAGES = 5
_SECONDS_A_MESSAGE = 0.5  # slower links get smaller messages
_SMALLEST = 256 * 1024  # bytes
_STALLED_AFTER = 60.0  # seconds
_SMALL = torch.zeros(16)  # 64 bytes

Kind = Literal["shared memory", "gloo"]


@dataclass(frozen=True)
class Speed:
    """The link from rank `source` to rank `target`.

    `latency`: seconds of one way of a 64-byte message, half the median round trip. `rate`: bytes per second, median over the
    messages of one stream, between their arrivals. `message`: bytes of each.
    """

    source: int
    target: int
    kind: Kind
    latency: float
    rate: float
    message: int


@dataclass(frozen=True)
class Clock:
    """What to add to rank `rank`'s clocks to be on rank 0's, in seconds: `wall` (time.time) and `counter`
    (time.perf_counter); both are right to ± `uncertainty`, half the shortest round trip."""

    rank: int
    wall: float
    counter: float
    uncertainty: float


def measure(
    world: Distributed, connected: list[Connection], mebibytes: float = 16, stalled_after: float = _STALLED_AFTER
) -> tuple[list[Speed], list[Clock]]:
    """The speeds of all pairs that can connect, each direction, and the clocks of those among them that rank 0 is part of.

    Args:
        world: whose links are measured; it has no mesh yet. mebibytes: size of a message in the stream; slow links get
            smaller ones, so that none takes much longer than half a second.

    All ranks call it; all get the result. Raises LostProcess, also when a pair is not done after `stalled_after` seconds.
    """
    cluster = world.crew
    cut_off = {frozenset((row.source, row.target)) for row in connected if row.seconds is None}
    pairs = neighbours(cluster.size)
    usable = [pair for pair in pairs if frozenset(pair) not in cut_off or _same_host(cluster, *pair)]
    worker = world.mesh(cluster.size, 1)[0]
    bench = _Bench(cluster, world, worker, int(mebibytes * 2**20), stalled_after)
    speeds = [speed for a, b in usable for speed in bench.pair(a, b)]
    return speeds, [bench.clock(b) for a, b in usable if a == 0]


def _same_host(cluster: Cluster, a: int, b: int) -> bool:
    return cluster.hosts[a] == cluster.hosts[b]


class _Bench:
    """The measurements, as seen from this process's worker."""

    def __init__(self, cluster: Cluster, world: Distributed, worker: Worker, size: int, stalled_after: float) -> None:
        self._cluster, self._world, self._worker = cluster, world, worker
        self._size, self._stalled_after = max(_SMALLEST, size), stalled_after

    def pair(self, a: int, b: int) -> list[Speed]:
        """Both directions between two ranks."""
        turns = self._both(a, b, _ask, _answer)[a]
        kind: Kind = "shared memory" if _same_host(self._cluster, a, b) else "gloo"
        latency = median(turns) / 2
        speeds = []
        for source, target in ((a, b), (b, a)):
            found = self._both(source, target, lambda link: _pour(link, self._size), _catch)
            message, *gaps = found[target]
            speeds.append(Speed(source, target, kind, latency, message / median(gaps), int(message)))
        return speeds

    def clock(self, rank: int) -> Clock:
        """Rank `rank` asks rank 0 what time it is."""
        rows = self._both(rank, 0, _ask_time, _tell_time)[rank]
        wait, wall, counter = min(tuple(rows[i : i + 3]) for i in range(0, len(rows), 3))
        return Clock(rank, wall, counter, wait / 2)

    def _both(
        self,
        a: int,
        b: int,
        of_a: Callable[[Link], Coroutine[Any, Any, list[float]]],
        of_b: Callable[[Link], Coroutine[Any, Any, list[float]]],
    ) -> list[list[float]]:
        """Run one program on rank a and one on rank b while the others wait; what each found, by rank."""
        found: list[float] = []

        async def program(other: int, of_it: Callable[[Link], Coroutine[Any, Any, list[float]]]) -> None:
            found.extend(await of_it(self._worker.replicas.peer(other)))

        me = self._cluster.rank
        if me in (a, b):
            task = program(b, of_a) if me == a else program(a, of_b)
            with self._watch(a, b):
                self._world.run([(self._worker, task)])
        return self._cluster.share(found)

    @contextmanager
    def _watch(self, a: int, b: int) -> Iterator[None]:
        """A link that hangs would hang the doctor."""
        sentence = (
            f"The link between rank {a} and rank {b} was not done after {self._stalled_after:.0f} s although the two can "
            "connect; look for a firewall or a wrong MTU between their hosts, or give a smaller --mebibytes."
        )
        timer = threading.Timer(self._stalled_after, self._cluster.fail, [sentence])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


async def _ask(link: Link) -> list[float]:
    """Seconds of each round trip, the first few left out."""
    turns = []
    for _ in range(_ROUNDS + 5):
        begin = time.perf_counter()
        await link.send("ask", _SMALL)
        await link.recv("answer")
        turns.append(time.perf_counter() - begin)
    return turns[5:]


async def _answer(link: Link) -> list[float]:
    for _ in range(_ROUNDS + 5):
        await link.recv("ask")
        await link.send("answer", _SMALL)
    return []


async def _pour(link: Link, size: int) -> list[float]:
    """Two probes say how large the messages should be; then one to warm up, and those that count."""
    for _ in range(2):
        begin = time.perf_counter()
        await link.send("stream", _bytes(min(size, 4 * _SMALLEST)))
        await link.recv("got it")
        rate = min(size, 4 * _SMALLEST) / (time.perf_counter() - begin)
    message = _bytes(max(_SMALLEST, min(size, int(rate * _SECONDS_A_MESSAGE))))
    for _ in range(1 + _MESSAGES):
        await link.send("stream", message)
    await link.recv("got it")
    return []


async def _catch(link: Link) -> list[float]:
    """Bytes of a message, then the seconds between the arrivals."""
    for _ in range(2):
        await link.recv("stream")
        await link.send("got it", _SMALL)
    arrivals, size = [], 0
    for _ in range(1 + _MESSAGES):
        size = len(await link.recv("stream"))
        arrivals.append(time.perf_counter())
    await link.send("got it", _SMALL)
    return [float(size)] + [after - before for before, after in itertools.pairwise(arrivals)]


def _bytes(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8)


async def _ask_time(link: Link) -> list[float]:
    """Rows of (round trip, wall offset, counter offset), flat."""
    rows: list[float] = []
    for _ in range(_ROUNDS):
        wall, start = time.time(), time.perf_counter()
        await link.send("time?", _SMALL)
        theirs = (await link.recv("time")).tolist()
        spent = time.perf_counter() - start
        rows += [spent, theirs[0] - (wall + spent / 2), theirs[1] - (start + spent / 2)]
    return rows


async def _tell_time(link: Link) -> list[float]:
    for _ in range(_ROUNDS):
        await link.recv("time?")
        await link.send("time", torch.tensor([time.time(), time.perf_counter()], dtype=torch.float64))
    return []
