"""What a shuffle of WASH costs on ResNet-18 (11 M parameters), as a share of a training step, and its bytes against PAPA's.

    python benchmarks/wash.py [--rounds 10] [--replicas 3 5 10] [--processes 3]

Cost: drawing, picking out, exchanging and putting back, per replica and update, every worker on one thread: in process (all
replicas in turn), and on processes of this machine (one replica each). A step: forward, backward and SGD with momentum of one
replica, batch 64 of 3×32×32, in the same process. To reach at p = 0.001: 3 % of a step.

Bytes: payload that leaves a replica per update, as its acts say, against PAPA's every T = 10 updates. Table 6.1 counts d values
for one of PAPA's exchanges and p/2·d for one of WASH's, which gives 1/200 at p = 0.001 and 1/4 at p = 0.05 (`table`). Measured
are: `of_d`, d values every T updates over the shuffle's bytes; `of_all_reduce`, the same with the mean that PAPA makes here,
2(N−1)/N·d. A replica sends only what moves, (N−1)/N of it; and Σ_l p_l d_l is p/2·d only where layers have one size: ResNet-18
has most of its weights in the last layers, which are hardly shuffled (`shuffled`, over p·d). `even`: eleven equal layers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import unlocked as ul
from unlocked.consensus.shuffling.layers import layers_of
from unlocked.worker import Worker
from unlocked.worlds import Distributed, World

from common import result

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # run_processes

PERIOD = 10
PROBABILITIES = (0.001, 0.05)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ul.models.build("resnet18", input_shape=(3, 32, 32), classes=10)


def even() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(300, 300, bias=False) for _ in range(11)))


def trainer(model: nn.Module, like: torch.Tensor, p: float, replicas: int, world: World | None = None) -> ul.Trainer:
    """Replicas of one stage."""
    return ul.Trainer(
        ul.cut(model, 1, like=like),
        consensus=ul.consensus.WASH(p=p),
        replicas=replicas,
        world=world,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    )


def shuffles(session: ul.Trainer, rounds: int, warm_up: int = 2) -> tuple[list[float], float]:
    """Seconds of each shuffle of the replicas here, and the payload bytes that a replica sends in one."""
    seconds, sent = [], 0
    for k in range(warm_up + rounds):
        for weights in session.weights:
            weights.worker.version += 1
        begin = time.perf_counter()
        timeline = session.world.run([(weights.worker, weights.mix()) for weights in session.weights])
        if k >= warm_up:
            seconds.append(time.perf_counter() - begin)
            sent += sum(act.bytes for act in timeline if act.kind == "M")
    return seconds, sent / rounds / len(session.weights)


def on_processes(cluster: Any, p: float, replicas: int, rounds: int) -> tuple[list[float], float]:
    """One replica of each process."""
    with Distributed(cluster) as world:
        return shuffles(trainer(resnet(), torch.zeros(2, 3, 32, 32), p, replicas, world), rounds)


def all_reduce_bytes(session: ul.Trainer) -> float:
    """Payload bytes that a replica sends in one mean of all weights."""

    async def mean(worker: Worker, tensors: list[torch.Tensor]) -> None:
        await worker.replicas.mean("mean", tensors)

    programs = [(w.worker, mean(w.worker, [x.detach() for x in w.parameters])) for w in session.weights]
    return sum(act.bytes for act in session.world.run(programs) if act.kind == "M") / len(programs)


def seconds_of_a_step(count: int, batch: int = 64) -> list[float]:
    """Steps of one replica."""
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    session = trainer(resnet(), x, 0.0, 1)
    seconds = []
    for _ in range(1 + count):
        begin = time.perf_counter()
        session.step(x, y)
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def row(model: nn.Module, like: torch.Tensor, p: float, replicas: int, rounds: int) -> dict[str, float]:
    """Cost and bytes in process."""
    session = trainer(model, like, p, replicas)
    seconds, sent = shuffles(session, rounds)
    count = sum(x.numel() for x in session.chains[0].parameters())
    layers = layers_of(session.chains[0], ul.consensus.WASH(p=p).selection, 0)
    return {
        "ms": round(1e3 * median(seconds) / replicas, 3),
        "best_ms": round(1e3 * min(seconds) / replicas, 3),
        "bytes": round(sent),
        "table": round(2 / (PERIOD * p), 1),  # one over this is the ratio
        "of_d": round(4 * count / PERIOD / sent, 1),
        "of_all_reduce": round(all_reduce_bytes(session) / PERIOD / sent, 1),
        "shuffled": round(sum(layer.p * layer.size for layer in layers) / (p * count), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--replicas", type=int, nargs="*", default=[3, 5, 10])
    parser.add_argument("--processes", type=int, nargs="*", default=[3])
    given = parser.parse_args()
    torch.set_num_threads(1)
    step = min(seconds_of_a_step(given.steps))
    print(f"a training step, batch 64: {step:.3f} s")
    rows: dict[str, dict[str, float]] = {}
    for p in PROBABILITIES:
        for n in given.replicas:
            rows[f"resnet18, p={p}, N={n}"] = row(resnet(), torch.zeros(2, 3, 32, 32), p, n, given.rounds)
        rows[f"even, p={p}, N=3"] = row(even(), torch.zeros(2, 300), p, 3, 4 * given.rounds)
        for n in given.processes:
            rows[f"resnet18, p={p}, N={n}, processes"] = apart(p, n, given.rounds)
    for name, found in rows.items():
        if name.startswith("resnet18"):
            found["share_of_step"] = round(found["ms"] / 1e3 / step, 5)
        print(f"{name:36s} " + "  ".join(f"{key} {value}" for key, value in found.items()))
    reached = all(found["share_of_step"] <= 0.03 for name, found in rows.items() if "resnet18, p=0.001" in name)
    result("wash", step_seconds=round(step, 3), rows=rows, rounds=given.rounds, goal_reached=reached)


def apart(p: float, replicas: int, rounds: int) -> dict[str, float]:
    """Cost and bytes on as many processes; the slowest one's median."""
    from processes import run_processes

    os.environ["OMP_NUM_THREADS"] = "1"
    found = run_processes(on_processes, replicas, p, replicas, rounds, deadline=300.0)
    return {
        "ms": round(1e3 * max(median(seconds) for seconds, _ in found), 3),
        "best_ms": round(1e3 * max(min(seconds) for seconds, _ in found), 3),
        "bytes": round(sum(sent for _, sent in found) / replicas),
    }


if __name__ == "__main__":
    main()
