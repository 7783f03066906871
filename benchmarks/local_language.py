"""A GPT on a text, byte by byte: backpropagation, DGL with four kinds of heads, interlocking backpropagation.

    python benchmarks/local_language.py input.txt                        4 layers of width 64, a CPU
    python benchmarks/local_language.py input.txt --full --device cuda   12 layers of width 512, 10,000 updates

DGL's heads: linear (LayerNorm, projection with a bias), mlp (one hidden layer, four times as wide), unembedding (LayerNorm, a
projection of its own), shared (LayerNorm of its own, the last stage's projection, copied every `period` steps). Interlocking
(d) has private unembeddings, or the shared one, copied every step. AdamW, one learning rate for all, linear warm-up over a
tenth of the updates, then a cosine to a tenth; clip 1 per stage. For a seed all methods start from the same network and see
the same batches in the same order. The validation text is the last tenth (its first --windows windows); losses are in nats
per byte, perplexity is e to that.

The second table times a step where every stage has a machine of its own and messages take no time: forward 1, backward 2.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import unlocked as ul
from unlocked.credit import Credit
from unlocked.heads import MLPHead, SharedUnembeddingHead
from unlocked.rng import seed_of
from unlocked.simulation.retiming import retimed
from unlocked.timeline import Timeline

from common import result

FULL = {
    "layers": 12,
    "width": 512,
    "heads": 8,
    "context": 256,
    "batch": 64,
    "updates": 10_000,
    "rate": 6e-4,
    "windows": 400,
}


def methods(width: int) -> dict[str, Callable[[], Credit]]:
    """By name; heads without a budget."""
    dgl, interlocking = ul.credit.DGL, ul.credit.Interlocking
    return {
        "backprop": ul.credit.Backprop,
        "dgl linear": lambda: dgl("linear", None),
        "dgl mlp": lambda: dgl(MLPHead(4 * width, 1), None),
        "dgl unembedding": lambda: dgl("unembedding", None),
        "dgl shared, period 1": lambda: dgl(SharedUnembeddingHead(1), None),
        "dgl shared, period 10": lambda: dgl(SharedUnembeddingHead(10), None),
        "interlocking(1)": lambda: interlocking(1, "unembedding", None),
        "interlocking(2)": lambda: interlocking(2, "unembedding", None),
        "interlocking(1) shared": lambda: interlocking(1, SharedUnembeddingHead(1), None),
        "interlocking(2) shared": lambda: interlocking(2, SharedUnembeddingHead(1), None),
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--windows", type=int, default=400, help="validation windows")
    parser.add_argument("--stages", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="some of them, by name; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    if options.full:
        vars(options).update(FULL)
    return options


def rows(options: argparse.Namespace) -> list[tuple[str, int]]:
    """(method, J): backpropagation once, and interlocking where it is not backpropagation."""
    names = options.methods or list(methods(1))
    found = [("backprop", options.stages[-1])] if "backprop" in names else []
    for stages in options.stages:
        for name in names:
            distance = int(name[len("interlocking(")]) if name.startswith("interlocking") else 0
            if name != "backprop" and distance < stages - 1:
                found.append((name, stages))
    return found


def session(name: str, stages: int, seed: int, like: torch.Tensor, options: argparse.Namespace) -> ul.Trainer:
    """The trainer of one row; the network depends on the seed only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "model"))
        model = ul.models.gpt((options.context,), 256, options.layers, options.width, options.heads)
    chain = ul.cut(model, stages, like=like)
    warm, updates = max(1, options.updates // 10), options.updates

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - warm) / (updates - warm))))
        return min(1.0, (step + 1) / warm) * (0.1 + 0.9 * cosine)

    return ul.Trainer(
        chain,
        credit=methods(options.width)[name](),
        optimizer=lambda weights: torch.optim.AdamW(weights, lr=options.rate, weight_decay=0.01),
        schedule=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        seed=seed,
        clip=1.0,
        device=options.device,
    )


def trained(name: str, stages: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One training; the losses on the validation text at every head, the network's own last."""
    train, test = ul.data.load(f"text:{options.text}", context=options.context)
    trainer = session(name, stages, seed, train.samples(torch.arange(2))[0], options)
    begin, done, epoch = time.perf_counter(), 0, 0
    while done < options.updates:
        for x, y in train.batches(options.batch, epoch=epoch, seed=seed, device=trainer.device):
            if done < options.updates:
                trainer.step(x, y)
                done += 1
        epoch += 1
    scores = trainer.evaluate(test.samples(torch.arange(min(options.windows, len(test)))))
    losses = [None if score is None else score[0] for score in scores.stages]
    return {"losses": losses, "accuracy": scores.accuracy, "seconds": time.perf_counter() - begin}


def pairs_alone(options: argparse.Namespace) -> float:
    """Loss of a table of how often each byte follows each other one in the training text, each count raised by one."""
    train, test = ul.data.load(f"text:{options.text}", context=options.context)
    text = train.x.long()
    counts = torch.bincount(256 * text[:-1] + text[1:], minlength=256**2).view(256, 256) + 1.0
    x, y = test.samples(torch.arange(min(options.windows, len(test))))
    return float(-(counts / counts.sum(1, keepdim=True)).log()[x, y].mean())


def of_one(values: list[float], digits: int) -> str:
    """Mean ± standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def line(name: str, stages: int, runs: list[dict[str, Any]]) -> str:
    """One row of the table."""
    own = [run["losses"][-1] for run in runs]
    below = zip(*[[x for x in run["losses"][:-1] if x is not None] for run in runs])
    heads = "  ".join(f"{statistics.mean(values):.3f}" for values in below)
    perplexity = of_one([math.exp(x) for x in own], 2)
    accuracy = of_one([100 * run["accuracy"] for run in runs], 1)
    seconds = statistics.mean(run["seconds"] for run in runs)
    return f"{name:<22} {stages:>2}   {of_one(own, 3):<15} {perplexity:<13} {accuracy:<12} {seconds:>5.0f}   {heads}"


def step_time(name: str, stages: int, steps: int = 20) -> float:
    """Units of time per step with a machine for each stage, filling and emptying left out."""
    tiny = argparse.Namespace(context=8, layers=stages, width=8, heads=2, rate=1e-3, updates=100, device="cpu")
    trainer = session(name, stages, 0, torch.zeros(2, 8, dtype=torch.long), tiny)
    x = torch.zeros(2, 8, dtype=torch.long)
    acts: list[Any] = []
    spans = []
    for step in range(1, 2 * steps + 1):
        trainer.step(x, x)
        costs = {"F": 1.0, "B": 2.0, "L": 0.0}
        acts += [act._replace(start=0.0, end=costs.get(act.kind, 0.0)) for act in trainer.timeline]
        if step in (steps, 2 * steps):
            spans.append(retimed(Timeline(acts)).span())
    return (spans[1] - spans[0]) / steps


def main() -> None:
    """Train, print the tables and the RESULT line."""
    options = arguments()
    print(f"a table of pairs of bytes, for comparison: loss {pairs_alone(options):.3f}\n")
    print(
        f"{'method':<22} {'J':>2}   {'loss':<15} {'perplexity':<13} {'accuracy %':<12} {'s':>5}   losses of the heads below"
    )
    table = []
    for name, stages in rows(options):
        runs = [trained(name, stages, seed, options) for seed in options.seeds]
        print(line(name, stages, runs), flush=True)
        table.append({"method": name, "stages": stages, "runs": runs})
    print("\ntime of a step, J =", *[f"{stages:>6}" for stages in options.stages])
    timed = [name for name in methods(1) if not name.startswith("interlocking")]
    times = {name: [step_time(name, stages) for stages in options.stages] for name in timed}
    for name, row in times.items():
        print(f"{name:<22}", *[f"{value:>6.1f}" for value in row])
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    result("local_language", settings=settings, rows=table, step_times=times)


if __name__ == "__main__":
    main()
