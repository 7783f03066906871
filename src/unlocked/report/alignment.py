"""RUN/alignment.json: cosine and ratio of each stage's gradient to backpropagation's (written by callbacks.GradientCosine)."""

from __future__ import annotations

import html
from pathlib import Path
from statistics import fmean

from .curves import Axis, Curve, Points, chart, over_runs, stages_chart
from .drawing import Look, Sheet
from .records import Record, read_json
from .study import Method

FILE = "alignment.json"


def read_alignment(folder: Path) -> list[Record]:
    """What was recorded, step by step; empty if nothing was. Raises BadData if the file is damaged."""
    where = str(folder / FILE)
    return [Record(row, where) for row in Record({"all": read_json(folder / FILE)}, where).rows("all")]


def alignment(sheet: Sheet, methods: list[Method], all_looks: dict[str, Look]) -> str:
    """The section's figures; nothing if no run has any."""
    found = {method.name: [read_alignment(run.folder) for run in method.runs] for method in methods}
    items = [
        ("Cosine to backpropagation's gradient", "cosine"),
        ("Norm over that of backpropagation's gradient", "ratio"),
    ]
    drawn = ""
    for title, key in items:
        curves = [over_runs(name, [_by_stage(rows, key) for rows in runs]) for name, runs in found.items()]
        known = [curve for curve in curves if curve is not None]
        drawn += chart(sheet, known, all_looks, Axis("stage", key, whole=True), title) if known else ""
    if not drawn:
        return ""
    text = (
        "What each stage was updated with, beside backpropagation's gradient of the network's loss on the same micro-batches "
        "at the weights of the beginning of the step: mean over the later half of the steps that were looked at. Below it "
        "the first run of each method, step by step."
    )
    courses = "".join(_course(sheet, name, runs[0]) for name, runs in found.items() if runs and runs[0])
    return f'<div class="panels">{drawn}</div><p class="caption">{html.escape(text)}</p><div class="panels">{courses}</div>'


def _by_stage(rows: list[Record], key: str) -> Points:
    """Mean of the later half, over the replicas."""
    half = max((row.whole("step", 0) for row in rows), default=0) / 2
    points: Points = []
    for stage in range(_stages(rows)):
        values = [row.number(key) for row in rows if row.whole("stage", 0) == stage and row.whole("step", 0) > half]
        known = [value for value in values if value is not None]
        points.append((float(stage), fmean(known)) if known else None)
    return points


def _course(sheet: Sheet, name: str, rows: list[Record]) -> str:
    curves = [curve for stage in range(_stages(rows)) if (curve := _over_steps(rows, stage)) is not None]
    return stages_chart(sheet, curves, Axis("update", "cosine", whole=True), name, small=False) if curves else ""


def _over_steps(rows: list[Record], stage: int) -> Curve | None:
    mine = [row for row in rows if row.whole("stage", 0) == stage and row.whole("replica", 0) == 0]
    points = [(float(row.whole("step", 0)), cosine) for row in mine if (cosine := row.number("cosine")) is not None]
    return over_runs(f"stage {stage}", [list(points)])


def _stages(rows: list[Record]) -> int:
    return max((row.whole("stage", 0) for row in rows), default=-1) + 1
