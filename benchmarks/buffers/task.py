"""What is trained: a small CNN of three stages on the digits, with linear heads."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked.data import Data

STAGES, BATCH = 3, 32
PLAIN: dict[str, Any] = {"head": "linear", "budget": None}


class Pad:
    """Forwards of a module take so many seconds at least (by sleeping), while `on`."""

    on = True

    def __init__(self, body: nn.Module, seconds: float) -> None:
        self._begin = 0.0
        self._seconds = seconds
        body.register_forward_pre_hook(self._before)
        body.register_forward_hook(self._after)

    def _before(self, body: nn.Module, inputs: Any) -> None:
        self._begin = time.perf_counter()

    def _after(self, body: nn.Module, inputs: Any, h: Tensor) -> None:
        if Pad.on:
            time.sleep(max(0.0, self._begin + self._seconds - time.perf_counter()))


@functools.lru_cache(maxsize=1)
def digits() -> tuple[Data, Data]:
    """Train and test."""
    return ul.data.load("digits")


def trainer(credit: Any, seed: int, width: int, rate: float, pad: float = 0.0, **options: Any) -> ul.Trainer:
    """Three blocks of a CNN with BatchNorm, one for each stage; SGD with momentum."""
    torch.manual_seed(seed)
    train, _ = digits()
    model = ul.models.build("cnn", input_shape=train.input_shape, classes=10, width=width, depth=2)
    chain = ul.cut(model, STAGES, like=train.samples(torch.arange(2))[0])
    if pad:
        for stage in chain:
            Pad(stage.body, pad)
    return ul.Trainer(
        chain,
        credit=credit,
        seed=seed,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=5e-4),
        **options,
    )
