"""Variants that take turns in windows of a second or so between barriers: throughput from wall time, ratios within a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from .crew import Member


@dataclass
class Variant:
    """One way to train.

    step: one step of this process; None: it has nothing to do. batch: samples a step trains on. count: how samples per second
    come from the processes: "together" (one training: wall time between barriers), "sum" (independent trainings), "slowest"
    (each does its part by itself). around: a context for the whole window. lead: steps before and after those that are timed,
    so that all processes are in the midst of training meanwhile (by their own seconds, so not for "together").
    """

    name: str
    step: Callable[[], object] | None
    batch: int
    count: Literal["together", "sum", "slowest"] = "together"
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    lead: int = 0
    steps: int = 0
    rows: list[tuple[int, float, float]] = field(default_factory=list)  # steps, own seconds (0: idle), wall seconds


def window(member: Member, variant: Variant, steps: int) -> tuple[int, float, float]:
    """Some steps between two barriers."""
    with variant.around():
        member.barrier.wait()
        _go(variant, variant.lead)
        begin = time.perf_counter()
        _go(variant, steps)
        own = time.perf_counter() - begin
        _go(variant, variant.lead)
        member.barrier.wait()
        wall = time.perf_counter() - begin
    return steps, own if variant.step is not None else 0.0, wall


def _go(variant: Variant, steps: int) -> None:
    if variant.step is not None:
        for _ in range(steps):
            variant.step()


def warm_up(member: Member, variants: Sequence[Variant], seconds: float, steps: int = 3) -> None:
    """Some steps that do not count, then a short window that says how many steps fill one of `seconds`."""
    for variant in variants:
        window(member, variant, steps)
        _, _, wall = window(member, variant, steps)
        wall = max(member.cluster.share(wall))
        variant.steps = max(3, round(seconds / wall * steps))


def play(member: Member, variants: Sequence[Variant], rounds: int) -> None:
    """Every variant has one window per round; every other round goes backwards."""
    for k in range(rounds):
        for variant in variants if k % 2 == 0 else reversed(variants):
            variant.rows.append(window(member, variant, variant.steps))


def rates(member: Member, variants: Sequence[Variant]) -> dict[str, list[float]]:
    """Samples per second of each variant in each round, the same on all processes."""
    tables = member.cluster.share({variant.name: variant.rows for variant in variants})
    return {
        variant.name: [_rate(variant, list(rows)) for rows in zip(*(table[variant.name] for table in tables))]
        for variant in variants
    }


def _rate(variant: Variant, rows: Sequence[tuple[int, float, float]]) -> float:
    own = [variant.batch * steps / seconds for steps, seconds, _ in rows if seconds]
    if variant.count == "sum":
        return sum(own)
    if variant.count == "slowest":
        return min(own)
    return variant.batch * rows[0][0] / rows[0][2]


def ratio(found: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the rounds of one / other within the same round: what disturbs both cancels."""
    return round(median(a / b for a, b in zip(found[one], found[other])), 4)
