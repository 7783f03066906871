"""Can the processes reach each other at all? Plain TCP connections with a deadline, before anything that could hang."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from statistics import median

from ..cluster import Cluster

_CONNECT_WITHIN = 3.0  # seconds
_STORE_ROUNDS = 50


@dataclass(frozen=True)
class Connection:
    """An attempt of one rank to connect to another; `seconds` it took, or `reason` why it failed."""

    source: int
    target: int
    address: str
    seconds: float | None
    reason: str = ""


def neighbours(size: int) -> list[tuple[int, int]]:
    """Pairs of ranks worth measuring: all up to 6 processes, then each with the next, and with the one half way round."""
    if size <= 6:
        return [(a, b) for a in range(size) for b in range(a + 1, size)]
    steps = {(r, (r + step) % size) for r in range(size) for step in (1, size // 2)}
    return sorted({(min(pair), max(pair)) for pair in steps})


def connections(cluster: Cluster, within: float = _CONNECT_WITHIN) -> list[Connection]:
    """Every pair of `neighbours`, each direction, on the interfaces the links use. All ranks call it; all get the result."""
    with _listening(cluster.interface.address) as door:  # the kernel lets callers in; nobody needs to accept
        places = cluster.share(list(door.getsockname()[:2]))
        mine = []
        for a, b in neighbours(cluster.size):
            if cluster.rank in (a, b):
                mine.append(_connect(cluster.rank, b if cluster.rank == a else a, places, within))
        rows = cluster.share([vars(row) for row in mine])
        cluster.barrier()
    return sorted((Connection(**values) for row in rows for values in row), key=lambda row: (row.source, row.target))


def _listening(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    door = socket.socket(family, socket.SOCK_STREAM)
    door.bind(socket.getaddrinfo(address, 0, family, socket.SOCK_STREAM)[0][4])
    door.listen(128)
    return door


def _connect(source: int, target: int, places: list[list], within: float) -> Connection:
    address, port = places[target]
    begin = time.perf_counter()
    try:
        socket.create_connection((address, port), within).close()
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else str(error.strerror or error)
        return Connection(source, target, address, None, reason)
    return Connection(source, target, address, time.perf_counter() - begin)


def store_round_trip(cluster: Cluster) -> float:
    """Median seconds of a question to the rendezvous store and its answer, seen from this rank."""
    spent = []
    for _ in range(_STORE_ROUNDS):
        begin = time.perf_counter()
        cluster.store.check(["doctor"])
        spent.append(time.perf_counter() - begin)
    return median(spent)
