"""What a person sees while training: a live table in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .callbacks import Callback
from .run_files import read_events
from .session import Trainer

_REFRESH = 0.25  # seconds between two drawings


def in_bytes(size: float | None) -> str:
    """4233732 → `4.2 MB`; a dash where there is nothing to say."""
    if size is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def in_time(seconds: float | None) -> str:
    """75.3 → `1:15`; a dash while unknown."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def in_percent(share: float | None) -> str:
    """0.9332 → `93.3 %`."""
    return "–" if share is None else f"{100 * share:.1f} %"


def in_words(validation: dict[str, Any] | None) -> str:
    """`93.3 %`, and by what it was read if that is not the network itself."""
    scores = validation or {}
    return f"{in_percent(scores.get('accuracy'))}{' by linear probe' if scores.get('probed') else ''}"


def in_losses(losses: Sequence[float | None]) -> str:
    """One number per stage, a dash where a stage has no loss of its own."""
    return " ".join("–" if loss is None else f"{loss:.3f}" for loss in losses)


def in_updates(buffers: Sequence[dict[str, Any]] | None) -> str:
    """The updates of an epoch by stage, of the first replica: `updates 20/18/20`; nothing under rules without buffers."""
    rows = [str(row["updates"]) for row in buffers or () if row["replica"] == 0]
    return f"updates {'/'.join(rows)}" if rows else ""


class LiveTable(Callback):
    """Epoch, loss of every stage, accuracy, speed, memory and time left of one run.

    In a terminal a table that is redrawn at most four times a second; otherwise a line per epoch.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._rows: list[tuple[str, ...]] = []
        self._drawn = 0.0

    def on_start(self, trainer: Trainer, epochs: int) -> None:
        self._total, self._first = epochs, trainer.epoch
        self._begin = time.monotonic()
        if trainer.epoch == 0:
            for remark in trainer.credit.remarks(trainer.template, trainer.batch_size or 1):
                self._console.print(remark, highlight=False, soft_wrap=True, markup=False)
        if self._console.is_terminal:
            # drawn by hand, not by rich's thread: a signal must never meet a half-drawn table
            self._live = Live(self._table(), console=self._console, auto_refresh=False)
            self._live.start()

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        now = time.monotonic()
        if self._live is None or now - self._drawn < _REFRESH:
            return
        speed = record["samples"] / record["seconds"] if record["seconds"] else 0.0
        where = f"{record['epoch'] + 1}/{self._total} · {record['step']}"
        left = in_time(self._left(record["epoch"]))
        row = (where, in_losses(record["losses"]), "", f"{speed:,.0f}", in_bytes(trainer.activation_peak), left)
        self._draw([*self._rows, row])

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        accuracy = in_words(record["validation"])
        memory, left = in_bytes(record["activation_peak"]), in_time(self._left(record["epoch"]))
        losses, speed = in_losses(record["losses"]), f"{record['samples_per_second']:,.0f}"
        where = f"{record['epoch']}/{self._total}"
        told = record.get("replicas")
        apart = "" if told is None else f"{100 * told['distance']:.2g} % from the mean"
        apart = ", ".join(filter(None, (apart, in_updates(record.get("buffers")))))
        if self._live is None:
            self._console.print(
                f"epoch {where}  loss {losses}  accuracy {accuracy}  {speed} samples/s  "
                f"memory {memory}  {f'{apart}  ' if apart else ''}{left} left",
                highlight=False,
                soft_wrap=True,
            )
            return
        scored = f"{accuracy}, {apart}" if apart else accuracy
        self._rows.append((where, losses, scored, speed, memory, left))
        self._draw(self._rows)

    def on_stop(self, trainer: Trainer, reason: str) -> None:
        if self._live is not None:
            self._draw(self._rows)
            self._live.stop()

    def _left(self, epoch: int) -> float | None:
        """Seconds to go, if the epochs to come take as long as those so far."""
        done = epoch - self._first
        spent = time.monotonic() - self._begin
        return spent / done * (self._total - epoch) if done else None

    def _draw(self, rows: Sequence[tuple[str, ...]]) -> None:
        assert self._live is not None
        self._drawn = time.monotonic()
        self._live.update(self._table(rows[-max(4, self._console.height - 6) :]), refresh=True)

    def _table(self, rows: Sequence[tuple[str, ...]] = ()) -> Table:
        table = Table("epoch", "loss per stage", "accuracy", "samples/s", "memory", "left")
        for row in rows:
            table.add_row(*row)
        return table


class Progress:
    """How far the runs of one method are, read from their logs."""

    def __init__(self, name: str, folders: Sequence[Path]) -> None:
        self.name, self._folders = name, list(folders)
        self.done = 0
        self.failed = False
        self._open: Path | None = None
        self._epochs: list[dict[str, Any]] = []
        self._total: int | None = None
        self._seconds: list[float] = []  # of the epochs seen, validation and all

    def begins(self, folder: Path) -> None:
        """A run of this method has begun."""
        self._open, self._epochs = folder, []

    def ends(self, failed: bool) -> None:
        """The run has ended."""
        self.look()
        self.done, self._open, self.failed = self.done + 1, None, self.failed or failed

    def look(self) -> None:
        """Read what the open run has logged since."""
        if self._open is None:
            return
        events = read_events(self._open)
        starts = [record for record in events if record["event"] == "start"]
        self._epochs = [record for record in events if record["event"] == "epoch"]
        if starts:
            self._total = starts[-1]["epochs"]
            times = [record["time"] for record in events if record["time"] >= starts[-1]["time"]]
            self._seconds = [after - before for before, after in pairwise(times)] or self._seconds

    def left(self) -> float | None:
        """Seconds of computing to go; None while nothing has been measured. 0 when all is done."""
        to_go = len(self._folders) - self.done
        if not to_go or self._total is None or not self._seconds:
            return None if to_go else 0.0
        done = len(self._epochs) if self._open is not None else 0
        return (to_go * self._total - done) * sum(self._seconds) / len(self._seconds)

    def row(self) -> tuple[str, ...]:
        """Method, runs done, epoch, accuracy, time left."""
        last = self._epochs[-1] if self._epochs else None
        runs = f"{self.done}/{len(self._folders)}"
        epoch = f"{last['epoch']}/{self._total}" if last and self._open is not None else ""
        accuracy = in_words(last["validation"]) if last else ""
        left = "failed" if self.failed else in_time(self.left()) if self._open or self.done else ""
        return self.name, runs, epoch, accuracy, left


class LiveComparison:
    """A row per method while a comparison runs; a line per finished run where there is no terminal."""

    def __init__(self, console: Console, rows: dict[str, Progress], jobs: int) -> None:
        self._console, self._rows, self._jobs = console, rows, jobs
        self._drawn, self._begin = 0.0, time.monotonic()
        self._live = Live(self._table(), console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> LiveComparison:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def finished(self, name: str, seed: int, outcome: str) -> None:
        """A run ended; `outcome` says how."""
        if self._live is None:
            done = sum(row.done for row in self._rows.values())
            total = sum(len(row._folders) for row in self._rows.values())
            spent = in_time(time.monotonic() - self._begin)
            line = f"[{done}/{total}] {spent}  {name}  seed {seed}: {outcome}"
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def refresh(self) -> None:
        """Read the logs and draw, if it is time."""
        if self._live is not None and time.monotonic() - self._drawn >= _REFRESH:
            for row in self._rows.values():
                row.look()
            self._live.update(self._table(), refresh=True)
            self._drawn = time.monotonic()

    def _table(self) -> Table:
        known = [row.left() for row in self._rows.values()]
        seen = [seconds for seconds in known if seconds is not None]
        # a method not yet seen is taken to cost as much as the others on average
        total = sum(seen) * len(known) / len(seen) / self._jobs if seen else None
        table = Table("method", "runs done", "epoch", "accuracy", "left", title=f"about {in_time(total)} left")
        for row in self._rows.values():
            table.add_row(*row.row())
        return table
