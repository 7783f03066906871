"""What a training loop needs besides training: Ctrl-C between steps, the books of an epoch, the user's random state."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

Losses = list[float | None]  # one per stage, None for a stage without a loss of its own


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C after a whole step; the text says what was saved and how to resume."""


@dataclass
class EpochBook:
    """What an epoch has come to so far. It is saved with a checkpoint, so that a resumed epoch is reported whole.

    sums, counts: of each stage's losses over the updates; bytes_before: sent by channel until the epoch began.
    """

    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    samples: int = 0
    seconds: float = 0.0
    bytes_before: dict[str, int] = field(default_factory=dict)

    def add(self, losses: Losses, samples: int, seconds: float) -> None:
        """One update."""
        if not self.sums:
            self.sums, self.counts = [0.0] * len(losses), [0] * len(losses)
        for stage, loss in enumerate(losses):
            if loss is not None:
                self.sums[stage] += loss
                self.counts[stage] += 1
        self.samples += samples
        self.seconds += seconds

    def losses(self) -> Losses:
        """Mean per stage."""
        return [total / count if count else None for total, count in zip(self.sums, self.counts)]


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
