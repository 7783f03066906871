"""Accuracy on CIFAR-10 of data parallelism (DP) and cyclic data parallelism (CDP-v1, CDP-v2); losses as in Figure 5.3.

    python benchmarks/cyclic_accuracy.py DIR --plot FILE.png      a small run on a CPU; DIR: train.parquet, test.parquet
    python benchmarks/cyclic_accuracy.py DIR --full --device cuda --plot FILE.png       width 1, all images, 100 epochs

Fournier's thesis, Section 5.4 and Appendix C.1: ResNet-18 in 4 stages of similar FLOPs, N = 4 micro-batches, 5 runs,
nothing tuned for CDP. SGD with momentum 0.9, weight decay 5e-4, learning rate 0.05 without warm-up, then a cosine to 0
(--full: × 0.2 at epochs 30, 60 and 90, batches of 128, as there); crop and flip. For a seed all methods begin with the
same weights and see the same samples in the same order, replica by replica; they live in one process and one thread.
BatchNorm normalises by the micro-batch of its replica. Each replica keeps its own running statistics; the averaged
network, which is what is tested, has their mean.

A finished run's line (with its loss at every update) is appended to --log; runs in the log of the same settings are not
done again, and are in the table and the picture, too.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from delayed_accuracy import load
from torch.optim import lr_scheduler

import unlocked as ul
from unlocked.data import Data
from unlocked.errors import NonFiniteLoss
from unlocked.rng import seed_of

from common import accuracy, result
from cyclics.losses import Losses, draw
from logged_runs import append, read

COUNT = 4  # replicas and stages
METHODS: dict[str, ul.consensus.Consensus] = {
    "DP": ul.consensus.AllReduce(bucket_mb=0),
    "CDP-v1": ul.consensus.CDP("v1"),
    "CDP-v2": ul.consensus.CDP("v2"),
}
Row = dict[str, Any]
Spread = tuple[float | None, float]  # mean (None: of nothing) and standard deviation


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--subset", type=int, default=3000, help="training images")
    parser.add_argument("--tested", type=int, default=2000, help="test images")
    parser.add_argument("--batch", type=int, default=64, help=f"samples of an update, of all {COUNT} replicas together")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05], help="learning rates, one table row each")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--log", type=Path, default=Path("runs/cyclic_accuracy.jsonl"))
    parser.add_argument("--plot", type=Path, help="where to draw the training losses (.png)")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    if options.full:
        options.width, options.subset, options.tested, options.batch, options.epochs = 1.0, None, 10_000, 128, 100
    return options


def run(name: str, rate: float, seed: int, train: Data, test: Data, options: argparse.Namespace) -> Row:
    """One training; its losses, and the test accuracy of the averaged network (None if the loss was not finite)."""
    recorder, begin = Losses(), time.perf_counter()
    trainer = _trainer(name, rate, seed, train, options)
    found = None
    try:
        trainer.fit(train, options.epochs, batch_size=options.batch // COUNT, callbacks=[recorder])
        found = accuracy(trainer.averaged(), test, options.tested)
    except NonFiniteLoss as error:
        print(error)
    seconds = time.perf_counter() - begin
    return {
        "method": name,
        "rate": rate,
        "seed": seed,
        "accuracy": found,
        "losses": recorder.losses,
        "seconds": seconds,
    }


def _trainer(name: str, rate: float, seed: int, train: Data, options: argparse.Namespace) -> ul.Trainer:
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "model"))
        model = ul.models.resnet18(train.input_shape, train.classes, width=options.width).to(options.device)
    like = train.samples(torch.arange(2))[0].to(options.device)
    steps = train.steps(options.batch // COUNT, shards=COUNT)

    def schedule(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        if options.full:
            return lr_scheduler.MultiStepLR(optimizer, [30 * steps, 60 * steps, 90 * steps], gamma=0.2)
        return lr_scheduler.CosineAnnealingLR(optimizer, steps * options.epochs)

    return ul.Trainer(
        ul.cut(model, COUNT, like=like),
        credit=ul.credit.Backprop(),
        consensus=METHODS[name],
        replicas=COUNT,
        optimizer=lambda ps: torch.optim.SGD(ps, lr=rate, momentum=0.9, weight_decay=5e-4),
        schedule=schedule,
        batchnorm="local",
        seed=seed,
        device=options.device,
    )


def table(rows: list[Row], updates: int) -> list[Row]:
    """Mean and standard deviation over the seeds, a line for each rate and method; differences to DP seed by seed."""
    print("rate    method   seeds  test accuracy (%)   less DP, seed by seed   loss: first epoch   last epoch")
    lines = []
    for rate, name in dict.fromkeys((row["rate"], row["method"]) for row in rows):
        here = {row["seed"]: row for row in rows if (row["rate"], row["method"]) == (rate, name)}
        whole = {seed: 100 * row["accuracy"] for seed, row in here.items() if row["accuracy"] is not None}
        plain = {row["seed"]: row["accuracy"] for row in rows if (row["rate"], row["method"]) == (rate, "DP")}
        line = {
            "rate": rate,
            "method": name,
            "seeds": len(here),
            "diverged": len(here) - len(whole),
            "accuracy": _spread(list(whole.values())),
            "less_dp": _spread([x - 100 * plain[seed] for seed, x in whole.items() if plain.get(seed) is not None]),
            "first": _spread([fmean(row["losses"][:updates]) for row in here.values()]),
            "last": _spread([fmean(here[seed]["losses"][-updates:]) for seed in whole]),
            "seconds": fmean(row["seconds"] for row in here.values()),
        }
        lines.append(line)
        shown = [
            _shown(line[key], digits) for key, digits in (("accuracy", 2), ("less_dp", 2), ("first", 3), ("last", 3))
        ]
        lost = f"   {line['diverged']} not finite" if line["diverged"] else ""
        print(f"{rate:<8g}{name:9s}{len(here):5d}{shown[0]:>19s}{shown[1]:>24s}{shown[2]:>20s}{shown[3]:>17s}{lost}")
    return lines


def _spread(values: list[float]) -> Spread:
    return (fmean(values) if values else None), (stdev(values) if len(values) > 1 else 0.0)


def _shown(spread: Spread, digits: int) -> str:
    mean, deviation = spread
    return "–" if mean is None else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    chosen = ("width", "subset", "tested", "batch", "epochs", "full")
    settings = {name: getattr(options, name) for name in chosen}
    known = {(row["method"], row["rate"], row["seed"]): row for row in read(options.log, settings)}
    train, test = load(options)
    tasks = [(name, rate, seed) for rate in options.rates for seed in range(options.seeds) for name in METHODS]
    for k, task in enumerate(tasks):
        if task in known:
            continue
        row = known[task] = run(*task, train, test, options)
        append(options.log, [row | {"settings": settings}])
        told = "not finite" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f} %"
        name, rate, seed = task
        print(f"{k + 1}/{len(tasks)} {name} rate {rate:g} seed {seed}: {told}, {row['seconds']:.0f} s", flush=True)
    rows = sorted(known.values(), key=lambda row: (row["rate"], list(METHODS).index(row["method"]), row["seed"]))
    updates = train.steps(options.batch // COUNT, shards=COUNT)
    if options.plot is not None:
        draw(options.plot, rows, updates)
    result("cyclic_accuracy", rows=table(rows, updates), settings=settings)


if __name__ == "__main__":
    main()
