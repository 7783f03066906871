"""Looking on while workers compute, and nothing else: what is sent, drawn and computed stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor

from ..batch import Batch
from ..worker import Link, Source, Worker

Around = Callable[[Worker, str, tuple[Any, ...]], AbstractContextManager[Any]]  # worker, kind of act, arguments


class Watched:
    """A world's transport for one worker. `around` is entered before each of its computations and left after it.

    It may not hold a context of torch: in some worlds others compute meanwhile.
    """

    def __init__(self, transport: Any, around: Around) -> None:
        self.inner, self.around = transport, around

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def execute(self, here: Worker, kind: str, function: Callable[..., Any], arguments: tuple) -> Any:
        """As the world does it."""
        with self.around(here, kind, arguments):
            return await self.inner.execute(here, kind, function, arguments)


class _Tap(Source):
    """The data below a first stage, with somebody who is told each micro-batch."""

    def __init__(self, inner: Link, around: Around, tell: Callable[[Batch], None]) -> None:
        self.inner, self.around, self._tell = inner, around, tell

    async def recv(self, channel: str, like: Any = None) -> Tensor:
        self._tell(like)
        return await self.inner.recv(channel, like)


def watch(workers: Iterable[Worker], around: Around, tell: Callable[[int, Batch], None] | None = None) -> None:
    """Begin to look on. `tell` is given each replica's micro-batches as its first stage takes them."""
    for worker in workers:
        worker.transport = Watched(worker.transport, around)
        if worker.first and tell is not None:
            worker.below = _Tap(worker.below, around, partial(tell, worker.replica))


def leave(workers: Iterable[Worker], around: Around) -> None:
    """Look on no more: the one that `watch` was given as `around`. Others go on."""
    for worker in workers:
        worker.transport = _without(worker.transport, around)
        worker.below = _untapped(worker.below, around)


def _without(transport: Any, around: Around) -> Any:
    if not isinstance(transport, Watched):
        return transport
    inner = _without(transport.inner, around)
    return inner if transport.around == around else Watched(inner, transport.around)


def _untapped(below: Link, around: Around) -> Link:
    if not isinstance(below, _Tap):
        return below
    below.inner = _untapped(below.inner, around)
    return below.inner if below.around == around else below
