"""A few processes of this machine, pinned to a core each, that measure together and never outlive the one that asked."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from ..allocator import keep_freed_memory
from ..cluster import Cluster
from ..cluster.rendezvous import Seat
from ..errors import LostProcess, UnlockedError

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux

Tell = Callable[[str], None]


class Member:
    """This process among the others: `cluster`; `barrier` blocks in the kernel (the cluster's own looks now and then);
    `tell` sends a word about the progress to the starter (of rank 0 only).

    cores: of the machine, as many as may be used; empty where a process cannot be pinned. core: this process's. kept: whether
    freed memory is kept.
    """

    def __init__(self, cluster: Cluster, barrier: Any, pipe: Connection, cores: list[int], kept: bool) -> None:
        self.cluster, self.barrier, self._pipe = cluster, barrier, pipe
        self.cores, self.kept = cores, kept
        self.core = cores[cluster.rank % len(cores)] if cores else 0

    @contextlib.contextmanager
    def all_cores(self) -> Iterator[None]:
        """Compute with one thread per core inside."""
        os.sched_setaffinity(0, self.cores)
        torch.set_num_threads(len(self.cores))
        try:
            yield
        finally:
            torch.set_num_threads(1)
            os.sched_setaffinity(0, {self.core})

    def tell(self, words: str) -> None:
        """Say what comes next."""
        if self.cluster.chief:
            self._pipe.send(("told", words))


def run_crew(
    function: Callable[..., Any], count: int, *arguments: Any, deadline: float, tell: Tell = lambda words: None
) -> list[Any]:
    """What `function(member, *arguments)` returned on each of `count` processes, in the order of the ranks.

    `function` must be importable. Every process computes with one thread on one core and keeps freed memory, as training does.
    All have ended when this returns or raises. Raises LostProcess: one failed, died, or was not done after `deadline` seconds.
    """
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
        answers = _answers(pipes, deadline, tell)
        for process in processes:
            process.join(5.0)  # by themselves, if they can
        return answers
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
        for process in processes:
            process.kill()
            process.join()


def _answers(pipes: list[Connection], deadline: float, tell: Tell) -> list[Any]:
    end = time.monotonic() + deadline
    found: dict[Connection, Any] = {}
    while len(found) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in found], max(0.0, end - time.monotonic()))
        if not ready:
            raise LostProcess(f"The measuring processes were not done after {deadline:.0f} s and were ended.")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                what, value = pipe.recv()
            except (EOFError, ConnectionResetError):
                raise LostProcess(f"Measuring process {pipes.index(pipe)} died; was the memory used up?") from None
            if what == "told":
                tell(value)
            elif what == "done":
                found[pipe] = value
            elif what == "refused":
                raise UnlockedError(value)
            else:
                raise LostProcess(f"Measuring process {pipes.index(pipe)} failed: {value}")
    return [found[pipe] for pipe in pipes]


def _work(pipe: Connection, seat: Seat, barrier: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the starter's, who ends this process
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if cores:
        os.sched_setaffinity(0, {cores[seat.rank % len(cores)]})  # before any thread is made: they inherit it
    torch.set_num_threads(1)
    kept = keep_freed_memory()
    try:
        cluster = Cluster.join(seat=seat)
        value = function(Member(cluster, barrier, pipe, cores, kept), *arguments)
        cluster.close()
    except UnlockedError as error:
        pipe.send(("refused", str(error)))
        os._exit(1)  # threads may sit in receives that nothing wakes
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
        os._exit(1)
    pipe.send(("done", value))


def _die_with_parent() -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
