"""The bytes kept for backward over one step."""

from __future__ import annotations

from .drawing import INK, Look, Sheet, heading, whole_ticks
from .words import bytes_text, bytes_unit

POINTS = 600  # more are thinned out: every bucket keeps its lowest and its highest


def memory(sheet: Sheet, curves: list[tuple[str, list[float]]], looks: dict[str, Look]) -> str:
    """The bytes kept for backward over one step, a small chart for each method on common axes."""
    top = max(max(curve) for _, curve in curves) or 1.0
    scale, unit = bytes_unit(top)
    panels = "".join(
        f'<div class="panel">{heading(name, looks[name])}'
        f"{_memory_panel(sheet, name, curve, looks[name].colour, top / scale, (scale, unit), len(curves) == 1)}</div>"
        for name, curve in curves
    )
    return f'<div class="panels{"" if len(curves) == 1 else " small"}">{panels}</div>'


def _memory_panel(
    sheet: Sheet, name: str, curve: list[float], colour: str, top: float, scale: tuple[float, str], alone: bool
) -> str:
    axes = sheet.axes(*((390, 230, (50, 40, 16, 14)) if alone else (250, 175, (44, 36, 10, 14))))
    places = thin(curve)
    y = [curve[k] / scale[0] for k in places]
    axes.fill_between(places, y, step="post", color=colour, alpha=0.25, linewidth=0)
    axes.step(places, y, where="post", color=colour, linewidth=1.4)
    peak = max(range(len(curve)), key=curve.__getitem__)
    (dot,) = axes.plot([peak], [curve[peak] / scale[0]], "o", color=colour, markersize=5)
    text = bytes_text(curve[peak])
    sheet.hover(dot, f"peak: {curve[peak]:,.0f} bytes")
    right = peak > 0.6 * len(curve)
    axes.annotate(
        text, (peak, curve[peak] / scale[0]), (-7 if right else 7, 3), textcoords="offset points",
        ha="right" if right else "left", fontsize=9, color=INK,
    )  # fmt: skip
    axes.set_ylim(0, 1.15 * top)
    axes.set_xlim(0, max(len(curve) - 1, 1))
    axes.set_xlabel("saves and frees")
    axes.set_ylabel(f"kept, {scale[1]}")
    whole_ticks(axes, 5)
    return sheet.svg(axes, f"Activation memory of {name}, peak {text}")


def thin(curve: list[float]) -> list[int]:
    """Indices of at most 2 · POINTS + 2 points that keep the curve's outline, its peak above all."""
    if len(curve) <= 2 * POINTS:
        return list(range(len(curve)))
    kept = {0, len(curve) - 1}
    for k in range(POINTS):
        bucket = range(k * len(curve) // POINTS, (k + 1) * len(curve) // POINTS)
        kept |= {min(bucket, key=curve.__getitem__), max(bucket, key=curve.__getitem__)}
    return sorted(kept)
