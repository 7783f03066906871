"""The thesis' Figure 5.4, from shapes alone: activation bytes per worker over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlocked.report.drawing import COLOURS, DASHES, INK, RC
from unlocked.simulation.cyclic import even_starts, staggered

from .tracking import Track

PERIODS = 2


def draw(file: Path, tracks: Mapping[str, Track], replicas: Sequence[int]) -> None:
    """A panel for each network: DP solid, CDP dashed for each number of replicas, half of DP's peak as a line."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        figure.patch.set_facecolor("white")
        for axes, (name, found) in zip(figure.subplots(1, len(tracks), squeeze=False)[0], tracks.items()):
            _panel(axes, found, replicas)
            axes.set_title(name, loc="left", fontsize=11, fontweight="bold", color=INK)
        figure.legend(
            *axes.get_legend_handles_labels(), frameon=False, fontsize=8.5, loc="outside lower center", ncols=9
        )
        figure.savefig(file, dpi=144, metadata={"Software": None})


def _panel(axes: Any, found: Track, replicas: Sequence[int]) -> None:
    _line(axes, found, 1, "DP", color=INK)
    for k, count in enumerate(replicas):
        dashes = (0, DASHES[1 + k % (len(DASHES) - 1)])
        _line(axes, found, count, f"CDP, N = {count}", color=COLOURS[k], linestyle=dashes)
    axes.axhline(found.peak / 2e9, color="#8A93A3", linewidth=1.2, label="half")
    axes.set_xlim(0, PERIODS)
    axes.set_ylim(0)
    axes.set_xlabel("time (gradients)")
    axes.set_ylabel("activations per worker (GB)")


def _line(axes: Any, found: Track, count: int, label: str, **look: Any) -> None:
    curve = staggered(found.curve, found.period, even_starts(count)).curve
    whole = [(k + when / found.period, level) for k in range(PERIODS) for when, level in curve]
    times, levels = zip(*whole)
    axes.plot(
        times, [level / count / 1e9 for level in levels], drawstyle="steps-post", linewidth=1.5, label=label, **look
    )
