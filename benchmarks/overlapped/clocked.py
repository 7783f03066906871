"""The same on a clock (simulated): four workers, all alike or one of them four times slower."""

from __future__ import annotations

from typing import Any

import unlocked as ul
from unlocked.consensus import Consensus
from unlocked.simulation import Hardware, simulate, uniform, unit

REPLICAS, WEIGHTS = 4, 1_000_000
FORWARD, BACKWARD = 1.0, 2.0  # seconds of a micro-batch on a device of speed 1
RULES: dict[str, Consensus] = {
    "all-reduce": ul.consensus.AllReduce(),
    "dpu": ul.consensus.DPU(),
    "dpu, managed": ul.consensus.DPU("managed"),
    "acco": ul.consensus.ACCO(),
    "acco, managed": ul.consensus.ACCO("managed"),
}


def seconds_per_update(
    rule: Consensus, ratio: float, slow: bool, count: int, steps: int = 16
) -> tuple[float, list[float]]:
    """Once it runs evenly; and micro-batches per update of each replica. `ratio`: seconds of an all-reduce / of computing."""
    exchange = ratio * count * (FORWARD + BACKWARD)
    bandwidth = 2 * (REPLICAS - 1) / REPLICAS * 4 * WEIGHTS / exchange
    hardware = Hardware(network=uniform(bandwidth=bandwidth), speeds=(1.0, 1.0, 1.0, 0.25 if slow else 1.0))
    costs = unit(1, forward=FORWARD, backward=BACKWARD, weights=WEIGHTS)
    acts = simulate(
        ul.credit.Backprop(), rule, costs=costs, replicas=REPLICAS, steps=steps, accumulate=count, hardware=hardware
    )
    ends: dict[int, float] = {}
    done = [0.0] * REPLICAS
    for act in acts:
        step = act.micro_batch // count
        if act.kind == "U":
            ends[step] = max(ends.get(step, 0.0), act.end)
        if act.kind == "B" and step >= steps // 2:
            done[act.replica] += 1 / (steps - steps // 2)
    half = steps // 2
    return (ends[steps - 1] - ends[half - 1]) / (steps - half), done


def measure(ratios: tuple[float, ...], count: int) -> list[dict[str, Any]]:
    """A row for each delay, cluster and rule."""
    rows = []
    for slow in (False, True):
        for ratio in ratios:
            for name, rule in RULES.items():
                seconds, done = seconds_per_update(rule, ratio, slow, count)
                rows.append(
                    {
                        "delay": ratio,
                        "one_slow": slow,
                        "rule": name,
                        "seconds": seconds,
                        "micro_batches": done,
                        "per_second": sum(done) / seconds,
                    }
                )
    return rows


def show(rows: list[dict[str, Any]], count: int) -> None:
    """The table."""
    print(f"\nSIMULATED: {REPLICAS} workers, {count} micro-batches of {FORWARD + BACKWARD:.0f} s per update and worker")
    print(
        f"{'delay':>5}  {'one 4× slower':>13}   {'rule':15s} {'s per update':>12} {'micro-batches/s':>16}   done per update"
    )
    for row in rows:
        done = ", ".join(f"{number:.1f}" for number in row["micro_batches"])
        slow = "yes" if row["one_slow"] else "no"
        print(
            f"{row['delay']:5.1f}  {slow:>13}   {row['rule']:15s} {row['seconds']:12.1f} {row['per_second']:16.3f}   {done}"
        )
