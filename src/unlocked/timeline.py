"""What happened: a list of acts, in any world.

    kind  what                                       bytes
    F     forward of a stage                         0
    B     backward of a stage                        0
    L     a head: its forward and backward           0
    U     update of the weights                      0
    S     a message leaves                           its payload
    R     a message is taken                         its payload
    M     an exchange among replicas (mean, shuffle) what this worker sends

Times are seconds of the world's own clock (wall clock in process). A message is taken in the order it was sent, so a
timeline alone says which S belongs to which R; simulation/retiming.py uses that to re-time it for another cluster.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from rich.table import Table

KINDS = "FBLUSRM"
BUSY = "FBLU"  # a worker computes or updates


class Act(NamedTuple):
    """One thing one worker did. `replica` and `stage` count from 0; `version` is how often the stage had been updated."""

    kind: str
    replica: int
    stage: int
    micro_batch: int
    version: int
    bytes: int
    start: float
    end: float
    channel: str = ""
    peer: tuple[int, int] | None = None  # (replica, stage) at the other end of an S or R
    wire: int = 0  # bytes that left the process for this S or M, headers included; 0 for what stays inside it


class Timeline:
    """The acts of a run, in the order they were recorded (per worker: the order they happened)."""

    def __init__(self, acts: Iterable[Act] = ()) -> None:
        self.acts: list[Act] = list(acts)

    def __len__(self) -> int:
        return len(self.acts)

    def __iter__(self) -> Iterator[Act]:
        return iter(self.acts)

    def workers(self) -> list[tuple[int, int]]:
        """The (replica, stage) pairs that did anything, sorted."""
        return sorted({(act.replica, act.stage) for act in self.acts})

    def of(self, replica: int, stage: int) -> list[Act]:
        """The acts of one worker, in its own order."""
        return [act for act in self.acts if (act.replica, act.stage) == (replica, stage)]

    def ending(self, share: float) -> Timeline:
        """The acts that begin in the last `share` of its time."""
        begin, end = (
            min((act.start for act in self.acts), default=0.0),
            max((act.end for act in self.acts), default=0.0),
        )
        return Timeline(act for act in self.acts if act.start >= end - min(1.0, share) * (end - begin))

    def bytes_sent(self) -> dict[str, int]:
        """Payload bytes that left workers, by channel: S between stages, M between replicas."""
        sent: Counter[str] = Counter()
        for act in self.acts:
            if act.kind in "SM" and act.bytes:
                sent[act.channel] += act.bytes
        return dict(sent)

    def wire_sent(self) -> dict[str, int]:
        """Bytes that left processes, headers included, by channel; a channel that stays inside a process has none."""
        sent: Counter[str] = Counter()
        for act in self.acts:
            if act.kind in "SM" and act.wire:
                sent[act.channel] += act.wire
        return dict(sent)

    def messages(self) -> list[tuple[Act, Act]]:
        """Each S with the R that took its message: the k-th with the k-th of (source, target, channel, micro-batch).

        A message between different micro-batches is matched by its turn on the channel: the k-th with the k-th. What was
        sent before the record began, or is taken after its end, is left out.
        """
        sent: dict[tuple, list[Act]] = defaultdict(list)
        taken: dict[tuple, list[Act]] = defaultdict(list)
        for act in self.acts:
            if act.kind == "S":
                sent[((act.replica, act.stage), act.peer, act.channel)].append(act)
            elif act.kind == "R":
                taken[(act.peer, (act.replica, act.stage), act.channel)].append(act)
        return [pair for way, row in taken.items() for pair in _matched(sent[way], row)]

    def meetings(self) -> list[list[Act]]:
        """The M acts that are one exchange: the k-th of each replica on the same channel of the same stage."""
        turns: Counter[tuple] = Counter()
        met: dict[tuple, list[Act]] = defaultdict(list)
        for act in self.acts:
            if act.kind == "M":
                here = (act.replica, act.stage, act.channel)
                met[(act.stage, act.channel, turns[here])].append(act)
                turns[here] += 1
        return list(met.values())

    def step_starts(self) -> list[float]:
        """When steps begin: the forwards that are the first with new weights, of the worker that has most of them."""
        starts: list[float] = []
        for worker in self.workers():
            found, version = [], None
            for act in self.of(*worker):
                if act.kind == "F" and act.version != version:
                    found.append(act.start)
                    version = act.version
            starts = found if len(found) > len(starts) else starts
        return starts

    def between(self, begin: float, end: float) -> Timeline:
        """What happened from `begin` to `end`, in seconds of this timeline's clock; acts that stick out are cut off."""
        return Timeline(
            act._replace(start=max(begin, act.start), end=min(end, act.end))
            for act in self.acts
            if begin <= act.start <= act.end <= end or max(begin, act.start) < min(end, act.end)
        )

    def span(self) -> float:
        """Seconds from the first start to the last end; 0 for an empty timeline."""
        if not self.acts:
            return 0.0
        return max(act.end for act in self.acts) - min(act.start for act in self.acts)

    def idle_share(self) -> float:
        """Mean of `idle_shares`: share of (workers × span) in which a worker neither computes nor updates."""
        return statistics.fmean(self.idle_shares().values()) if self.acts else 0.0

    def idle_shares(self, begin: float | None = None, end: float | None = None) -> dict[tuple[int, int], float]:
        """Share of the time from `begin` to `end` in which each worker neither computes nor updates.

        Sending, waiting for messages and exchanges count as idle. Without limits: over the whole span, which all workers
        share. Limits are seconds of this timeline's clock; 0 for a span of no length.
        """
        begin = min((act.start for act in self.acts), default=0.0) if begin is None else begin
        end = max((act.end for act in self.acts), default=0.0) if end is None else end
        busy = dict.fromkeys(self.workers(), 0.0)
        for act in self.acts:
            if act.kind in BUSY:
                busy[(act.replica, act.stage)] += max(0.0, min(end, act.end) - max(begin, act.start))
        span = end - begin
        return {worker: max(0.0, 1.0 - seconds / span) if span > 0 else 0.0 for worker, seconds in busy.items()}

    def staleness(self) -> dict[tuple[int, int], list[list[int]]]:
        """For every worker and update, in order: how many updates old the weights were that its gradients are of.

        τ = version at the update − version of the forward, of every micro-batch with a backward since the update before (once
        for each). Read off the acts alone; micro-batches whose forward is not among them are left out.
        """
        delays: dict[tuple[int, int], list[list[int]]] = {worker: [] for worker in self.workers()}
        seen: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
        ready: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
        for act in self.acts:
            worker = (act.replica, act.stage)
            if act.kind == "F":
                seen[worker][act.micro_batch] = act.version
            elif act.kind == "B" and act.micro_batch in seen[worker]:
                ready[worker][act.micro_batch] = seen[worker][act.micro_batch]
            elif act.kind == "U" and worker in ready:  # a mix may follow as a U of its own
                delays[worker].append([act.version - version for version in ready.pop(worker).values()])
        return delays

    def staleness_counts(self) -> dict[int, int]:
        """Histogram of `staleness`: how many gradients were how many updates old, over all workers and updates."""
        return dict(sorted(Counter(chain.from_iterable(chain.from_iterable(self.staleness().values()))).items()))

    @classmethod
    def median(cls, steps: Sequence[Timeline]) -> Timeline:
        """The last of several steps that did the same acts, each act as long as its median over the steps.

        One step on a busy machine is mostly noise. Steps that did something else than the last one are left out. Only
        durations mean something in the result: starts are those of the last step.
        """
        last = steps[-1]
        alike = [step for step in steps if [act[:3] for act in step] == [act[:3] for act in last]]
        acts = []
        for act, *others in zip(last, *alike):
            length = statistics.median(other.end - other.start for other in others)
            acts.append(act._replace(end=act.start + length))
        return cls(acts)

    def table(self) -> Table:
        """All acts as a rich table."""
        table = Table("worker", "act", "micro-batch", "version", "start ms", "ms", "bytes", "channel", "peer")
        origin = min((act.start for act in self.acts), default=0.0)
        for act in self.acts:
            table.add_row(
                f"{act.replica}.{act.stage}",
                act.kind,
                str(act.micro_batch),
                str(act.version),
                f"{1e3 * (act.start - origin):.3f}",
                f"{1e3 * (act.end - act.start):.3f}",
                str(act.bytes or ""),
                act.channel,
                f"{act.peer[0]}.{act.peer[1]}" if act.peer else "",
            )
        return table

    def __str__(self) -> str:
        """One line per worker, an act as kind, micro-batch and weight version: `F0@3 S0@3 B0@3 U0@3`."""
        lines = []
        for replica, stage in self.workers():
            acts = " ".join(f"{act.kind}{act.micro_batch}@{act.version}" for act in self.of(replica, stage))
            lines.append(f"replica {replica} stage {stage}: {acts}")
        return "\n".join(lines)

    def to_json(self) -> list[dict[str, Any]]:
        """The acts as plain dictionaries."""
        return [act._asdict() for act in self.acts]

    @classmethod
    def from_json(cls, rows: Iterable[dict[str, Any]]) -> Timeline:
        """The inverse of `to_json`."""
        return cls(Act(**{**row, "peer": tuple(row["peer"]) if row.get("peer") else None}) for row in rows)


def _matched(sent: list[Act], taken: list[Act]) -> Iterator[tuple[Act, Act]]:
    """The messages of one channel of one link: each S with its R."""
    if sent and sent[0].peer is not None and sent[0].peer[0] != sent[0].replica:
        yield from _by_turn(sent, taken)  # either replica has a micro-batch of its own
        return
    by_number = _by_micro_batch(taken)
    rows = [(row, by_number[number]) for number, row in _by_micro_batch(sent).items() if number in by_number]
    for left, came in rows or [(sent, taken)]:
        # where more was taken than sent, the first to be taken were sent before the record began
        yield from zip(left, came[max(0, len(came) - len(left)) :])


def _by_turn(sent: list[Act], taken: list[Act]) -> Iterator[tuple[Act, Act]]:
    """The k-th with the k-th, without those taken first whose sending is not in the record, as nothing is taken before it is
    sent."""
    skip = 0
    while any(taking.end < sending.start for sending, taking in zip(sent, taken[skip:])):
        skip += 1
    return zip(sent, taken[skip:])


def _by_micro_batch(acts: list[Act]) -> dict[int, list[Act]]:
    rows: dict[int, list[Act]] = defaultdict(list)
    for act in acts:
        rows[act.micro_batch].append(act)
    return rows
