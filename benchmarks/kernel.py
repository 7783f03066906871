"""The kernel's cost per await in process: messages between two workers, computing, exchanges. To beat: ≤ 5 µs.

python benchmarks/kernel.py [--rounds 9] [--awaits 20000]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from unlocked.worker import Worker
from unlocked.worlds import InProcess

from common import result


async def ping(worker: Worker, rounds: int, x: torch.Tensor) -> None:
    """Two awaits a round and worker: one send, one receive that must wait."""
    for _ in range(rounds):
        if worker.first:
            await worker.above.send("there", x)
            await worker.above.recv("back")
        else:
            await worker.below.recv("there")
            await worker.below.send("back", x)


async def compute(worker: Worker, rounds: int, x: torch.Tensor) -> None:
    """Two awaits a round: nothing is computed."""
    for _ in range(rounds):
        await worker.run("F", int)
        await worker.run("B", int)


async def meet(worker: Worker, rounds: int, x: torch.Tensor) -> None:
    """Two awaits a round, of two replicas."""
    for _ in range(rounds):
        await worker.replicas.gather("first", x)
        await worker.replicas.gather("second", x)


async def average(worker: Worker, rounds: int, x: torch.Tensor) -> None:
    """Two awaits a round, of two replicas; the mean's own arithmetic is in the time."""
    for _ in range(rounds):
        await worker.replicas.mean("first", [x])
        await worker.replicas.mean("second", [x])


def microseconds(program: Callable[..., Any], replicas: int, stages: int, awaits: int) -> float:
    world = InProcess()
    workers = world.mesh(replicas, stages)
    rounds = awaits // (2 * len(workers))
    programs = [(worker, program(worker, rounds, torch.zeros(4))) for worker in workers]
    begin = time.perf_counter()
    world.run(programs)
    return 1e6 * (time.perf_counter() - begin) / (2 * rounds * len(workers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--awaits", type=int, default=20000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = {
        "message": (ping, 1, 2),
        "compute": (compute, 1, 1),
        "exchange of 2": (meet, 2, 1),
        "mean of 2": (average, 2, 1),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for k in range(arguments.rounds + 1):
        for name, case in cases.items():
            value = microseconds(*case, arguments.awaits)
            if k:  # the first is warm-up
                times[name].append(value)
    for name, values in times.items():
        print(f"{name:14s} median {median(values):5.2f} µs per await   best {min(values):5.2f} µs")
    result("kernel", microseconds_per_await={name: round(median(v), 3) for name, v in times.items()})


if __name__ == "__main__":
    main()
