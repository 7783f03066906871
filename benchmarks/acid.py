"""Asynchronous gossip and A²CiD² against all-reduce SGD on a ring: accuracy, consensus distance, simulated time; real speed.

    python benchmarks/acid.py --data parquet:DIR --jobs 2       a small run on CPUs; DIR holds train.parquet, test.parquet
    python benchmarks/acid.py --data digits                     without other data
    python benchmarks/acid.py --quick                           both parts in minutes
    python benchmarks/acid.py --data parquet:DIR --full --device cuda     ResNet-18, all images, 300 epochs

Three parts (`--only rates|accuracy|speed` for one of them):

    rates      what theory says of gossip alone (gossiping/rates.py)
    accuracy   4 to 64 workers on the simulated clock; "available" pairing (who is free meets whom), the truly asynchronous one.
               For N of --compared also pre-drawn "clocks", and one worker that is four times slower. All methods have the
               same samples per epoch, in the same order; learning rate --rate · N · batch / 256 after a linear warm-up, ÷ 10 at
               half and three quarters; no weight decay of vectors. The mean's BatchNorm
               statistics are estimated anew.
    speed      2 and 4 real processes whose gradients take --pad seconds (by sleep, which leaves the cores free), one of them
               four times as long: samples per second (gossiping/throughput.py)

The paper's claim, A²CiD² "acts like doubling the communication rate", is tested as stated: A²CiD² at one exchange per gradient
against gossip at two, run by run of the same seed. Runs are spread over --jobs processes of one thread each; finished ones are
appended to --log and not done again. Ends with one line RESULT {json}.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import unlocked as ul

from common import result
from gossiping import rates, reporting, throughput
from gossiping.drawing import draw
from gossiping.training import METHODS, Recipe, Row, Task, run
from logged_runs import append, finished, read
from pipelines.crew import run_crew

FULL = {
    "network": "resnet18",
    "size": None,
    "subset": None,
    "epochs": 300,
    "batch": 128,
    "rate": 0.1,
    "warm_up": 5,
    "flops": 1e13,
}
QUICK = {"workers": [4, 16], "seeds": [0], "compared": [], "subset": 1024, "epochs": 4, "processes": [2], "passes": 1}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("rates", "accuracy", "speed"))
    parser.add_argument("--data", default="digits", help="digits or parquet:DIR")
    parser.add_argument("--size", type=int, default=16, help="side of the images, which are resized; not of digits")
    parser.add_argument("--subset", type=int, default=4096, help="training images; not of digits")
    parser.add_argument("--network", default="cnn")
    parser.add_argument("--width", type=int, default=8, help="of the small CNN")
    parser.add_argument("--depth", type=int, default=2, help="of the small CNN")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="samples of a worker and gradient")
    parser.add_argument("--rate", type=float, default=0.2, help="learning rate of 256 samples per round")
    parser.add_argument("--clip", type=float, help="largest norm of a worker's gradient (AR-SGD: of the mean gradient)")
    parser.add_argument("--warm-up", type=int, default=2, help="epochs")
    parser.add_argument("--flops", type=float, default=1e8, help="of a simulated worker, per second")
    parser.add_argument("--workers", type=int, nargs="*", default=[64, 16, 4, 32, 8])
    parser.add_argument(
        "--compared", type=int, nargs="*", default=[16], help="N with clocks and with a slow worker, too"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--log", type=Path, default=Path("runs/acid.jsonl"))
    parser.add_argument("--plot", type=Path, help="where to draw (.png)")
    parser.add_argument("--table", action="store_true", help="train nothing: the tables of what is in the log")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--pad", type=float, default=0.1, help="seconds of a gradient")
    parser.add_argument("--passes", type=int, default=2, help="times each rule is measured, in turn, three epochs each")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    vars(options).update((FULL if options.full else {}) | (QUICK if options.quick else {}))
    return options


def recipe_of(options: argparse.Namespace) -> Recipe:
    """What is alike for all trainings."""
    chosen = ("network", "epochs", "batch", "rate", "warm_up", "clip", "flops", "device")
    small = {"width": options.width, "depth": options.depth} if options.network == "cnn" else {}
    return Recipe(options=small, **{name: getattr(options, name) for name in chosen})


def load(options: argparse.Namespace) -> Any:
    """(training set, test set)."""
    if options.data == "digits":
        return ul.data.load("digits")
    augment = "crop-flip" if options.full else None
    return ul.data.load(options.data, augment=augment, subset=options.subset, size=options.size)


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """Seed by seed."""
    for seed in options.seeds:
        for workers in options.workers:
            yield from (Task(workers, name, "available", False, seed) for name in options.methods)
        for workers in options.compared:
            yield from (Task(workers, name, "available", True, seed) for name in options.methods)
            yield from (
                Task(workers, name, "clocks", slow, seed)
                for name in options.methods
                if name != "AR-SGD"
                for slow in (False, True)
            )


# ---- running ---------------------------------------------------------------------------------------------------------


def accuracies(options: argparse.Namespace) -> dict[str, Any]:
    """All trainings that are not in the log, then the tables of those asked for."""
    settings = asdict(recipe_of(options)) | {name: getattr(options, name) for name in ("data", "size", "subset")}
    settings["data"] = options.data.partition(":")[0]
    rows = [line["row"] for line in read(options.log, settings)]
    done = {Task(*(row[name] for name in Task._fields)) for row in rows}
    wanted = list(tasks(options))
    todo = [task for task in wanted if task not in done and not options.table]
    shared = (recipe_of(options), *load(options)) if todo else ()
    for k, (task, row) in enumerate(finished(run, todo, shared, options.jobs), start=1):
        rows.append(row)
        append(options.log, [{"settings": settings, "row": row}])
        told = "not finite" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} %, {row['seconds']:.0f} s"
        print(f"{k}/{len(todo)} {' '.join(map(str, task))}: {told}", flush=True)
    rows = [row for row in rows if Task(*(row[name] for name in Task._fields)) in wanted]
    found = reporting.report(rows)
    if options.plot is not None:
        draw(options.plot, rows)
    return {"table": found, "settings": settings}


def speed(options: argparse.Namespace) -> list[Row]:
    """Real processes."""
    rows = []
    for count in options.processes:
        for slow in (True, False):
            (found, *_) = run_crew(throughput.measure, count, options.pad, slow, options.passes, deadline=600.0)
            rows += [{"processes": count, "slow": slow, **row} for row in found]
            throughput.show(rows[-len(found) :])
    return rows


def main() -> None:
    """Measure and print."""
    options = arguments()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if options.only in (None, "rates"):
        found["rates"] = rates.measure(options.workers)
    if options.only in (None, "accuracy"):
        found["accuracy"] = accuracies(options)
    if options.only in (None, "speed"):
        found["speed"] = speed(options)
    result("acid", **found)


if __name__ == "__main__":
    main()
