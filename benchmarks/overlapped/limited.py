"""Real processes whose links are slow: what comes to a process passes one wire of a given bandwidth, message after message."""

from __future__ import annotations

import threading
import time
from typing import Any

from torch import Tensor

from unlocked.cluster import Cluster
from unlocked.worlds import Distributed


class Limited(Distributed):
    """The distributed world behind a slow wire. A message is handed over late, by the thread that received it; the processor
    is not used for that.

    bandwidth: bytes per second into this process.
    """

    def __init__(self, cluster: Cluster, bandwidth: float) -> None:
        super().__init__(cluster)
        self._bandwidth, self._free, self._lock = bandwidth, 0.0, threading.Lock()
        deliver = self.wiring._arrived

        def late(key: Any, x: Tensor) -> None:
            time.sleep(max(0.0, self._reserve(x.numel() * x.element_size()) - time.monotonic()))
            deliver(key, x)

        self.wiring._arrived = late  # type: ignore[method-assign]

    def _reserve(self, size: int) -> float:
        """When the wire will have carried so many bytes more."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size / self._bandwidth
            return self._free
