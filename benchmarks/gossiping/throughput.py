"""Samples per second of real processes, one of them slower, pinned to a core each as far as there are cores.

A gradient takes `pad` seconds: the forward computes, then sleeps until they are over, so that more processes than cores do not
slow each other down; in the slow process (the last one) four times as long. Each rule trains for an epoch that is not counted
and three that are, the rules taking turns; a number is the median of an epoch's samples by its seconds, waiting at its end
included.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked.callbacks import Callback
from unlocked.consensus import AllReduce, Consensus
from unlocked.consensus.acid import ACiD
from unlocked.consensus.gossip import Gossip
from unlocked.worlds import Distributed

from pipelines.crew import Member

Row = dict[str, Any]
RULES: dict[str, Consensus] = {
    "all-reduce": AllReduce(),
    "gossip, rate 1": Gossip(graph="ring", rate=1.0, pairing="available"),
    "A²CiD², rate 1": ACiD(graph="ring", rate=1.0, pairing="available"),
}
BATCH, ROUNDS, EPOCHS, FACTOR = 8, 24, 3, 4.0


class _Padded(nn.Module):
    """A network whose forward takes so many seconds at least."""

    def __init__(self, inner: nn.Module, seconds: float) -> None:
        super().__init__()
        self.inner, self.seconds = inner, seconds

    def forward(self, x: Tensor) -> Tensor:
        end = time.perf_counter() + (self.seconds if self.training else 0.0)
        h = self.inner(x)
        time.sleep(max(0.0, end - time.perf_counter()))
        return h


class _Stamps(Callback):
    """When each epoch was over."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_epoch(self, trainer: ul.Trainer, record: dict[str, Any]) -> None:
        self.times.append(time.perf_counter())


def measure(member: Member, pad: float, slow: bool, passes: int) -> list[Row]:
    """A row for each rule."""
    count, names = member.cluster.size, list(RULES)
    found: dict[str, list[Row]] = {name: [] for name in names}
    seconds = pad * (FACTOR if slow and member.cluster.rank == count - 1 else 1.0)
    for turn in range(passes):
        for name in names if turn % 2 == 0 else reversed(names):
            found[name].append(_train(member, RULES[name], count, seconds))
    rows = [{"rule": name, "pad": pad, **_joined(found[name])} for name in names]
    for row in rows:
        row["against_all_reduce"] = row["samples_per_second"] / rows[0]["samples_per_second"]
    return rows


def _train(member: Member, rule: Consensus, count: int, seconds: float) -> Row:
    """Samples per second of each counted epoch; the share of the slow one's gradients; exchanges per gradient."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(count * ROUNDS * BATCH, 3, 8, 8, generator=source)
    y = torch.randint(10, (len(x),), generator=source)
    torch.manual_seed(0)
    model = ul.models.build("cnn", input_shape=(3, 8, 8), classes=10, width=4, depth=1)
    stamps = _Stamps()
    with Distributed(member.cluster) as world:
        trainer = ul.Trainer(
            ul.cut(nn.Sequential(_Padded(model, seconds)), 1, like=x[:2]),
            consensus=rule,
            replicas=count,
            world=world,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        )
        trainer.fit((x, y), EPOCHS + 1, batch_size=BATCH, callbacks=[stamps])
        (weights,) = trainer.weights
        made = member.cluster.share([weights.worker.version, sum(getattr(weights, "exchanges", {}).values())])
        member.barrier.wait()
    passed = [b - a for a, b in zip(stamps.times, stamps.times[1:])]
    return {"speeds": [len(x) / s for s in passed], "gradients": [m[0] for m in made], "met": sum(m[1] for m in made)}


def _joined(parts: Sequence[Row]) -> Row:
    speeds = [speed for part in parts for speed in part["speeds"]]
    gradients = sum(sum(part["gradients"]) for part in parts)
    return {
        "samples_per_second": median(speeds),
        "range": (min(speeds), max(speeds)),
        "last_share": sum(part["gradients"][-1] for part in parts) / gradients,
        "exchanges": sum(part["met"] for part in parts) / gradients,
    }


def show(rows: Sequence[Row]) -> None:
    """The table of one setting."""
    first = rows[0]
    slow = "the last one four times as long" if first["slow"] else "all alike"
    print(f"\n{first['processes']} processes, gradients of {first['pad'] * 1e3:.0f} ms, {slow}")
    for row in rows:
        low, high = row["range"]
        print(
            f"  {row['rule']:15s} {row['samples_per_second']:7.1f} samples/s ({low:.1f} to {high:.1f})   "
            f"× {row['against_all_reduce']:.2f}   the last one's share of the gradients {row['last_share']:.3f}   "
            f"{row['exchanges']:.2f} exchanges per gradient"
        )
