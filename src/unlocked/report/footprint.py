"""RUN/memory.json: what tensors took in a step of each phase, measured and predicted (written by probes/step.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .records import Record, read_json

FILE = "memory.json"

PARTS = {
    "parameters": "parameters and buffers",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "saved": "kept for backward",
    "versions": "copies of old weights",
}


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage by part (see PARTS), the most over phases and replicas; None where not known.

    peak: live bytes of what it made and what is its own, at its worst moment.
    """

    measured: dict[str, float | None]
    predicted: dict[str, float | None]
    peak: float | None


@dataclass(frozen=True)
class Footprint:
    """A run's memory.

    steps: the updates that were measured, one in each phase. allocator: whether an accelerator's allocator was asked.
    processes: how many. peak, categories, curve: of the process and the phase with the most live bytes: those bytes, what they
    were, and (seconds, bytes) over the update. stages: in order.
    """

    steps: list[int]
    allocator: bool
    processes: int
    peak: float
    categories: dict[str, float]
    curve: list[tuple[float, float]]
    stages: list[StageMemory]


def read_footprint(folder: Path) -> Footprint | None:
    """The memory of the run in `folder`; None if it was not recorded. Raises BadData if the file is damaged."""
    where = str(folder / FILE)
    records = [Record(row, where) for row in Record({"all": read_json(folder / FILE)}, where).rows("all")]
    processes = [Record(row, where) for record in records for row in record.rows("processes")]
    worst = max(processes, key=lambda process: process.number("peak") or 0.0, default=None)
    if worst is None:
        return None
    categories = worst.part("categories")
    return Footprint(
        [record.whole("step", 0) for record in records],
        any(record.text("meter") == "allocator" for record in records),
        len({process.whole("rank", 0) for process in processes}),
        worst.number("peak") or 0.0,
        {} if categories is None else {name: categories.number(name) or 0.0 for name in categories.value},
        _curve(worst),
        _stages(records),
    )


def _curve(process: Record) -> list[tuple[float, float]]:
    points = [Record({"point": row}, process.where).numbers("point") for row in process.rows("curve")]
    return [
        (point[0], point[1]) for point in points if len(point) == 2 and point[0] is not None and point[1] is not None
    ]


def _stages(records: list[Record]) -> list[StageMemory]:
    workers = [Record(row, record.where) for record in records for row in record.rows("workers")]
    foretold = [Record(row, record.where) for record in records for row in record.rows("predicted")]
    count = max((worker.whole("stage", 0) for worker in workers), default=-1) + 1
    return [
        StageMemory(
            {part: _most(workers, j, part) for part in PARTS},
            {part: _most(foretold, j, part) for part in PARTS},
            _most(workers, j, "peak"),
        )
        for j in range(count)
    ]


def _most(rows: list[Record], stage: int, key: str) -> float | None:
    values = [row.number(key) for row in rows if row.whole("stage", 0) == stage]
    return max((value for value in values if value is not None), default=None)
