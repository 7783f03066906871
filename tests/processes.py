"""Run a function in several real processes, with a hard deadline, and leave none behind.

    results = run_processes(function, 2, *arguments)

`function(cluster, *arguments)` must be importable (module level); what it returns comes back in rank order. The store is
hosted by the test's own process, which is no worker, as under `unlocked launch`.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from unlocked.cluster import Cluster
from unlocked.cluster.rendezvous import Seat

DEADLINE = 60.0


class Failed(AssertionError):
    """A process failed; the text is what it raised."""


class Processes:
    """Processes that run `function(cluster, *arguments)` each; use as a context manager."""

    def __init__(
        self, function: Callable[..., Any], count: int, *arguments: Any, join: dict[str, Any] | None = None
    ) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")  # torch is imported once, not by every process
        context.set_forkserver_preload(["unlocked", "unlocked.session", "unlocked.heads", "torch._dynamo", "methods"])
        self.processes, self._pipes = [], []
        for rank in range(count):
            mine, theirs = context.Pipe()
            seat = Seat(rank, count, "127.0.0.1", self.store.port, True, 0)
            target = (theirs, function, seat, join or {}, arguments)
            self.processes.append(context.Process(target=_work, args=target, daemon=True))
            self._pipes.append(mine)

    def __enter__(self) -> Processes:
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        for process in self.processes:
            process.start()
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()  # also ends a stopped one
            process.join()

    def result(self, rank: int, deadline: float = DEADLINE) -> Any:
        """What the function returned on this rank. Raises Failed."""
        if not self._pipes[rank].poll(deadline):
            raise Failed(f"rank {rank} did not answer within {deadline} s")
        try:
            good, value = self._pipes[rank].recv()
        except EOFError:
            raise Failed(f"rank {rank} died") from None
        if not good:
            raise Failed(f"rank {rank}: {value}")
        return torch.load(io.BytesIO(value), weights_only=False)

    def results(self, deadline: float = DEADLINE) -> list[Any]:
        """What the function returned on all ranks; and all of them have ended by themselves, well."""
        end = time.monotonic() + deadline
        found = [self.result(rank, max(0.1, end - time.monotonic())) for rank in range(len(self.processes))]
        for process in self.processes:
            process.join(10.0)
            assert process.exitcode == 0, f"exit code {process.exitcode}"
        return found


def run_processes(function: Callable[..., Any], count: int, *arguments: Any, deadline: float = DEADLINE) -> list[Any]:
    """The results of `function(cluster, *arguments)` on `count` processes."""
    with Processes(function, count, *arguments) as running:
        return running.results(deadline)


def _work(
    pipe: Any, function: Callable[..., Any], seat: Seat, join: dict[str, Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        cluster = Cluster.join(seat=seat, **join)
        value = function(cluster, *arguments)
        cluster.close()
    except BaseException as error:
        pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        os._exit(1)  # threads may sit in receives that nothing wakes
    kept = io.BytesIO()
    torch.save(value, kept)  # a pipe would send tensors as handles, which die with this process
    pipe.send((True, kept.getvalue()))
