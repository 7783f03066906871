"""Cyclic data parallelism on real processes beside all-reduce and PyTorch's DDP, at several bandwidths.

P processes of one thread, a replica of the whole network in each. `compute` is the same training without communication,
`means only` the same exchange without training. A variant's share of communication hidden is

    1 − (both − max(compute, communication)) / min(compute, communication)

    1: the shorter one is hidden; 0: one after the other; less: even more

Seconds per step of the slowest process, medians over the rounds. Bytes are those of the record, all replicas together;
what PyTorch sends is recorded as a ring's all-reduce of its gradients. What really went over the loopback stands beside
it where the network is a namespace's own.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

import unlocked as ul
from unlocked.consensus import CDP, AllReduce, Consensus, Independent, TorchDDP
from unlocked.cutting import cut
from unlocked.simulation.costs import unit
from unlocked.simulation.hardware import Hardware
from unlocked.simulation.network import Edge, Network
from unlocked.simulation.simulating import seconds_per_update, simulate
from unlocked.worlds import Distributed

from pipelines.crew import Member
from pipelines.overlapping import OnlyMean
from pipelines.tasks import Task, sgd
from pipelines.windows import Variant, play, rates, warm_up

BUCKET_MB = 0.2
RULES: dict[str, Consensus] = {
    "compute": Independent(),
    "means only": Independent(),
    "cdp(v2)": CDP("v2"),
    "cdp(v1)": CDP("v1"),
    "all-reduce, at the end": AllReduce(bucket_mb=0),
    "all-reduce, buckets": AllReduce(bucket_mb=BUCKET_MB),
    "torch-ddp": TorchDDP(),
}
METHODS = list(RULES)[2:]
_STAGES_OF_ONE = ("means only", "torch-ddp")  # a worker per process
_STEPS, _SILENCE = 5, 0.2  # steps; seconds in which all that was sent arrives
_BURST, _QUEUE = "128kb", "64mb"
_SIMULATED_STEPS, _LAST = 14, 6


class Plan(NamedTuple):
    """What to measure: cases, stages of a replica, rounds, seconds of a window, and bandwidths: what an all-reduce
    takes, as a multiple of what a step computes (0: not limited)."""

    cases: list[str]
    stages: int
    rounds: int
    seconds: float
    ratios: list[float]


def cases(names: list[str]) -> list[Task]:
    """Small, so that an all-reduce is worth hiding and all fits into minutes."""
    torch.manual_seed(0)
    text = torch.randint(256, (8, 64))
    known = [
        Task("gpt", "gpt", {"layers": 4, "width": 96, "heads": 4}, text, torch.randint(256, (8, 64))),
        Task("mlp", "mlp", {"width": 256, "depth": 12}, torch.randn(768, 256), torch.randint(10, (768,))),
    ]
    return [task for task in known if task.name in names]


def limit_loopback(rate: float | None) -> None:
    """Let the loopback of this network namespace carry so many bytes per second in all; None: as many as it can."""
    base = ["tc", "qdisc", "del" if rate is None else "replace", "dev", "lo", "root"]
    limits = [] if rate is None else ["tbf", "rate", f"{round(8 * rate)}bit", "burst", _BURST, "limit", _QUEUE]
    subprocess.run([*base, *limits], check=True, capture_output=True)


class Trained:
    """One method on all processes."""

    def __init__(self, member: Member, task: Task, name: str, stages: int, limited: bool, worlds: ExitStack) -> None:
        world = worlds.enter_context(Distributed(member.cluster, links="gloo" if limited else "auto"))
        torch.manual_seed(0)
        chain = cut(task.network(), 1 if name in _STAGES_OF_ONE else stages, like=task.x, balance="flops")
        credit = OnlyMean() if name == "means only" else ul.credit.Backprop()
        count = member.cluster.size
        self.name, self.parameters = name, sum(x.numel() * x.element_size() for x in chain.parameters())
        self.session = ul.Trainer(
            chain, credit=credit, consensus=RULES[name], replicas=count, optimizer=sgd, world=world
        )
        self._share = {member.cluster.rank: (task.x, task.y)}
        self.step: Callable[[], object] = partial(self.session.update, self._share)

    def sent(self, member: Member) -> dict[str, int]:
        """Bytes per step that replicas have sent each other, of all processes, by channel. All must call it."""
        self.session.settle()
        total: Counter[str] = Counter()
        for one in member.cluster.share(dict(self.session.bytes_sent)):
            total += Counter(one)
        steps = self.session.steps
        between = {channel: size for channel, size in total.items() if channel not in ("activation", "gradient")}
        assert all(size % steps == 0 for size in between.values()), (self.name, between, steps)
        return {channel: size // steps for channel, size in between.items()}


def measure(member: Member, plan: Plan, namespace: bool) -> dict[str, Any]:
    """Every case at every bandwidth. Called on every process. `namespace`: whether bandwidth can be limited here."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if namespace else member.cluster.interface.name)
    found: dict[str, Any] = {}
    for task in cases(plan.cases):
        rows = found[task.name] = []
        computes = None
        for ratio in plan.ratios:
            if ratio == 0 or namespace:
                rows.append(_one(member, task, plan, ratio, computes))
                computes = computes or rows[0]["fastest_ms"] / 1e3
    return {"cases": found, "freed_memory_kept": all(member.cluster.share(member.kept))}


def _one(member: Member, task: Task, plan: Plan, ratio: float, computes: float | None) -> dict[str, Any]:
    """One case at one bandwidth."""
    limited = ratio > 0
    count = member.cluster.size
    with ExitStack() as worlds:
        trained = {name: Trained(member, task, name, plan.stages, limited, worlds) for name in RULES}
        size = trained["compute"].parameters
        whole = 2 * (count - 1) * size  # what an all-reduce sends, all replicas together
        rate = None
        if limited:
            assert computes is not None
            rate = whole / (ratio * computes)
            _set_rate(member, rate)
        variants = [Variant(name, one.step, count * len(task.x)) for name, one in trained.items()]
        try:
            warm_up(member, variants, plan.seconds, steps=2)
            wire = _wire(member, variants) if limited else None
            play(member, variants, plan.rounds)
        finally:
            if limited:
                _set_rate(member, None)
        speed = rates(member, variants)
        sent = {name: trained[name].sent(member) for name in METHODS}
    seconds = {variant.name: variant.batch / median(speed[variant.name]) for variant in variants}
    for name in METHODS:
        assert sum(sent[name].values()) == whole, f"{name} sent {sent[name]} bytes, a ring all-reduce sends {whole}"
    compute, communication = seconds["compute"], seconds["means only"]
    return {
        "ratio": ratio,
        "processes": count,
        "stages": plan.stages,
        "parameter_bytes": size,
        "bytes": sent,
        "ring_all_reduce_bytes": whole,
        "wire": wire,
        "megabytes_per_second": None if rate is None else round(rate / 1e6, 2),
        "fastest_ms": 1e3 * count * len(task.x) / max(max(row) for name, row in speed.items() if name != "means only"),
        "ms": {name: round(1e3 * value, 2) for name, value in seconds.items()},
        "of ddp": {name: _of_ddp(speed, name) for name in METHODS},
        "hidden": {name: _hidden(compute, communication, seconds[name]) for name in METHODS} if limited else None,
    }


def _wire(member: Member, variants: list[Variant]) -> dict[str, int]:
    """What the loopback of this network namespace carries in a step: with headers, acknowledgements, and the little
    that the processes say besides."""
    found = {}
    for variant in variants:
        assert variant.step is not None
        member.barrier.wait()
        time.sleep(_SILENCE)
        before = _carried()
        member.barrier.wait()
        for _ in range(_STEPS):
            variant.step()
        member.barrier.wait()
        time.sleep(_SILENCE)
        found[variant.name] = (_carried() - before) // _STEPS
    return found


def _carried() -> int:
    """Bytes that the loopback has sent."""
    row = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(row.split()[9])


def _of_ddp(speed: dict[str, list[float]], name: str) -> float:
    """Step time over DDP's: the median of ratios within a round."""
    return round(median(b / a for a, b in zip(speed[name], speed["torch-ddp"])), 3)


def _hidden(compute: float, communication: float, both: float) -> float:
    return round(1.0 - (both - max(compute, communication)) / min(compute, communication), 2)


def _set_rate(member: Member, rate: float | None) -> None:
    member.barrier.wait()
    if member.cluster.chief:
        limit_loopback(rate)
    member.barrier.wait()


# ---- the same on a simulated clock -----------------------------------------------------------------------------------


def simulated(processes: int, stages: int, ratios: list[float]) -> list[dict[str, Any]]:
    """Step times over compute of equal stages, on devices with a wire each; an all-reduce takes `ratio` times what a
    step computes. A backward takes twice a forward, as on processors; an all-reduce of a stage begins after its
    backward."""
    rows = []
    values = 840
    costs = unit(stages, forward=1.0, backward=2.0, weights=values)
    computes = 3.0 * stages
    for ratio in (ratio for ratio in ratios if ratio > 0):
        volume = 2 * (processes - 1) / processes * 4 * values * stages
        hardware = Hardware(devices=processes, network=Network(Edge(bandwidth=volume / (ratio * computes))))
        row = {}
        for name, rule in RULES.items():
            if name in METHODS[:3]:  # stages of one weight have one bucket
                timeline = simulate(
                    ul.credit.Backprop(),
                    rule,
                    costs=costs,
                    replicas=processes,
                    steps=_SIMULATED_STEPS,
                    hardware=hardware,
                )
                row[name] = round(max(seconds_per_update(timeline, _LAST).values()) / computes, 3)
        rows.append({"ratio": ratio, "processes": processes, "stages": stages, "of compute": row})
    return rows


# ---- how it is shown -------------------------------------------------------------------------------------------------


def show(name: str, row: dict[str, Any]) -> None:
    """The table of one case at one bandwidth."""
    rate = row["megabytes_per_second"]
    wire = (
        "not limited" if rate is None else f"{rate} MB/s for all together: an all-reduce takes {row['ratio']} × compute"
    )
    print(
        f"\n{name}, {row['processes']} processes, {row['stages']} stages each, "
        f"Ψ_P = {row['parameter_bytes']:,} bytes; {wire}"
    )
    titles = (
        f"{'ms/step':>9s}{'of DDP':>9s}{'of compute':>12s}{'hidden':>9s}{'bytes per step':>16s}{'on the wire':>14s}"
    )
    print(" " * 24 + titles)
    for method, milliseconds in row["ms"].items():
        share = milliseconds / row["ms"]["compute"]
        line = f"{method:24s}{milliseconds:9.2f}"
        if method in METHODS:
            hidden = "" if row["hidden"] is None else f"{row['hidden'][method]:.2f}"
            sent = sum(row["bytes"][method].values())
            line += f"{row['of ddp'][method]:9.3f}{share:12.3f}{hidden:>9s}{sent:16,}"
            line += f"{row['wire'][method]:14,}" if row["wire"] else ""
        print(line, flush=True)


def show_simulated(rows: list[dict[str, Any]]) -> None:
    """Step times over compute."""
    for row in rows:
        told = ", ".join(f"{name} {value}" for name, value in row["of compute"].items())
        print(
            f"simulated, {row['processes']} devices with a wire each, {row['stages']} equal stages, an all-reduce "
            f"takes {row['ratio']} × compute; step time over compute: {told}"
        )
