"""The machines of a simulated cluster: devices, how fast each is, what slows it down, and the network between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InvalidChoice
from ..rng import mix
from .network import FREE, Network

_UNIT = 1.0 / (1 << 62)


@dataclass(frozen=True)
class SlowDowns:
    """Seeded random slow-downs: what an act takes longer than its cost says.

    An act is `factor` times as long with probability `probability`, drawn anew for every worker and micro-batch, and besides
    exp(`spread` · z) times, z a standard normal number of the same draw. Deterministic: the draw is a function of (seed,
    replica, stage, micro-batch).
    """

    probability: float = 0.0
    factor: float = 1.0
    spread: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0 or not self.factor > 0.0 or not self.spread >= 0.0:
            raise InvalidChoice(
                f"Slow-downs of probability {self.probability}, factor {self.factor}, spread {self.spread} are not "
                "possible; give a probability from 0 to 1, a factor greater than 0 and a spread of at least 0."
            )

    def of(self, replica: int, stage: int, micro_batch: int) -> float:
        """By how much the acts of this worker for this micro-batch are longer: a factor."""
        draw = mix(self.seed, replica, stage, micro_batch)
        factor = self.factor if draw * _UNIT < 2 * self.probability else 1.0
        if self.spread:
            radius = mix(draw, 1) * _UNIT / 2 or _UNIT
            angle = mix(draw, 2) * _UNIT / 2
            factor *= math.exp(self.spread * math.sqrt(-2 * math.log(radius)) * math.cos(2 * math.pi * angle))
        return factor


@dataclass(frozen=True)
class Device:
    """What computes.

    Args:
        flops: floating-point operations per second it really reaches. memory_bandwidth: bytes per second that operations
            other than matrix products are bound by. memory: bytes it holds; None: not looked at.
    """

    flops: float = 1e9
    memory_bandwidth: float = math.inf
    memory: int | None = None

    def __post_init__(self) -> None:
        if not self.flops > 0 or not self.memory_bandwidth > 0 or (self.memory is not None and self.memory <= 0):
            raise InvalidChoice(
                f"A device of {self.flops} operations/s, {self.memory_bandwidth} bytes/s and memory {self.memory} is not "
                "possible; all must be greater than 0."
            )


@dataclass(frozen=True)
class Hardware:
    """A cluster, as the simulated world knows it.

    Args:
        device: what every device is, but for `speeds`: factors by device, 1 where the row ends.
        slow_downs: random ones, or None.
        network: between the devices.
        devices: how many there are; None: one for every worker. Workers share devices in contiguous, equal blocks, replica by
            replica, as processes do in the distributed world; a device does one thing at a time.
    """

    device: Device = Device()
    speeds: tuple[float, ...] = ()
    slow_downs: SlowDowns | None = None
    network: Network = FREE
    devices: int | None = None

    def __post_init__(self) -> None:
        if any(not 0 < speed < math.inf for speed in self.speeds):
            raise InvalidChoice(f"Speeds must be greater than 0; given {', '.join(map(str, self.speeds))}.")
        if self.devices is not None and self.devices < 1:
            raise InvalidChoice(f"{self.devices} devices are not possible; give at least 1.")
        if self.devices is not None and len(self.speeds) > self.devices:
            raise InvalidChoice(f"{len(self.speeds)} speeds were given for {self.devices} devices.")

    def speed(self, device: int) -> float:
        """The factor of a device."""
        return self.speeds[device] if device < len(self.speeds) else 1.0

    def but(self, **changes: Any) -> Hardware:
        """The same with some fields changed."""
        return replace(self, **changes)
