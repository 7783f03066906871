"""What devices send in a training step, and how many messages wait for each other between two units of time.

A message between workers of one device is none. Bytes are told apart by what they are: activations and their gradients
between stages, weights, gradients of weights.

Steps of communication: the longest chain of messages that are sent and taken at one moment. A message waits for those
that its sender had to take before it, and for those that it has sent before on the same channel (one after the other
leaves a device). Several tensors to one receiver are one message. An exchange among all replicas counts as the messages
that the program of worlds/exchange.py sends for it.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...timeline import Act, Timeline
from ...worker import Place
from ...worlds import exchange
from .held import DeviceOf, Held, Window, moment, place_of
from .zero_dp import GRADIENTS, WEIGHTS

_Boxes = dict[tuple[int, int], deque[tuple[int, Tensor]]]  # (from, to): messages with their ranks

KINDS = {
    "activation": "activations",
    "gradient": "activations",
    "cdp-weights": "weights",
    "cdp-gradient": "gradients",
    "all-reduce": "gradients",
    WEIGHTS: "weights",
    GRADIENTS: "gradients",
}


def pairs(timeline: Timeline) -> list[tuple[Act, Act]]:
    """Each S with the R that took its message: the k-th of a channel with the k-th, as the record is complete."""
    waiting: dict[tuple, deque[Act]] = defaultdict(deque)
    found = []
    for act in timeline:
        if act.kind == "S":
            waiting[place_of(act), act.peer, act.channel].append(act)
        elif act.kind == "R":
            assert act.peer is not None
            found.append((waiting[Place(*act.peer), tuple(place_of(act)), act.channel].popleft(), act))
    return found


def between_devices(act: Act, device_of: DeviceOf) -> bool:
    """Whether a message leaves its device."""
    return act.peer is not None and device_of(place_of(act)) != device_of(Place(*act.peer))


def volume(timeline: Timeline, device_of: DeviceOf, window: Window) -> Counter[str]:
    """Bytes that leave devices in the window, by what they are."""
    found: Counter[str] = Counter()
    for act in timeline:
        leaves = act.kind == "M" or (act.kind == "S" and between_devices(act, device_of))
        if leaves and window[0] <= moment(act.end) < window[1] and act.channel in KINDS:
            found[KINDS[act.channel]] += act.bytes
    return found


def moved_states(
    timeline: Timeline, ends: dict[int, list[float]], per_step: int, full: int, window: Window
) -> Counter[str]:
    """Bytes of cyclic ZeRO's states in the window: the newest weights, older ones, sums of gradients.

    `ends`: of all backwards, by stage; `full`: bytes of a stage's weights. A message is the states' description and
    then rows.
    """
    bundles: list[tuple[Place, float, list[Act]]] = []
    latest: dict[Place, list[Act]] = {}
    for act in timeline:
        if act.kind == "S" and act.channel == "cdp-state":
            place = place_of(act)
            if act.bytes != full:
                latest[place] = []
                bundles.append((place, moment(act.end), latest[place]))
            else:
                latest[place].append(act)
    found: Counter[str] = Counter()
    for place, now, rows in bundles:
        if window[0] <= now < window[1]:
            summed = sum(x <= now for x in ends[place.stage]) % per_step != 0
            found += Counter(weights=full, gradients=full * summed, older=full * (len(rows) - 1 - summed))
    return found


def waiting(timeline: Timeline, device_of: DeviceOf) -> list[Held]:
    """Weights that were sent and are not yet taken, at the device they are for."""
    return [
        Held(device_of(place_of(taken)), taken.stage, (place_of(taken), number), moment(sent.end), moment(taken.end))
        for number, (sent, taken) in enumerate(pairs(timeline))
        if taken.channel == "cdp-weights" and between_devices(taken, device_of)
    ]


# ---- steps of communication ------------------------------------------------------------------------------------------


def longest_chain(timeline: Timeline, device_of: DeviceOf, window: Window, replicas: int) -> int:
    """The most messages that wait for each other at one moment of the window."""
    taker = {id(sent): taken for sent, taken in pairs(timeline)}
    sender = {id(taken): sent for sent, taken in pairs(timeline)}
    chain = _Chain()
    met: dict[int, list[Act]] = {id(act): row for row in timeline.meetings() for act in row}
    for act in timeline:
        now = moment(act.end)
        if act.kind not in "SRM" or not window[0] <= now < window[1]:
            continue
        if act.kind == "M":
            chain.exchange(now, met[id(act)], replicas)
        elif act.kind == "S":
            taken = taker.get(id(act))
            if taken is not None and moment(taken.end) == now and between_devices(act, device_of):
                chain.sent(now, act)
        elif id(act) in sender:
            chain.taken(now, act, sender[id(act)])
    return chain.longest


class _Chain:
    """Ranks of messages: 1 + that of the latest one they wait for."""

    def __init__(self) -> None:
        self.longest = 0
        self._ranks: dict[int, int] = {}
        self._before: dict[tuple[float, Place], int] = defaultdict(int)  # of what a worker has taken at a moment
        self._out: dict[tuple[float, Place, str], tuple[Hashable, int]] = {}  # to whom it has sent last, and the rank
        self._met: set[int] = set()

    def sent(self, now: float, act: Act) -> None:
        here = place_of(act)
        to, rank = self._out.get((now, here, act.channel), (None, 0))
        if to != act.peer:
            rank = 1 + max(rank, self._before[now, here])
            self._out[now, here, act.channel] = (act.peer, rank)
        self._ranks[id(act)] = rank
        self.longest = max(self.longest, rank)

    def taken(self, now: float, act: Act, sent: Act) -> None:
        key = (now, place_of(act))
        self._before[key] = max(self._before[key], self._ranks.get(id(sent), 0))

    def exchange(self, now: float, row: list[Act], replicas: int) -> None:
        if id(row[0]) in self._met:
            return
        self._met.add(id(row[0]))
        begin = max(self._before[now, place_of(act)] for act in row)
        rank = begin + steps_of_mean(replicas)
        for act in row:
            self._before[now, place_of(act)] = rank
        self.longest = max(self.longest, rank)


@lru_cache
def steps_of_mean(replicas: int) -> int:
    """The longest chain of messages in a mean over so many replicas, from the program that does it."""
    return chain_of(lambda member: exchange.mean(member, [torch.zeros(replicas)]), replicas)


def chain_of(program: Callable[[exchange.Member], Coroutine[Any, Any, Any]], size: int) -> int:
    """The longest chain of messages of a program among `size` members, which is run."""
    boxes: _Boxes = defaultdict(deque)
    members = [_Member(rank, size, boxes) for rank in range(size)]
    running = [program(member) for member in members]
    while running:
        running = [one for one in running if not _over(one)]
    return max(member.longest for member in members)


def _over(program: Coroutine[Any, Any, Any]) -> bool:
    try:
        program.send(None)
    except StopIteration:
        return True
    return False


class _Member:
    """One of those that exchange; it counts what waits for what."""

    def __init__(self, rank: int, size: int, boxes: _Boxes) -> None:
        self.rank, self.size, self.longest = rank, size, 0
        self._boxes, self._latest = boxes, 0  # rank of the latest message it has sent or taken

    def put(self, to: int, x: Tensor) -> None:
        self._latest += 1
        self.longest = max(self.longest, self._latest)
        self._boxes[self.rank, to].append((self._latest, x))

    def get(self, source: int) -> Awaitable[Tensor]:
        return _Taking(self, self._boxes[source, self.rank])

    def took(self, rank: int) -> None:
        self._latest = max(self._latest, rank)


class _Taking:
    """The next message of a box."""

    def __init__(self, member: _Member, box: deque[tuple[int, Tensor]]) -> None:
        self._member, self._box = member, box

    def __await__(self) -> Generator[None, None, Tensor]:
        while not self._box:
            yield
        rank, x = self._box.popleft()
        self._member.took(rank)
        return x
