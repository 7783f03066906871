"""One more process for a run whose members may come and go (elastic.py): it knocks, and waits until the others let it in."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from ..errors import CannotJoin, InvalidChoice, UnlockedError
from .elastic import bury
from .rendezvous import Seat

_ATTEMPTS = 32  # restarts of a launch that are looked at
_REACHED_WITHIN = 10.0  # seconds
_PAUSE = 0.1


class Admission(NamedTuple):
    """Where one that was let in sits, the numbers of all members, and the folder of the run's checkpoints."""

    seat: Seat
    numbers: list[int]
    folder: Path


def address_of(text: str) -> tuple[str, int]:
    """HOST and PORT of "HOST:PORT". Raises InvalidChoice."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidChoice(f"{text!r} is no address; give HOST:PORT, as the run prints it when it begins.")
    return host.strip("[]"), int(port)


def knock(host: str, port: int, wait: float) -> Admission:
    """Ask to be let in, and wait for it so many seconds at most: the others come to the door between two gradients.

    Raises CannotJoin: nobody answers, no run there that can be joined, nobody opened, or the run's folder is not to be seen.
    """
    root = _reach(host, port)
    attempt = _attempt(root, f"{host}:{port}")
    base = Seat(0, 1, host, port, True, attempt).base
    store = dist.PrefixStore(base, root)
    folder = Path(json.loads(store.get("elastic/run"))["folder"])
    if not folder.parent.exists():
        raise CannotJoin(
            f"The run is in {folder.parent}, which is not to be seen from here; use a file system that all share."
        )
    number = store.add("elastic/numbers", 1) - 1
    with _withdrawn_unless_admitted(store, number):
        store.set(f"knock/{number}", "")
        store.add("changes", 1)
        _await_admission(store, number, wait)
    described, numbers = json.loads(store.get(f"admitted/{number}"))
    return Admission(Seat(*described)._replace(host=host), numbers, folder)


def _reach(host: str, port: int) -> dist.Store:
    try:
        return dist.TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_REACHED_WITHIN)
        )
    except RuntimeError as error:
        raise CannotJoin(
            f"Nobody answers at {host}:{port} within {_REACHED_WITHIN:.0f} s. Is the run still going on, and is that the "
            "address it printed when it began?"
        ) from error


def _attempt(root: dist.Store, where: str) -> int:
    """The latest attempt of the launch that can be joined."""
    for attempt in reversed(range(_ATTEMPTS)):
        if dist.PrefixStore(Seat(0, 1, "", 0, True, attempt).base, root).check(["elastic/run"]):
            return attempt
    raise CannotJoin(
        f"The run at {where} cannot be joined: only replicas that run freely can be, each on a process of its own, as under "
        "'gossip(pairing=available)' or 'acid(pairing=available)'; or it has not begun to train yet."
    )


@contextmanager
def _withdrawn_unless_admitted(store: dist.Store, number: int) -> Iterator[None]:
    """Nobody shall wait for one that has given up."""
    try:
        yield
    except BaseException as error:
        with suppress(RuntimeError):
            bury(store, number, "One that wanted to join gave up.")
        if isinstance(error, RuntimeError) and not isinstance(error, UnlockedError):
            raise CannotJoin("The rendezvous store does not answer any more; the run is over.") from error
        raise


def _await_admission(store: dist.Store, number: int, wait: float) -> None:
    end = time.monotonic() + wait
    while not store.check([f"admitted/{number}"]):
        if time.monotonic() > end:
            raise CannotJoin(
                f"Nobody let this process in within {wait:.0f} s; the run may be over, or between two epochs for long."
            )
        time.sleep(_PAUSE)
