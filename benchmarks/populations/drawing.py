"""The pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unlocked.report.drawing import COLOURS, DASHES, GREY, INK, RC
from unlocked.soups import HeatMap

Row = dict[str, Any]
Curve = tuple[Sequence[float], Sequence[float]]  # x and y
LABELS = {"ensemble": "ensemble", "averaged": "averaged", "greedy": "greedy soup"}


def figure(
    file: Path, panels: int, fill: Callable[[Sequence[Any]], None], width: float = 4.6, columns: int = 2
) -> None:
    """Write a figure of so many panels; `fill` draws into them."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = -(-panels // columns)
    with matplotlib.rc_context(RC):
        made = Figure(figsize=(width * columns, 3.4 * rows), layout="constrained")
        made.patch.set_facecolor("white")
        fill(made.subplots(rows, columns, squeeze=False).flatten().tolist())
        file.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(file, dpi=110, metadata={"Software": None})


def title(axes: Any, text: str) -> None:
    """Above a panel, on the left."""
    axes.set_title(text, loc="left", fontsize=10.5, fontweight="bold", color=INK)


def curves(axes: Any, rows: Mapping[str, Curve], x: str, y: str, marker: str = "") -> None:
    """A line for each name."""
    for k, (name, (xs, ys)) in enumerate(rows.items()):
        look = {"color": COLOURS[k % len(COLOURS)], "linestyle": (0, DASHES[k % len(DASHES)])}
        axes.plot(xs, ys, label=name, marker=marker, markersize=4, linewidth=1.8, **look)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def accuracies(file: Path, lines: Sequence[Row]) -> None:
    """For each setting and N a panel: ensemble, averaged network and greedy soup of each method, with one deviation."""
    groups = list(dict.fromkeys((line["setting"], line["members"]) for line in lines))
    colours = {
        name: COLOURS[k % len(COLOURS)] for k, name in enumerate(dict.fromkeys(line["method"] for line in lines))
    }
    marks = (("ensemble", "o", "white"), ("averaged", "o", None), ("greedy", "x", None))

    def fill(panels: Sequence[Any]) -> None:
        for axes, (setting, count) in zip(panels, groups):
            here = [line for line in lines if (line["setting"], line["members"]) == (setting, count)]
            for k, line in enumerate(here):
                for (kind, mark, face), shift in zip(marks, (-0.16, 0.0, 0.16)):
                    mean, deviation = line[kind]
                    axes.errorbar(
                        mean,
                        k + shift,
                        xerr=deviation,
                        fmt=mark,
                        color=colours[line["method"]],
                        markerfacecolor=face or colours[line["method"]],
                        markersize=6,
                        elinewidth=1.2,
                        label=LABELS[kind] if axes is panels[0] and k == 0 else None,
                    )
            axes.set_yticks(range(len(here)), [line["method"] for line in here])
            axes.invert_yaxis()
            axes.axvline(10, color=GREY, linewidth=1)
            axes.set_xlabel("test accuracy (%)")
            title(axes, f"{setting}, N = {count}")
        panels[0].figure.legend(loc="outside lower center", ncols=len(marks), frameon=False, fontsize=9)

    figure(file, len(groups), fill)


def heat_maps(file: Path, maps: Mapping[str, HeatMap]) -> None:
    """A panel for each method, all with one scale of colours."""
    values = {name: [100 * value for value in found.values] for name, found in maps.items()}
    lowest, highest = (choose(x for row in values.values() for x in row) for choose in (min, max))

    def fill(panels: Sequence[Any]) -> None:
        drawn = None
        for axes, (name, found) in zip(panels, maps.items()):
            x, y = zip(*found.points)
            drawn = axes.tripcolor(x, y, values[name], shading="gouraud", vmin=lowest, vmax=highest, rasterized=True)
            for k in found.corners:
                (right, up), text = found.points[k], f"{values[name][k]:.1f} %"
                axes.annotate(
                    text, (right, up), (14 * right, 11 * up), textcoords="offset points", ha="center", va="center"
                )
            axes.set_aspect("equal")
            axes.set_axis_off()
            axes.margins(0.2)
            title(axes, f"{name}: in the middle {values[name][0]:.1f} %")
        panels[0].figure.colorbar(drawn, ax=list(panels), label="test accuracy (%)", shrink=0.8)

    figure(file, len(maps), fill, width=4.2, columns=3)
