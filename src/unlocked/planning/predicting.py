"""One candidate on the simulated cluster: what it will do there, or why it cannot.

A few updates are simulated, shapes only, after as many as it takes to fill the pipeline of a delayed rule, and the later half
of them is taken for what goes on for ever. One network is what rates are of: under rules that split the batch all replicas
train one, under the others each trains its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn

from ..chain import Chain
from ..consensus import Consensus
from ..credit import Credit
from ..errors import InvalidChoice, UnlockedError
from ..method_names import make_consensus, make_credit
from ..reversible import is_reversible, units
from ..simulation.costs import Costs, costs_of
from ..simulation.hardware import Hardware
from ..simulation.memory import device_peaks
from ..simulation.network import Wire
from ..simulation.simulating import seconds_per_update, simulate
from ..timeline import BUSY, Act, Timeline
from ..worker import Place
from ..worlds.placement import placement
from . import accuracy
from .candidates import Candidate
from .cuts import Cuts

STEPS = 16
HELD_MESSAGES = 2  # per channel: what a receiver of the distributed world holds before its sender must wait


Bound = Literal["computing", "wire", "waiting"]
Reason = Literal["memory", "batch", "cut"]


@dataclass(frozen=True)
class Row:
    """What a candidate is predicted to do. Bytes are per update; of one device, the one that sends most.

    networks: how many are trained at once. samples_per_second, updates_per_second: of one of them. utilisation: share of the
    time in which the devices used compute. peaks: the most bytes each device holds, in the order of the workers, replica by
    replica. bytes_step: sent by all devices, for one network. delay: the most updates between the weights of a forward and
    the update it causes, measured. exact: whether the updates are those of one device. bound: what keeps it from being
    faster, with the busiest device or wire named in `bound_by`.
    """

    method: str
    stages: int
    replicas: int
    devices: int
    accumulate: int
    networks: int
    samples_per_second: float
    updates_per_second: float
    utilisation: float
    peaks: tuple[int, ...]
    bytes_up: int
    bytes_down: int
    bytes_replicas: int
    bytes_step: int
    bytes_per_sample: float
    delay: int
    exact: bool
    accuracy: str
    bound: Bound
    bound_by: str

    @property
    def peak(self) -> int:
        """Of the fullest device."""
        return max(self.peaks)

    def to_json(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return asdict(self) | {"peak": self.peak}


@dataclass(frozen=True)
class Infeasible:
    """A candidate that cannot be, and why.

    remedy: what would help, or nothing. parts: about how many accumulated micro-batches would fit into the memory, 0 if that
    does not help. instead: in how many it does fit, as a row of the plan has it; 0 if there is none.
    """

    method: str
    stages: int
    replicas: int
    kind: Reason
    reason: str
    remedy: str = ""
    parts: int = 0
    instead: int = 0

    def to_json(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Setting:
    """What all candidates share. batch: samples of an update of one network."""

    cuts: Cuts
    hardware: Hardware
    batch: int
    devices: int
    optimizer: str


def predict(setting: Setting, candidate: Candidate) -> Row | Infeasible:
    """The candidate's row, or why it has none."""
    try:
        credit = make_credit(candidate.method.credit, candidate.stages)
        consensus = make_consensus(candidate.method.consensus, candidate.stages)
        credit.check(consensus)
        chain, profile = setting.cuts.profiled(candidate.stages, credit)
    except UnlockedError as error:
        return _infeasible(candidate, "cut", str(error))
    replicas = candidate.method.replicas
    splits = replicas if consensus.shares_data else 1
    if setting.batch % splits:
        return _infeasible(
            candidate,
            "batch",
            f"A batch of {setting.batch} cannot be split evenly among {splits} replicas.",
            f"a batch of {math.ceil(setting.batch / splits) * splits}",
        )
    pieces = splits * candidate.accumulate * credit.parts
    if setting.batch < pieces:
        return _infeasible(
            candidate, "batch", f"A batch of {setting.batch} cannot be split into {pieces} parts.", "a larger batch"
        )
    costs = costs_of(profile, setting.hardware.device, setting.optimizer)
    try:
        return _Prediction(setting, candidate, credit, consensus, chain, costs, setting.batch // splits).row()
    except InvalidChoice as error:  # a rule for other numbers of stages or replicas
        return _infeasible(candidate, "cut", str(error))


class _Prediction:
    """One candidate that has a cut and a batch. `share`: samples of an update at one replica."""

    def __init__(
        self,
        setting: Setting,
        candidate: Candidate,
        credit: Credit,
        consensus: Consensus,
        chain: Chain,
        costs: Costs,
        share: int,
    ) -> None:
        self._setting, self._candidate, self._credit, self._consensus = setting, candidate, credit, consensus
        self._chain, self._costs = chain, costs
        self._replicas, self._stages = candidate.method.replicas, candidate.stages
        views = 2 if credit.self_supervised else 1  # of each sample
        self._samples = views * math.ceil(share / candidate.accumulate)
        self._part = math.ceil(self._samples / credit.parts)  # the most computed with at once
        self._used = used_devices(setting.hardware, candidate.devices)
        self._hardware = _only(setting.hardware, self._used)
        self._placement = placement(self._replicas, self._stages, candidate.devices)
        self._filling = credit.filling(self._stages, candidate.accumulate)
        self._phases = [self._simulated(phase) for phase in range(credit.phases(self._stages))]

    def row(self) -> Row | Infeasible:
        memory, peaks = self._setting.hardware.device.memory, self._peaks()
        if memory is not None and max(peaks) > memory:
            return self._too_large(peaks, memory)
        seconds = self._seconds()
        networks = 1 if self._consensus.shares_data else self._replicas
        updates = sum(1 / x for x in seconds) / len(seconds)
        busy, wires = self._busy(), self._wires()
        sent = self._sent()
        up, down, sideways = (max(row) for row in zip(*sent.values()))
        step = sum(map(sum, sent.values())) / networks
        bound, by = self._bound(seconds, busy, wires)
        exact = self._exact()
        return Row(
            method=str(self._candidate.method),
            stages=self._stages,
            replicas=self._replicas,
            devices=self._candidate.devices,
            accumulate=self._candidate.accumulate,
            networks=networks,
            samples_per_second=updates * self._setting.batch,
            updates_per_second=updates,
            utilisation=sum(busy[place] / seconds[place.replica] for place in self._placement) / len(self._placement),
            peaks=tuple(peaks),
            bytes_up=round(up),
            bytes_down=round(down),
            bytes_replicas=round(sideways),
            bytes_step=round(step),
            bytes_per_sample=step / self._setting.batch,
            delay=max((max(timeline.staleness_counts(), default=0) for timeline in self._phases), default=0),
            exact=exact,
            accuracy=self._accuracy(exact),
            bound=bound,
            bound_by=by,
        )

    @property
    def _steps(self) -> int:
        """Updates that are simulated: twice as many as a rule's whole cycles."""
        twice = 2 * self._consensus.cycle(self._stages)
        return -(-STEPS // twice) * twice

    def _simulated(self, phase: int) -> Timeline:
        return simulate(
            self._credit,
            self._consensus,
            costs=self._costs,
            replicas=self._replicas,
            steps=self._steps + self._filling,
            samples=self._samples,
            accumulate=self._candidate.accumulate,
            hardware=self._hardware,
            chain=self._chain if self._consensus.reads_layers else None,
            phase=phase,
        )

    def _counted(self, timeline: Timeline) -> Iterator[tuple[Act, float]]:
        """Every act, and how many updates there are in the timeline of which a worker has done this part.

        A pipeline that is not emptied ends with more forwards than backwards.
        """
        if not self._credit.crossing:
            yield from ((act, self._steps) for act in timeline)
            return
        numbers: dict[tuple, set[int]] = defaultdict(set)
        for act in timeline:
            numbers[_part(act)].add(act.micro_batch)
        for act in timeline:
            once = act.kind in "UM"  # in an update; the others for each of its micro-batches
            yield act, len(numbers[_part(act)]) / (1 if once else self._candidate.accumulate)

    # ---- time ------------------------------------------------------------------------------------------------------

    def _seconds(self) -> list[float]:
        """Seconds per update of every replica: of its slowest worker, over all phases."""
        total = [0.0] * self._replicas
        for timeline in self._phases:
            slowest = [0.0] * self._replicas
            for place, interval in seconds_per_update(timeline, self._steps // 2, self._candidate.accumulate).items():
                slowest[place.replica] = max(slowest[place.replica], interval)
            total = [a + b for a, b in zip(total, slowest)]
        return total

    def _busy(self) -> dict[Place, float]:
        """Seconds per update in which each worker computes."""
        busy: dict[Place, float] = dict.fromkeys(self._placement, 0.0)
        for timeline in self._phases:
            for act, updates in self._counted(timeline):
                if act.kind in BUSY:
                    busy[Place(act.replica, act.stage)] += (act.end - act.start) / updates
        return busy

    def _wires(self) -> dict[Wire, tuple[float, Place]]:
        """Seconds per update in which each wire is taken, and who uses it most."""
        network = self._hardware.network
        taken: dict[Wire, dict[Place, float]] = defaultdict(lambda: defaultdict(float))
        for timeline in self._phases:
            for act, updates in self._counted(timeline):
                if act.kind in "SM" and act.bytes:
                    here = self._placement[Place(act.replica, act.stage)]
                    there = self._placement[_receiver(act, self._replicas)]
                    if here != there:
                        seconds = network.between(here, there).seconds(act.bytes) / updates
                        taken[network.wire(here, there)][Place(act.replica, act.stage)] += seconds
        return {wire: (sum(by.values()), max(by, key=by.__getitem__)) for wire, by in taken.items()}

    def _bound(
        self, seconds: Sequence[float], busy: Mapping[Place, float], wires: Mapping[Wire, tuple[float, Place]]
    ) -> tuple[Bound, str]:
        """What is taken nine tenths of the time; else it is the waiting."""
        computing = {place: share / seconds[place.replica] for place, share in busy.items()}
        worker = max(computing, key=lambda place: (computing[place], -self._speed(place)))
        wire, sender = max(
            ((taken / seconds[place.replica], place) for taken, place in wires.values()),
            default=(0.0, worker),
            key=lambda row: row[0],
        )
        if computing[worker] >= max(0.9, wire):
            return "computing", f"{self._name(worker)} computes {_percent(computing[worker])} of the time"
        if wire >= 0.9:
            return "wire", f"the wire of {self._name(sender)} is busy {_percent(wire)} of the time"
        wired = f", no wire is busy more than {_percent(wire)}" if wires else ""
        return "waiting", f"its devices wait: none computes more than {_percent(computing[worker])} of the time{wired}"

    def _speed(self, place: Place) -> float:
        return self._hardware.speed(self._placement[place])

    def _name(self, place: Place) -> str:
        device, speed = self._used[self._placement[place]], self._speed(place)
        where = [f"replica {place.replica}"] * (self._replicas > 1) + [f"stage {place.stage}"] * (self._stages > 1)
        where += [f"speed {speed:g}"] * (speed != 1.0)
        return f"device {device}" + (f" ({', '.join(where)})" if where else "")

    # ---- bytes -----------------------------------------------------------------------------------------------------

    def _sent(self) -> dict[Place, tuple[float, float, float]]:
        """Bytes per update that each worker sends up, down and among the replicas."""
        sent: dict[Place, list[float]] = {place: [0.0, 0.0, 0.0] for place in self._placement}
        for timeline in self._phases:
            for act, updates in self._counted(timeline):
                if act.kind in "SM":
                    sent[Place(act.replica, act.stage)][_direction(act)] += act.bytes / updates
        return {place: (row[0], row[1], row[2]) for place, row in sent.items()}

    def _peaks(self) -> list[int]:
        rows = [
            device_peaks(bounded(timeline), self._costs, self._part, self._placement, self._credit)
            for timeline in self._phases
        ]
        return [max(row[device] for row in rows) for device in range(self._candidate.devices)]

    def _too_large(self, peaks: list[int], memory: int) -> Infeasible:
        worst = max(range(len(peaks)), key=peaks.__getitem__)
        place = next(place for place, device in self._placement.items() if device == worst)
        held = self._costs[place.stage].held + self._credit.holds_beside(place.stage)
        reason = f"{self._name(place)} would hold {in_bytes(peaks[worst])}, but has {in_bytes(memory)}."
        more = "more stages" if self._setting.devices > self._replicas else "a device with more memory"
        if held >= memory:
            alone = f"{more}; weights, gradients and the optimizer's state alone take {in_bytes(held)}"
            return _infeasible(self._candidate, "memory", reason, alone)
        parts = self._candidate.accumulate * 2 ** math.ceil(math.log2((peaks[worst] - held) / (memory - held)))
        remedy = f"about {parts} accumulated micro-batches (--accumulate {parts}), {more}, or a smaller batch"
        return _infeasible(self._candidate, "memory", reason, remedy, parts)

    # ---- accuracy --------------------------------------------------------------------------------------------------

    def _exact(self) -> bool:
        rules = [accuracy.of(self._credit.name).exact]
        rules += [accuracy.of(self._consensus.name).exact] * (self._replicas > 1)
        return all(rules)

    def _accuracy(self, exact: bool) -> str:
        if exact:
            normed = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in self._chain.modules())
            split = normed and self._part < self._setting.batch
            return f"exact, but BatchNorm sees {self._part} samples" if split else "exact"
        rules = [self._credit.name] * (not accuracy.of(self._credit.name).exact)
        if self._replicas > 1 and not accuracy.of(self._consensus.name).exact:
            rules.append(self._consensus.name)
        words = [accuracy.of(rule).short for rule in rules]
        if self._credit.held(last=False).what == "parts" and not self._reversible():
            words.append("nothing here is reversible, so it keeps inputs")
        return "; ".join(words)

    def _reversible(self) -> bool:
        """Whether a stage below the last has a part that is."""
        return any(is_reversible(unit) for stage in list(self._chain)[:-1] for unit in units(stage.body))


def used_devices(hardware: Hardware, count: int) -> list[int]:
    """Which devices a candidate is given: the fastest, in their order; the first ones where nodes or edges matter."""
    speeds = [hardware.speed(device) for device in range(max(hardware.devices or 0, count))]
    if count > 1 and (hardware.network.per_node is not None or hardware.network.edges):
        return list(range(count))
    fastest = sorted(range(len(speeds)), key=lambda device: -speeds[device])[:count]
    return sorted(fastest)


def crowds(hardware: Hardware, devices: int) -> list[int]:
    """All devices, and how many are left without the slowest, the two slowest kinds, …: at most four numbers.

    Only all of them where nodes or edges say which devices are neighbours.
    """
    if hardware.network.per_node is not None or hardware.network.edges:
        return [devices]
    speeds = [hardware.speed(device) for device in range(devices)]
    return [sum(speed >= least for speed in speeds) for least in sorted(set(speeds))[:4]]


def bounded(timeline: Timeline) -> Timeline:
    """The timeline in which a message leaves only when few enough of its channel are under way.

    A simulated sender never waits, so one that is faster than its wire would pile up messages without end; a real one waits.
    """
    leaves: dict[int, float] = {}
    taken: dict[tuple, list[float]] = defaultdict(list)
    for sent, received in timeline.messages():
        row = taken[(received.replica, received.stage, received.peer, received.channel)]
        if len(row) >= HELD_MESSAGES:
            leaves[id(sent)] = max(sent.end, row[-HELD_MESSAGES])
        row.append(received.end)
    return Timeline(act._replace(end=leaves[id(act)]) if id(act) in leaves else act for act in timeline)


def in_bytes(size: float) -> str:
    """4509715661 → `4.20 GiB`, as memory is counted."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _only(hardware: Hardware, used: Sequence[int]) -> Hardware:
    """The cluster of these devices only; memory is looked at here, not there."""
    speeds = tuple(hardware.speed(device) for device in used)
    return hardware.but(
        devices=len(used),
        speeds=speeds if any(speed != 1.0 for speed in speeds) else (),
        device=replace(hardware.device, memory=None),
    )


def _part(act: Act) -> tuple:
    """Acts that a worker does equally often have the same."""
    return act.replica, act.stage, act.kind, act.channel, act.peer


def _receiver(act: Act, replicas: int) -> Place:
    """Whom a message goes to; in an exchange the next replica of the ring."""
    return Place(*act.peer) if act.peer is not None else Place((act.replica + 1) % replicas, act.stage)


def _direction(act: Act) -> int:
    if act.kind == "M" or act.peer is None or act.peer[0] != act.replica:
        return 2
    return 0 if act.peer[1] > act.stage else 1


def _infeasible(candidate: Candidate, kind: Reason, reason: str, remedy: str = "", parts: int = 0) -> Infeasible:
    method = candidate.method
    return Infeasible(str(method), candidate.stages, method.replicas, kind, " ".join(reason.split()), remedy, parts)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
