"""The figure: probes and dimensions by depth, spectra, negatives kept; means over the seeds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .cases import Case, Found
from .reporting import of


def draw(rows: list[Found], wanted: list[Case], path: Path) -> None:
    """The headline rules at J = 1 and at the deepest split, into a .png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    deepest = max(case.stages for case in wanted)
    shown = [("SimCLR", 1), ("subsampled", 1)]
    shown += [(name, deepest) for name in ("DGSSL", "subsampled", "DGSSL-LLM", "DGSSL, 0c2f", "oracle")]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), dpi=70)
    for k, (name, stages) in enumerate(shown):
        here = of(rows, name, stages)
        if here:
            style = {"color": f"C{k}", "label": f"{name}, J = {stages}", "linestyle": "--" if stages == 1 else "-"}
            _by_depth(axes[0], here, "probe", 100, style)
            _by_depth(axes[1], here, "rank", 1, style)
            spectrum = [statistics.fmean(column) for column in zip(*(row["depths"][-1]["spectrum"] for row in here))]
            axes[2].plot(range(1, len(spectrum) + 1), spectrum, **style)
            if "negatives kept" in here[0]["kept"][-1] and stages > 1:
                _negatives(axes[3], here, style)
    titles = (
        "linear probe, %",
        "effective rank",
        "covariance at the last depth",
        "negatives kept in the last epoch, %",
    )
    for axis, title in zip(axes, titles):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("singular value" if "covariance" in title else "stage" if "kept" in title else "blocks")
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _by_depth(axis: Any, rows: list[Found], what: str, scale: float, style: dict[str, Any]) -> None:
    columns = zip(*([scale * depth[what] for depth in row["depths"]] for row in rows))
    means = [statistics.fmean(column) for column in columns]
    axis.plot(range(1, len(means) + 1), means, **style)


def _negatives(axis: Any, rows: list[Found], style: dict[str, Any]) -> None:
    columns = zip(*([100 * share for share in row["kept"][-1]["negatives kept"]] for row in rows))
    means = [statistics.fmean(column) for column in columns]
    axis.plot(range(1, len(means) + 1), means, **style)
