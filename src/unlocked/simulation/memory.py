"""Bytes held on every worker over a timeline, by what the stages' costs say.

    held always          weights, buffers, their gradients, the optimizer's state
    activations          what a forward keeps, from its start to the end of the micro-batch's last backward there; a head's,
                         from where the head runs (its own act L, else the backward) to the same end
    messages             what has left its sender and was not yet taken

A forward without a backward keeps nothing (a stage that is only passed through, or evaluated).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate

from ..timeline import Act, Timeline
from ..worker import Place
from .costs import Costs

Curve = list[tuple[float, int]]  # (seconds, bytes from then on)


def activation_curves(timeline: Timeline, costs: Costs, samples: int) -> dict[Place, Curve]:
    """Bytes of activations and untaken messages of every worker; `samples` in a micro-batch."""
    changes: dict[Place, list[tuple[float, int]]] = defaultdict(list)
    for place, spans in _spans(timeline).items():
        profile = costs[place.stage].profile
        kept, head = round(profile.kept.at(samples)), round(profile.head_kept.at(samples))
        for begin, head_begin, end in spans:
            changes[place] += [(begin, kept), (head_begin, head), (end, -kept - head)]
    for sent, taken in timeline.messages():
        changes[Place(taken.replica, taken.stage)] += [(sent.end, taken.bytes), (taken.end, -taken.bytes)]
    return {place: _curve(changes[place]) for place in map(Place._make, timeline.workers())}


def device_peaks(timeline: Timeline, costs: Costs, samples: int, devices: Mapping[Place, int]) -> dict[int, int]:
    """The most bytes each device holds at once: all of its workers together."""
    curves = activation_curves(timeline, costs, samples)
    rows: dict[int, list[Curve]] = defaultdict(list)
    always: dict[int, int] = defaultdict(int)
    for place, device in devices.items():
        always[device] += costs[place.stage].held
        rows[device].append(curves.get(place, []))
    return {device: size + max((x for _, x in together(rows[device])), default=0) for device, size in always.items()}


def together(curves: Sequence[Curve]) -> Curve:
    """The sum of several curves."""
    if len(curves) == 1:
        return curves[0]
    changes: list[tuple[float, int]] = []
    for curve in curves:
        for (when, level), before in zip(curve, [0, *(level for _, level in curve)]):
            changes.append((when, level - before))
    return _curve(changes)


def _spans(timeline: Timeline) -> dict[Place, list[tuple[float, float, float]]]:
    """For every worker and micro-batch with a backward: begin of its first forward, of its head, end of its last backward."""
    first: dict[tuple[Place, int], Act] = {}
    head: dict[tuple[Place, int], float] = {}
    last: dict[tuple[Place, int], float] = {}
    for act in timeline:
        key = (Place(act.replica, act.stage), act.micro_batch)
        if act.kind == "F":
            first.setdefault(key, act)
        elif act.kind in "LB":
            head.setdefault(key, act.start)
            if act.kind == "B":
                last[key] = max(last.get(key, 0.0), act.end)
    spans: dict[Place, list[tuple[float, float, float]]] = defaultdict(list)
    for key, act in first.items():
        if key in last:
            spans[key[0]].append((act.start, head[key], last[key]))
    return spans


def _curve(changes: list[tuple[float, int]]) -> Curve:
    """Sums over time; at one moment what is freed goes first."""
    ordered = sorted(changes)
    levels = accumulate(size for _, size in ordered)
    curve: Curve = []
    for (when, _), level in zip(ordered, levels):
        if curve and curve[-1][0] == when:
            curve[-1] = (when, level)
        else:
            curve.append((when, level))
    return curve
