"""What the numbers mean, in sentences. Pure functions of a report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..live import in_bytes
from .connections import Connection
from .facts import Facts
from .measuring import Clock, Speed

_LITTLE_MEMORY = 512 * 2**20  # bytes
_SKEW = 1.0  # seconds
_UNEVEN = 4.0  # times slower than the other direction
_SLOW = 12.5e6  # bytes per second: 100 Mbit/s
_SLOW_STORE = 0.1  # seconds


class Finding(NamedTuple):
    """`wrong`: a run would fail, or something is broken; otherwise a run works, but slower or less clearly than it could."""

    wrong: bool
    sentence: str


@dataclass(frozen=True)
class Report:
    """All that was found out. `store_round_trips`: seconds, by rank; empty without other processes."""

    processes: list[Facts]
    rendezvous: str | None = None
    store_round_trips: list[float] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    links: list[Speed] = field(default_factory=list)
    clocks: list[Clock] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """What is wrong first, then what could be better."""
        found = [Finding(True, sentence) for sentence in self.broken]
        for look in (_versions, _interfaces, _connections, _links, _oversubscription, _memory, _clocks, _store):
            found += look(self)
        return sorted(found, key=lambda finding: not finding.wrong)

    @property
    def well(self) -> bool:
        """Whether nothing is wrong."""
        return not any(finding.wrong for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As plain values: seconds, bytes, bytes per second."""
        return {
            "event": "doctor",
            "well": self.well,
            "findings": [finding._asdict() for finding in self.findings],
            "rendezvous": self.rendezvous,
            "store_round_trips": self.store_round_trips,
            "processes": [facts.to_json() for facts in self.processes],
            "connections": [asdict(row) for row in self.connections],
            "links": [asdict(row) for row in self.links],
            "clocks": [asdict(row) for row in self.clocks],
        }


def rate_in_words(rate: float) -> str:
    """6.1e6 → `6.1 MB/s (49 Mbit/s)`."""
    return f"{in_bytes(rate)}/s ({in_bytes(8 * rate).replace('B', 'bit')}/s)"


def _versions(report: Report) -> Iterator[Finding]:
    first = report.processes[0]
    for what in ("python", "torch", "unlocked"):
        for facts in report.processes[1:]:
            theirs, ours = getattr(facts, what), getattr(first, what)
            if what == "python":  # a patch release changes nothing that matters here
                theirs, ours = theirs.rpartition(".")[0], ours.rpartition(".")[0]
            if theirs != ours:
                yield Finding(
                    what != "python",
                    f"Rank {facts.rank} runs {what} {theirs}, rank {first.rank} {ours}; install the same version.",
                )


def _interfaces(report: Report) -> Iterator[Finding]:
    """A loopback address is no way to another machine."""
    for facts in report.processes:
        elsewhere = [other.rank for other in report.processes if other.machine != facts.machine]
        if facts.loopback and elsewhere:
            yield Finding(
                True,
                f"Rank {facts.rank} uses the loopback interface {facts.interface} ({facts.address}), which rank "
                f"{elsewhere[0]} on another machine cannot reach; give the rendezvous an address that is not the "
                f"loopback's (is {facts.host} in /etc/hosts as 127.0.…?), or choose with --interface.",
            )


def _connections(report: Report) -> Iterator[Finding]:
    for row in report.connections:
        if row.seconds is None:
            yield Finding(
                True,
                f"Rank {row.source} cannot connect to rank {row.target} at {row.address} ({row.reason}); let a firewall "
                "between them pass TCP on all ports, or choose another network with --interface.",
            )


def _links(report: Report) -> Iterator[Finding]:
    rates = {(link.source, link.target): link.rate for link in report.links}
    for link in report.links:
        if link.kind != "gloo":  # memory is fast, and its rate is at the mercy of what else the machine does
            continue
        name = f"The link {link.source}→{link.target} carries {rate_in_words(link.rate)}"
        ratio = rates.get((link.target, link.source), link.rate) / link.rate
        if ratio >= _UNEVEN:
            back = f"{ratio:.0f} times less than {link.target}→{link.source}"
            yield Finding(True, f"{name}, {back}; look for a bad cable, a half-duplex port or a limit on one side.")
        elif link.rate < _SLOW:
            seconds = 10e6 / link.rate
            yield Finding(
                False,
                f"{name}: a message of 10 MB takes {seconds:.1f} s. Cut where activations are small, or use a faster "
                "network (--interface).",
            )


def _oversubscription(report: Report) -> Iterator[Finding]:
    for machine in dict.fromkeys(facts.machine for facts in report.processes):
        rows = [facts for facts in report.processes if facts.machine == machine]
        threads = sum(facts.threads for facts in rows)
        cores = _usable(rows)
        if threads > cores:
            each = max(1, int(cores // len(rows)))
            yield Finding(
                False,
                f"Host {rows[0].host} has {cores:.2g} core(s) for {len(rows)} process(es) with {threads} threads in all; "
                + (f"start each with OMP_NUM_THREADS={each}." if each * len(rows) <= cores else "start fewer there."),
            )


def _usable(rows: list[Facts]) -> float:
    """Cores that processes of one machine have between them; those with one host name share one quota."""
    quotas = {facts.host: facts.core_quota for facts in rows}
    allowed = sum(math.inf if quota is None else quota for quota in quotas.values())
    return min(len({core for facts in rows for core in facts.cores}), allowed)


def _memory(report: Report) -> Iterator[Finding]:
    for facts in report.processes:
        if facts.memory_free is not None and facts.memory_free < _LITTLE_MEMORY:
            yield Finding(
                False, f"Only {in_bytes(facts.memory_free)} of memory are free for rank {facts.rank} on {facts.host}."
            )


def _clocks(report: Report) -> Iterator[Finding]:
    for clock in report.clocks:
        if abs(clock.wall) > _SKEW + clock.uncertainty:
            way = "behind" if clock.wall > 0 else "ahead of"
            yield Finding(
                False,
                f"The clock of rank {clock.rank} is {abs(clock.wall):.1f} s {way} rank 0's; training does not mind, but dates "
                "in logs and files will mislead: let NTP set the clocks.",
            )


def _store(report: Report) -> Iterator[Finding]:
    for rank, seconds in enumerate(report.store_round_trips):
        if seconds > _SLOW_STORE:
            yield Finding(
                False, f"The rendezvous store answers rank {rank} in {seconds * 1e3:.0f} ms; starting will be slow."
            )
