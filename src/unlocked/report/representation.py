"""RUN/probes.json: what each stage has made of the data, and the figure of it by depth (written by `unlocked probe`)."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ..errors import InvalidChoice
from .curves import Axis, Curve, Points, apart, chart, draw_curve, over_runs
from .drawing import INK, RC, Look, Sheet, log_ticks, looks, whole_ticks
from .records import Record, read_json
from .spectra import AXIS, spectra
from .study import Method

FILE = "probes.json"
PICTURES = (".png", ".svg")
IF_ASKED_FOR = {"knn": "Vote of the nearest neighbours", "recipe": "Linear layer trained by the recipe"}

Named = Mapping[str, Sequence[Record]]  # the networks of each method


class Panel(NamedTuple):
    """One chart: what it shows of a depth."""

    title: str
    unit: str
    value: Callable[[Record], float | None]

    def axis_of(self, curves: list[Curve]) -> Axis:
        """Losses may be far apart."""
        return Axis("depth", self.unit, log=self.unit == "loss" and apart(curves), whole=True)


def read_probes(folder: Path) -> Record | None:
    """What was found of the run's network, if it was probed. Raises BadData if the file is damaged."""
    found = read_json(folder / FILE)
    return None if found is None else Record(found, str(folder / FILE))


def panels(named: Named) -> list[Panel]:
    """What may be drawn over the depths: of classes the probe's accuracy in per cent, else R²."""
    classes = all(_classes(record) for records in named.values() for record in records)
    score = "held-out accuracy, %" if classes else "held-out R²"
    scale = 100 if classes else 1
    found = [
        Panel("Linear probe of the features", score, lambda row: _scaled(row, "probe", scale)),
        Panel("Held-out loss at the stage's own head", "loss", _of_stages("loss")),
        Panel("Cosine to backpropagation's gradient", "cosine", _of_stages("cosine")),
        Panel(
            "Effective rank of the features",
            "directions",
            lambda row: row.number("effective_rank"),
        ),
    ]
    found += [Panel(title, "held-out accuracy, %", _shares(key)) for key, title in IF_ASKED_FOR.items()]
    return found


def _shares(key: str) -> Callable[[Record], float | None]:
    return lambda row: _scaled(row, key, 100)


def charts(named: Named) -> list[tuple[str, list[Curve], Axis]]:
    """What is drawn: title, lines and axis of each chart for which anything is known."""
    found = [(panel, curves) for panel in panels(named) if (curves := lines(panel, named))]
    over_depth = [(panel.title, curves, panel.axis_of(curves)) for panel, curves in found]
    return [*over_depth, *((title, curves, AXIS) for title, curves in spectra(named))]


def lines(panel: Panel, named: Named) -> list[Curve]:
    """One for each method that has any: mean and spread over its networks."""
    curves = [
        over_runs(name, [_points(panel, record) for record in records]) for name, records in named.items() if records
    ]
    return [curve for curve in curves if curve is not None]


def _points(panel: Panel, record: Record) -> Points:
    values = [panel.value(row) for row in depths(record)]
    return [None if value is None else (float(depth), value) for depth, value in enumerate(values)]


def depths(record: Record) -> list[Record]:
    """The depths of a network, from the first."""
    return [Record(row, record.where) for row in record.rows("depths")]


def stages(depth: Record) -> list[Record]:
    """The stages that stand at a depth."""
    return [Record(row, depth.where) for row in depth.rows("stages")]


def _of_stages(key: str) -> Callable[[Record], float | None]:
    """Mean over the groups of a depth."""

    def mean(depth: Record) -> float | None:
        known = [value for stage in stages(depth) if (value := stage.number(key)) is not None]
        return fmean(known) if known else None

    return mean


def _scaled(row: Record, key: str, scale: float) -> float | None:
    value = row.number(key)
    return None if value is None else scale * value


def _classes(record: Record) -> bool:
    return record.value.get("classes") is not False


# ---- in the report -----------------------------------------------------------------------------------------------------


def representation(sheet: Sheet, methods: list[Method], all_looks: dict[str, Look]) -> str:
    """The section's charts and its table; nothing if no run was probed."""
    named = {
        method.name: [record for run in method.runs if (record := read_probes(run.folder)) is not None]
        for method in methods
    }
    if not any(named.values()):
        return ""
    drawn = "".join(chart(sheet, curves, all_looks, axis, title) for title, curves, axis in charts(named))
    text = (
        "Of the trained networks. Probe: a linear map fitted to each depth's frozen features by ridge regression, on held-out "
        "data. Cosine: of the gradient that a stage's weights learn from to backpropagation's of the network's loss, over the "
        "same training samples; 1 where the stage learns from the network's loss. Effective rank: exp of the entropy of the "
        "normalised eigenvalues of the features' covariance. Spectrum: those eigenvalues over the largest."
    )
    if any(record.value.get("pairs") is True for records in named.values() for record in records):
        text += " Of a network that learned from pairs of views the loss is of held-out pairs, and there is no cosine."
    shown = headings([record for records in named.values() for record in records])
    body = "".join(_table_rows(name, records[0], shown) for name, records in named.items() if records)
    heads = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in ("Method", *shown))
    table = f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    return (
        f'<div class="panels">{drawn}</div><p class="caption">{html.escape(text)}</p>'
        f"<details><summary>Depth by depth (first seed)</summary>{table}</details>"
    )


_HEADINGS = (
    "depth",
    "features",
    "probe",
    "loss",
    "accuracy",
    "cosine, weights",
    "cosine, activations",
    "effective rank",
    "participation",
)


def headings(records: Sequence[Record]) -> tuple[str, ...]:
    """The columns of a table of these networks."""
    rows = [row for record in records for row in depths(record)]
    return (*_HEADINGS, *(key for key in IF_ASKED_FOR if any(row.number(key) is not None for row in rows)))


def cells(record: Record, shown: Sequence[str]) -> list[list[str]]:
    """For every depth the texts under these headings; those of groups beside each other."""
    percent = (lambda x: f"{100 * x:.2f} %") if _classes(record) else (lambda x: f"{x:.4f}")
    return [
        [
            str(depth.whole("depth", number)),
            str(depth.whole("features", 0)),
            _text(depth.number("probe"), percent),
            _beside(depth, "loss", lambda x: f"{x:.4g}"),
            _beside(depth, "accuracy", lambda x: f"{100 * x:.2f} %"),
            _beside(depth, "cosine", lambda x: f"{x:.3f}"),
            _beside(depth, "activation_cosine", lambda x: f"{x:.3f}"),
            _text(depth.number("effective_rank"), lambda x: f"{x:.1f}"),
            _text(depth.number("participation_ratio"), lambda x: f"{x:.1f}"),
            *(_text(depth.number(key), lambda x: f"{100 * x:.2f} %") for key in IF_ASKED_FOR if key in shown),
        ]
        for number, depth in enumerate(depths(record))
    ]


def _table_rows(name: str, record: Record, shown: Sequence[str]) -> str:
    rows = ""
    for row in cells(record, shown):
        rows += f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td>{html.escape(x)}</td>" for x in row)}</tr>'
    return rows


def _beside(depth: Record, key: str, write: Callable[[float], str]) -> str:
    return " / ".join(_text(stage.number(key), write) for stage in stages(depth))


def _text(value: float | None, write: Callable[[float], str]) -> str:
    return "–" if value is None else write(value)


# ---- a picture ---------------------------------------------------------------------------------------------------------


def refuse_picture(path: Path) -> None:
    """Raises InvalidChoice if the file's name is not that of a .png or .svg."""
    if path.suffix not in PICTURES:
        raise InvalidChoice(f"{path} is no picture that can be drawn; its name ends in .png or .svg.")


def draw_records(found: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> Path:
    """The panels and the spectra in one figure, a line for each method. Raises InvalidChoice for a file that is no picture."""
    refuse_picture(path)
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    named = {name: [Record(one, name) for one in records] for name, records in found.items()}
    styles = looks(list(named))
    with matplotlib.rc_context(RC):
        drawn = charts(named)
        rows = max(1, -(-len(drawn) // 2))
        figure = Figure(figsize=(9.4, 3.2 * rows), layout="constrained")
        grid = figure.subplots(rows, 2, squeeze=False).flat
        for axes, (title, curves, axis) in zip(grid, drawn):
            for curve in curves:
                draw_curve(Sheet(), axes, curve, styles[curve.name], end=False)
            axes.set_title(title, fontsize=10, color=INK)
            axes.set_xlabel(axis.x)
            axes.set_ylabel(axis.y)
            whole_ticks(axes)
            if axis.log:
                log_ticks(axes)
        for axes in list(figure.axes)[len(drawn) :]:
            axes.set_axis_off()
        entries = [Line2D([], [], color=look.colour, dashes=look.dashes) for look in styles.values()]
        figure.legend(entries, list(styles), loc="outside lower center", ncols=3, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
