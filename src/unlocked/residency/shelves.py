"""Where stages wait that are not in use: in files, or in the host's memory."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .files import DamagedFile, Label, read, write


class Shelf(Protocol):
    """Keeps rows of values (1-D tensors) under a stage's number. Called by one thread at a time."""

    def store(self, stage: int, rows: Sequence[Tensor]) -> None: ...

    def fetch(self, stage: int, rows: Sequence[Tensor]) -> None:
        """Fill the rows with what was stored; they have its lengths and types."""


class Disk:
    """A file for each stage. The files have no name in the folder, so they go when the process ends, however it ends.

    Written data is the operating system's from then on: it may keep it in memory that nobody else needs. Raises DamagedFile:
    a file cannot be written, or is not as it was written.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = Path(tempfile.gettempdir() if folder is None else folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DamagedFile(
                f"Stages cannot be kept in {self._folder} ({error.strerror}); give OneStage another folder."
            ) from error
        self._files: dict[int, Any] = {}
        self._labels: dict[int, Label] = {}

    def store(self, stage: int, rows: Sequence[Tensor]) -> None:
        self._labels.pop(stage, None)
        try:
            self._labels[stage] = write(self.descriptor(stage), [row.cpu() for row in rows])
        except OSError as error:
            raise DamagedFile(
                f"Stage {stage} could not be written to a file in {self._folder} ({error.strerror}), so its newest weights are "
                "lost. Go on from the last checkpoint, with a folder that has more room."
            ) from error

    def fetch(self, stage: int, rows: Sequence[Tensor]) -> None:
        if stage not in self._labels:
            raise DamagedFile(
                f"Stage {stage} could not be written to a file in {self._folder}, so its newest weights are lost. Go on from "
                "the last checkpoint, with a folder that has more room."
            )
        on_host = [row if row.device.type == "cpu" else torch.empty_like(row, device="cpu") for row in rows]
        read(self.descriptor(stage), on_host, self._labels[stage], f"The file of stage {stage} in {self._folder}")
        for row, value in zip(rows, on_host):
            if row is not value:
                row.copy_(value)

    def descriptor(self, stage: int) -> int:
        """Of the stage's file."""
        if stage not in self._files:
            self._files[stage] = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  # open for the run
        return self._files[stage].fileno()


class Host:
    """Memory of the host, pinned where stages compute on an accelerator, so that copies go on beside its work."""

    def __init__(self) -> None:
        self._kept: dict[int, list[Tensor]] = {}

    def store(self, stage: int, rows: Sequence[Tensor]) -> None:
        kept = self._kept.get(stage, [])
        if [(x.shape, x.dtype) for x in kept] != [(x.shape, x.dtype) for x in rows]:
            kept = [torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda) for x in rows]
        for mine, row in zip(kept, rows):
            mine.copy_(row, non_blocking=True)
        self._kept[stage] = kept

    def fetch(self, stage: int, rows: Sequence[Tensor]) -> None:
        for row, mine in zip(rows, self._kept[stage]):
            row.copy_(mine, non_blocking=True)
