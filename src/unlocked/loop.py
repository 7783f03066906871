"""What a training loop needs besides training: Ctrl-C between steps, running means, the user's random state."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

Losses = list[float | None]  # one per stage, None for a stage without a loss of its own


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C after a whole step; the text says what was saved and how to resume."""


class MeanLosses:
    """Running mean of per-stage losses that may be None."""

    def __init__(self) -> None:
        self._sums: Counter[int] = Counter()
        self._counts: Counter[int] = Counter()
        self._stages = 0

    def add(self, losses: Losses) -> None:
        self._stages = len(losses)
        for stage, loss in enumerate(losses):
            if loss is not None:
                self._sums[stage] += loss  # type: ignore[assignment]
                self._counts[stage] += 1

    def values(self) -> Losses:
        return [self._sums[j] / self._counts[j] if self._counts[j] else None for j in range(self._stages)]


class Interrupt:
    """Ctrl-C is noted, and acted on between two steps; the second one acts at once."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> Interrupt:
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def check(self) -> None:
        if self._asked:
            raise Interrupted(
                "Stopped by Ctrl-C after a whole step; nothing was saved, as fit had no checkpoint folder."
            )


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Workers seed the global generator; the user's own stream must not notice."""
    state = torch.random.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
