"""Samples per second on two processes whose all-reduce would take 0.5, 1, 2 times what a step computes.

The processes stand for accelerators: a micro-batch's forward computes, then sleeps until `PAD` seconds are over, so the
processor is free for whoever communicates and other load on the machine changes little. Links are limited (limited.py).
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked.consensus import Consensus
from unlocked.worlds import Distributed

from .limited import Limited
from .task import Size, adamw, chain_of, parameter_bytes
from pipelines.crew import Member

SIZE = Size(layers=2, width=64, context=16, micro=4)
PAD = 0.03  # seconds
RULES: dict[str, Consensus] = {
    "all-reduce": ul.consensus.AllReduce(),
    "dpu": ul.consensus.DPU(),
    "wp": ul.consensus.WP(),
    "acco": ul.consensus.ACCO(),
}
_STEP = 4  # micro-batches of the step that the delay is a multiple of


class Padded(nn.Module):
    """A network whose forward takes `PAD` seconds at least."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        begin = time.perf_counter()
        h = self.inner(x)
        time.sleep(max(0.0, begin + PAD - time.perf_counter()))
        return h


def padded() -> ul.Chain:
    """The GPT as one stage, padded."""
    chain = chain_of(SIZE)
    return ul.cut(nn.Sequential(Padded(chain)), 1, like=chain.like)


def measure(member: Member, ratios: tuple[float, ...], parts: tuple[int, ...], steps: int) -> dict[str, Any]:
    """A row for each delay, number of micro-batches per update, and rule: seconds per update, samples per second of all."""
    compute = {count: _seconds(member, ul.consensus.Independent(), None, count, steps) for count in parts}
    volume = parameter_bytes(chain_of(SIZE))  # 2(N−1)/N Ψ_P for N = 2
    rows = []
    for ratio in ratios:
        bandwidth = volume / (ratio * compute[_STEP])
        for count in parts:
            for name, rule in RULES.items():
                seconds = _seconds(member, rule, bandwidth, count, steps)
                rows.append(
                    {
                        "delay": ratio,
                        "micro_batches": count,
                        "rule": name,
                        "seconds": seconds,
                        "samples_per_second": 2 * count * SIZE.micro / seconds,
                        "of_compute": compute[count] / seconds,
                    }
                )
    return {"compute": compute, "rows": rows}


def _seconds(member: Member, rule: Consensus, bandwidth: float | None, count: int, steps: int) -> float:
    """Per update, of the slower process: the median."""
    source = torch.Generator().manual_seed(member.cluster.rank)
    ids = torch.randint(256, (2, count * SIZE.micro, SIZE.context), generator=source)
    with Distributed(member.cluster) if bandwidth is None else Limited(member.cluster, bandwidth) as world:
        trainer = ul.Trainer(padded(), consensus=rule, replicas=2, accumulate=count, optimizer=adamw(1e-3), world=world)
        times = []
        for _ in range(steps + 2):
            begin = time.perf_counter()
            trainer.update({member.cluster.rank: (ids[0], ids[1])})
            times.append(time.perf_counter() - begin)
        member.barrier.wait()
    return max(member.cluster.share(median(times[2:])))


def show(found: dict[str, Any]) -> None:
    """The table."""
    print(
        f"\nTwo processes, GPT of {parameter_bytes(chain_of(SIZE)) / 1e6:.2f} MB; a step of {_STEP} micro-batches computes for"
    )
    print(
        f"{found['compute'][_STEP] * 1e3:.0f} ms. Delay: what an all-reduce of all gradients takes, as a multiple of that."
    )
    print(f"\n{'delay':>5}  {'micro-batches':>13}   " + "".join(f"{name:>24}" for name in RULES))
    cells = {(row["delay"], row["micro_batches"], row["rule"]): row for row in found["rows"]}
    for delay, count in dict.fromkeys((row["delay"], row["micro_batches"]) for row in found["rows"]):
        line = [cells[delay, count, name] for name in RULES]
        told = "".join(f"{row['samples_per_second']:12.0f}/s ({100 * row['of_compute']:4.0f} %)" for row in line)
        print(f"{delay:5.1f}  {count:13d}   {told}")
    print("Samples per second of both; in brackets the share of the speed without communication.")
