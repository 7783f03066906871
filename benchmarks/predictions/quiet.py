"""Windows on a machine that others use, too: those in which they did are played again, as long as patience lasts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from pipelines.crew import Others
from pipelines.windows import Variant, window

_QUIET = 0.06  # share of all cores' time that others may use


def play_quietly(member: Any, variants: Sequence[Variant], rounds: int, patience: float) -> dict[str, list[float]]:
    """As `play` of pipelines.windows, into `variant.rows`; and how busy others were in each window that counts."""
    busy: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for k in range(rounds):
        for variant in variants if k % 2 == 0 else reversed(variants):
            row, others, spent = _one(member, variant)
            while others > _QUIET and patience > 0:
                patience -= spent
                again, share, spent = _one(member, variant)
                if share < others:
                    row, others = again, share
            variant.rows.append(row)
            busy[variant.name].append(round(others, 3))
    return busy


def _one(member: Any, variant: Variant) -> tuple[tuple[int, float, float], float, float]:
    """A window, the share of the machine that others used meanwhile, and its seconds; alike on both processes."""
    others, begin, own = Others(), time.perf_counter(), time.process_time()
    row = window(member, variant, variant.steps)
    wall = time.perf_counter() - begin
    told = member.cluster.share([others.share(), (time.process_time() - own) / wall / (os.cpu_count() or 1), wall])
    return row, max(0.0, told[0][0] - sum(own for _, own, _ in told[1:])), told[0][2]
