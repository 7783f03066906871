"""A pool of batches (pool.py) for all processes: a counter in the store."""

from __future__ import annotations

import torch.distributed as dist

from ..pool import whole_rounds

_STOPPED = 1 << 40  # added to the counter when it is to stop


class SharedPool:
    """The numbers `begin` … `end` − 1, each given to one process. `name`: used once in a run. `size`: batches of a round."""

    def __init__(self, store: dist.Store, name: str, begin: int, end: int, size: int) -> None:
        self._store, self._name = store, f"pool/{name}"
        self._begin, self._end, self._size = begin, end, size

    @property
    def taken(self) -> int:
        """How far it has come, whoever took them."""
        count = self._store.add(self._name, 0)
        return min(self._begin + (count if count < _STOPPED else count - _STOPPED), self._last)

    @property
    def _last(self) -> int:
        key = f"{self._name}/end"
        return int(self._store.get(key)) if self._store.check([key]) else self._end

    def take(self) -> int | None:
        """The next number, or None."""
        count = self._store.add(self._name, 1) - 1
        if count < _STOPPED:  # given before anybody has said stop
            return self._begin + count if self._begin + count < self._end else None
        number = self._begin + count - _STOPPED
        return number if number < int(self._store.get(f"{self._name}/end")) else None  # who stops is about to set it

    def stop(self) -> None:
        """End with the round that has begun; the first who says so decides which it is, at one moment for all.

        Not before the first round: all stop after the largest step that one of them has entered, and this may be it.
        """
        if self._store.add(f"{self._name}/stops", 1) == 1:
            taken = max(1, self._store.add(self._name, _STOPPED) - _STOPPED)
            self._store.set(f"{self._name}/end", str(min(self._end, whole_rounds(self._begin + taken, self._size))))
