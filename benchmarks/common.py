"""What the benchmarks share: interleaved timing, test accuracy, the machine's description, the RESULT line."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from unlocked.chain import Chain
from unlocked.data import Data
from unlocked.evaluation import Score


def machine() -> dict[str, Any]:
    """Where this ran."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def interleaved(variants: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 5) -> dict[str, list[float]]:
    """Seconds of each call, the variants taking turns (A B B A A B …), warm-up excluded."""
    for _ in range(warm_up):
        for call in variants.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for k in range(rounds):
        order = list(variants.items())
        for name, call in order if k % 2 else reversed(order):
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return times


def ratio(times: Mapping[str, list[float]], one: str, other: str) -> float:
    """Median over the rounds of one / other within the same round: what disturbs both cancels."""
    return median(a / b for a, b in zip(times[one], times[other]))


@torch.no_grad()
def accuracy(network: Chain, test: Data, samples: int | None = None) -> float | None:
    """Share of the first `samples` (None: of all) whose class the network names, in evaluation mode; None without classes."""
    score, device = Score(), next(network.parameters()).device
    network.eval()
    for index in torch.arange(len(test))[:samples].split(500):
        x, y = (part.to(device) for part in test.samples(index))
        score.add(network(x), y, None)
    return score.accuracy


def result(name: str, **values: Any) -> None:
    """The last line: `RESULT {json}`."""
    print("RESULT " + json.dumps({"benchmark": name, **values, "machine": machine()}))
