"""Which mitigation of delayed gradients helps: training against the number of stages J and the learning rate, on digits.

    python benchmarks/stability.py [--credit pipedream] [--epochs 4] [--seeds 3]

A perceptron of 16 hidden layers with LayerNorm-free tanh units in J = 2, 4, 8, 16 stages; SGD with momentum 0.9, batches
of 32, constant learning rate; the same data order and initial weights for all. Prints, for each J and learning rate, the
validation accuracy after the last epoch (mean over the seeds) of backprop (no delay), of the delayed rule alone and with
each mitigation; draws them into --to.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

import unlocked as ul
from unlocked.method_names import make_credit, make_mitigation, parse_method

from common import result

MITIGATIONS = (
    "staleness-aware",
    "gap-aware",
    "delay-compensation(lam=0.1)",
    "delay-compensation(lam=0.1,adaptive=True)",
    "weight-prediction",
    "weight-prediction(form=linear)",
)
STAGES, RATES = (2, 4, 8, 16), (0.003, 0.01, 0.03, 0.1)


def network(seed: int, layers: int = 16, units: int = 64) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = [[nn.Linear(units if k else 64, units), nn.Tanh()] for k in range(layers)]
    model = nn.Sequential(nn.Flatten(), *itertools.chain.from_iterable(hidden), nn.Linear(units, 10))
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, gain=1.2)
    return model


def accuracy(task: tuple[str, int, float, int, int]) -> float:
    """After training; a run that meets a loss that is not finite has what chance gives."""
    text, stages, rate, seed, epochs = task
    torch.set_num_threads(1)
    train, test = ul.data.load("digits")
    method = parse_method(text)
    trainer = ul.Trainer(
        ul.cut(network(seed), stages, like=train.samples(torch.arange(2))[0]),
        credit=make_credit(method.credit, stages),
        mitigation=make_mitigation(method.mitigation, stages),
        optimizer=lambda ps: torch.optim.SGD(ps, lr=rate, momentum=0.9),
        seed=seed,
    )
    try:
        records = trainer.fit(train, epochs, batch_size=32, validate=test, validate_every=epochs)
    except ul.UnlockedError:
        return 0.1
    return float(records[-1]["validation"]["accuracy"])


def draw(found: dict[tuple[str, int, float], list[float]], methods: list[str], to: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(STAGES), 3.4), layout="constrained")
    for axes, stages in zip(figure.subplots(1, len(STAGES), sharey=True), STAGES):
        for name in methods:
            rows = [found[name, stages, rate] for rate in RATES]
            axes.plot(RATES, [100 * statistics.fmean(row) for row in rows], marker="o", markersize=3, label=name)
        axes.set(xscale="log", title=f"J = {stages}", xlabel="learning rate", ylim=(0, 101))
    figure.axes[0].set_ylabel("validation accuracy, %")
    figure.axes[-1].legend(fontsize=6)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--credit", default="pipedream")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--to", type=Path, default=Path("docs/figures/stability.svg"))
    options = parser.parse_args()
    methods = ["backprop", options.credit, *(f"{options.credit}+{one}" for one in MITIGATIONS)]
    cases = list(itertools.product(methods, STAGES, RATES, range(options.seeds)))
    found: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    with ProcessPoolExecutor(options.jobs) as pool:
        tasks = [(*case, options.epochs) for case in cases]
        for (method, stages, rate, _), score in zip(cases, pool.map(accuracy, tasks, chunksize=4)):
            found[method, stages, rate].append(score)
    rows: list[dict[str, Any]] = []
    for stages in STAGES:
        print(f"\nJ = {stages:2d}" + " " * 48 + "".join(f"lr {rate:<12g}" for rate in RATES) + "mean")
        for method in methods:
            means = [100 * statistics.fmean(found[method, stages, rate]) for rate in RATES]
            spread = [
                100 * statistics.stdev(found[method, stages, rate] or [0, 0]) if options.seeds > 1 else 0.0
                for rate in RATES
            ]
            rows.append({"method": method, "stages": stages, "accuracy": means, "std": spread})
            print(
                f"{method:54s}"
                + "".join(f"{m:5.1f} ± {s:<7.1f}" for m, s in zip(means, spread))
                + f"{statistics.fmean(means):5.1f}"
            )
    draw(found, methods, options.to)
    result("stability", rates=RATES, rows=rows, epochs=options.epochs, seeds=options.seeds)


if __name__ == "__main__":
    main()
