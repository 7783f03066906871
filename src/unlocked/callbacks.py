"""What looks on while a session trains: the event log, TensorBoard, the live table (live.py)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InvalidChoice, UnlockedError
from .probes.alignment import Alignment
from .probes.reconstruction import Reconstructions
from .run_files import read_json, write_json

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

    def note(self, record: dict[str, Any]) -> None:
        """Append a record of one's own."""
        self._write(record)

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
    """Writes losses, accuracies, speed and what stages noted to TensorBoard; needs the extra `track`."""

    def __init__(self, path: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UnlockedError("TensorBoard is not installed; pip install 'unlocked[track]'.") from error
        self._writer = SummaryWriter(str(path))

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        noted = {f"notes/{name}": row for name, row in record.get("notes", {}).items()}
        for name, row in {"loss": record["losses"], **noted}.items():
            for stage, value in enumerate(row):
                if value is not None:
                    self._writer.add_scalar(f"{name}/stage{stage}", value, record["step"])
        for name, value in (record.get("validation") or {}).items():
            if isinstance(value, float):
                self._writer.add_scalar(f"validation/{name}", value, record["step"])
        self._writer.add_scalar("samples_per_second", record["samples_per_second"], record["step"])

    def on_stop(self, trainer: Trainer, reason: str) -> None:
        self._writer.close()


class _Probe(Callback):
    """What the two callbacks below have in common: `every`, `records`, and the file `to` that has them, too."""

    def __init__(self, every: int, to: str | Path | None = None) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InvalidChoice(f"every={every} is not possible; give a whole number of steps, at least 1.")
        self._every, self._to = every, None if to is None else Path(to)
        self.records: list[dict[str, Any]] = []

    def on_start(self, trainer: Trainer, epochs: int) -> None:
        """A run that goes on keeps what it had."""
        if self._to is not None and trainer.steps and self._to.exists() and not self.records:
            self.records += [record for record in read_json(self._to) if record["step"] <= trainer.steps]

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if self._to is not None:
            write_json(self._to, self.records, indent=None)


class GradientCosine(_Probe):
    """How far each stage's gradient is from backpropagation's, at every `every`-th step (see probes/alignment.py).

    `records`: {step, replica, stage, cosine, ratio} for each stage that was updated in such a step, step by step; cosine and
    ratio are None where a gradient is zero. Training is not changed by a bit. All stages must live in this process. `to`: a
    file that gets the records after every epoch; a report shows RUN/alignment.json. With `every` ≥ 3 the steps whose memory
    `fit` meters are not looked at, so that the probe's own memory does not count.
    """

    def on_start(self, trainer: Trainer, epochs: int) -> None:
        super().on_start(trainer, epochs)
        self._alignment = Alignment(trainer, self._every, self.records)

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self._alignment.after_step()

    def on_stop(self, trainer: Trainer, reason: str) -> None:
        self._alignment.close()


class ReconstructionError(_Probe):
    """How far PETRA's reconstructed activations are from the true ones (see probes/reconstruction.py).

    `records`: {step, replica, stage, delay, error, worst} for the first micro-batch of every `every`-th step, when it has its
    backward. delay: in updates of the stage. error: at the input of the stage's lowest reversible unit, which is the
    stage's input if that unit comes first; worst: of all its reversible units. Stages that keep everything (the last one, those
    without a reversible unit) have none. Training is not changed by a bit. `to`: as above.
    """

    def on_start(self, trainer: Trainer, epochs: int) -> None:
        super().on_start(trainer, epochs)
        self._reconstructions = Reconstructions(trainer, self._every, self.records)

    def on_stop(self, trainer: Trainer, reason: str) -> None:
        self._reconstructions.close()
