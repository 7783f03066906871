"""What devices hold, from the recorded acts: activations and weights.

    activations   of a stage and a micro-batch: from the begin of its forward to the end of its backward
    weights       version v of a stage: from when it came to the device, or was made there, until the next one has come
                  and nobody there is between a forward and a backward that see v

At a moment when one thing is freed and another begins, the freed one goes first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import NamedTuple

from ...timeline import Act, Timeline
from ...worker import Place
from .zero_dp import WEIGHTS as VISITS

FOREVER = float("inf")
DeviceOf = Callable[[Place], Hashable]
Window = tuple[float, float]


class Held(NamedTuple):
    """Something of a stage on a device, from `begin` to `end`. what: tells apart those that are not the same."""

    device: Hashable
    stage: int
    what: Hashable
    begin: float
    end: float


class Use(NamedTuple):
    """One micro-batch at a worker: its forward's begin, its backward's end, the version of the weights both see."""

    place: Place
    step: int
    version: int
    begin: float
    end: float


def place_of(act: Act) -> Place:
    """The worker that did it."""
    return Place(act.replica, act.stage)


def moment(seconds: float) -> float:
    """Times are sums and products of fractions; here all are whole units, up to rounding."""
    return round(seconds, 6)


def uses_of(timeline: Timeline, per_step: int) -> list[Use]:
    """All micro-batches that have had both; `per_step`: how many of a worker's numbers are one step."""
    begun: dict[tuple[Place, int], Act] = {}
    found = []
    for act in timeline:
        key = (place_of(act), act.micro_batch)
        if act.kind == "F":
            begun[key] = act
        elif act.kind == "B":
            first = begun.pop(key)
            step = act.micro_batch // per_step
            found.append(Use(key[0], step, first.version, moment(first.start), moment(act.end)))
    return found


def peak(rows: Iterable[Held], window: Window) -> int:
    """The most different things on any one device at once, at any moment of the window."""
    by_device: dict[Hashable, list[Held]] = defaultdict(list)
    for row in rows:
        by_device[row.device].append(row)
    most = 0
    for mine in by_device.values():
        moments = {window[0], *(row.begin for row in mine if window[0] <= row.begin < window[1])}
        for now in moments:
            there = {(row.stage, row.what) for row in mine if row.begin <= now < row.end}
            most = max(most, len(there))
    return most


def activations(uses: Iterable[Use], device_of: DeviceOf) -> list[Held]:
    """Of every stage and micro-batch."""
    return [Held(device_of(use.place), use.place.stage, use, use.begin, use.end) for use in uses]


# ---- weights ---------------------------------------------------------------------------------------------------------


def weights_that_stay(timeline: Timeline, uses: list[Use], device_of: DeviceOf, shared: bool) -> list[Held]:
    """Versions at the workers of their stage: made there by the last backward of a step, or received.

    `shared`: whether the replicas of a device have the same weights; each has its own otherwise.
    """

    def key(place: Place, version: int) -> tuple[Hashable, int, Hashable]:
        return device_of(place), place.stage, (version, 0 if shared else place.replica)

    last: dict[Hashable, float] = defaultdict(float)
    for use in uses:
        last[key(use.place, use.version)] = max(last[key(use.place, use.version)], use.end)
    spans: dict[tuple[Hashable, int, Hashable], tuple[float, float]] = {}
    for place, row in _arrivals(timeline, uses).items():
        for version, (begin, after) in enumerate(zip(row, [*row[1:], FOREVER])):
            here = key(place, version)
            spans[here] = (begin, max(after, last[here]))
    return [Held(*here, *span) for here, span in spans.items()]


def _arrivals(timeline: Timeline, uses: list[Use]) -> dict[Place, list[float]]:
    """When version 0, 1, … came to every worker: at the end of a step's last backward, if that is its own; else with
    the next message."""
    ends: dict[tuple[int, int], float] = defaultdict(float)  # of a stage and step
    own: dict[tuple[Place, int], float] = defaultdict(float)
    for use in uses:
        ends[use.place.stage, use.step] = max(ends[use.place.stage, use.step], use.end)
        own[use.place, use.step] = max(own[use.place, use.step], use.end)
    received: dict[Place, list[float]] = defaultdict(list)
    for act in timeline:
        if act.kind == "R" and act.channel == "cdp-weights" and act.bytes:
            received[place_of(act)].append(moment(act.end))
    steps = 1 + max(use.step for use in uses)
    found: dict[Place, list[float]] = {}
    for place in {use.place for use in uses}:
        messages = iter(received[place])
        versions = found[place] = [0.0]
        for step in range(steps):
            end = ends[place.stage, step]
            made = own[place, step] == end or not received[place]
            versions.append(end if made else next(messages, FOREVER))
    return found


def weights_that_move(timeline: Timeline, uses: list[Use], per_step: int, full: int) -> list[Held]:
    """Cyclic ZeRO: from when a stage's states come to a replica until they leave; `full`: bytes of a stage's weights.

    What comes is the newest weights, an older version while somebody is to read it, and the gradient's sum, if there is
    one.
    """
    ends: dict[int, list[float]] = defaultdict(list)
    for use in uses:
        ends[use.place.stage].append(use.end)
    open_: dict[Place, tuple[float, int]] = {
        use.place: (0.0, 1) for use in uses if use.place.replica == 0
    }  # where they are at first
    found = []
    for act in timeline:
        if act.channel != "cdp-state":
            continue
        place = place_of(act)
        if act.kind == "R":
            begin, rows = open_.get(place, (moment(act.end), 0))
            open_[place] = (begin, rows + (act.bytes == full))
        elif place in open_:
            begin, rows = open_.pop(place)
            found += _visit(place, begin, moment(act.end), rows, ends[place.stage], per_step)
    return found


def _visit(place: Place, begin: float, end: float, rows: int, ends: list[float], per_step: int) -> list[Held]:
    summed = sum(x <= begin for x in ends) % per_step != 0
    names = ["newest", *["older"] * (rows - 1 - summed)]
    return [Held(place.replica, place.stage, name, begin, end) for name in names]


def weights_that_visit(timeline: Timeline, uses: list[Use], owner: Mapping[int, int]) -> list[Held]:
    """ZeRO-DP: at the owner always, elsewhere from when they come until they have been used."""
    found = [Held(replica, stage, "own", 0.0, FOREVER) for stage, replica in owner.items()]
    came: dict[Place, float] = {}
    for act in timeline:
        place = place_of(act)
        if act.kind == "R" and act.channel == VISITS:
            came[place] = moment(act.end)
        elif act.kind in "FB" and place in came:
            found.append(Held(place.replica, place.stage, "visiting", came.pop(place), moment(act.end)))
    return found
