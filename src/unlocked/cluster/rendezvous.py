"""How processes find each other: a store (torch's TCPStore), a rank each, and a table of who and where they are.

The store should belong to a process that is no worker, as it dies with its host: `unlocked launch` and torchrun's agent both
host it. Without either, rank 0 does. Every restart has a prefix of its own in the store, so nothing old is ever read.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..errors import CannotJoin

_WANTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Seat(NamedTuple):
    """What the starter told this process: its rank among `size`, where the store is, who hosts it, which attempt it is."""

    rank: int
    size: int
    host: str
    port: int
    hosted: bool  # by the starter; else rank 0 must
    attempt: int
    generation: int = 0  # of members, where these may change (elastic.py)

    @property
    def base(self) -> str:
        """Under which the keys are that all generations of this attempt share."""
        return f"generation-{self.attempt}/"

    @property
    def prefix(self) -> str:
        """Under which this attempt's, and this generation's, keys are."""
        return self.base if self.generation == 0 else f"{self.base}{self.generation}/"


def read_seat(environment: Mapping[str, str] | None = None) -> Seat:
    """The seat from the variables that `unlocked launch` and torchrun set. Raises CannotJoin."""
    given = os.environ if environment is None else environment
    missing = [name for name in _WANTED if name not in given]
    if missing:
        raise CannotJoin(
            f"This process was not started as one of several ({', '.join(missing)} not set); start it with "
            "'unlocked launch --processes 4 -- train …' or 'torchrun --nnodes … -m unlocked train --world distributed …'."
        )
    try:
        rank, size, port = (int(given[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        attempt = int(given.get("TORCHELASTIC_RESTART_COUNT", "0"))
    except ValueError as error:
        raise CannotJoin(
            f"RANK, WORLD_SIZE and MASTER_PORT must be whole numbers ({error}); check how this process was started."
        ) from error
    if not 0 <= rank < size:
        raise CannotJoin(f"RANK={rank} is not among WORLD_SIZE={size} processes; ranks go from 0 to {size - 1}.")
    hosted = given.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Seat(rank, size, given["MASTER_ADDR"], port, hosted, attempt)


def open_store(seat: Seat, seconds: float, host_it: bool = False, prefix: str | None = None) -> dist.Store:
    """Connect to the store; `host_it`: be its host; `prefix`: of the keys, if not the seat's.

    Raises CannotJoin if nobody answers or the port is taken.
    """
    where = f"{seat.host}:{seat.port}"
    try:
        store = dist.TCPStore(
            seat.host, seat.port, is_master=host_it, wait_for_workers=False, timeout=timedelta(seconds=seconds)
        )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise CannotJoin(
                f"Port {seat.port} of {seat.host} is in use by another program; give another MASTER_PORT."
            ) from error
        raise CannotJoin(
            f"Nobody answers at the rendezvous {where} within {seconds:.0f} s. Is the launcher running there, is the "
            "address right, and is the port open? ('unlocked doctor' looks into it.)"
        ) from error
    return dist.PrefixStore(seat.prefix if prefix is None else prefix, store)


def take_seat(store: dist.Store, seat: Seat, seconds: float) -> None:
    """Announce this rank and wait for all the others. Raises CannotJoin: two with one rank, wrong counts, somebody missing."""
    if store.add(f"seats/{seat.rank}", 1) > 1:
        raise CannotJoin(f"Two processes say they are rank {seat.rank}; every process needs a rank of its own.")
    store.set(f"size/{seat.rank}", str(seat.size))
    others = [f"size/{rank}" for rank in range(seat.size)]
    try:
        store.wait(others, timedelta(seconds=seconds))
    except RuntimeError as error:
        missing = [str(rank) for rank in range(seat.size) if not store.check([f"size/{rank}"])]
        raise CannotJoin(
            f"After {seconds:.0f} s {seat.size - len(missing)} of {seat.size} processes have come to {seat.host}:"
            f"{seat.port}; rank(s) {', '.join(missing)} are missing. Were they started, with the same WORLD_SIZE?"
        ) from error
    for rank, size in enumerate(store.multi_get(others)):
        if int(size) != seat.size:
            raise CannotJoin(
                f"Rank {rank} was told there are {int(size)} processes, rank {seat.rank} was told {seat.size}; "
                "start all with one count (--nnodes and --nproc-per-node alike on every host)."
            )


def describe_self(address: str) -> dict[str, Any]:
    """Who this process is: for the table that all share."""
    from .. import __version__

    kernel = _read("/proc/sys/kernel/random/boot_id") or f"{platform.node()}-{socket.gethostname()}"
    return {
        "pid": os.getpid(),
        "name": socket.gethostname(),
        "address": address,
        "clock": kernel,  # one kernel, one monotonic clock
        "host": "/".join([kernel, _link("/proc/self/ns/net"), _link("/proc/self/ns/mnt"), str(os.getuid())]),
        "unlocked": __version__,
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
