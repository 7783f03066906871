"""The local-learning family on CIFAR-10 with a ResNet-32: accuracy of every rule, several seeds, the same data order for all.

    python benchmarks/local_learning.py DIR                          a small run on a CPU; DIR holds train.parquet, test.parquet
    python benchmarks/local_learning.py DIR --full --device cuda     InfoPro's recipe: width 1, all images, 160 epochs

SGD with Nesterov momentum 0.9, weight decay 1e-4, batches of 64 (--full: 1024), learning rate 0.05 (0.8), a linear warm-up over
the first epoch (ten), then a cosine to 0; crop and flip. Every stage below the last has the head "1c2f" without a budget, but
for rules that bring their own. K stages are cut by FLOPs; gn-dgl has K modules of G groups, with stem and classifier as stages
of their own. Greedy trains each stage for all the epochs. Runs are spread over --jobs processes of one thread each. A finished
run's line is appended to --log, and runs in the log with the same settings are not done again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import unlocked as ul
from unlocked.errors import NonFiniteLoss
from unlocked.method_names import make_credit, parse_method
from unlocked.rng import seed_of

from common import result
from logged_runs import append, finished, read

FULL = {
    "width": 1.0,
    "subset": None,
    "size": None,
    "tested": 10_000,
    "batch": 1024,
    "epochs": 160,
    "lr": 0.8,
    "warm": 10,
}
HEAD = 'head="1c2f",budget=None'
DEEP = {
    "greedy": f"greedy({HEAD})",
    "dgl": f"dgl({HEAD})",
    "predsim": "predsim(budget=None)",
    "infopro, softmax": "infopro(task=softmax)",
    "infopro, contrast": "infopro(task=contrast)",
    "interlocking 1": f"interlocking(d=1,{HEAD})",
    "interlocking 2": f"interlocking(d=2,{HEAD})",
    "auglocal": "dgl(head=auglocal,budget=None)",
    "man": "dgl(head=man,budget=None)",
}
WIDE = {
    "gn-dgl": "",
    "gn-dgl, stop-gradient": ",stop_gradient=True",
    "gn-dgl, diversity": ",diversity={0}",
    "gn-dgl, both": ",stop_gradient=True,diversity={0}",
}


class Case(NamedTuple):
    """A rule in K stages of G groups."""

    name: str
    stages: int
    groups: int
    text: str


class Task(NamedTuple):
    """One training."""

    case: Case
    seed: int


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Backpropagation; the rules that cut in depth; those that cut in width too."""
    yield Case("backprop", 1, 1, "backprop")
    for stages in options.stages:
        for name, text in DEEP.items():
            if stages > 8 and name not in ("dgl", "infopro, softmax"):
                continue
            if name.startswith("interlocking") and int(name[-1]) >= stages - 1:
                continue  # that is backpropagation
            yield Case(name, stages, 1, text)
    for stages, groups in ((2, 2), (2, 4), (4, 2), (4, 4), (8, 2)):
        for name, more in WIDE.items():
            if stages > 2 and name != "gn-dgl, both":
                continue
            weight = 1 / (groups * (groups - 1))  # the authors' (credit/gn_dgl.py)
            yield Case(name, stages, groups, f"gn-dgl({HEAD}{more.format(f'{weight:.6g}')},groups={groups})")


def run(task: Task, sets: tuple[Any, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One training; its test accuracies after the last epoch. Without them if a loss was not finite."""
    case, (train, test) = task.case, sets
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(task.seed, "model"))
        model = ul.models.resnet32(train.input_shape, train.classes, width=options.width)
    like = train.samples(torch.arange(2))[0]
    trainer = ul.Trainer(
        ul.cut(model, case.stages, like=like, groups=case.groups if case.groups > 1 else None),
        credit=make_credit(parse_method(case.text).credit, case.stages),
        optimizer=lambda ps: torch.optim.SGD(ps, options.lr, momentum=0.9, nesterov=True, weight_decay=1e-4),
        schedule=_schedule(options, len(train) // options.batch),
        seed=task.seed,
        device=options.device,
    )
    row = {"name": case.name, "stages": case.stages, "groups": case.groups, "seed": task.seed, "text": case.text}
    begin = time.perf_counter()
    try:
        trainer.fit(train, options.epochs, batch_size=options.batch)
    except NonFiniteLoss as error:
        print(error)
        return {**row, "accuracy": None}
    found = trainer.evaluate(test)
    heads = [None if stage is None else stage[1] for stage in found.stages]
    scores = {"accuracy": found.accuracy, "layerwise": found.layerwise, "heads": heads}
    return {**row, **scores, "seconds": time.perf_counter() - begin, "workers": trainer.stages}


def _schedule(options: argparse.Namespace, steps: int) -> Any:
    total, warm = steps * options.epochs, steps * options.warm

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, a line each."""
    lines = []
    print("| rule | K | G | last output | layerwise ensemble | s per run |\n|---|---:|---:|---:|---:|---:|")
    for key in dict.fromkeys((row["name"], row["stages"], row["groups"]) for row in rows):
        here = [row for row in rows if (row["name"], row["stages"], row["groups"]) == key]
        good = [row for row in here if row["accuracy"] is not None]
        line = dict(zip(("name", "stages", "groups"), key)) | {"seeds": len(here), "lost": len(here) - len(good)}
        for what in ("accuracy", "layerwise", "seconds"):
            line[what] = _spread([row[what] for row in good if row[what] is not None], 1 if what == "seconds" else 100)
        lines.append(line)
        told = [_told(line["accuracy"]), _told(line["layerwise"]), f"{line['seconds'][0]:.0f}" if good else "–"]
        print(f"| {key[0]} | {key[1]} | {key[2]} | {' | '.join(told)} |")
    return lines


def _spread(values: list[float], scale: float) -> tuple[float, float] | None:
    values = [scale * value for value in values]
    return (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None


def _told(spread: tuple[float, float] | None) -> str:
    return "–" if spread is None else f"{spread[0]:.1f} ± {spread[1]:.1f}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--subset", type=int, default=4000, help="training images")
    parser.add_argument("--size", type=int, default=16, help="side of the images, which are resized")
    parser.add_argument("--tested", type=int, default=2500, help="test images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--warm", type=int, default=1, help="epochs of warm-up")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of rules")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--log", type=Path, default=Path("runs/local_learning.jsonl"))
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
    wanted = [case for case in cases(options) if not options.only or case.name in options.only]
    known = {(line["name"], line["stages"], line["groups"], line["seed"]) for line in lines}
    tasks = [Task(case, seed) for seed in options.seeds for case in wanted if (*case[:3], seed) not in known]
    if tasks and not options.table:
        train, test = ul.data.load(
            f"parquet:{options.data}", augment="crop-flip", subset=options.subset, size=options.size
        )
        test = ul.data.from_tensors(test.x[: options.tested], test.y[: options.tested], like=train)
        for _, row in finished(run, tasks, ((train, test), options), options.jobs):
            lines += append(options.log, [row | {"settings": settings}])
            print({key: value for key, value in row.items() if key != "text"}, flush=True)
    order = {case[:3]: k for k, case in enumerate(wanted)}
    lines = [line for line in lines if (line["name"], line["stages"], line["groups"]) in order]
    lines.sort(key=lambda line: (order[line["name"], line["stages"], line["groups"]], line["seed"]))
    result("local_learning", rows=table(lines), settings=settings)


if __name__ == "__main__":
    main()
