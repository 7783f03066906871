"""How long messages take between devices.

A message first waits until the wire it leaves by is free, then occupies it for bytes/bandwidth seconds, and arrives a latency
later. Wires are full duplex; what comes in never waits. Which wire a message leaves by:

    uniform        every device has one wire to all others
    edges          every named pair of devices has a wire of its own in each direction; other pairs cannot talk
    hierarchical   a device has one wire to the others of its node; a node has one wire to the other nodes

An all-reduce goes round a ring of its members in the order of the replicas: 2(N−1) rounds, each of which moves 1/N of the
payload along every edge, so uniformly it takes 2(N−1)/N · bytes/bandwidth + 2(N−1) · latency. With `collective="direct"`
(what the distributed world does) every member sends its parts to all others at once, twice: two latencies, the same volume.

Besides, handling a message may keep a worker busy: `send`, `receive` and `exchange` are seconds per message and per byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..errors import InvalidChoice, choose

Wire = tuple[int, ...]


class Edge(NamedTuple):
    """Seconds of latency, bytes per second."""

    latency: float = 0.0
    bandwidth: float = math.inf

    def seconds(self, size: float) -> float:
        """How long `size` bytes occupy the wire."""
        return size / self.bandwidth


class Line(NamedTuple):
    """A cost that is `fixed` + `each` × amount."""

    fixed: float = 0.0
    each: float = 0.0

    def at(self, amount: float) -> float:
        """Its value."""
        return self.fixed + self.each * amount


INSTANT, NOTHING = Edge(), Line()


@dataclass(frozen=True)
class Network:
    """What lies between the devices, which are numbered from 0.

    Args:
        edge: between any two devices, or between any two nodes if `per_node` is given. Latency ≥ 0 s, bandwidth > 0 bytes/s.
        inside: between two devices of a node. per_node: devices per node; None: there are no nodes.
        edges: the pairs of devices that are joined, each in both directions; empty: all are.
        collective: how a mean over N members travels; see above.
        send, receive: seconds a worker is busy with a message, by its bytes. exchange: the same with an exchange.
    """

    edge: Edge = INSTANT
    inside: Edge = INSTANT
    per_node: int | None = None
    edges: Mapping[tuple[int, int], Edge] = field(default_factory=dict)
    collective: Literal["ring", "direct"] = "ring"
    send: Line = NOTHING
    receive: Line = NOTHING
    exchange: Line = NOTHING

    def __post_init__(self) -> None:
        choose("collective", self.collective, ("ring", "direct"))
        for edge in (self.edge, self.inside, *self.edges.values()):
            if not (edge.latency >= 0.0 and edge.bandwidth > 0.0) or math.isinf(edge.latency):
                raise InvalidChoice(
                    f"A link of latency {edge.latency} s and bandwidth {edge.bandwidth} bytes/s is not possible; "
                    "give a latency of at least 0 and a bandwidth greater than 0."
                )
        if self.per_node is not None and self.per_node < 1:
            raise InvalidChoice(f"{self.per_node} devices per node is not possible; give at least 1.")

    def between(self, source: int, target: int) -> Edge:
        """The edge from one device to another. Raises InvalidChoice if they are not joined."""
        if source == target:
            return INSTANT
        if self.edges:
            edge = self.edges.get((source, target)) or self.edges.get((target, source))
            if edge is None:
                raise InvalidChoice(
                    f"Devices {source} and {target} must talk, but this network has no edge between them; "
                    "add it, or place the workers otherwise."
                )
            return edge
        return self.inside if self._same_node(source, target) else self.edge

    def wire(self, source: int, target: int) -> Wire:
        """The name of the wire by which a message leaves."""
        if self.edges:
            return (source, target)
        if self.per_node is None:
            return (source,)
        return (source,) if self._same_node(source, target) else (-1, source // self.per_node)

    def _same_node(self, source: int, target: int) -> bool:
        return self.per_node is not None and source // self.per_node == target // self.per_node

    def ring(self, members: Sequence[int]) -> list[Edge]:
        """The edges of the ring through these devices."""
        return [self.between(here, there) for here, there in zip(members, [*members[1:], members[0]])]

    def mean_seconds(self, size: float, members: Sequence[int]) -> float:
        """Seconds of a mean of `size` bytes over the devices `members`, once all have come."""
        count = len(members)
        if count == 1:
            return 0.0
        if self.per_node is None and not self.edges:
            slowest = self.edge.latency, self.edge.seconds(size / count)
            return self._mean(count, *slowest, self.edge.latency + slowest[1])
        edges = self.ring(members)
        latency = max(edge.latency for edge in edges)
        part = max(edge.seconds(size / count) for edge in edges)
        return self._mean(count, latency, part, max(edge.latency + edge.seconds(size / count) for edge in edges))

    def _mean(self, count: int, latency: float, part: float, slowest_round: float) -> float:
        if self.collective == "ring":
            return 2 * (count - 1) * slowest_round
        return 2 * latency + 2 * (count - 1) * part

    def spread_seconds(self, sent: float, members: Sequence[int]) -> float:
        """Seconds in which every device of `members` sends `sent` bytes, spread over the others."""
        if len(members) == 1:
            return 0.0
        edges = [self.edge] if self.per_node is None and not self.edges else self.ring(members)
        return max(edge.latency + edge.seconds(sent) for edge in edges)


FREE = Network()
"""A network on which nothing takes any time."""


def uniform(latency: float = 0.0, bandwidth: float = math.inf) -> Network:
    """Every device has one wire to all others: seconds, bytes per second."""
    return Network(Edge(latency, bandwidth))


def hierarchical(per_node: int, inside: Edge, outside: Edge) -> Network:
    """Nodes of `per_node` devices each; the devices of a node share its wire to the other nodes."""
    return Network(outside, inside, per_node)
