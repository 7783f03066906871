"""The training loss at every update, and the thesis' Figure 5.3: the three rules' curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unlocked.callbacks import Callback
from unlocked.report.drawing import COLOURS, DASHES, INK, RC

SHARE = 7 / 90  # of the training: the window of Figure 5.3, 7 of 90 epochs


class Losses(Callback):
    """Keeps the loss of every update, the mean over the replicas, each at the weights its forward saw."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, trainer: Any, record: dict[str, Any]) -> None:
        self.losses.append(record["losses"][-1])


def windowed(losses: Tensor) -> Tensor:
    """(seeds, updates) → the same, each value the mean of those around it; shorter windows at both ends."""
    half = max(1, round(SHARE * losses.shape[-1]) // 2)
    return torch.nn.functional.avg_pool1d(losses[None], 2 * half + 1, 1, half, count_include_pad=False)[0]


def draw(file: Path, rows: Sequence[dict[str, Any]], updates: int) -> None:
    """A panel for each learning rate: mean over the seeds, a band of one standard deviation. `updates`: of an epoch."""
    import matplotlib
    from matplotlib.figure import Figure

    rates = list(dict.fromkeys(row["rate"] for row in rows))
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(max(5.6, 4.2 * len(rates)), 3.9), layout="constrained")
        figure.patch.set_facecolor("white")
        for axes, rate in zip(figure.subplots(1, len(rates), squeeze=False)[0], rates):
            _panel(axes, [row for row in rows if row["rate"] == rate], updates)
            axes.set_title(f"Learning rate {rate:g}", loc="left", fontsize=11, fontweight="bold", color=INK)
        figure.savefig(file, dpi=144, metadata={"Software": None})


def _panel(axes: Any, rows: Sequence[dict[str, Any]], updates: int) -> None:
    for k, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        runs = [row["losses"] for row in rows if row["method"] == name]
        length = min(map(len, runs))  # a run that was not finite ends early
        curves = windowed(torch.tensor([run[:length] for run in runs]))
        mean, deviation = curves.mean(0), curves.std(0, correction=1 if len(runs) > 1 else 0)
        when = torch.arange(length) / updates
        axes.plot(when, mean, color=COLOURS[k], linestyle=(0, DASHES[k]), label=name)
        axes.fill_between(when, mean - deviation, mean + deviation, color=COLOURS[k], alpha=0.2, linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss (nats)")
    axes.legend(frameon=False, fontsize=8.5)
