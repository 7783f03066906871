"""One training of the comparison: ResNet-18 in 8 or 16 stages, the same images in the same order for every case of a seed."""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import torch

import unlocked as ul
from unlocked.chain import Chain
from unlocked.credit.base import Credit
from unlocked.errors import NonFiniteLoss
from unlocked.heads import CNNHead, MLPHead
from unlocked.rng import seed_of

from .cases import WATCHED, Case, credit_options

SIZES = {8: [2, *[1] * 6, 2], 16: [2, *[1] * 14, 2]}  # the stem is in the first stage, the classifier in the last


class Task(NamedTuple):
    """One training."""

    case: Case
    seed: int
    rate: float


def head_of(case: Case, options: argparse.Namespace) -> Any:
    """F B.1.2: MLP of 1024 and CNN of 32 channels, which grow with the network's width as in F B.2.1. `halved`: half as
    wide with 16 stages, as in the thesis' code."""
    width = options.width * case.width * (0.5 if options.halved and case.stages == 16 else 1)
    wide = {"mlp": MLPHead(round(1024 * width)), "cnn": CNNHead(max(4, round(32 * width)))}
    return wide.get(case.head, case.head or "mlp")


def credit_of(case: Case, options: argparse.Namespace, watch: bool) -> Credit:
    """The rule. Heads have the thesis' size and no budget: on narrow stages they are over 10 % of the FLOPs."""
    if case.target == "end to end":
        return ul.credit.Backprop()
    head = head_of(case, options)
    if case.guess == "itself":
        return ul.credit.DGL(head=head, budget=None)
    return ul.credit.ForwardGradient(**credit_options(case), head=head, budget=None, watch=watch)


def chain_of(case: Case, seed: int, data: Any, options: argparse.Namespace) -> Chain:
    """The network, the same for all cases of a seed, a number of stages and a width."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "model"))
        model = ul.models.resnet18(
            data.input_shape, data.classes, width=options.width * case.width, skip=case.stages == 8
        )
    like = data.samples(torch.arange(2))[0]
    if case.target == "end to end":
        return ul.cut(model, 1, like=like)
    return ul.cut(model, case.stages, like=like, sizes=SIZES[case.stages])


def run(task: Task, sets: tuple[Any, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The line of one training: test accuracy after the last epoch (None if a loss was not finite), of the heads, too."""
    case, (train, test) = task.case, sets
    watch = case in WATCHED and task.seed == options.seeds[0] and not options.grid
    trainer = ul.Trainer(
        chain_of(case, task.seed, train, options),
        credit=credit_of(case, options, watch),
        optimizer=lambda ps: torch.optim.SGD(ps, task.rate, momentum=0.9, weight_decay=5e-4),
        schedule=schedule(len(train) // options.batch * options.epochs),
        seed=task.seed,
        device=options.device,
    )
    line = {**case._asdict(), "seed": task.seed, "rate": task.rate, "accuracy": None}
    begin, spent = time.perf_counter(), time.process_time()
    try:
        records = trainer.fit(train, options.epochs, batch_size=options.batch)
    except NonFiniteLoss as error:
        print(f"{case.label}, seed {task.seed}: {error}", flush=True)
        return line
    found = trainer.evaluate(test)
    return line | {
        "accuracy": found.accuracy,
        "loss": found.loss,
        "heads": [None if stage is None else stage[1] for stage in found.stages],
        "head losses": [None if stage is None else stage[0] for stage in found.stages],
        "training losses": [record["losses"] for record in records],
        "notes": [record["notes"] for record in records if "notes" in record],
        "head share": max((report.share for report in trainer.heads), default=None),
        "updates": trainer.steps,
        "seconds": time.perf_counter() - begin,
        "processor seconds": time.process_time() - spent,
    }


def schedule(updates: int) -> Any:
    """Times 0.2 after 30, 60 and 90 % of the updates; the thesis': every 30 of 100 epochs."""

    def factor(step: int) -> float:
        return 0.2 ** min(3, 10 * step // (3 * updates))

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
