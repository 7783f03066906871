"""Bytes between workers: one number for each method."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any, NamedTuple

from .drawing import INK, Look, Sheet
from .study import Method
from .words import bytes_text, bytes_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RATIO = 50  # values further apart than this go on a logarithmic axis


class Scale(NamedTuple):
    """Bytes per unit of the axis, the unit, where the axis begins and ends, and whether it is logarithmic."""

    divide: float
    unit: str
    low: float
    high: float
    log: bool


def traffic(sheet: Sheet, methods: list[Method], key: str, heading: str, looks: dict[str, Look]) -> str:
    """Bars from zero; if the values differ much, dots on a logarithmic axis, with zeros at its left end."""
    known = [(method.name, value) for method in methods if (value := method.numbers[key]) is not None]
    scale = _scale([value for _, value in known if value > 0])
    axes = sheet.axes(330, 34 * len(known) + 50, (10, 38, 62, 6))
    axes.set_xlim(scale.low, scale.high)
    axes.set_ylim(len(known) - 0.35, -0.75)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("bytes per update, logarithmic" if scale.log else f"{scale.unit} per update")
    if not any(value for _, value in known):
        axes.set_xticks([])
    if scale.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: bytes_text(value))
    for row, (name, value) in enumerate(known):
        _bar(sheet, axes, row, scale, value, looks[name].colour)
        _words(axes, row, scale, name, value)
    return f'<div class="panel"><h3>{html.escape(heading)}</h3>{sheet.svg(axes, heading)}</div>'


def _scale(positive: list[float]) -> Scale:
    if positive and max(positive) > RATIO * min(positive):
        return Scale(1.0, "bytes", min(positive) / 4, 1.5 * max(positive), True)
    top = max(positive, default=1.0)
    divide, unit = bytes_unit(top)
    return Scale(divide, unit, 0.0, 1.02 * top / divide, False)


def _bar(sheet: Sheet, axes: Axes, row: int, scale: Scale, value: float, colour: str) -> None:
    end = max(value / scale.divide, scale.low)
    if scale.log:
        axes.plot([scale.low, end], [row, row], color=colour, linewidth=1.5, alpha=0.5)
        (dot,) = axes.plot([end], [row], "o" if value else "|", color=colour, markersize=7, clip_on=False)
        sheet.hover(dot, f"{value:,.1f} bytes")
    else:
        sheet.hover(axes.barh(row, end, height=0.3, color=colour)[0], f"{value:,.1f} bytes")


def _words(axes: Axes, row: int, scale: Scale, name: str, value: float) -> None:
    """The method above its bar, its bytes behind it."""
    end = max(value / scale.divide, scale.low)
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": INK, "annotation_clip": False}
    axes.annotate(name, (scale.low, row), (2, 8), **style)
    axes.annotate(bytes_text(value), (end, row), (7, 0), va="center", **style)
