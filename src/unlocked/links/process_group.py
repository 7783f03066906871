"""Between hosts: torch.distributed point to point, one process group of two per channel.

A group per channel keeps the order of messages (backends match by order, not by name), and a broken one takes no other with
it. A message is one buffer, body and header; the receiver always has the next receive posted, as large as the largest body
so far, so a message needs no round trip. Sends are kept alive until they are done.

gloo's waits have no deadline here on purpose: a wait that times out closes the pair for good. Who is dead or stuck is found
out by the heartbeats; the thread is then left to its fate.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CannotJoin
from .header import END, GROW, HEADER_BYTES, Header, dense, goodbye, header_of, room

_FOR_EVER = timedelta(days=365)
_GOODBYE_WITHIN = 15.0  # seconds; a thread left in gloo when the interpreter ends aborts the process


def pair_group(store: dist.Store, name: str, rank: int, address: str) -> dist.ProcessGroup:
    """A gloo group of two, rank 0 the sender, rank 1 the receiver, on the interface with this address."""
    gloo: Any = dist.ProcessGroupGloo  # its stubs lack the options
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = _FOR_EVER
    return gloo(dist.PrefixStore(name, store), rank, 2, options)


class GroupSender:
    """The sending end of one channel; as RingSender. `connect` makes the group (it waits for the other side)."""

    def __init__(
        self, connect: Callable[[], dist.ProcessGroup], lost: Callable[[str], None], sent: Callable[[], None]
    ) -> None:
        self._connect, self._lost, self._sent = connect, lost, sent
        self._queue: deque[tuple[Tensor, int]] = deque()
        self._change = threading.Condition()
        self._end = self._closing = False
        self._thread = threading.Thread(target=self._work, name="unlocked send", daemon=True)
        self._thread.start()

    def put(self, x: Tensor, window: int) -> int:
        """Queue `x`; returns the bytes it takes on the wire."""
        x = dense(x.detach())
        size = header_of(x).size  # refuses here, not on the thread that sends
        with self._change:
            self._queue.append((x, window))
            self._change.notify()
        return size + HEADER_BYTES

    @property
    def oldest(self) -> int | None:
        """The window of the oldest message not yet sent."""
        with self._change:
            return self._queue[0][1] if self._queue else None

    def closing(self) -> None:
        """From now on the other side's end is no loss."""
        self._closing = True

    def close(self) -> None:
        """End the thread once the queue is empty."""
        with self._change:
            self._end = True
            self._change.notify()
        self._thread.join(_GOODBYE_WITHIN)

    def _work(self) -> None:
        try:
            group, capacity = self._connect(), 0
            buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
            while (x := self._next()) is not None:
                header = header_of(x)
                if header.size > capacity:
                    capacity = header.size
                    _fill(buffer, room(capacity))
                    group.send([buffer[:HEADER_BYTES]], 1, 0).wait()
                    buffer = torch.empty(HEADER_BYTES + capacity, dtype=torch.uint8)
                _fill(buffer, header)
                header.view(buffer[HEADER_BYTES:]).copy_(x)
                group.send([buffer[: HEADER_BYTES + header.size]], 1, 0).wait()
                with self._change:
                    self._queue.popleft()
                self._sent()
            _fill(buffer, goodbye())  # lets the receiving thread end: one left in gloo at exit aborts the process
            group.send([buffer[:HEADER_BYTES]], 1, 0).wait()
        except (RuntimeError, CannotJoin) as error:
            if not self._closing:
                self._lost(_reason(error))

    def _next(self) -> Tensor | None:
        with self._change:
            while not self._queue:
                if self._end:
                    return None
                self._change.wait()
            return self._queue[0][0]


class GroupReceiver:
    """The receiving end of one channel: a thread that always has a receive posted."""

    def __init__(
        self, connect: Callable[[], dist.ProcessGroup], deliver: Callable[[Tensor], None], lost: Callable[[str], None]
    ) -> None:
        self._connect, self._deliver, self._lost = connect, deliver, lost
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="unlocked receive", daemon=True)
        self._thread.start()

    def closing(self) -> None:
        """From now on the other side's end is no loss."""
        self._closing = True

    def close(self) -> None:
        """Wait for the sender's goodbye. Without one the thread is left in its receive, which nothing else wakes."""
        self._thread.join(_GOODBYE_WITHIN)

    def _work(self) -> None:
        try:
            group, capacity = self._connect(), 0
            while True:
                buffer = torch.empty(HEADER_BYTES + capacity, dtype=torch.uint8)
                group.recv([buffer], 0, 0).wait()
                header = Header.unpack(buffer[:HEADER_BYTES].numpy().tobytes())
                if header.kind == END:
                    return
                if header.kind == GROW:
                    capacity = header.size
                else:
                    self._deliver(header.view(buffer[HEADER_BYTES:]))
        except (RuntimeError, CannotJoin) as error:
            if not self._closing:
                self._lost(_reason(error))


def _fill(buffer: Tensor, header: Header) -> None:
    buffer[:HEADER_BYTES] = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)


def _reason(error: Exception) -> str:
    """What the backend said, without its file names and stack."""
    return "the connection broke (" + str(error).splitlines()[0].split("] ")[-1].strip().rstrip(".") + ")"
