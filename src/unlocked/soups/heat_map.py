"""How good the networks between three to five members are: a heat map over a polygon (Fournier's thesis, Figure D.1).

The corners of a regular polygon are the members. A point p inside stands for the mean with weights (Wachspress, "A Rational
Finite Element Basis", 1975)

    w_n(p) ∝ Π over the edges that do not touch corner n of (area of the triangle of p and that edge)

For a triangle these are the barycentric coordinates. Limits: w is 1 for one member at its corner; on an edge only its two ends
have a share; the centre is the plain mean. Other figures between the same members are possible for four and more: the points of
a polygon are two-dimensional, the means of N members N − 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..batchnorm import refresh_batchnorm
from ..errors import InvalidChoice
from ..losses import Loss
from ..report.drawing import INK, RC
from .averaging import averaged, refuse_unlike
from .predicting import Batches, loss_and_accuracy, predict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEWEST, MOST = 3, 5
SMALLEST_SHARE = 1e-12  # rounding, at corners and edges


@dataclass(frozen=True)
class HeatMap:
    """points: (x, y) in the unit circle, the corners (0, 1) and on, anticlockwise; weights: of each point, one per member;
    values: accuracy or loss there; corners: the members' own points, as indices. All in the order of `points`."""

    names: list[str]
    points: list[tuple[float, float]]
    weights: list[list[float]]
    values: list[float]
    corners: list[int]
    what: Literal["accuracy", "loss"]

    def to_json(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return asdict(self)

    def draw(self, path: str | Path, title: str = "") -> None:
        """Write the picture, as the file's ending says: .svg or .png. Raises InvalidChoice for another ending."""
        _draw(self, Path(path), title)


def heat_map(
    models: Sequence[nn.Module],
    data: Any,
    *,
    steps: int = 5,
    refresh: Any = None,
    loss: Loss | None = None,
    names: Sequence[str] | None = None,
    batch_size: int = 512,
) -> HeatMap:
    """The accuracy (the loss, where targets are no classes) of means of 3 to 5 models, at 1 + N·steps·(steps + 1)/2 points.

    steps: points from the centre to a corner. refresh: batches for the BatchNorm statistics of every mean that is no corner;
    None: the mean of the members' own. Raises InvalidChoice for too few or too many models, or models that differ in shape.
    """
    refuse_drawing(len(models), steps)
    refuse_unlike(models)
    batches = Batches(data, batch_size)
    sources = None if refresh is None else Batches(refresh, batch_size)
    points = lattice(len(models), steps)
    rows, values, what = [], [], "loss"
    for point in points:
        weights = polygon_weights(len(models), point)
        mean = averaged(models, weights.tolist())
        if sources is not None and float(weights.max()) < 1:
            refresh_batchnorm(mean, sources)
        found, accuracy = loss_and_accuracy(predict(mean, batches), loss)
        what = "loss" if accuracy is None else "accuracy"
        rows.append(weights.tolist())
        values.append(found if accuracy is None else accuracy)
    corners = [next(k for k, row in enumerate(rows) if row[n] == 1) for n in range(len(models))]
    called = list(names) if names is not None else [str(n) for n in range(len(models))]
    return HeatMap(called, points, rows, values, corners, what)  # type: ignore[arg-type]


def refuse_drawing(count: int, steps: int = 1) -> None:
    """Raises InvalidChoice if so many members make no polygon that can be read."""
    if not FEWEST <= count <= MOST:
        raise InvalidChoice(f"A heat map has 3 to 5 members as its corners, got {count}; choose some of them.")
    if steps < 1:
        raise InvalidChoice(f"steps={steps} is not possible; give a whole number of at least 1.")


def polygon(count: int) -> list[tuple[float, float]]:
    """Corners of the regular polygon in the unit circle, the first at the top, anticlockwise."""
    angles = [math.pi / 2 + 2 * math.pi * n / count for n in range(count)]
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


def lattice(count: int, steps: int) -> list[tuple[float, float]]:
    """Points in rings around the centre, the last ring on the polygon: ring r has r points on each of the sides."""
    corners = polygon(count)
    points = [(0.0, 0.0)]
    for ring in range(1, steps + 1):
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
            for k in range(ring):
                far, near = ring - k, k
                points.append(((far * ax + near * bx) / steps, (far * ay + near * by) / steps))
    return points


def polygon_weights(count: int, point: tuple[float, float]) -> Tensor:
    """(count,) float64 Wachspress weights of a point in the polygon: at least 0, summing up to 1."""
    corners = polygon(count)
    areas = [
        max(0.0, (ax - point[0]) * (by - point[1]) - (bx - point[0]) * (ay - point[1]))
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1])
    ]  # areas[n]: twice that of the triangle with the edge from corner n to the next
    shares = torch.tensor(
        [math.prod(area for k, area in enumerate(areas) if k not in ((n - 1) % count, n)) for n in range(count)],
        dtype=torch.float64,
    )
    shares = shares / shares.sum()
    shares[shares < SMALLEST_SHARE] = 0.0
    return shares / shares.sum()


# ---- the picture -----------------------------------------------------------------------------------------------------


def _draw(found: HeatMap, path: Path, title: str) -> None:
    if path.suffix not in (".svg", ".png"):
        raise InvalidChoice(f"A picture ends in .svg or .png; {path} does not.")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(RC):
        figure = Figure(figsize=(5.6, 4.8))
        axes = figure.add_axes((0.06, 0.05, 0.66, 0.76))
        _fill(found, axes)
        _name_corners(found, axes)
        axes.set_title(
            title or f"{found.what} of the means of {len(found.names)} members", fontsize=11, color=INK, pad=34
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _fill(found: HeatMap, axes: Axes) -> None:
    percent = 100 if found.what == "accuracy" else 1
    x, y = zip(*found.points)
    values = [percent * value for value in found.values]
    map_name = "viridis" if found.what == "accuracy" else "viridis_r"  # bright is good
    drawn = axes.tripcolor(x, y, values, shading="gouraud", cmap=map_name, rasterized=True)
    axes.scatter(x, y, s=3, color="white", alpha=0.5, linewidths=0)
    bar = axes.figure.colorbar(drawn, cax=axes.inset_axes((1.06, 0.05, 0.05, 0.9)))
    bar.set_label("accuracy %" if percent == 100 else "loss")
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.margins(0.12)


def _name_corners(found: HeatMap, axes: Axes) -> None:
    for name, k in zip(found.names, found.corners):
        (x, y), value = found.points[k], found.values[k]
        shown = f"{100 * value:.1f} %" if found.what == "accuracy" else f"{value:.3g}"
        axes.annotate(
            f"{name}\n{shown}",
            (x, y),
            (14 * x, 14 * y),
            textcoords="offset points",
            ha="center" if abs(x) < 0.3 else "left" if x > 0 else "right",
            va="center" if abs(y) < 0.3 else "bottom" if y > 0 else "top",
            fontsize=9,
            color=INK,
            annotation_clip=False,
        )
