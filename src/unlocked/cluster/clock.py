"""All processes on one clock.

    θ_r = t_0 − (s_r + e_r)/2           of the round trip with the smallest e_r − s_r

    s_r, e_r: when rank r asked and had its answer, by its own clock; t_0 what rank 0's clock said in between; θ_r what to add
    to rank r's clock (time.perf_counter, seconds). The error is at most half of the round trip.

Processes of one kernel share the clock: their offset is exactly 0.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch.distributed as dist

_ROUNDS = 10


def clock_offset(store: dist.Store, rank: int, clocks: Sequence[str]) -> float:
    """θ of this rank. All ranks call it; rank 0 answers the ranks whose kernel (`clocks`) is not its own, one by one."""
    strangers = [other for other, clock in enumerate(clocks) if clock != clocks[0]]
    if rank == 0:
        for other in strangers:
            for turn in range(_ROUNDS):
                store.wait([f"clock/{other}/{turn}/ask"])
                store.set(f"clock/{other}/{turn}/answer", repr(time.perf_counter()))
        return 0.0
    return min(_ask(store, rank, turn) for turn in range(_ROUNDS))[1] if rank in strangers else 0.0


def _ask(store: dist.Store, rank: int, turn: int) -> tuple[float, float]:
    """(round trip, offset) of one question."""
    start = time.perf_counter()
    store.set(f"clock/{rank}/{turn}/ask", "")
    store.wait([f"clock/{rank}/{turn}/answer"])
    end = time.perf_counter()
    theirs = float(store.get(f"clock/{rank}/{turn}/answer"))
    return end - start, theirs - (start + end) / 2
