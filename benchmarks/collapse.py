"""Dimensional collapse in a linear model, and what keeping similar pairs only does about it (F §3.2.4, Figure 3.2).

    python benchmarks/collapse.py [--points 256] [--sigma 1.5] [--seeds 5] [--steps 300] [--plot FILE.svg]

Points of the standard normal distribution in D = 16 dimensions; two views of each, with noise of amplitude σ on the last 8.
W (16 × 16), from the identity, is trained on them by gradient descent on subsampled NT-Xent with threshold T; T = -1 is
SimCLR. Prints, for each T, the singular values of the covariance of z = W x over the greatest: their mean over the trailing 8,
the 9th and the last; how many are above 0.001; and what is kept at the end. Mean ± standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unlocked.pairs import SubsampledNTXent
from unlocked.pairs.toy import interleaved, noisy_views, spectrum, train

from common import result

THRESHOLDS = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.6, 0.7, 0.75, 0.8)
NOISY = 8


class Task(NamedTuple):
    threshold: float
    seed: int
    points: int
    sigma: float
    steps: int
    rate: float
    temperature: float


def run(task: Task) -> tuple[list[float], float, float]:
    """Spectrum, share of positives kept, share of negatives kept, after training."""
    torch.set_num_threads(1)
    views = interleaved(*noisy_views(task.points, task.sigma, torch.Generator().manual_seed(task.seed), noisy=NOISY))
    loss = SubsampledNTXent(task.threshold, temperature=task.temperature)
    z = views @ train(loss, views, task.steps, task.rate).T
    notes = loss.judge(z, torch.zeros(len(z), dtype=torch.int64)).notes
    return spectrum(z).tolist(), float(notes["positives kept"]), float(notes["negatives kept"])


def mean_std(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def row(threshold: float, runs: list[tuple[list[float], float, float]]) -> dict[str, Any]:
    """One line of the table."""
    spectra = [one[0] for one in runs]
    return {
        "threshold": threshold,
        "trailing": mean_std([statistics.fmean(values[-NOISY:]) for values in spectra]),
        "ninth": mean_std([values[-NOISY] for values in spectra]),
        "last": mean_std([values[-1] for values in spectra]),
        "in use": mean_std([float(sum(value > 1e-3 for value in values)) for values in spectra]),
        "positives kept": mean_std([one[1] for one in runs]),
        "negatives kept": mean_std([one[2] for one in runs]),
        "spectrum": [statistics.fmean(column) for column in zip(*spectra)],
    }


def draw(rows: list[dict[str, Any]], to: Path) -> None:
    """Figure 3.2: the mean spectrum of each threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for one in rows:
        label = f"T = {one['threshold']:g}" + (" (SimCLR)" if one["threshold"] == -1 else "")
        values = [max(value, 1e-9) for value in one["spectrum"]]
        axes.semilogy(range(1, len(values) + 1), values, marker="o", markersize=3, label=label)
    axes.set(
        xlabel="singular value",
        ylabel="over the greatest (at least 1e-9)",
        title="Covariance of z = W x after training",
    )
    axes.legend(fontsize="small")
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=256)
    parser.add_argument("--sigma", type=float, default=1.5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=5.0)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--plot", type=Path, default=None)
    options = parser.parse_args()
    settings = (options.points, options.sigma, options.steps, options.rate, options.temperature)
    tasks = [Task(threshold, seed, *settings) for threshold in THRESHOLDS for seed in range(options.seeds)]
    with ProcessPoolExecutor(options.jobs) as pool:
        found = list(pool.map(run, tasks))
    rows = [
        row(threshold, [one for task, one in zip(tasks, found) if task.threshold == threshold])
        for threshold in THRESHOLDS
    ]
    columns = ("trailing", "ninth", "last", "in use", "positives kept", "negatives kept")
    print("     T  " + "".join(f"{name:>22s}" for name in columns))
    for one in rows:
        print(
            f"{one['threshold']:6.2f}  " + "".join(f"{m:12.3g} ± {s:<7.2g}" for m, s in map(one.__getitem__, columns))
        )
    if options.plot is not None:
        draw(rows, options.plot)
    result("collapse", rows=rows, **{name: getattr(options, name) for name in ("points", "sigma", "seeds", "steps")})


if __name__ == "__main__":
    main()
