"""RUN/timeline.json: the acts of some consecutive steps on one clock, and who was where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadData
from ..timeline import Timeline
from .records import LARGEST, Record, read_json, read_timeline

FILE = "timeline.json"


@dataclass(frozen=True)
class Recording:
    """What a run recorded of some of its steps.

    measured: whether the acts were timed on real processes, or by the clock of a simulated cluster; False: one process did
    them one after the other. simulated: whether it was a simulated one.
    ranks: the process of each worker (replica, stage). first, last: the updates that were recorded, both included.
    acts: in seconds of one clock, of all processes.
    """

    measured: bool
    ranks: dict[tuple[int, int], int]
    first: int
    last: int
    acts: Timeline
    simulated: bool = False

    @property
    def updates(self) -> int:
        """How many updates were recorded."""
        return self.last - self.first + 1

    @property
    def processes(self) -> int:
        """How many processes the workers were on."""
        return len(set(self.ranks.values()))

    @property
    def replicas(self) -> int:
        """How many replicas there were."""
        return len({replica for replica, _ in self.ranks})


def read_recording(folder: Path) -> Recording | None:
    """The recording of the run in `folder`; None if there is none, or nothing in it. Raises BadData if it is damaged."""
    content = read_json(folder / FILE)
    if content is None:
        return None
    record = Record(content, str(folder / FILE))
    measured = record.value.get("measured")
    if not isinstance(measured, bool):
        raise BadData(f"{record.where} does not say whether it was 'measured' (true or false); the file is damaged.")
    ranks = {(replica, stage): rank for replica, stage, rank in _rows_of(record, "ranks", 3)}
    ((first, last),) = _rows_of(Record({"steps": [record.value.get("steps")]}, record.where), "steps", 2)
    if last < first:
        raise BadData(f"{record.where} goes from update {first} to {last}, backwards; the file is damaged.")
    acts = read_timeline(record.rows("acts"), record.where)
    absent = [worker for worker in acts.workers() if worker not in ranks]
    if absent:
        raise BadData(
            f"{record.where} has acts of replica {absent[0][0]} stage {absent[0][1]}, which is not in its 'ranks'; "
            "the file is damaged."
        )
    return Recording(measured, ranks, first, last, acts, bool(record.value.get("simulated"))) if len(acts) else None


def _rows_of(record: Record, key: str, length: int) -> list[list[int]]:
    """Rows of so many whole numbers from 0."""
    rows: list[Any] = record.rows(key)
    for row in rows:
        if not isinstance(row, list) or len(row) != length or not all(_counts(entry) for entry in row):
            raise BadData(
                f"{record.where} has {str(row)[:60]} in {key!r} where {length} whole numbers were expected; "
                "the file is damaged."
            )
    return rows


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST
