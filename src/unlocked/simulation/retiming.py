"""A recorded run on another cluster: the same acts, each computation as long as it was, under any network.

Every worker gets a device of its own and does what it did, in its own order: it computes for the seconds that were recorded,
and sends, receives and meets under the clock of the simulated world. How long R, S and M take is what the network and the
waiting make of it, not what was recorded. An act does not say what kind of exchange it was, so it is taken for a mean in which
as many bytes are sent; one that went on beside a computation is done in its place in the record, beside nothing.

What waits for a message that was sent before the record began, or for an exchange that not all replicas have in it, is left
out, and so is all that its worker did afterwards; so are S and R that do not say with whom.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

import torch

from ..timeline import BUSY, Act, Timeline
from ..worker import Link, Place, Worker
from ..worlds.simulated import Lasting, Simulated
from .costs import unit
from .ghosts import Ghost
from .hardware import Hardware
from .network import FREE, Network


def retimed(timeline: Timeline, network: Network = FREE) -> Timeline:
    """The same acts as one device per worker would have timed them, from 0 on; only their starts and ends differ.

    Devices are numbered replica by replica. Without a network this is what the dependencies of the method allow, not a
    measurement of a cluster.
    """
    timeline = Timeline(act for act in timeline if act.kind not in "SR" or act.peer is not None)
    if not len(timeline):
        return Timeline()
    acting = timeline.workers()
    there = {*acting, *(act.peer for act in timeline if act.peer is not None)}
    own = {replica for replica, _ in acting}
    replicas = {number: k for k, number in enumerate(sorted({r for r, _ in there}, key=lambda r: (r not in own, r)))}
    stages = {number: k for k, number in enumerate(sorted({stage for _, stage in there}))}

    left: dict[Place, deque[Act]] = defaultdict(deque)
    for act in timeline:
        left[Place(replicas[act.replica], stages[act.stage])].append(act)
    world = Simulated(Hardware(network=network), unit(len(stages)), tensors=False)
    programs = []
    for worker in world.mesh(len(replicas), len(stages)):
        if worker.place in left:
            worker.replicas.size = len(own)
            programs.append((worker, _replay(worker, list(left[worker.place]), replicas, stages)))
    done = world.run(programs, partly=True)
    origin = [(left[Place(act.replica, act.stage)].popleft(), act) for act in done]  # each worker keeps its order
    return Timeline(before._replace(start=after.start, end=after.end) for before, after in origin)


async def _replay(worker: Worker, acts: Iterable[Act], replicas: dict[int, int], stages: dict[int, int]) -> None:
    """What one worker did."""
    for act in acts:
        if act.kind in BUSY:
            await worker.run(act.kind, Lasting(act.end - act.start))
        elif act.kind == "M":
            await worker.transport.mean(worker, act.channel, [_mean_of(act.bytes, worker.replicas.size)])
        else:
            assert act.peer is not None
            link = Link(worker, Place(replicas[act.peer[0]], stages[act.peer[1]]))
            await (link.send(act.channel, _payload(act.bytes)) if act.kind == "S" else link.recv(act.channel))


def _payload(size: int) -> Any:  # stands for a tensor
    return Ghost((size,), torch.uint8)


def _mean_of(sent: int, members: int) -> Any:
    """What a mean is of in which every member sends so many bytes: 2(N−1)/N of it."""
    return _payload(round(sent * members / (2 * (members - 1))) if members > 1 else sent)
