"""What stages noted while they trained (`Worker.note`), such as the shares of pairs that a subsampled loss keeps."""

from __future__ import annotations

import html

from .curves import Axis, Curve, chart, over_runs, stages_chart
from .drawing import Look, Sheet
from .study import Method, Run

OVER_EPOCHS = "passes over the data"


def notes(sheet: Sheet, methods: list[Method], all_looks: dict[str, Look], comparison: bool) -> str:
    """The section's charts for each name that was noted: of a run over the passes, of a comparison over the depth, too. Empty
    if nothing was noted."""
    runs = {method.name: method.runs for method in methods if any(_names(run) for run in method.runs)}
    names = sorted({name for rows in runs.values() for run in rows for name in _names(run)})
    if not names:
        return ""
    drawn = "".join(_chart(sheet, name, runs, all_looks, comparison) for name in names)
    text = "Means over each pass of what every stage noted of its loss; darker lines are deeper stages. Kept: a share of pairs."
    if comparison:
        text += " Over the depth: the last pass, mean over the seeds. Over the passes: the first seed."
    return f'{drawn}<p class="caption">{html.escape(text)}</p>'


def _chart(sheet: Sheet, name: str, runs: dict[str, list[Run]], all_looks: dict[str, Look], comparison: bool) -> str:
    title, limits = name[:1].upper() + name[1:], bounds(name)
    courses = {method: found for method, rows in runs.items() if (found := over_epochs(rows[0], name))}
    axis = Axis(OVER_EPOCHS, name, whole=True, limits=limits)
    drawn = "".join(
        stages_chart(sheet, found, axis, method if comparison else title, small=comparison, what=name)
        for method, found in courses.items()
    )
    if not comparison:
        return f'<div class="panels">{drawn}</div>'
    last = [curve for method, rows in runs.items() if (curve := over_depth(method, rows, name)) is not None]
    depths = (
        chart(sheet, last, all_looks, Axis("stage", name, whole=True, limits=limits), f"{title}, by depth")
        if last
        else ""
    )
    return f'<div class="panels">{depths}</div><h3>{html.escape(title)}</h3><div class="panels small">{drawn}</div>'


def bounds(name: str) -> tuple[float, float] | None:
    """The range of what is a share or a cosine by its name; None: that of the values."""
    if name.endswith(" kept"):
        return -0.03, 1.03
    return (-1.05, 1.05) if "cosine" in name else None


def over_epochs(run: Run, name: str) -> list[Curve]:
    """A line for each stage that noted it."""
    curves = []
    for j in range(max((len(epoch.notes.get(name, [])) for epoch in run.epochs), default=0)):
        row = [(float(e.epoch), value) for e in run.epochs if (value := _at(e.notes.get(name, []), j)) is not None]
        curve = over_runs(f"stage {j}", [list(row)])
        curves += [curve] if curve is not None else []
    return curves


def over_depth(method: str, runs: list[Run], name: str) -> Curve | None:
    """The last pass in which it was noted, stage by stage: mean and spread over the runs."""
    rows = []
    for run in runs:
        noted = [epoch.notes[name] for epoch in run.epochs if name in epoch.notes]
        last = noted[-1] if noted else []
        rows.append([None if value is None else (float(j), value) for j, value in enumerate(last)])
    return over_runs(method, rows)


def _names(run: Run) -> list[str]:
    return sorted({name for epoch in run.epochs for name in epoch.notes})


def _at(values: list[float | None], j: int) -> float | None:
    return values[j] if j < len(values) else None
