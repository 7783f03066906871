"""Populations on CIFAR-10: independent members, PAPA, WASH, WASH+Opt; their ensemble, their average, their greedy soup.

    python benchmarks/population_accuracy.py DIR --jobs 2 --plot FILE.png       a small run on a CPU; DIR: train.parquet, …
    python benchmarks/population_accuracy.py DIR --full --device cuda --plot FILE.png         ResNet-18, 300 epochs, as there

Fournier's thesis, Section 6.3 and Tables 6.2, 6.3: N = 3 and 5 members; homogeneous (they differ in the order of the data) and
heterogeneous (mixup, CutMix, label smoothing, random erasing, drawn for each member). SGD with momentum 0.9, weight decay
1e-4, learning rate 0.1, a cosine to 1e-4, batches of 64. Crop and flip in both settings. For a seed all methods see the same
samples in the same order, member by member, and members that begin equal begin with the same weights in all methods. A share
of the training images is held out: it chooses the greedy soup and the temperatures, and nothing else. BatchNorm's statistics
are averaged as they are; beside that stand the averages with statistics estimated anew, and with REPAIR.

N = 3 of the independent members are the first three of N = 5. Runs are spread over --jobs processes of one thread each. A
finished run's lines are appended to --log, and runs in the log of the same settings are not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

import unlocked as ul
from unlocked.data import Data
from unlocked.errors import NonFiniteLoss

from common import result
from logged_runs import append, finished, read
from populations.drawing import accuracies
from populations.scoring import Row, scored, table
from populations.training import Recipe, methods, trained

FULL = {
    "network": "resnet18",
    "width": 1.0,
    "size": None,
    "subset": None,
    "tested": 10_000,
    "epochs": 300,
    "p": [0.001],
    "alpha": [0.01],
}
HELD_OUT = {False: 0.1, True: 0.02}  # share of the training images; True: --full
SETTINGS = ("homogeneous", "heterogeneous")


class Task(NamedTuple):
    """One training."""

    setting: str
    seed: int
    method: str
    members: int


class Sets(NamedTuple):
    """What is trained on, what chooses, what judges."""

    train: Data
    validation: Data
    test: Data


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--network", default="vgg6a")
    parser.add_argument("--width", type=float, default=0.125)
    parser.add_argument("--size", type=int, default=16, help="side of the images, which are resized")
    parser.add_argument("--subset", type=int, default=4000, help="training images, those held out included")
    parser.add_argument("--tested", type=int, default=2000, help="test images")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--p", type=float, nargs="+", default=[0.05], help="WASH's base probabilities")
    parser.add_argument(
        "--alpha", type=float, nargs="+", default=[0.3], help="PAPA's shares of the mean; the first one's bytes are 1"
    )
    parser.add_argument("--members", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", help="some of them; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--log", type=Path, default=Path("runs/population_accuracy.jsonl"))
    parser.add_argument("--plot", type=Path, help="where to draw the accuracies (.png)")
    parser.add_argument("--table", action="store_true", help="train nothing: the table of what is in the log")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    if options.full:
        vars(options).update(FULL)
    return options


def load(options: argparse.Namespace) -> Sets:
    """The images, the same for all runs."""
    train, test = ul.data.load(f"parquet:{options.data}", augment="crop-flip", subset=options.subset, size=options.size)
    train, validation = ul.soups.hold_out(train, HELD_OUT[options.full])
    assert test.y is not None
    return Sets(train, validation, dataclasses.replace(test, x=test.x[: options.tested], y=test.y[: options.tested]))


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """Seed by seed; independent members once, for the largest N."""
    names = options.methods or list(methods(options.p, options.alpha))
    for seed, setting, name in product(options.seeds, options.settings, names):
        counts = [max(options.members)] if name.startswith("baseline") else options.members
        yield from (Task(setting, seed, name, count) for count in counts)


def run(task: Task, sets: Sets, options: argparse.Namespace) -> list[Row]:
    """One training; a line for each N that it has members for. Without scores if a loss was not finite."""
    recipe = Recipe(options.network, options.epochs, 64, device=options.device, options={"width": options.width})
    method, begin = methods(options.p, options.alpha)[task.method], time.perf_counter()
    row: Row = {"method": task.method, "setting": task.setting, "seed": task.seed}
    counts = options.members if task.method.startswith("baseline") else [task.members]
    try:
        trainer, loss = trained(recipe, method, task.members, task.seed, sets.train, task.setting)  # type: ignore[arg-type]
    except NonFiniteLoss as error:
        print(error)
        return [{**row, "members": count, "scores": None} for count in counts]
    row["seconds"], row["loss"], row["updates"] = time.perf_counter() - begin, loss, trainer.steps
    row["bytes"] = sum(trainer.bytes_sent.values()) / task.members / trainer.steps
    networks = trainer.members() or []
    row["parameters"] = sum(x.numel() for x in networks[0].parameters())
    samples = min(2048, len(sets.train)) if options.full else 1024
    return [
        {**row, "members": count, "scores": scored(networks[:count], sets.test, sets.validation, sets.train, samples)}
        for count in counts
    ]


def ordered(lines: Iterable[Row], options: argparse.Namespace) -> list[Row]:
    """As in the thesis' tables; what was not asked for is left out."""
    names = options.methods or list(methods(options.p, options.alpha))
    return sorted(
        (line for line in lines if line["method"] in names),
        key=lambda line: (SETTINGS.index(line["setting"]), line["members"], names.index(line["method"]), line["seed"]),
    )


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    chosen = ("network", "width", "size", "subset", "tested", "epochs", "full")
    settings = {name: getattr(options, name) for name in chosen}
    lines = read(options.log, settings)
    done = {Task(line["setting"], line["seed"], line["method"], line["members"]) for line in lines}
    todo = [task for task in tasks(options) if task not in done and not options.table]
    shared = (load(options), options) if todo else ()
    for k, (_, rows) in enumerate(finished(run, todo, shared, options.jobs), start=1):
        lines += append(options.log, [row | {"settings": settings} for row in rows])
        print(f"{k}/{len(todo)} {_told(rows[-1])}", flush=True)
    lost = [line for line in lines if line["scores"] is None]
    print(f"{len(lost)} runs with a loss that was not finite")
    found = table(
        ordered((line for line in lines if line["scores"] is not None), options), paid=f"PAPA {options.alpha[0]:g}"
    )
    if options.plot is not None:
        accuracies(options.plot, found)
    result("population_accuracy", rows=found, lost=len(lost), settings=settings)


def _told(row: Row) -> str:
    start = f"{row['method']} {row['setting']} N = {row['members']} seed {row['seed']}:"
    if row["scores"] is None:
        return f"{start} not finite"
    scores = row["scores"]
    return f"{start} ensemble {scores['ensemble']:.1f}, averaged {scores['averaged']:.1f} %, {row['seconds']:.0f} s"


if __name__ == "__main__":
    main()
