"""The picture: accuracy and consensus distance against N, and the distance over the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .reporting import middle, spread
from populations.drawing import curves, figure, title

Row = dict[str, Any]


def draw(file: Path, rows: Sequence[Row]) -> None:
    """Three panels: of equal workers that meet who is free."""
    rows = [r for r in rows if r["accuracy"] is not None and r["pairing"] == "available" and not r["slow"]]
    names = sorted(
        dict.fromkeys(row["method"] for row in rows), key=lambda name: name.startswith("AR")
    )  # last: no distance
    sizes = sorted({row["workers"] for row in rows})

    def against(name: str, of: Any) -> tuple[list[float], list[float]]:
        found = {n: [of(row) for row in rows if row["method"] == name and row["workers"] == n] for n in sizes}
        return [n for n in sizes if found[n]], [spread(values)[0] for values in found.values() if values]

    def over(name: str) -> tuple[list[float], list[float]]:
        one = [row["distances"] for row in rows if row["method"] == name and row["workers"] == sizes[-1]]
        means = [spread(values)[0] for values in zip(*one)]
        return [float(k + 1) for k in range(len(means))], means

    apart = [name for name in names if not name.startswith("AR")]

    def fill(panels: Sequence[Any]) -> None:
        first, second, third, *_ = panels
        curves(first, {n: against(n, lambda row: 100 * row["accuracy"]) for n in names}, "workers", "% correct", "o")
        title(first, "Test accuracy of the mean")
        curves(second, {n: against(n, middle) for n in apart}, "workers", "‖xᵢ − x̄‖ / ‖x̄‖", "o")
        title(second, "Distance, half way")
        curves(third, {n: over(n) for n in apart}, "epoch", "‖xᵢ − x̄‖ / ‖x̄‖", "o")
        title(third, f"Distance, N = {sizes[-1]}")
        for axes in (first, second):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(n) for n in sizes])
        for axes in (second, third):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        first.legend()

    figure(file, 3, fill, width=4.0, columns=3)
