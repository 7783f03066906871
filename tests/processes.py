"""Run a function in several real processes, with a hard deadline, and leave none behind.

    results = run_processes(function, 2, *arguments)

`function(cluster, *arguments)` must be importable (module level); what it returns comes back in rank order. The store is
hosted by the test's own process, which is no worker, as under `unlocked launch`. `killed` and `finished` run a `Training` so,
with and without one of the processes being killed.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import unlocked as ul
from unlocked.callbacks import Callback
from unlocked.cluster import Cluster
from unlocked.cluster.rendezvous import Seat
from unlocked.errors import LostProcess
from unlocked.worlds import Distributed

DEADLINE = 180.0  # against hangs, not slowness: nothing takes so long here, but machines may be shared and slow


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
            process.join(60.0)
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


# ---- a training that is killed and goes on ---------------------------------------------------------------------------


class At(Callback):
    """Does something to this process after some update."""

    def __init__(self, update: int, action: Callable[[], Any]) -> None:
        self.update, self.action = update, action

    def on_step(self, trainer: ul.Trainer, record: dict[str, Any]) -> None:
        if trainer.steps == self.update:
            self.action()


def kill_me() -> None:
    """Ends this process as no process can prevent."""
    os.kill(os.getpid(), signal.SIGKILL)


class Training(NamedTuple):
    """What processes begin or go on with; all functions can be imported.

    begin: a new trainer in this world. blank: the network for one that goes on. fit: trains to the end, with `callbacks` and
    `checkpoint` of `Trainer.fit`. kept: what the workers of this process come to.
    """

    begin: Callable[[Distributed], ul.Trainer]
    blank: Callable[[], ul.chain.Chain]
    fit: Callable[..., Any]
    kept: Callable[[ul.Trainer], dict[Any, torch.Tensor]]


def attempt(cluster: Cluster, training: Training, folder: Path, victim: int | None, update: int) -> Any:
    """Go on from the checkpoint, if there is one; the victim kills itself after that update. Its survivors return what they
    are told, otherwise all return what they keep."""
    world = Distributed(cluster)
    resume = (folder / "LATEST").exists()
    trainer = ul.Trainer.resume(folder, training.blank(), world=world) if resume else training.begin(world)
    callbacks = [At(update, kill_me)] if cluster.rank == victim else []
    try:
        training.fit(trainer, callbacks=callbacks, checkpoint=folder)
    except LostProcess as lost:
        world.close()
        return str(lost)
    found = training.kept(trainer)
    world.close()
    return found


def killed(training: Training, count: int, folder: Path, victim: int, update: int) -> list[str]:
    """What the survivors are told when one of `count` processes is killed after an update; all are told which one it was."""
    with Processes(attempt, count, training, folder, victim, update) as running:
        told = [running.result(rank) for rank in range(count) if rank != victim]
    assert all(f"Process {victim} " in sentence for sentence in told), told
    return told


def finished(training: Training, count: int, folder: Path) -> dict[Any, torch.Tensor]:
    """What all processes keep after training to the end, from the checkpoint in the folder if there is one."""
    found: dict[Any, torch.Tensor] = {}
    for rows in run_processes(attempt, count, training, folder, None, 0):
        found |= rows
    return found
