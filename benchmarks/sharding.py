"""PyTorch's data parallelism in all its forms beside the library's all-reduce: time, bytes sent, bytes held.

    python benchmarks/sharding.py [--rounds 7] [--steps 4] [--width 512] [--blocks 6] [--batch 64]

Two replicas of a multilayer perceptron of equal blocks, on processes of one thread and one core each; Adam. The
variants take turns in windows of some steps between barriers, warm-up excluded; ratios are medians over the rounds of
ratios within a round. Bytes are those of one update and worker. Held: weights, optimizer state and what a hook carries
between two steps, gradients at the update, each in copies of the weights (Ψ_P), as counted by looking at the tensors
of one worker.
"""

from __future__ import annotations

import argparse
import functools
from statistics import median
from typing import Any

import torch
from torch import nn

import unlocked as ul
from unlocked.consensus import AllReduce, Consensus, TorchDDP, TorchFullyShard, TorchZeRO1
from unlocked.probes.step import optimizer_state
from unlocked.sharding import local
from unlocked.worlds import Distributed

from common import result
from pipelines.crew import Member, Others, run_crew
from pipelines.windows import Variant, play, warm_up

RULES: dict[str, Consensus] = {
    "all-reduce": AllReduce(),
    "torch-ddp": TorchDDP(),
    "torch-ddp(hook=bf16)": TorchDDP(hook="bf16"),
    "torch-ddp(hook=powersgd,rank=4)": TorchDDP(hook="powersgd", rank=4, start=2),
    "torch-zero1": TorchZeRO1(),
    "torch-fully-shard(level=2)": TorchFullyShard(2),
    "torch-fully-shard(level=3)": TorchFullyShard(3),
    "torch-fully-shard(level=3,units=block)": TorchFullyShard(3, "block"),
}
REPLICAS = 2


def network(width: int, blocks: int) -> nn.Sequential:
    """Equal blocks of one layer, and a classifier of ten classes."""
    torch.manual_seed(0)
    inside = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(blocks)]
    return nn.Sequential(*inside, nn.Linear(width, 10))


def held(session: ul.Trainer, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """What this worker holds, in copies of the weights; makes one step."""
    (weights,) = session.weights
    numbers = sum(parameter.numel() for parameter in weights.parameters)
    seen: dict[str, float] = {}

    def count(*_: Any) -> None:
        gradients = [parameter.grad for parameter in weights.parameters if parameter.grad is not None]
        seen["gradients"] = sum(local(gradient).numel() for gradient in gradients) / numbers

    hook = weights.store.optimizer.register_step_pre_hook(count)
    session.step(x, y)
    hook.remove()
    seen["weights"] = sum(local(parameter).numel() for parameter in weights.parameters) / numbers
    seen["optimizer state"] = sum(local(value).numel() for value in optimizer_state(weights)) / numbers
    seen["hook's state"] = sum(x.numel() for x in _tensors(weights.carried())) / numbers
    return seen


def _tensors(value: Any) -> list[torch.Tensor]:
    """Of a tree."""
    if isinstance(value, dict):
        return [x for part in value.values() for x in _tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def measure(member: Member, width: int, blocks: int, size: int, rounds: int, steps: int) -> dict[str, Any]:
    """On each process: every rule's rows of seconds, bytes and what is held."""
    x, y = torch.randn(REPLICAS * size, width), torch.randint(10, (REPLICAS * size,))
    adam = functools.partial(torch.optim.Adam, lr=1e-4)
    variants, found = [], {}
    with Distributed(member.cluster) as world:
        for name, rule in RULES.items():
            chain = ul.cut(network(width, blocks), 1, like=x)
            session = ul.Trainer(chain, consensus=rule, replicas=REPLICAS, world=world, optimizer=adam)
            for _ in range(3):  # PowerSGD is at work from the third on
                session.step(x, y)
            found[name] = held(session, x, y)
            found[name]["bytes"] = sum(session.timeline.bytes_sent().values())
            variants.append(Variant(name, functools.partial(session.step, x, y), REPLICAS * size))
        warm_up(member, variants, 0.1)
        for variant in variants:
            variant.steps = steps
        play(member, variants, rounds)
    for variant in variants:
        found[variant.name]["milliseconds"] = [1e3 * wall / count for count, _, wall in variant.rows]
    return found


def table(found: dict[str, Any], copy: int) -> list[dict[str, Any]]:
    """A row per rule; `copy`: bytes of the weights."""
    rows = []
    for name, one in found.items():
        times = one["milliseconds"]
        row: dict[str, Any] = {"method": name, "milliseconds": round(median(times), 2)}
        for other in ("all-reduce", "torch-ddp"):
            ratios = [a / b for a, b in zip(times, found[other]["milliseconds"])]
            row[f"time / {other}"] = round(median(ratios), 3)
        row["bytes / Ψ_P"] = round(one["bytes"] / copy, 4)
        rows.append(
            row | {key: round(one[key], 3) for key in ("weights", "gradients", "optimizer state", "hook's state")}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="in each window")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64, help="samples per replica")
    given = parser.parse_args()
    torch.set_num_threads(1)
    copy = sum(x.numel() * x.element_size() for x in network(given.width, given.blocks).parameters())
    others = Others()
    arguments = (given.width, given.blocks, given.batch, given.rounds, given.steps)
    rows = table(run_crew(measure, REPLICAS, *arguments, deadline=300)[0], copy)
    busy = round(others.share(), 3)
    print("| " + " | ".join(rows[0]) + " |\n|---|" + "---:|" * (len(rows[0]) - 1))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    result("sharding", rows=rows, copy_bytes=copy, **vars(given), busy_with_others=busy)


if __name__ == "__main__":
    main()
