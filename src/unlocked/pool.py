"""An epoch's batches that nobody was given beforehand: whoever is free takes the next one.

Used by rules whose replicas run freely (`Consensus.free`): a fast one takes more of them, and nobody waits for a slow one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .batch import Batch


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


class Tape:
    """The updates of one replica. Its stages come to each at different times; whichever is first takes it from the pool.

    count: updates taken so far.
    """

    def __init__(self, take: Callable[[], list[Batch] | None], stages: int) -> None:
        self._take, self._stages = take, stages
        self._updates: dict[int, tuple[list[Batch], int]] = {}  # with the number of stages that have still to come
        self.count, self._over = 0, False

    def update(self, k: int) -> list[Batch] | None:
        """The micro-batches of update k, counted from 0; None: there is no such update."""
        if k == self.count and not self._over:
            batches = self._take()
            if batches is None:
                self._over = True
            else:
                self._updates[k] = (batches, self._stages)
                self.count += 1
        if k not in self._updates:
            return None
        batches, left = self._updates.pop(k)
        if left > 1:
            self._updates[k] = (batches, left - 1)
        return batches
