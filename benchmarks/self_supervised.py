"""Local learning from pairs of views on CIFAR-10: the tables of Fournier's Chapter 3 and Patel's Chapter 4, scaled.

    python benchmarks/self_supervised.py DIR                         a small run on a CPU; DIR holds train.parquet, test.parquet
    python benchmarks/self_supervised.py DIR --full --device cuda    the theses' protocol: ResNet-50, all images, 1000 epochs
    python benchmarks/self_supervised.py DIR --costs                 MACs and memory (of a ResNet-50, too), no training
    python benchmarks/self_supervised.py DIR --table --figure F.png  what the log has

Adam, learning rate 1e-3, weight decay 1e-6, temperature 0.5, two views of every image by `augment="simclr"`; the same images in
the same order, and the same first weights, for every rule of a seed. Networks are cut where the theses cut them; a ResNet-18 of
4 stages after every second block. The oracle is the run of SimCLR at J = 1 of the same seed, kept beside the log. Afterwards a
linear probe (ridge regression, in closed form) and a vote of 200 neighbours read the network after every block, whatever its
stages were; for the first seed the theses' trained layer does, too.

Runs are spread over --jobs processes of one thread each. A finished run's line is appended to --log, and runs in the log with
the same settings are not done again. The 95 % intervals of the orderings are Student's t of the differences seed by seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common import result
from contrasts.cases import TEACHER, Case, cases, orderings
from contrasts.costing import own_costs, thesis_costs
from contrasts.drawing import draw
from contrasts.reporting import accuracies, agreement, by_depth, verdicts
from contrasts.training import Sets, Settings, load, oracle_folder, run
from logged_runs import append, finished, read

FULL = {
    "network": "resnet50",
    "width": 1.0,
    "size": None,
    "images": None,
    "probed": None,
    "tested": 10_000,
    "batch": 256,
    "epochs": 1000,
    "recipe": 200,
    "stages": [1, 4, 8, 16],
    "jobs": 1,
}


class Task(NamedTuple):
    """One training."""

    case: Case
    seed: int


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--network", choices=["resnet18", "resnet50"], default="resnet18")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--size", type=int, default=16, help="side of the images, which are resized")
    parser.add_argument("--images", type=int, default=5120, help="images to learn from without labels")
    parser.add_argument("--probed", type=int, default=10_000, help="training images that the probes are fitted to")
    parser.add_argument("--tested", type=int, default=5000, help="test images")
    parser.add_argument("--batch", type=int, default=64, help="images of an update; twice as many views")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=1e-6)
    parser.add_argument(
        "--recipe", type=int, default=50, help="epochs of the theses' trained layer, for the first seed"
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of rules")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--log", type=Path, default=Path("runs/self_supervised.jsonl"))
    parser.add_argument("--figure", type=Path, help="a .png to draw")
    parser.add_argument("--table", action="store_true", help="print what is in the log, run nothing")
    parser.add_argument("--costs", action="store_true", help="print MACs and memory only")
    parser.add_argument("--full", action="store_true", help="the theses' protocol; what else is given has precedence")
    if parser.parse_known_args()[0].full:
        parser.set_defaults(**FULL)
    options = parser.parse_args()
    if max(options.stages) < 2:
        parser.error("--stages needs a J above 1, as in --stages 1 4 8.")
    if options.probed is not None and (options.images is None or options.images > options.probed):
        parser.error("--images are the first of those that probes are fitted to; give --probed at least as many.")
    return options


def _run(task: Task, sets: Sets, settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    oracle = oracle_folder(options.log, settings, task.seed)
    return run(task.case, task.seed, sets, settings, oracle, task.seed == options.seeds[0], options.device)


def tasks(options: argparse.Namespace, settings: Settings, lines: list[dict[str, Any]]) -> list[Task]:
    """What is wanted and not in the log; teachers of the seeds first, of which the network must be there, too."""
    wanted = [case for case in cases(options.stages) if not options.only or case.name in options.only]
    if any(case.wants_oracle for case in wanted) and TEACHER not in wanted:
        wanted.insert(0, TEACHER)
    known = {(line["name"], line["stages"], line["seed"]) for line in lines}
    every = [Task(case, seed) for case in wanted for seed in options.seeds[: 1 if case.few else None]]
    return [task for task in every if not _done(task, known, options, settings)]


def _done(task: Task, known: set[Any], options: argparse.Namespace, settings: Settings) -> bool:
    there = task.case != TEACHER or oracle_folder(options.log, settings, task.seed).is_dir()
    return there and (task.case.name, task.case.stages, task.seed) in known


def train(options: argparse.Namespace, settings: Settings, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Do what is missing; all lines."""
    missing = tasks(options, settings, lines)
    if not missing:
        return lines
    shared = load(options.data, settings), settings, options
    teachers = [task for task in missing if task.case == TEACHER]
    for some in (teachers, [task for task in missing if task.case != TEACHER]):
        for _, row in finished(_run, some, shared, options.jobs):
            (line,) = append(options.log, [{**row, "settings": settings.text}])
            lines = [row for row in lines if not _same(row, line)] + [line]
            shown = line["depths"][-1]["probe"] if "depths" in line else line["lost"]
            print(line["name"], line["stages"], line["seed"], shown, f"{line.get('cpu_seconds', 0):.0f} s", flush=True)
    return lines


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("name", "stages", "seed"))


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    settings = Settings(*(getattr(options, name) for name in Settings._fields))
    if options.costs:
        own = own_costs(settings.network, settings.width, settings.size or 32, options.stages, settings.batch)
        return result("self_supervised_costs", own=own, resnet50=thesis_costs(), settings=settings._asdict())
    lines = read(options.log, settings.text)
    lines = lines if options.table else train(options, settings, lines)
    wanted = list(cases(options.stages))
    rows = accuracies(lines, wanted)
    for what, scale in (("probe", 100), ("rank", 1)):
        by_depth(lines, wanted, what, scale)
    agreement(lines)
    claims = verdicts(lines, orderings(options.stages))
    if options.figure:
        draw(lines, wanted, options.figure)
    result("self_supervised", rows=rows, orderings=claims, settings=settings._asdict())


if __name__ == "__main__":
    main()
