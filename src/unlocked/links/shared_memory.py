"""Between two processes of one host: a ring of buffers in shared memory, and a Unix socket that says which one is full.

    sender   copies the tensor into a free slot, writes a header with the slot's number
    receiver reads the header and hands out a tensor that lies in the slot; once its memory is unused, the slot goes back

One copy per message. The memory belongs to no file (memfd), so nothing is left behind even if both are killed; a peer's death
ends the socket at once. If the receiver keeps tensors for long, the last free slot is never kept: the message is copied out.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import secrets
import socket
import struct
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .header import GROW, HEADER_BYTES, MESSAGE, Header, dense, header_of

SLOTS = 4
_PAGE = 4096

Deliver = Callable[[Tensor], None]
Lost = Callable[[str], None]


class RingSender:
    """The sending end of one channel. `put` never waits: a full ring makes the message wait in a queue.

    address: where the receiver's `Door` is. channel: what the door is told (JSON). lost: called with a reason when the
    receiver is gone. sent: called whenever a queued message has been sent.
    """

    def __init__(self, address: str, channel: Any, lost: Lost, sent: Callable[[], None]) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        hello = json.dumps(channel).encode()
        with self._broken():
            self._socket.connect(address)
            self._socket.sendall(struct.pack("<I", len(hello)) + hello)
        self._lost, self._sent = lost, sent
        self._lock = threading.Lock()
        self._queue: deque[tuple[Tensor, int]] = deque()
        self._ring, self._memory, self._slot_bytes = -1, torch.empty(0, dtype=torch.uint8), 0
        self._free: list[int] = []
        self._closing = False
        self._thread = threading.Thread(target=self._listen, name=f"unlocked send {channel}", daemon=True)
        self._thread.start()

    def put(self, x: Tensor, window: int) -> int:
        """Send `x`, or queue it; returns the bytes it takes on the wire. `window` is remembered for `oldest`."""
        x = dense(x.detach())
        size = header_of(x).size  # refuses here, not on the thread that sends what was queued
        with self._lock:
            if self._queue or not self._ready(size):
                self._queue.append((x, window))
            else:
                self._write(x)
        return size + HEADER_BYTES

    @property
    def oldest(self) -> int | None:
        """The window of the oldest message still queued."""
        with self._lock:
            return self._queue[0][1] if self._queue else None

    def closing(self) -> None:
        """From now on the other side's end is no loss."""
        self._closing = True

    def close(self) -> None:
        """End the channel. What is queued is lost: close after everything was received."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5.0)
        self._socket.close()
        with self._lock:
            self._queue.clear()
            self._memory, self._free = torch.empty(0, dtype=torch.uint8), []

    def _ready(self, size: int) -> bool:
        if size > self._slot_bytes or self._ring < 0:
            self._new_ring(size)
        return bool(self._free)

    def _new_ring(self, size: int) -> None:
        size = max(_PAGE, size, 2 * self._slot_bytes)  # doubling: so few rings that their numbers modulo 256 never meet
        self._slot_bytes = -(-size // _PAGE) * _PAGE
        handle = _anonymous_file(self._slot_bytes * SLOTS)
        try:
            self._memory = torch.frombuffer(mmap.mmap(handle, self._slot_bytes * SLOTS), dtype=torch.uint8)
            header = Header(GROW, torch.uint8, (), (), SLOTS, self._slot_bytes).pack()
            with self._broken():
                socket.send_fds(self._socket, [header], [handle])
        finally:
            os.close(handle)
        self._ring, self._free = self._ring + 1, list(range(SLOTS))

    def _write(self, x: Tensor) -> None:
        slot = self._free.pop()
        header = header_of(x, slot)
        header.view(self._memory[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]).copy_(x)
        with self._broken():
            self._socket.sendall(header.pack())

    def _listen(self) -> None:
        """Slots come back; each may let a queued message go."""
        with contextlib.suppress(OSError):
            while data := _exactly(self._socket, 2):
                ring, slot = data
                with self._lock:
                    if ring == self._ring % 256:
                        self._free.append(slot)
                    moved = False
                    while self._queue and self._ready(self._queue[0][0].numel() * self._queue[0][0].element_size()):
                        self._write(self._queue.popleft()[0])
                        moved = True
                if moved:
                    self._sent()
        if not self._closing:
            self._lost("its end of a shared-memory channel was closed")

    @contextlib.contextmanager
    def _broken(self) -> Any:
        """A receiver that is gone is reported by the listening thread, once."""
        with contextlib.suppress(OSError):
            yield


class Door:
    """Where the processes of this host knock: accepts their channels and starts a receiving thread for each.

    open_channel: called with what the sender told about the channel; returns what is to be done with its messages and what
    when it breaks.
    """

    def __init__(self, open_channel: Callable[[Any], tuple[Deliver, Lost]]) -> None:
        self._open_channel = open_channel
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        name = f"unlocked-{os.getpid()}-{secrets.token_hex(8)}"
        if sys.platform == "linux":
            self.address = "\0" + name  # abstract: no file to leave behind
        else:
            self._folder = tempfile.TemporaryDirectory()
            self.address = os.path.join(self._folder.name, "door")
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(self.address)
        self._listening.listen(128)
        self._receivers: list[_RingReceiver] = []
        self._closing, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._accept, name="unlocked door", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                if _same_user(connection):
                    with self._lock:
                        self._receivers.append(_RingReceiver(connection, self._open_channel, self._closing))
                else:
                    connection.close()

    def closing(self) -> None:
        """From now on a sender's end is no loss."""
        with self._lock:  # one that is being let in is told as well
            self._closing = True
            for receiver in self._receivers:
                receiver.closing()

    def close(self) -> None:
        """Let nobody in any more and end all channels."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(5.0)
        for receiver in self._receivers:
            receiver.close()
        if self._folder is not None:
            self._folder.cleanup()


class _RingReceiver:
    """The receiving end of one channel, on a thread of its own."""

    def __init__(
        self, connection: socket.socket, open_channel: Callable[[Any], tuple[Deliver, Lost]], closing: bool
    ) -> None:
        self._socket, self._open_channel = connection, open_channel
        self._closing = closing
        self._ring, self._slot_bytes, self._slots = -1, 0, 0
        self._out: set[int] = set()  # slots whose memory is in use; finalizers of any thread take theirs out
        self._map: Any = None
        self._thread = threading.Thread(target=self._receive, name="unlocked receive", daemon=True)
        self._thread.start()

    def closing(self) -> None:
        self._closing = True

    def close(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _receive(self) -> None:
        lost: Lost = print  # never called before the channel is known
        with self._socket, contextlib.suppress(OSError):
            if (length := _exactly(self._socket, 4)) is None:
                return
            hello = _exactly(self._socket, struct.unpack("<I", length)[0])
            deliver, lost = self._open_channel(json.loads(hello or b"null"))
            while (arrived := _with_handles(self._socket)) is not None:
                header, handles = arrived
                if header.kind == GROW:
                    self._new_ring(header, handles[0])
                elif header.kind == MESSAGE:
                    deliver(self._take(header))
        self._map = None
        if not self._closing:
            lost("its end of a shared-memory channel was closed")

    def _new_ring(self, header: Header, handle: int) -> None:
        try:
            self._map = mmap.mmap(handle, header.size * header.slot)
        finally:
            os.close(handle)
        self._ring, self._slot_bytes, self._slots, self._out = self._ring + 1, header.size, header.slot, set()

    def _take(self, header: Header) -> Tensor:
        if header.size == 0:
            self._give_back(self._ring, header.slot, None)
            return torch.empty_strided(header.shape, header.stride, dtype=header.dtype)
        memory = (ctypes.c_uint8 * header.size).from_buffer(self._map, header.slot * self._slot_bytes)
        self._out.add(header.slot)
        keep = len(self._out) < self._slots
        weakref.finalize(memory, self._give_back, self._ring, header.slot, self._out).atexit = False
        x = header.view(torch.frombuffer(memory, dtype=torch.uint8))
        return x if keep else torch.empty_strided(header.shape, header.stride, dtype=header.dtype).copy_(x)

    def _give_back(self, ring: int, slot: int, out: set[int] | None) -> None:
        if out is not None:
            out.discard(slot)
        with contextlib.suppress(OSError):
            self._socket.send(bytes([ring % 256, slot]))


def _anonymous_file(size: int) -> int:
    """A handle of memory without a name."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("unlocked-ring")
    else:
        handle, path = tempfile.mkstemp()
        os.unlink(path)
    os.ftruncate(handle, size)
    return handle


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    """So many bytes, or None at the end."""
    parts = b""
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            return None
        parts += part
    return parts


def _with_handles(connection: socket.socket) -> tuple[Header, list[int]] | None:
    """The next header and the file handles that came with it, or None at the end."""
    data, handles = b"", []
    while len(data) < HEADER_BYTES:
        part, found, _, _ = socket.recv_fds(connection, HEADER_BYTES - len(data), 1)
        if not part:
            return None
        data += part
        handles += found
    return Header.unpack(data), handles


def _same_user(connection: socket.socket) -> bool:
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return user in (os.getuid(), 0)
