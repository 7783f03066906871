"""Accuracy on CIFAR-10 of delayed rules on a reversible ResNet-18, several seeds, the same data order for all.

    python benchmarks/delayed_accuracy.py DIR                          a small run on CPUs: DIR holds train.parquet,
    test.parquet python benchmarks/delayed_accuracy.py DIR --full --device cuda     the paper's size: width 1, all images,
    300 epochs

RevResNet-18 in J stages. A micro-batch has `--micro` samples, an update k of them; learning rate 0.1 · micro · k / 256
after a linear warm-up over the first epoch, then a cosine to 0 (--full: ÷ 10 at half and three quarters, as in the paper);
SGD with Nesterov momentum 0.9, weight decay 5e-4; crop and flip. Runs are spread over `--jobs` processes of one thread
each. A finished run's line is appended to --log, and runs in the log are not done again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import unlocked as ul
from unlocked.method_names import make_credit, make_mitigation, parse_method
from unlocked.rng import seed_of

from common import result
from logged_runs import append, finished, read

METHODS = (  # method, J, k
    ("backprop", 4, 1),
    ("backprop", 4, 4),
    ("backprop", 4, 8),
    ("ddg", 4, 1),
    ("pipedream-2bw", 4, 4),
    ("petra", 4, 1),
    ("petra", 10, 1),
    ("petra", 10, 4),
    ("petra", 10, 8),
)


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    train, test = ul.data.load(f"parquet:{options.data}", augment="crop-flip", subset=options.subset)
    return train, test


def run(task: tuple[str, int, int, int], options: argparse.Namespace) -> dict[str, Any]:
    """One training; its test accuracy after the last epoch, with the weights as they are."""
    text, stages, k, seed = task
    train, test = load(options)
    method = parse_method(text)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "model"))
        model = ul.models.revresnet18(train.input_shape, train.classes, width=options.width).to(options.device)
    like = train.samples(torch.arange(2))[0].to(options.device)
    trainer = ul.Trainer(
        ul.cut(model, stages, like=like),
        credit=make_credit(method.credit, stages),
        mitigation=make_mitigation(method.mitigation, stages),
        optimizer=lambda ps: torch.optim.SGD(
            ps, lr=0.1 * options.micro * k / 256, momentum=0.9, nesterov=True, weight_decay=5e-4
        ),
        schedule=_schedule(options, len(train) // (options.micro * k)),
        accumulate=k,
        seed=seed,
        device=options.device,
    )
    begin = time.perf_counter()
    records = trainer.fit(
        train, options.epochs, batch_size=options.micro * k, validate=test, validate_every=options.epochs
    )
    found = records[-1]["validation"]
    return {
        "method": text,
        "stages": stages,
        "k": k,
        "seed": seed,
        "accuracy": found["accuracy"],
        "loss": found["loss"],
        "train_loss": records[-1]["losses"][-1],
        "seconds": time.perf_counter() - begin,
    }


def _schedule(options: argparse.Namespace, steps: int) -> Any:
    total = steps * options.epochs

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / steps)
        if options.full:
            return warm * (0.1 if step >= total / 2 else 1.0) * (0.1 if step >= 3 * total / 4 else 1.0)
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, a line each."""
    lines = []
    for method, stages, k in dict.fromkeys((row["method"], row["stages"], row["k"]) for row in rows):
        here = [row for row in rows if (row["method"], row["stages"], row["k"]) == (method, stages, k)]
        scores = [100 * row["accuracy"] for row in here]
        line = {
            "method": method,
            "stages": stages,
            "k": k,
            "seeds": len(scores),
            "mean": statistics.fmean(scores),
            "std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            "seconds": statistics.fmean(row["seconds"] for row in here),
        }
        lines.append(line)
        print(
            f"{method:36s} J = {stages:2d}  k = {k}   {line['mean']:5.1f} ± {line['std']:.1f} %  ({len(scores)} seeds, "
            f"{line['seconds']:.0f} s each)"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--subset", type=int, default=5000, help="training images")
    parser.add_argument("--micro", type=int, default=32, help="samples in a micro-batch")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--log", type=Path, default=Path("runs/delayed_accuracy.jsonl"))
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    if options.full:
        options.width, options.subset, options.micro, options.epochs = 1.0, None, 64, 300
    done = read(options.log)
    known = {(row["method"], row["stages"], row["k"], row["seed"]) for row in done}
    tasks = [(*method, seed) for seed in range(options.seeds) for method in METHODS if (*method, seed) not in known]
    for (method, stages, k, seed), row in finished(run, tasks, (options,), options.jobs):
        done += append(options.log, [row])
        print(f"{method} J = {stages} k = {k} seed {seed}: {100 * row['accuracy']:.1f} %", flush=True)
    order = {method: index for index, method in enumerate(METHODS)}
    done = [row for row in done if (row["method"], row["stages"], row["k"]) in order]
    done.sort(key=lambda row: (order[row["method"], row["stages"], row["k"]], row["seed"]))
    settings = {name: value for name, value in vars(options).items() if name not in ("log", "jobs")}
    result("delayed_accuracy", rows=table(done), settings=settings)


if __name__ == "__main__":
    main()
