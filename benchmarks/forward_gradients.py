"""Forward gradients on CIFAR-10 with a ResNet-18: accuracy of pairs of target and guess, and the orderings the thesis claims.

    python benchmarks/forward_gradients.py DIR               a small run on a CPU; DIR holds train.parquet and test.parquet
    python benchmarks/forward_gradients.py DIR --grid        learning rates for it, on a seed of its own
    python benchmarks/forward_gradients.py DIR --full --device cuda --seeds 0 1 2 3
                                                             the thesis' protocol: width 1, all images, 100 epochs

8 stages: a residual block each; 16: a convolution each, without shortcuts (F 4.3.1). SGD with momentum 0.9, weight decay 5e-4,
learning rate times 0.2 after 30, 60 and 90 % of the updates; crop and flip; the same images in the same order for every case of
a seed. Heads are those of F B.1.2, without a budget, as wide as the network is (guessing/training.py). Runs are spread over
--jobs processes of one thread each. A finished run's line is appended to --log, and runs in the log with the same settings are
not done again. Printed: accuracies beside the thesis', its orderings with an error over seeds, cosines, losses by depth.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import unlocked as ul

from common import result
from guessing import tables
from guessing.cases import GRID, cases, grid, rate
from guessing.training import Task, run
from logged_runs import append, finished, read

FULL = {
    "width": 1.0,
    "subset": None,
    "size": None,
    "tested": 10_000,
    "batch": 256,
    "epochs": 100,
    "rates": "thesis",
    "halved": True,
}
GRID_SEED = 100  # none of those that are reported


def tasks_of(options: argparse.Namespace) -> list[Task]:
    """All trainings, in the order in which they are to be done: case by case, so that a stopped session has whole rows."""
    if options.grid:
        return [Task(case, GRID_SEED, lr) for case in grid() for lr in GRID]
    rows = cases(options.full)[: options.first]
    return [Task(case, seed, rate(case, options.rates)) for case in rows for seed in options.seeds]


def left(tasks: Sequence[Task], lines: Sequence[tables.Line]) -> list[Task]:
    """Those that the log does not have."""
    known = {(tables.case_of(line), line["seed"], line["rate"]) for line in lines}
    return [task for task in tasks if task not in known]


def train(tasks: Sequence[Task], options: argparse.Namespace, settings: dict[str, Any]) -> list[tables.Line]:
    """Run them; every line is in the log as soon as it is there."""
    training, test = ul.data.load(
        f"parquet:{options.data}", augment="crop-flip", subset=options.subset, size=options.size
    )
    test = ul.data.from_tensors(test.x[: options.tested], test.y[: options.tested], like=training)
    lines: list[tables.Line] = []
    for task, row in finished(run, tasks, ((training, test), options), options.jobs):
        lines += append(options.log, [row | {"settings": settings}])
        print(row["stages"], task.case.label, row["seed"], row["rate"], row["accuracy"], flush=True)
    return lines


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--subset", type=int, default=5120, help="training images")
    parser.add_argument("--size", type=int, default=16, help="side of the images, which are resized")
    parser.add_argument("--tested", type=int, default=4000, help="test images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--rates", choices=("short", "thesis"), default="short", help="learning rates (guessing/cases.py)"
    )
    parser.add_argument(
        "--halved", action="store_true", help="heads half as wide with 16 stages, as in the thesis' code"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--first", type=int, help="how many rows of the table; default: all")
    parser.add_argument("--grid", action="store_true", help="learning rates instead of the table")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--log", type=Path, default=Path("runs/forward_gradients.jsonl"))
    parser.add_argument("--table", action="store_true", help="print what is in the log, run nothing")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    for name, value in FULL.items() if options.full else ():
        setattr(options, name, value)
    return options


def main() -> None:
    options = arguments()
    settings = {name: getattr(options, name) for name in FULL}
    lines = read(options.log, settings)
    tasks = tasks_of(options)
    if not options.table and (todo := left(tasks, lines)):
        lines += train(todo, options, settings)
    wanted = {tuple(task): k for k, task in enumerate(tasks)}
    lines = [line for line in lines if (tables.case_of(line), line["seed"], line["rate"]) in wanted]
    lines.sort(key=lambda line: wanted[tables.case_of(line), line["seed"], line["rate"]])
    if options.grid:
        found = [{"case": tables.case_of(line).label} | {k: line[k] for k in ("rate", "accuracy")} for line in lines]
        for row in found:
            print(row)
        result("forward_gradients_grid", rows=found, settings=settings)
        return
    rows = tables.accuracies(cases(options.full), lines)
    claims = tables.orderings(lines)
    tables.watched(lines)
    tables.by_depth(lines, options.seeds[0])
    result("forward_gradients", rows=rows, orderings=claims, settings=settings)


if __name__ == "__main__":
    main()
