"""Bytes held on every worker over a timeline, by what the stages' costs and the credit rule say.

    held always          weights, buffers, their gradients, the optimizer's state; networks that a rule asks (an oracle)
    activations          what a rule holds of a micro-batch (`Credit.held`), from the start of its forward to the end of
                         its last backward there; a graph that is made again, during that backward; a head's, from
                         where the head runs (its own act L, else the backward) to the same end
    versions             copies of old weights: version v from the update that ends it to the last backward of a
                         micro-batch that has seen it
    messages             what has left its sender and was not yet taken

A forward without a backward keeps nothing (a stage that is only passed through, or evaluated), unless the rule has
micro-batches in flight between steps. Then a record may begin and end anywhere: backwards are in the order of the forwards,
so between the oldest backward and the newest forward of a worker every micro-batch is in flight, whether its own acts are
in the record or not. Which weights it saw before the record began is taken from the ones that follow, a whole number of
updates later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ..credit.base import Credit, Held
from ..timeline import Act, Timeline
from ..worker import Place
from .costs import Costs

Curve = list[tuple[float, int]]  # (seconds, bytes from then on)
Changes = list[tuple[float, int]]  # (when, bytes more or less)


def activation_curves(
    timeline: Timeline, costs: Costs, samples: int, credit: Credit | None = None, *, between_replicas: bool = True
) -> dict[Place, Curve]:
    """Bytes of activations and untaken messages of every worker; `samples` in a micro-batch.

    `credit`: the rule, for what it holds; without it, whole graphs within a step. `between_replicas`: whether messages between
    the same stage of two replicas count, which are weights or their gradients.
    """
    changes: dict[Place, Changes] = defaultdict(list)
    limits, workers = _limits(timeline), [Place(*worker) for worker in timeline.workers()]
    for place, acts in _by_worker(timeline).items():
        held, profile = _held(credit, costs, place), costs[place.stage].profile
        replayed = False
        if held.several is not None and _per_update(acts) > 1:
            held, replayed = replace(held, what=held.several), True
        holding = profile.holding(held.what)
        kept, again = (round(line.at(samples)) for line in (holding.kept, holding.again))
        head = 0 if held.what == "nothing" else round(profile.head_kept.at(samples))
        for one in _flights(acts, held, limits):
            changes[place] += [(one.begin, kept), (one.end, -kept)]
            changes[place] += [(one.backward, again), (one.end, -again)] if again and one.backward is not None else []
            began = one.backward if replayed else one.head
            changes[place] += [(began, head), (one.end, -head)] if began is not None else []
    if not between_replicas:
        timeline = Timeline(act for act in timeline if act.peer is None or act.peer[1] != act.stage)
    for place, begin, end, size in _messages(timeline, credit, limits):
        changes[place] += [(begin, size), (end, -size)]
    return {place: _curve(changes[place]) for place in workers}


def version_curves(timeline: Timeline, costs: Costs, credit: Credit | None = None) -> dict[Place, Curve]:
    """Bytes of old weights that every worker keeps beside today's."""
    limits = _limits(timeline)
    curves = {}
    for place, acts in _by_worker(timeline).items():
        held, size = _held(credit, costs, place), costs[place.stage].profile.trained
        spans = _copies(acts, held, limits) if held.versions else []
        curves[place] = _curve([change for begin, end in spans for change in ((begin, size), (end, -size))])
    return curves


def device_peaks(
    timeline: Timeline, costs: Costs, samples: int, devices: Mapping[Place, int], credit: Credit | None = None
) -> dict[int, int]:
    """The most bytes each device holds at once: all of its workers together, old weights included."""
    rows: dict[int, list[Curve]] = defaultdict(list)
    always: dict[int, int] = defaultdict(int)
    curves = [activation_curves(timeline, costs, samples, credit), version_curves(timeline, costs, credit)]
    for place, device in devices.items():
        always[device] += costs[place.stage].held + (0 if credit is None else credit.holds_beside(place.stage))
        rows[device] += [found[place] for found in curves if found.get(place)]
    return {device: size + max((x for _, x in together(rows[device])), default=0) for device, size in always.items()}


def together(curves: Sequence[Curve]) -> Curve:
    """The sum of several curves."""
    if len(curves) == 1:
        return curves[0]
    changes: Changes = []
    for curve in curves:
        for (when, level), before in zip(curve, [0, *(level for _, level in curve)]):
            changes.append((when, level - before))
    return _curve(changes)


# ---- micro-batches in flight -------------------------------------------------------------------------------------------


@dataclass
class _Flight:
    """A micro-batch at a worker: when it is held, when its head and its last backward begin (None: not in the record), and the
    version of the weights its forward saw (None: not known)."""

    begin: float
    end: float
    head: float | None
    backward: float | None
    version: int | None


def _held(credit: Credit | None, costs: Costs, place: Place) -> Held:
    return Held() if credit is None else credit.held(last=place.stage == len(costs) - 1)


def _by_worker(timeline: Timeline) -> dict[Place, list[Act]]:
    rows: dict[Place, list[Act]] = {Place(*worker): [] for worker in timeline.workers()}
    for act in timeline:
        rows[Place(act.replica, act.stage)].append(act)
    return rows


def _limits(timeline: Timeline) -> tuple[float, float]:
    """Begin and end of the record."""
    return min((act.start for act in timeline), default=0.0), max((act.end for act in timeline), default=0.0)


def _flights(acts: Sequence[Act], held: Held, limits: tuple[float, float]) -> list[_Flight]:
    """What a worker holds, micro-batch by micro-batch, in their order."""
    forward: dict[int, Act] = {}
    head: dict[int, float] = {}
    backward: dict[int, Act] = {}
    for act in acts:
        if act.kind == "F":
            forward.setdefault(act.micro_batch, act)
        elif act.kind in "LB":
            head.setdefault(act.micro_batch, act.start)
            if act.kind == "B":
                backward[act.micro_batch] = act
    if not held.crosses:
        whole = [number for number in forward if number in backward]
    else:
        seen = sorted({*forward, *backward})
        whole = list(range(min(backward, default=seen[0]), seen[-1] + 1)) if seen else []
    per_update = _per_update(acts)
    flights, end = [], limits[1]
    for number in reversed(whole):  # a backward that is not in the record was over when the next one's began
        first, last = forward.get(number), backward.get(number)
        flights.append(
            _Flight(
                begin=limits[0] if first is None else first.start,
                end=end if last is None else last.end,
                head=head.get(number),
                backward=None if last is None else last.start,
                version=_version(number, forward, per_update, seen[-1]) if held.versions else None,
            )
        )
        end = end if last is None else last.start
    return flights[::-1]


def _per_update(acts: Sequence[Act]) -> int:
    """Micro-batches of an update: from one to the next, or all forwards of a record with one."""
    updates = [act.micro_batch for act in _updates(acts).values()]
    if len(updates) > 1:
        return max(1, updates[1] - updates[0])
    return max(1, len({act.micro_batch for act in acts if act.kind == "F"}))


def _updates(acts: Sequence[Act]) -> dict[int, Act]:
    """The updates by the version they end; what follows one under the same micro-batch belongs to it."""
    found: dict[int, Act] = {}
    for act in acts:
        if act.kind == "U":
            found.setdefault(act.micro_batch, act)
    return {act.version: act for act in found.values()}


def _version(number: int, forward: Mapping[int, Act], per_update: int, last: int) -> int | None:
    """The version a forward saw; if it was before the record, so many less than one later as there are updates between."""
    for updates, later in enumerate(range(number, last + 1, per_update)):
        if later in forward:
            return max(0, forward[later].version - updates)
    return None


def _copies(acts: Sequence[Act], held: Held, limits: tuple[float, float]) -> list[tuple[float, float]]:
    """From when to when each old version is kept."""
    gone: dict[int, float] = {}
    for one in _flights(acts, held, limits):
        if one.version is not None:
            gone[one.version] = max(one.end, gone.get(one.version, one.end))
    ends = _updates(acts)
    oldest = min(ends, default=None)
    spans = []
    for version, end in gone.items():
        if version in ends:
            begin = ends[version].start
        elif oldest is not None and version < oldest:
            begin = limits[0]
        else:
            continue  # it is today's to the end
        if end > begin:
            spans.append((begin, end))
    return spans


# ---- messages ----------------------------------------------------------------------------------------------------------


def _messages(
    timeline: Timeline, credit: Credit | None, limits: tuple[float, float]
) -> list[tuple[Place, float, float, int]]:
    """Who holds a message that it has not taken, from when to when, and its bytes."""
    if credit is None or not credit.crossing:
        return [
            (Place(taken.replica, taken.stage), sent.end, taken.end, taken.bytes) for sent, taken in timeline.messages()
        ]
    found: dict[tuple, list[float]] = defaultdict(lambda: [*limits])
    for act in timeline:  # a message is of one micro-batch; either end of it may be outside the record
        if act.kind in "SR" and act.peer is not None:
            here, there = (act.replica, act.stage), act.peer
            way = (here, there) if act.kind == "S" else (there, here)
            found[(*way, act.channel, act.micro_batch, act.bytes)][act.kind == "R"] = act.end
    return [(Place(*key[1]), begin, end, key[-1]) for key, (begin, end) in found.items()]


def _curve(changes: Changes) -> Curve:
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
