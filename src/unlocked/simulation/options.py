"""The options by which a person describes a cluster on the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidChoice

if TYPE_CHECKING:
    from .hardware import Hardware


@dataclass(frozen=True)
class ClusterOptions:
    """Options of every command that simulates."""

    speeds: str | None = None
    """Speed of each device as a factor, e.g. 1,1,0.5; 1 where the row ends."""
    flops: str | None = None
    """Operations per second a device really reaches, e.g. 10T."""
    memory_bandwidth: str | None = None
    """Memory bandwidth of a device, e.g. 500GB/s: what bounds all that is no matrix product."""
    memory: str | None = None
    """Memory of a device, e.g. 16GiB."""
    bandwidth: str | None = None
    """Bandwidth of a device's link, e.g. 1Gbit/s; with --per-node: of a node's."""
    latency: str | None = None
    """Latency of a message, e.g. 100us."""
    per_node: int | None = None
    """Devices per node."""
    inside_bandwidth: str | None = None
    """Bandwidth between two devices of a node."""
    inside_latency: str | None = None
    """Latency between two devices of a node."""
    slow_downs: str | None = None
    """Random slow-downs, PROBABILITY:FACTOR, e.g. 0.1:4: a tenth of the acts take four times as long."""
    costs: Path | None = None
    """Cost file of unlocked calibrate."""


def hardware(options: ClusterOptions, devices: int | None, base: Hardware, seed: int = 0) -> Hardware:
    """The cluster that the options describe; what they leave open is `base`'s. Raises InvalidChoice."""
    from . import quantities
    from .hardware import Device, SlowDowns
    from .network import Edge, Network

    def given(text: str | None, read: object, otherwise: float | None) -> float | None:
        return otherwise if text is None else read(text)  # type: ignore[operator]

    device = Device(
        given(options.flops, quantities.speed, base.device.flops),  # type: ignore[arg-type]
        given(options.memory_bandwidth, quantities.rate, base.device.memory_bandwidth),  # type: ignore[arg-type]
        given(options.memory, quantities.size, base.device.memory),  # type: ignore[arg-type]
    )
    network = base.network
    if any(x is not None for x in (options.bandwidth, options.latency, options.per_node)):
        edge = Edge(
            given(options.latency, quantities.duration, network.edge.latency),  # type: ignore[arg-type]
            given(options.bandwidth, quantities.rate, network.edge.bandwidth),  # type: ignore[arg-type]
        )
        inside = Edge(
            given(options.inside_latency, quantities.duration, 0.0),  # type: ignore[arg-type]
            given(options.inside_bandwidth, quantities.rate, math.inf),  # type: ignore[arg-type]
        )
        network = Network(
            edge, inside, options.per_node, {}, network.collective, network.send, network.receive, network.exchange
        )
    if options.per_node is None and (options.inside_bandwidth is not None or options.inside_latency is not None):
        raise InvalidChoice("--inside-bandwidth and --inside-latency are of nodes; give --per-node as well.")
    return base.but(
        device=device,
        speeds=base.speeds if options.speeds is None else quantities.numbers("speeds", options.speeds),
        slow_downs=base.slow_downs if options.slow_downs is None else _slow_downs(options.slow_downs, seed, SlowDowns),
        network=network,
        devices=devices,
    )


def _slow_downs(text: str, seed: int, make: type) -> object:
    try:
        probability, factor = (float(part) for part in text.split(":"))
    except ValueError:
        raise InvalidChoice(f"--slow-downs {text!r} is not PROBABILITY:FACTOR; write for example 0.1:4.") from None
    return make(probability, factor, seed=seed)
