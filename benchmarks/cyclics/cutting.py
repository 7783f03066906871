"""Where a network is cut, when replicas begin, what is computed again: what it does to the bytes they retain together.

Cuts, with N = J, all replicas going on by one stage at a time:

    flops           no stage takes longer than it must (the thesis' cut)
    bytes           no stage keeps more than it must
    together s×     the least for one device that holds all replicas, no stage above s × the least possible seconds
    each s×         the least for the fullest of J devices, a stage on each (the pipeline form)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from unlocked.cutting import from_recipe_of_chain
from unlocked.partition import partition
from unlocked.simulation.cyclic import StageMemory, even_starts, in_rounds, retained, staggered
from unlocked.simulation.cyclic_cuts import best_sizes
from unlocked.simulation.hardware import Device
from unlocked.simulation.profile import profile

from .tracking import Network, Track, track

Row = dict[str, Any]


def cuts(network: Network, found: Track, samples: int, stages: int) -> list[Row]:
    """A row for every cut: sizes; seconds of its slowest stage over their mean; how much less replicas in rounds retain
    than under DP; GB of the pipeline's fullest device."""
    rows = []
    for name, sizes in _cuts(found.pieces, stages):
        grouped = joined(found.pieces, sizes)
        rounds, at_once = (retained(in_rounds(grouped), stages, cyclic).peak for cyclic in (True, False))
        slowest = max(stage.seconds for stage in grouped) * stages / found.period
        devices = _devices(network, sizes, samples)
        row = {"cut": name, "sizes": sizes, "slowest": slowest, "reduction": 1 - rounds / at_once}
        rows.append(row | {"fullest": max((stages - j) * size for j, size in enumerate(devices)) / 1e9})
    return rows


def _cuts(pieces: Sequence[StageMemory], stages: int) -> Iterator[tuple[str, list[int]]]:
    yield "flops", partition([piece.seconds for piece in pieces], stages)
    yield "bytes", partition([piece.kept for piece in pieces], stages)
    for holder in ("together", "each"):
        for slowest in (1.25, 1.5, 2.0, math.inf):
            yield f"{holder} {slowest:g}×", best_sizes(pieces, stages, holder, slowest)  # type: ignore[arg-type]


def joined(pieces: Sequence[StageMemory], sizes: Sequence[int]) -> list[StageMemory]:
    """The stages that so many pieces each make."""
    groups = [pieces[begin:end] for begin, end in pairwise([0, *accumulate(sizes)])]
    return [
        StageMemory(sum(p.forward for p in row), sum(p.backward for p in row), sum(p.kept for p in row))
        for row in groups
    ]


def _devices(network: Network, sizes: list[int], samples: int) -> list[int]:
    """Bytes of a micro-batch on a device of its own for every stage: what two stages keep counts for both."""
    with FakeTensorMode():
        chain = from_recipe_of_chain({"model": network.model().recipe, "sizes": sizes}, torch.empty(2, 3, 224, 224))
    return [round(row.kept.at(samples)) + round(row.head_kept.at(samples)) for row in profile(chain).stages]


# ---- starts ----------------------------------------------------------------------------------------------------------


def best_starts(found: Track, replicas: int, grid: int = 960) -> tuple[int, int]:
    """(peak with even starts, the least peak that was found with any), of all replicas together.

    One replica after the other is moved to its best place on a grid until none gains, from even and from random starts.
    """
    times = np.array([when for when, _ in found.curve]) / found.period
    levels = np.array([level for _, level in found.curve])
    own = levels[np.searchsorted(times, (np.arange(grid) + 0.5) / grid, side="right") - 1]
    shifted = np.stack([np.roll(own, shift) for shift in range(grid)])
    draws = np.random.default_rng(0).integers(0, grid, (5, replicas))
    first = np.arange(replicas) * grid // replicas
    peaks = []
    for starts in (first, *(_moved(shifted, row) for row in (first, *draws))):
        shares = [Fraction(int(start), grid) for start in starts]
        peaks.append(staggered(found.curve, found.period, shares).peak)
    even = staggered(found.curve, found.period, even_starts(replicas)).peak
    return even, min(even, *peaks)


def _moved(shifted: np.ndarray, starts: np.ndarray) -> np.ndarray:
    starts, total = starts.copy(), shifted[starts].sum(0)
    before = np.inf
    while total.max() < before:
        before = total.max()
        for n, start in enumerate(starts):
            rest = total - shifted[start]
            starts[n] = (rest + shifted).max(1).argmin()
            total = rest + shifted[starts[n]]
    return starts


# ---- computing again -------------------------------------------------------------------------------------------------


def again(network: Network, samples: int, device: Device, replicas: int, counts: Sequence[int]) -> list[Row]:
    """A row for each number of pieces that are computed again: those with the most bytes × waiting per second of work."""
    plain = track(network, samples, device)
    rows = []
    for count in counts:
        found = track(network, samples, device, _worth_most(plain, count)) if count else plain
        cyclic = staggered(found.curve, found.period, even_starts(replicas)).peak / replicas
        row = {"again": count, "time": found.period / plain.period, "dp": found.peak / 1e9, "cdp": cyclic / 1e9}
        rows.append(row | {"reduction": 1 - cyclic / found.peak, "of_plain_dp": 1 - cyclic / plain.peak})
    return rows


def _worth_most(found: Track, count: int) -> frozenset[int]:
    worth, waits = {}, found.period
    for k, (piece, size) in enumerate(zip(found.pieces, found.inputs)):
        worth[k] = (piece.kept - size) * waits / piece.forward
        waits -= piece.seconds
    return frozenset(sorted(worth, key=worth.__getitem__, reverse=True)[:count])
