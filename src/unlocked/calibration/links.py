"""What messages and exchanges between two processes of this machine cost, through the distributed world's own links.

Where links are memory, and on the loopback, a message is work of the processors: the sender copies it, threads wake up on both
sides. So besides how long a message is under way, what counts is how long it keeps a worker from computing. That is measured
as the processor's time of the whole process, threads included, so other programs hardly disturb it.

    way        seconds of one way of a message, until it is read, to a worker that has waited for some milliseconds: waking up
               takes longer than in a quick game of ping-pong
    send       processor's seconds of who sends a message while it computes
    receive    processor's seconds of who gets a message while it computes, and reads it
    exchange   processor's seconds of a mean over two replicas, among several begun at once, until it is in its place

Each at several sizes; a line is put through them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from statistics import fmean, linear_regression
from typing import Any

import torch

from ..simulation.network import Edge, Line, Network
from ..worker import Worker
from ..worlds.distributed import Distributed
from ..worlds.wiring import Links
from .crew import Member
from .stopwatch import Stopwatch

SIZES = (4096, 262144, 1048576, 4194304)
"""Bytes of the messages."""
_TIMES = 32  # messages of a window
_TURNS, _WAIT = 10, 8  # round trips, and computing before each message
_TOGETHER = 8  # means that are under way at once
_WINDOWS = 6

Points = dict[int, float]


@dataclass(frozen=True)
class LinkSeconds:
    """Seconds by bytes of a message, or of a payload, as measured."""

    way: Points
    send: Points
    receive: Points
    exchange: Points

    def network(self) -> Network:
        """The lines through the points, as the simulated world's network."""
        send, receive, way = line(self.send), line(self.receive), line(self.way)
        latency = max(0.0, way.fixed - send.fixed - receive.fixed)
        each = max(0.0, way.each - send.each - receive.each)
        bandwidth = 1.0 / each if each else float("inf")
        return Network(
            Edge(latency, bandwidth), collective="direct", send=send, receive=receive, exchange=line(self.exchange)
        )


def line(points: Points) -> Line:
    """The line nearest to all points (least squares), never below 0."""
    each = 0.0
    if len(points) > 1:
        each = max(0.0, linear_regression(list(points), list(points.values())).slope)
    return Line(max(0.0, fmean(points.values()) - each * fmean(points)), each)


def measure_links(member: Member, links: Links = "auto") -> LinkSeconds:
    """Called by both processes of a crew of two; both get the result."""
    with Distributed(member.cluster, links=links) as world:
        bench = _Bench(member, world)
        rows: dict[str, Points] = {"way": {}, "send": {}, "receive": {}, "exchange": {}}
        for size in SIZES:
            for name in rows:
                rows[name][size] = getattr(bench, name)(size)
    return LinkSeconds(**rows)


class _Bench:
    """The measurements, as seen from this process's worker: a replica of two, of one stage."""

    def __init__(self, member: Member, world: Distributed) -> None:
        self._member, self._world = member, world
        self._worker: Worker = world.mesh(2, 1)[0]
        self._rank, self._watch = member.cluster.rank, Stopwatch()

    def way(self, size: int) -> float:
        """One way of a message to a worker that has waited for a while: half the fastest round trip, without the computing."""
        x, trips = torch.zeros(size // 4), []

        async def program(worker: Worker) -> None:
            peer = worker.replicas.peer(1 - self._rank)
            for _ in range(_TURNS):
                begin = time.perf_counter()
                if self._rank == 1:
                    (await peer.recv("ask")).sum()
                _compute(_WAIT)
                await peer.send("ask", x)
                if self._rank == 0:
                    (await peer.recv("ask")).sum()
                trips.append(time.perf_counter() - begin)

        async def alone(worker: Worker) -> None:
            for _ in range(_TURNS):
                _compute(_WAIT)
                x.sum()

        self._least(program, time.perf_counter)
        trip = self._member.cluster.share(min(trips))[0]
        return max(0.0, trip - sum(self._least(alone, self._watch.now)) / _TURNS) / 2

    def send(self, size: int) -> float:
        """What a message costs who sends it."""
        return self._stream(size, sender=0)

    def receive(self, size: int) -> float:
        """What a message costs who gets it."""
        return self._stream(size, sender=1)

    def exchange(self, size: int) -> float:
        """A mean among several begun at once, put where a rule wants it."""
        x = torch.zeros(size // 4)

        async def program(worker: Worker) -> None:
            for _ in range(_TIMES // _TOGETHER):
                begun = [worker.replicas.begin_mean(f"several/{k}", [x]) for k in range(_TOGETHER)]
                for one in begun:
                    x.copy_((await one)[0])

        return max(self._least(program, time.process_time)) / _TIMES

    def _stream(self, size: int, sender: int) -> float:
        """Rank 0's processor time for each message from `sender` to the other.

        Who gets it reads it: what another core has written must come to this one first.
        """
        x = torch.zeros(size // 4)

        async def program(worker: Worker) -> None:
            peer = worker.replicas.peer(1 - self._rank)
            for _ in range(_TIMES):
                if self._rank == sender:
                    await peer.send("stream", x)
                _compute()
                (await peer.recv("stream") if self._rank != sender else x).sum()

        async def alone(worker: Worker) -> None:
            for _ in range(_TIMES):
                _compute()
                x.sum()

        busy, computing = (self._least(each, time.process_time)[0] for each in (program, alone))
        return max(0.0, busy - computing) / _TIMES

    def _least(self, program: Callable[[Worker], Coroutine[Any, Any, None]], clock: Callable[[], float]) -> list[float]:
        """Seconds by this clock of the fastest window on each rank, the first left out."""
        found = []
        for _ in range(1 + _WINDOWS):
            self._member.barrier.wait()
            begin = clock()
            self._world.run([(self._worker, program(self._worker))])
            found.append(clock() - begin)
        return self._member.cluster.share(min(found[1:]))


_LEFT, _RIGHT = torch.randn(512, 256), torch.randn(256, 256)


def _compute(amount: int = 2) -> None:
    """A little computing, a third of a millisecond or so for each."""
    for _ in range(amount):
        torch.mm(_LEFT, _RIGHT)
