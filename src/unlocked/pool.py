"""An epoch's batches that nobody was given beforehand: whoever is free takes the next one.

Used by rules whose replicas run freely (`Consensus.free`): a fast one takes more of them, and nobody waits for a slow one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from .worker import Link, Place, Worker

_AHEAD = 2


class Pool(Protocol):
    """Batches by number. `taken`: numbers below this one have been taken."""

    @property
    def taken(self) -> int: ...

    def take(self) -> int | None:
        """The next number; None: there is no other."""

    def stop(self) -> None:
        """No more than what completes the round that has begun, a round being a batch for each replica."""


class LocalPool:
    """The numbers `begin` … `end` − 1, for the workers of one process. `size`: batches of a round."""

    def __init__(self, begin: int, end: int, size: int) -> None:
        self._next, self._end, self._size = begin, end, size

    @property
    def taken(self) -> int:
        """How far it has come."""
        return self._next

    def take(self) -> int | None:
        """The next number, or None."""
        if self._next >= self._end:
            return None
        self._next += 1
        return self._next - 1

    def stop(self) -> None:
        """End with the round that has begun."""
        self._end = min(self._end, whole_rounds(self._next, self._size))


def whole_rounds(taken: int, size: int) -> int:
    """The number at which the round ends that has begun."""
    return -(-taken // size) * size


class Turns:
    """A worker's way through the updates of its replica.

    The first stage takes a batch from the pool and tells the other stages its number, wherever they live; it is at most
    `_AHEAD` + J updates ahead of any of them, so that no replica takes batches that it cannot train on yet. count: updates so
    far.
    """

    def __init__(self, worker: Worker, take: Callable[[], int | None]) -> None:
        self._worker, self._take, self.count = worker, take, 0
        others = range(1, worker.stages) if worker.first else (0,)
        self._links = [Link(worker, Place(worker.replica, j)) for j in others]

    async def next(self) -> int | None:
        """The number of the next batch; None: there is no other."""
        number = await (self._from_pool() if self._worker.first else self._from_first())
        self.count += number is not None
        return number

    async def _from_pool(self) -> int | None:
        ahead = _AHEAD + self._worker.stages
        await self._worker.give_way(self.count)
        if self.count >= ahead:
            await self._wait_for_others()
        number = self._take()
        for link in self._links:
            await link.send("pool", torch.tensor(-1 if number is None else number))
        for _ in range(min(self.count, ahead - 1) if number is None else 0):
            await self._wait_for_others()
        return number

    async def _wait_for_others(self) -> None:
        for link in self._links:
            await link.recv("pool")

    async def _from_first(self) -> int | None:
        (first,) = self._links
        if self.count:
            await first.send("pool", torch.zeros(0))  # the update before is over
        number = int(await first.recv("pool"))
        return None if number < 0 else number
