"""What a step takes: the bytes kept for backward, all live bytes, and what was predicted of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..probes.thinning import POINTS as POINTS
from ..probes.thinning import thin
from .drawing import INK, Look, Sheet, heading, whole_ticks
from .footprint import PARTS, Footprint, StageMemory
from .measured import facts
from .words import bytes_text, bytes_unit

Points = list[tuple[float, float]]


class Words(NamedTuple):
    """What is on a chart's axes and in its label; `whole`: x counts things."""

    x: str
    y: str
    label: str
    whole: bool = False


KEPT = Words("saves and frees", "kept", "Activation memory", whole=True)
LIVE = Words("ms", "live", "Live memory")

STAGES = {
    "Stage": "from the first (0) to the last",
    "What": "",
    "Predicted": "from the shapes of the network and the order of the method's forwards and backwards",
    "Measured": "the most over replicas and phases",
    "Measured / predicted": "",
}
PEAKS = {
    "At the worst moment": "live bytes of the process that had most",
    "parameters": "",
    "buffers": "",
    "optimizer state": "",
    "gradients": "",
    "inputs": "the batch",
    "saved for backward": "what autograd kept, parameters and buffers left out",
    "other": "messages, temporaries, and what was about to be freed",
}


def memory(sheet: Sheet, curves: list[tuple[str, list[float]]], looks: dict[str, Look]) -> str:
    """The bytes kept for backward over one step, a small chart for each method on common axes."""
    found = [(name, [(float(k), curve[k]) for k in thin(curve)]) for name, curve in curves]
    return _panels(sheet, found, looks, KEPT)


def live(sheet: Sheet, found: list[tuple[str, Footprint]], looks: dict[str, Look]) -> str:
    """All live bytes over one step in milliseconds, in the same way."""
    curves = [(name, [(1e3 * seconds, size) for seconds, size in footprint.curve]) for name, footprint in found]
    return _panels(sheet, curves, looks, LIVE)


def _panels(sheet: Sheet, curves: list[tuple[str, Points]], looks: dict[str, Look], words: Words) -> str:
    top = max(max(size for _, size in curve) for _, curve in curves) or 1.0
    panels = "".join(
        f'<div class="panel">{heading(name, looks[name])}'
        f"{_panel(sheet, name, curve, looks[name].colour, top, words, len(curves) == 1)}</div>"
        for name, curve in curves
    )
    return f'<div class="panels{"" if len(curves) == 1 else " small"}">{panels}</div>'


def _panel(sheet: Sheet, name: str, curve: Points, colour: str, top: float, words: Words, alone: bool) -> str:
    scale, unit = bytes_unit(top)
    axes = sheet.axes(*((390, 230, (50, 40, 16, 14)) if alone else (250, 175, (44, 36, 10, 14))))
    places, sizes = [x for x, _ in curve], [size / scale for _, size in curve]
    axes.fill_between(places, sizes, step="post", color=colour, alpha=0.25, linewidth=0)
    axes.step(places, sizes, where="post", color=colour, linewidth=1.4)
    place, peak = max(curve, key=lambda point: point[1])
    (dot,) = axes.plot([place], [peak / scale], "o", color=colour, markersize=5)
    text = bytes_text(peak)
    sheet.hover(dot, f"peak: {peak:,.0f} bytes")
    right = place > 0.6 * places[-1]
    axes.annotate(
        text, (place, peak / scale), (-7 if right else 7, 3), textcoords="offset points",
        ha="right" if right else "left", fontsize=9, color=INK,
    )  # fmt: skip
    axes.set_ylim(0, 1.15 * top / scale)
    axes.set_xlim(0, places[-1] or 1)
    axes.set_xlabel(words.x)
    axes.set_ylabel(f"{words.y}, {unit}")
    if words.whole:
        whole_ticks(axes, 5)
    return sheet.svg(axes, f"{words.label} of {name}, peak {text}")


# ---- tables ------------------------------------------------------------------------------------------------------------


def peaks(found: Sequence[tuple[str, Footprint]]) -> str:
    """What the live bytes were at the worst moment."""
    rows = []
    for name, footprint in found:
        parts = [bytes_text(footprint.categories.get(part, 0.0)) for part in list(PEAKS)[1:]]
        rows.append([*([name] if len(found) > 1 else []), bytes_text(footprint.peak), *parts])
    return facts(PEAKS, rows, method=len(found) > 1)


def stages(found: Sequence[tuple[str, Footprint]]) -> str:
    """Every stage, predicted against measured."""
    rows = []
    for name, footprint in found:
        for j, stage in enumerate(footprint.stages):
            rows += [[*([name] if len(found) > 1 else []), str(j), *row] for row in _rows(stage)]
    return facts(STAGES, rows, method=len(found) > 1)


def _rows(stage: StageMemory) -> list[list[str]]:
    rows = [[words, *_compared(stage.predicted[part], stage.measured[part])] for part, words in PARTS.items()]
    if stage.peak is None:
        return rows
    return [*rows, ["all that it made, at its worst moment", *_compared(None, stage.peak)]]


def _compared(predicted: float | None, measured: float | None) -> list[str]:
    ratio = f"{measured / predicted:.3f}" if predicted and measured is not None else "–"
    return [bytes_text(predicted), bytes_text(measured), ratio]
