"""A pool of batches (pool.py) for all processes: a counter in the store."""

from __future__ import annotations

import torch.distributed as dist

from ..pool import whole_rounds


class SharedPool:
    """The numbers `begin` … `end` − 1, each given to one process. `name`: used once in a run. `size`: batches of a round."""

    def __init__(self, store: dist.Store, name: str, begin: int, end: int, size: int) -> None:
        self._store, self._name = store, f"pool/{name}"
        self._begin, self._end, self._size = begin, end, size

    @property
    def taken(self) -> int:
        """How far it has come, whoever took them."""
        return min(self._begin + self._store.add(self._name, 0), self._last)

    @property
    def _last(self) -> int:
        key = f"{self._name}/end"
        return int(self._store.get(key)) if self._store.check([key]) else self._end

    def take(self) -> int | None:
        """The next number, or None."""
        number = self._begin + self._store.add(self._name, 1) - 1
        return number if number < self._last else None

    def stop(self) -> None:
        """End with the round that has begun; the first who says so decides which it is."""
        taken = self._begin + self._store.add(self._name, 0)
        self._store.compare_set(f"{self._name}/end", "", str(min(self._end, whole_rounds(taken, self._size))))
