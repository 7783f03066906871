"""A row of the table and N → what its timeline shows in the steady state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from ...timeline import Timeline
from ..costs import unit
from ..simulating import simulate
from .held import (
    Held,
    Use,
    Window,
    activations,
    peak,
    uses_of,
    weights_that_move,
    weights_that_stay,
    weights_that_visit,
)
from .rows import Row, Rule
from .sent import longest_chain, moved_states, volume, waiting

VALUES = 840  # of a stage's weights: parts of 2, 3, … 8 replicas are equal
_FULL = 4 * VALUES  # bytes
_FIRST, _LAST, _STEPS = 3, 5, 7  # steps that are looked at, and that are run


@dataclass(frozen=True)
class Measured:
    """Peaks of one device (of the one that has most), and what one micro-batch of a training step has sent.

    activations: in B Ψ_A. parameters: in Ψ_P, as rows.py defines it. versions: weights that are really held, in Ψ_P:
    old versions and other devices' stages included. waiting: weights sent to the device and not yet taken, in Ψ_P.
    parameter_volume: in 2 (N−1)/N Ψ_P, of weights and gradients but for those of cyclic ZeRO (`volumes`).
    activation_volume: in B Ψ_A^int, up and down. volumes: in Ψ_P, by what it is. steps: of communication between two
    units of time. devices: that computed. step: units of time. occupied: share of the time in which a device has
    activations, the mean of all.
    """

    activations: Fraction
    parameters: Fraction
    versions: Fraction
    waiting: Fraction
    parameter_volume: Fraction
    activation_volume: Fraction
    volumes: dict[str, Fraction]
    steps: int
    devices: int
    step: Fraction
    occupied: Fraction


def run(row: Row, count: int, rule: Rule = "v2") -> Timeline:
    """Some steps of the row's program with N = J = `count`."""
    credit, consensus = row.method(rule)
    replicas, accumulate = (1, count) if row.pipeline else (count, 1)
    costs = unit(count, weights=VALUES)
    return simulate(credit, consensus, costs=costs, replicas=replicas, accumulate=accumulate, steps=_STEPS)


def measure(row: Row, count: int, rule: Rule = "v2") -> Measured:
    """Run the row's program with N = J = `count` ≥ 2 and look at it. rule: of cyclic rows without one of their own."""
    timeline = run(row, count, rule)
    per_step = count if row.dealt else 1
    uses = uses_of(timeline, per_step)
    window = (2.0 * count * _FIRST, 2.0 * count * _LAST)
    held = _weights(row, timeline, uses, count)
    stages = [one._replace(what=None) for one in held if one.what != "visiting"]
    acts = activations(uses, row.device_of)
    part = Fraction(1, count)
    if row.device == "one":
        timeline = Timeline(act for act in timeline if act.kind != "M")  # an exchange inside one device sends nothing
    sent = _volumes(row, timeline, uses, count, window)
    weights = sent.get("weights", Fraction(0))
    moved = weights if row.states == "move" else weights + sent.get("gradients", Fraction(0))
    return Measured(
        activations=part * peak(acts, window),
        parameters=part * peak(acts if row.copies else stages, window),
        versions=part * peak(held, window),
        waiting=part * peak(waiting(timeline, row.device_of), window),
        parameter_volume=moved / (2 * (1 - part)),
        activation_volume=sent.pop("activations", Fraction(0)),
        volumes=sent,
        steps=longest_chain(timeline, row.device_of, window, count),
        devices=len({row.device_of(use.place) for use in uses}),
        step=_step(uses),
        occupied=_occupied(acts, window),
    )


def _weights(row: Row, timeline: Timeline, uses: list[Use], count: int) -> list[Held]:
    if row.states == "move":
        return weights_that_move(timeline, uses, count, _FULL)
    if row.states == "broadcast":
        return weights_that_visit(timeline, uses, {stage: stage % count for stage in range(count)})
    return weights_that_stay(timeline, uses, row.device_of, row.shared)


def _volumes(row: Row, timeline: Timeline, uses: list[Use], count: int, window: Window) -> dict[str, Fraction]:
    """Of a micro-batch of a step: activations in B Ψ_A^int, the others in Ψ_P."""
    sent = volume(timeline, row.device_of, window)
    if row.states == "move":
        ends: dict[int, list[float]] = defaultdict(list)
        for use in uses:
            ends[use.place.stage].append(use.end)
        sent += moved_states(timeline, ends, count, _FULL, window)
    each = (_LAST - _FIRST) * count
    whole = {"activations": 2 * 4 * (count - 1)}
    return {what: Fraction(size, each * whole.get(what, count * _FULL)) for what, size in sorted(sent.items())}


def _step(uses: Iterable[Use]) -> Fraction:
    """Units of time from one forward of stage 0 to the same one in the next step."""
    begins: dict[int, list[float]] = defaultdict(list)
    for use in uses:
        if use.place.stage == 0:
            begins[use.step].append(use.begin)
    return Fraction(min(begins[_LAST]) - min(begins[_FIRST])) / (_LAST - _FIRST)


def _occupied(acts: list[Held], window: Window) -> Fraction:
    devices = {act.device for act in acts}
    units = [window[0] + k for k in range(round(window[1] - window[0]))]
    there = sum(len({act.device for act in acts if act.begin <= now < act.end}) for now in units)
    return Fraction(there, len(units) * len(devices))
