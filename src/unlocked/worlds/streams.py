"""A CUDA stream for every worker: stages that share a device compute at the same time, as far as it has room.

    a program runs on its worker's stream, all of it
    send                the sender's stream marks the moment
    recv                the receiver's stream waits for that moment on the device; the program goes on at once
    an exchange         whoever joins what was brought waits for all, and all wait for the result
    a run               begins after what was computed before it, and ends with everything done before what comes after it

The host never waits. Memory that is given to another stream is not used again before that stream is done with it
(`record_stream`). Not run on a GPU yet: what is tested is the order of marks and waits, with streams that only keep books.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InvalidChoice
from ..worker import Worker
from .scheduler import Running, Scheduler


class Stream(Protocol):
    """A queue of work on a device."""

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Context: what is computed goes into this queue."""

    def mark(self) -> Any:
        """The moment when all that is in the queue now is done."""

    def wait(self, moment: Any) -> None:
        """What comes later in this queue waits for the moment."""

    def use(self, x: Tensor) -> None:
        """This queue uses memory that another one made."""


class CudaStream:
    """PyTorch's; `own=False`: the one that is current."""

    def __init__(self, device: torch.device, own: bool = True) -> None:
        self._stream = torch.cuda.Stream(device) if own else torch.cuda.current_stream(device)

    def current(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def mark(self) -> Any:
        return self._stream.record_event()

    def wait(self, moment: Any) -> None:
        self._stream.wait_event(moment)

    def use(self, x: Tensor) -> None:
        x.record_stream(self._stream)


def cuda_stream(device: torch.device | None, own: bool = True) -> Stream:
    """Raises InvalidChoice unless the workers compute on a CUDA device."""
    if device is None or device.type != "cuda":
        raise InvalidChoice(f"streams=True is for stages on a CUDA device, not on {device or 'cpu'}; leave it out.")
    return CudaStream(device, own)


class Streams(Scheduler):
    """The scheduler of a world whose workers have streams; `make(device, own)` makes one."""

    def __init__(self, make: Callable[[torch.device | None, bool], Stream] = cuda_stream) -> None:
        super().__init__()
        self._make = make
        self._streams: dict[Any, Stream] = {}

    def of(self, worker: Worker) -> Stream:
        """The worker's stream."""
        if worker.place not in self._streams:
            self._streams[worker.place] = self._make(worker.device, True)
        return self._streams[worker.place]

    @contextlib.contextmanager
    def running(self, workers: list[Worker]) -> Iterator[None]:
        """Around a run: after what came before, before what comes after."""
        outside = self._make(workers[0].device, False)
        before = outside.mark()
        for worker in workers:
            self.of(worker).wait(before)
        try:
            yield
        finally:
            for worker in workers:
                outside.wait(self.of(worker).mark())

    def _advance(self, running: Running) -> None:
        with self.of(running.worker).current():
            super()._advance(running)
