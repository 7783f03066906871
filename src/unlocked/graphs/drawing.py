"""A picture of a graph: its edges as wide as their rates and coloured by their resistances, and the spectrum beside it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InvalidChoice
from ..report.drawing import COLOURS, INK, RC
from .graph import Floats, Graph
from .reading import to_networkx
from .spectra import edge_resistances, eigenvalues

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST = 300  # nodes that a picture can show
_TREE_LIKE = 100  # up to here a slower layout that shows lengths better
_LABELLED = 40


def layout(graph: Graph) -> Floats:
    """(n, 2): where to draw the nodes, by networkx if it is installed (the same each time), else on a circle."""
    angles = 2 * np.pi * np.arange(graph.n) / graph.n
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if graph.n < 3 or not graph.connected or importlib.util.find_spec("networkx") is None:
        return circle
    import networkx

    made, start = to_networkx(graph), dict(enumerate(circle))
    if graph.n <= _TREE_LIKE:
        found = networkx.kamada_kawai_layout(made, pos=start, weight=None)
    else:
        found = networkx.spring_layout(made, pos=start, weight=None, seed=0, iterations=200)
    return np.array([found[node] for node in range(graph.n)])


def refuse_picture(path: Path, n: int) -> None:
    """Raises InvalidChoice for a name that is no picture's, or a graph of too many nodes to see anything."""
    if path.suffix not in (".png", ".svg"):
        raise InvalidChoice(f"{path} is no picture that can be written; let its name end in .png or .svg.")
    if n > LARGEST:
        raise InvalidChoice(f"{n} nodes cannot be seen in one picture, at most {LARGEST}; leave out --plot.")


def draw(path: Path, graph: Graph, title: str = "", where: Floats | None = None) -> None:
    """Write the picture, as the file's ending says: .png or .svg. where: (n, 2), None for `layout`. Raises InvalidChoice."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    refuse_picture(path, graph.n)
    with rc_context(RC):
        figure = Figure(figsize=(9.2, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _draw_edges(left, graph, layout(graph) if where is None else where)
        _draw_spectrum(right, graph)
        figure.suptitle(title or f"{graph.name}, n = {graph.n}", fontsize=11, color=INK)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_edges(axes: Axes, graph: Graph, where: Floats) -> None:
    from matplotlib.collections import LineCollection

    axes.set_axis_off()
    axes.set_aspect("equal")
    if len(graph):
        widths = 0.4 + 3.2 * graph.rates / graph.rates.max()
        lines = LineCollection(list(where[graph.edges]), linewidths=widths, cmap="viridis_r", zorder=1)
        found = edge_resistances(graph)
        lines.set_array(found)
        lines.set_clim(0.0, float(found.max()))
        axes.add_collection(lines)
        bar = axes.figure.colorbar(lines, ax=axes, location="bottom", shrink=0.6, pad=0.02)
        bar.set_label("effective resistance R; width: rate")
    named = graph.n <= _LABELLED
    axes.scatter(
        where[:, 0], where[:, 1], s=160 if named else 18, color="white", edgecolors=INK, linewidths=1.0, zorder=2
    )
    for node in range(graph.n if named else 0):
        axes.annotate(str(node), where[node], ha="center", va="center", fontsize=7, color=INK)
    axes.margins(0.08)


def _draw_spectrum(axes: Axes, graph: Graph) -> None:
    values = eigenvalues(graph)
    axes.plot(np.arange(1, graph.n + 1), values, ".", color=COLOURS[0], markersize=5)
    if graph.n > 1:
        axes.plot([2], [values[1]], "o", color=COLOURS[1], markersize=7)
        axes.annotate(f"λ₂ = {values[1]:.3g}", (2, values[1]), (12, -4), textcoords="offset points", color=COLOURS[1])
    axes.set_xlabel("k")
    axes.set_ylabel("eigenvalue λ_k of Λ")
