"""What one core of this machine reaches: operations per second on what networks are made of, bytes per second of the rest."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from ..simulation.hardware import Device
from .stopwatch import Stopwatch

_WINDOWS = 5


def measure_device(seconds: float = 0.1) -> Device:
    """Of this process with the threads it has.

    flops: geometric mean of a matrix product and of a convolution of usual sizes, each at its fastest window of `seconds`.
    memory_bandwidth: of an element-wise operation on 4 MB, as large as an activation: bytes read and written per second.
    """
    with torch.no_grad():
        speeds = [_rate(*_product(), seconds), _rate(*_convolution(), seconds)]
        return Device(math.prod(speeds) ** (1 / len(speeds)), _rate(*_elementwise(), seconds))


def _product() -> tuple[Callable[[], object], float]:
    """Operations of a matrix product."""
    x, w = torch.randn(512, 256), torch.randn(256, 256)
    return lambda: x @ w, 2.0 * 512 * 256 * 256


def _convolution() -> tuple[Callable[[], object], float]:
    """Operations of a convolution."""
    x, w = torch.randn(16, 32, 16, 16), torch.randn(32, 32, 3, 3)
    return lambda: functional.conv2d(x, w, padding=1), 2.0 * 16 * 16 * 16 * 32 * 32 * 9


def _elementwise() -> tuple[Callable[[], object], float]:
    """Bytes of an element-wise operation."""
    x = torch.randn(1 << 20)
    return lambda: x * 1.5, 2.0 * 4 * (1 << 20)


def _rate(call: Callable[[], object], amount: float, seconds: float) -> float:
    """Amount per second in the fastest window."""
    call()
    best = math.inf
    with Stopwatch() as watch:
        begin = watch.now()
        call()
        count = max(3, round(seconds / max(1e-9, watch.now() - begin)))
        for _ in range(_WINDOWS):
            begin = watch.now()
            for _ in range(count):
                call()
            best = min(best, watch.now() - begin)
    return amount * count / best
