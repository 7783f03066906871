"""What looks on while a session trains: the event log, TensorBoard, the live table (live.py)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UnlockedError

if TYPE_CHECKING:
    from .session import Trainer


class Callback:
    """Base: every method does nothing. A record is a dictionary of plain values with an entry "event"."""

    def on_start(self, trainer: Trainer, epochs: int) -> None:
        """Training begins or goes on; `epochs` in total, all phases together."""

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After each update: event, step, epoch, phase, losses (per stage), samples, seconds."""

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After each epoch and its validation: see `Trainer.fit`."""

    def on_stop(self, trainer: Trainer, reason: str) -> None:
        """Training ended: "finished", "interrupted" or "failed"."""


class EventLog(Callback):
    """Appends every record to a JSONL file, one line each, flushed at once. `steps=False`: epochs only."""

    def __init__(self, path: str | Path, steps: bool = False) -> None:
        self._path, self._steps = Path(path), steps
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def _write(self, record: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"time": time.time(), **record}) + "\n")

    def on_start(self, trainer: Trainer, epochs: int) -> None:
        self._write({"event": "start", "epochs": epochs, "epoch": trainer.epoch, "step": trainer.steps})

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if self._steps:
            self._write(record)

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self._write(record)

    def on_stop(self, trainer: Trainer, reason: str) -> None:
        self._write({"event": "stop", "reason": reason, "epoch": trainer.epoch, "step": trainer.steps})


class TensorBoard(Callback):
    """Writes losses, accuracies and speed to TensorBoard; needs the extra `track`."""

    def __init__(self, path: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UnlockedError("TensorBoard is not installed; pip install 'unlocked[track]'.") from error
        self._writer = SummaryWriter(str(path))

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        for stage, loss in enumerate(record["losses"]):
            if loss is not None:
                self._writer.add_scalar(f"loss/stage{stage}", loss, record["step"])
        for name, value in (record.get("validation") or {}).items():
            if isinstance(value, float):
                self._writer.add_scalar(f"validation/{name}", value, record["step"])
        self._writer.add_scalar("samples_per_second", record["samples_per_second"], record["step"])

    def on_stop(self, trainer: Trainer, reason: str) -> None:
        self._writer.close()
