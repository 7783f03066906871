"""Lines over something: accuracy over epochs and seconds, losses over depth and epochs."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from .drawing import GREY, INK, Look, Sheet, heading, legend, log_ticks, whole_ticks
from .study import Epoch, Method, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, float] | None]

TOGETHER = 5  # more methods than these get a panel each
MARKED = 30  # more points than these are a line only


@dataclass(frozen=True)
class Curve:
    """One method's line: points, and the standard deviation of y over the runs (0 for one run)."""

    name: str
    x: list[float]
    y: list[float]
    spread: list[float]


@dataclass(frozen=True)
class Axis:
    """What is on the axes of a chart."""

    x: str
    y: str
    log: bool = False
    whole: bool = False  # x counts things
    limits: tuple[float, float] | None = None


def over_runs(name: str, rows: list[Points]) -> Curve | None:
    """Mean and spread over the runs' (x, y) at each place; a run without a value there is left out."""
    places = []
    for k in range(max((len(row) for row in rows), default=0)):
        points = [point for row in rows if k < len(row) and (point := row[k]) is not None]
        if points:
            ys = [y for _, y in points]
            places.append((fmean(x for x, _ in points), fmean(ys), stdev(ys) if len(ys) > 1 else 0.0))
    return Curve(name, *map(list, zip(*places))) if places else None


def chart(sheet: Sheet, curves: list[Curve], looks: dict[str, Look], axis: Axis, title: str) -> str:
    """All curves in one chart if they are few, else a small chart for each with the others behind it in grey."""
    above = f"<h3>{html.escape(title)}</h3>"
    if len(curves) <= TOGETHER:
        names = [curve.name for curve in curves]
        figure = _panel(sheet, curves, names, looks, axis, title, small=False)
        return f'<div class="panel wide">{above}{figure}{legend(names, looks) if len(names) > 1 else ""}</div>'
    axis = Axis(axis.x, axis.y, axis.log, axis.whole, axis.limits or _limits(curves, axis.log))
    panels = "".join(
        f'<div class="panel">{heading(curve.name, looks[curve.name])}'
        f"{_panel(sheet, curves, [curve.name], looks, axis, f'{title}: {curve.name}', True)}</div>"
        for curve in curves
    )
    return f'<div class="full">{above}<div class="panels small">{panels}</div></div>'


def _panel(
    sheet: Sheet, curves: list[Curve], shown: list[str], looks: dict[str, Look], axis: Axis, label: str, small: bool
) -> str:
    axes = sheet.axes(*((250, 185, (44, 36, 30, 8)) if small else (390, 255, (50, 40, 40, 10))))
    for curve in curves:
        if curve.name not in shown:
            axes.plot(curve.x, curve.y, color=GREY, linewidth=1.0, zorder=1)
    for curve in curves:
        if curve.name in shown:
            draw_curve(sheet, axes, curve, looks[curve.name], end=len(shown) == 1)
    axes.set_xlabel(axis.x)
    axes.set_ylabel(axis.y)
    if axis.log:
        log_ticks(axes)
    if axis.limits:
        axes.set_ylim(*axis.limits)
    if axis.whole:
        whole_ticks(axes)
    return sheet.svg(axes, label)


def draw_curve(sheet: Sheet, axes: Axes, curve: Curve, look: Look, end: bool) -> None:
    """A line with its band; `end`: with the last value beside it."""
    if any(curve.spread):
        low = [y - s for y, s in zip(curve.y, curve.spread)]
        high = [y + s for y, s in zip(curve.y, curve.spread)]
        axes.fill_between(curve.x, low, high, color=look.colour, alpha=0.2, linewidth=0)
    marker = "o" if len(curve.x) <= MARKED else ""
    (line,) = axes.plot(curve.x, curve.y, color=look.colour, marker=marker, markersize=3.5, zorder=3)
    if look.dashes:
        line.set_dashes(look.dashes)
    sheet.hover(line, f"{curve.name}: {curve.y[-1]:.4g} at the end")
    if end:
        axes.annotate(
            f"{curve.y[-1]:.3g}",
            (curve.x[-1], curve.y[-1]),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
            annotation_clip=False,
        )


def apart(curves: list[Curve]) -> bool:
    """Whether the values are so far apart that only a logarithmic axis shows them all."""
    values = [y for curve in curves for y in curve.y]
    return bool(values) and min(values) > 0 and max(values) > 8 * min(values)


def _limits(curves: list[Curve], log: bool) -> tuple[float, float]:
    """Common limits of charts that are compared."""
    if log:
        values = [y for curve in curves for y in curve.y]
        return min(values) / 1.3, max(values) * 1.3
    low = min(y - s for curve in curves for y, s in zip(curve.y, curve.spread))
    high = max(y + s for curve in curves for y, s in zip(curve.y, curve.spread))
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


# ---- what is drawn -----------------------------------------------------------------------------------------------------


def accuracy(methods: list[Method], by_seconds: bool) -> list[Curve]:
    """Held-out accuracy in per cent after each pass over the data; x is the pass, or the seconds of training so far."""

    def point(epoch: Epoch) -> tuple[float, float] | None:
        x = epoch.elapsed if by_seconds else float(epoch.epoch)
        return None if x is None or epoch.accuracy is None else (x, 100 * epoch.accuracy)

    return _of(methods, lambda run: [point(epoch) for epoch in run.epochs])


def validation_loss(methods: list[Method]) -> list[Curve]:
    """Held-out loss after each pass, for targets that are no classes."""
    return _of(methods, lambda run: [None if e.loss is None else (float(e.epoch), e.loss) for e in run.epochs])


def losses_by_depth(methods: list[Method]) -> list[Curve]:
    """The training loss at each stage's head in the last epoch that has one."""
    return _of(methods, lambda run: [_latest([e.losses for e in run.epochs], j, 1.0) for j in range(_stages(run))])


def accuracy_by_depth(methods: list[Method]) -> list[Curve]:
    """Held-out accuracy in per cent read at each stage's head at the end."""
    return _of(methods, lambda run: [_latest([e.stages for e in run.epochs], j, 100.0) for j in range(_stages(run))])


def losses_by_epoch(run: Run) -> list[Curve]:
    """The training loss of each stage over the passes."""
    curves = []
    for j in range(_stages(run)):
        row = [(float(e.epoch), loss) for e in run.epochs if (loss := _at(e.losses, j)) is not None]
        curve = over_runs(f"stage {j}", [list(row)])
        curves += [curve] if curve else []
    return curves


def _of(methods: list[Method], points: Callable[[Run], Points]) -> list[Curve]:
    curves = [over_runs(method.name, [points(run) for run in method.runs]) for method in methods]
    return [curve for curve in curves if curve is not None]


def _stages(run: Run) -> int:
    return max((max(len(e.losses), len(e.stages)) for e in run.epochs), default=0)


def _at(values: list[float | None], j: int) -> float | None:
    return values[j] if j < len(values) else None


def _latest(rows: list[list[float | None]], j: int, scale: float) -> tuple[float, float] | None:
    known = [value for row in rows if (value := _at(row, j)) is not None]
    return (float(j), scale * known[-1]) if known else None


def stages_chart(
    sheet: Sheet, curves: list[Curve], axis: Axis, name: str, small: bool, what: str = "losses of the stages"
) -> str:
    """The stages of one run in one chart, deeper ones darker."""
    looks = {curve.name: Look(_shade(k, len(curves)), ()) for k, curve in enumerate(curves)}
    names = [curve.name for curve in curves]
    figure = _panel(sheet, curves, names, looks, axis, f"{name}: {what}", small)
    return f'<div class="panel"><h4>{html.escape(name)}</h4>{figure}{legend(names, looks)}</div>'


def _shade(k: int, count: int) -> str:
    """From amber over red to dark violet: hue and lightness both tell the depth."""
    stops = ((0xE0, 0xA0, 0x20), (0xC2, 0x43, 0x6B), (0x2B, 0x1B, 0x6B))
    share = 2 * k / (count - 1) if count > 1 else 2.0
    low, high = (stops[0], stops[1]) if share < 1 else (stops[1], stops[2])
    return "#" + "".join(f"{round(a + (share - (share >= 1)) * (b - a)):02X}" for a, b in zip(low, high))
