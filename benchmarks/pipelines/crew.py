"""A few processes, pinned to a core each, that live as long as the benchmark and never longer."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from unlocked.allocator import keep_freed_memory
from unlocked.cluster import Cluster
from unlocked.cluster.rendezvous import Seat

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


class Member(NamedTuple):
    """This process among the others. `barrier` blocks in the kernel (the cluster's own looks a few times a second).

    cores: of the machine, as many as the benchmark uses; core: this process's. kept: whether freed memory is kept.
    """

    cluster: Cluster
    barrier: Any
    cores: list[int]
    core: int
    kept: bool

    @contextmanager
    def all_cores(self) -> Iterator[None]:
        """Compute with one thread per core inside."""
        os.sched_setaffinity(0, self.cores)
        torch.set_num_threads(len(self.cores))
        try:
            yield
        finally:
            torch.set_num_threads(1)
            os.sched_setaffinity(0, {self.core})


def run_crew(function: Callable[..., Any], count: int, *arguments: Any, deadline: float) -> list[Any]:
    """What `function(member, *arguments)` returned on each of `count` processes, which have ended. Raises RuntimeError."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    barrier, processes, pipes = context.Barrier(count), [], []
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported there
    try:
        for rank in range(count):
            mine, theirs = context.Pipe()
            seat = Seat(rank, count, "127.0.0.1", store.port, True, 0)
            process = context.Process(target=_work, args=(theirs, seat, barrier, function, arguments), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(mine)
        return _answers(pipes, deadline)
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
        for process in processes:
            process.join(5.0)
            process.kill()
            process.join()


def _answers(pipes: list[Connection], deadline: float) -> list[Any]:
    end = time.monotonic() + deadline
    found: dict[Connection, Any] = {}
    while len(found) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in found], max(0.0, end - time.monotonic()))
        if not ready:
            raise RuntimeError(f"The processes did not finish within {deadline:.0f} s.")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                good, found[pipe] = pipe.recv()
            except EOFError:
                raise RuntimeError(f"Process {pipes.index(pipe)} died.") from None
            if not good:
                raise RuntimeError(f"Process {pipes.index(pipe)} failed: {found[pipe]}")
    return [found[pipe] for pipe in pipes]


def _work(pipe: Connection, seat: Seat, barrier: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    cores = sorted(os.sched_getaffinity(0))
    core = cores[seat.rank % len(cores)]
    os.sched_setaffinity(0, {core})  # before any thread is made: they inherit it
    torch.set_num_threads(1)
    try:
        cluster = Cluster.join(seat=seat)
        value = function(Member(cluster, barrier, cores, core, keep_freed_memory()), *arguments)
        cluster.close()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        os._exit(1)  # threads may sit in receives that nothing wakes
    pipe.send((True, value))


def busy_share(seconds: float = 1.0) -> float:
    """Share of all cores' time that something ran, over the next seconds."""
    others = Others()
    time.sleep(seconds)
    return others.share()


class Others:
    """How busy the machine was since this was made, without this process and the children that have ended since."""

    def __init__(self) -> None:
        self._ticks, self._own = _ticks(), _own_seconds()

    def share(self) -> float:
        """Share of all cores' time."""
        (total, idle), (total_now, idle_now) = self._ticks, _ticks()
        own = (_own_seconds() - self._own) * os.sysconf("SC_CLK_TCK")
        return max(0.0, (total_now - total - (idle_now - idle) - own) / max(1, total_now - total))


def _own_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _ticks() -> tuple[int, int]:
    with open("/proc/stat") as file:
        user, nice, system, idle, waiting, *rest = map(int, file.readline().split()[1:])
    return user + nice + system + idle + waiting + sum(rest[:3]), idle + waiting
