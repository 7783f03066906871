"""The options by which a person describes a cluster on the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import InvalidChoice

if TYPE_CHECKING:
    from .hardware import Hardware, SlowDowns

T = TypeVar("T")


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


CLUSTER_OPTIONS = tuple(field.name for field in fields(ClusterOptions))


def in_words(given: Mapping[str, Any]) -> str:
    """The cluster of a simulated run, as one line."""
    if not given:
        return "on a simulated cluster: a device of 1 GFLOP/s for each worker, a network that takes no time"
    return "on a simulated cluster: " + ", ".join(f"{name.replace('_', ' ')} {one}" for name, one in given.items())


def described(options: ClusterOptions, world: str) -> dict[str, Any] | None:
    """The cluster options that were given, as JSON; None where the world is no simulated one.

    Raises InvalidChoice if there are some nevertheless, or if they cannot be read.
    """
    given = {name: getattr(options, name) for name in CLUSTER_OPTIONS}
    given = {name: str(x) if isinstance(x, Path) else x for name, x in given.items() if x is not None}
    if world == "simulated":
        of_description(given)
        return given
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise InvalidChoice(f"{names} describes a simulated cluster; add --world simulated, or leave it out.")
    return None


def of_description(given: Mapping[str, Any]) -> Hardware:
    """The cluster of what `described` gave, one device for each worker. Raises InvalidChoice."""
    from .cost_file import base_hardware

    file = given.get("costs")
    options = ClusterOptions(**{**given, "costs": None if file is None else Path(file)})
    return hardware(options, None, base_hardware(options.costs))


def hardware(options: ClusterOptions, devices: int | None, base: Hardware, seed: int = 0) -> Hardware:
    """The cluster that the options describe; what they leave open is `base`'s. Raises InvalidChoice."""
    from . import quantities
    from .hardware import Device
    from .network import Edge, Network

    device = Device(
        _given(options.flops, quantities.speed, base.device.flops),
        _given(options.memory_bandwidth, quantities.rate, base.device.memory_bandwidth),
        _given(options.memory, quantities.size, base.device.memory),
    )
    network = base.network
    if any(x is not None for x in (options.bandwidth, options.latency, options.per_node)):
        edge = Edge(
            _given(options.latency, quantities.duration, network.edge.latency),
            _given(options.bandwidth, quantities.rate, network.edge.bandwidth),
        )
        inside = Edge(
            _given(options.inside_latency, quantities.duration, 0.0),
            _given(options.inside_bandwidth, quantities.rate, math.inf),
        )
        network = Network(
            edge, inside, options.per_node, {}, network.collective, network.send, network.receive, network.exchange
        )
    if options.per_node is None and (options.inside_bandwidth is not None or options.inside_latency is not None):
        raise InvalidChoice("--inside-bandwidth and --inside-latency are of nodes; give --per-node as well.")
    return base.but(
        device=device,
        speeds=base.speeds if options.speeds is None else quantities.numbers("speeds", options.speeds),
        slow_downs=base.slow_downs if options.slow_downs is None else _slow_downs(options.slow_downs, seed),
        network=network,
        devices=devices,
    )


def _given(text: str | None, read: Callable[[str], T], otherwise: T) -> T:
    return otherwise if text is None else read(text)


def _slow_downs(text: str, seed: int) -> SlowDowns:
    from .hardware import SlowDowns

    try:
        probability, factor = (float(part) for part in text.split(":"))
    except ValueError:
        raise InvalidChoice(f"--slow-downs {text!r} is not PROBABILITY:FACTOR; write for example 0.1:4.") from None
    return SlowDowns(probability, factor, seed=seed)
