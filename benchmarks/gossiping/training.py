"""One training of N workers on a ring, on the simulated clock: accuracy of their mean, how far apart they are, seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

import unlocked as ul
from unlocked.callbacks import Callback
from unlocked.consensus import AllReduce, Consensus
from unlocked.consensus.acid import ACiD
from unlocked.consensus.gossip import Gossip, Pairing
from unlocked.data import Data
from unlocked.errors import NonFiniteLoss
from unlocked.rng import seed_of
from unlocked.simulation import Device, Hardware, uniform
from unlocked.worlds import Simulated

from common import accuracy

Row = dict[str, Any]
METHODS: dict[str, Callable[[Pairing], Consensus]] = {
    "AR-SGD": lambda pairing: AllReduce(),
    "gossip, rate 1": lambda pairing: Gossip(graph="ring", rate=1.0, pairing=pairing),
    "gossip, rate 2": lambda pairing: Gossip(graph="ring", rate=2.0, pairing=pairing),
    "A²CiD², rate 1": lambda pairing: ACiD(graph="ring", rate=1.0, pairing=pairing),
    "A²CiD², rate 2": lambda pairing: ACiD(graph="ring", rate=2.0, pairing=pairing),
}


class Task(NamedTuple):
    """One training. slow: worker 0 is four times slower than the others."""

    workers: int
    method: str
    pairing: Literal["available", "clocks"]
    slow: bool
    seed: int


@dataclass(frozen=True)
class Recipe:
    """What is alike for all: the network, the optimizer, the machines.

    rate: learning rate of 256 samples per round; a round has workers · batch. warm_up: epochs. flops: of a worker per second;
    latency in seconds, bandwidth in bytes per second.
    """

    network: str = "cnn"
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 10
    batch: int = 4
    rate: float = 0.2
    warm_up: int = 2
    weight_decay: float = 5e-4
    clip: float | None = None
    flops: float = 1e8
    latency: float = 1e-4
    bandwidth: float = 1.25e7
    device: str = "cpu"


class _Distances(Callback):
    """After each epoch: √(mean_i ‖x_i − x̄‖²)/‖x̄‖ over the parameters, all workers having flowed to one moment."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_epoch(self, trainer: ul.Trainer, record: dict[str, Any]) -> None:
        rows = torch.stack([nn.utils.parameters_to_vector(chain.parameters()).detach() for chain in trainer.chains])
        mean = rows.double().mean(0)
        apart = (rows.double() - mean).square().sum(1).mean().sqrt()
        self.found.append(float(apart / mean.norm()))


def run(task: Task, recipe: Recipe, train: Data, test: Data) -> Row:
    """One training. accuracy is None where a loss was not finite."""
    begin, distances, row = time.process_time(), _Distances(), dict(task._asdict())
    trainer = _trainer(task, recipe, train)
    try:
        records = trainer.fit(train, recipe.epochs, batch_size=recipe.batch, callbacks=[distances])
    except NonFiniteLoss as error:
        print(error)
        return {**row, "accuracy": None}
    made, gradients = trainer.averaged(refresh=train), trainer.steps * task.workers
    met = [sum(getattr(weights, "exchanges", {}).values()) for weights in trainer.weights]
    alone = [accuracy(chain, test, 1000) or 0.0 for chain in trainer.chains[:: max(1, task.workers // 8)]]
    return {
        **row,
        "accuracy": accuracy(made, test),
        "alone": sum(alone) / len(alone),
        "loss": records[-1]["losses"][-1],
        "distances": distances.found,
        "rounds": trainer.steps,
        "simulated": records[-1]["elapsed"],
        "exchanges": sum(met) / gradients,
        "stale": sum(getattr(weights, "stale", 0) for weights in trainer.weights) / gradients,
        "least": min(weights.worker.version for weights in trainer.weights) / trainer.steps,
        "seconds": time.process_time() - begin,
    }


def _trainer(task: Task, recipe: Recipe, train: Data) -> ul.Trainer:
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(task.seed, "model"))
        model = ul.models.build(recipe.network, input_shape=train.input_shape, classes=train.classes, **recipe.options)
    rounds = train.steps(recipe.batch, task.workers)
    return ul.Trainer(
        ul.cut(model.to(recipe.device), 1, like=train.samples(torch.arange(2))[0].to(recipe.device)),
        consensus=METHODS[task.method](task.pairing),
        replicas=task.workers,
        world=Simulated(hardware(recipe, task.slow)),
        optimizer=lambda parameters: _optimizer(parameters, recipe, task.workers),
        schedule=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, _factor(recipe, rounds)),
        clip=recipe.clip,
        seed=task.seed,
        device=recipe.device,
    )


def hardware(recipe: Recipe, slow: bool) -> Hardware:
    """A device for each worker, its own wire to each other one."""
    network = uniform(recipe.latency, recipe.bandwidth)
    return Hardware(device=Device(flops=recipe.flops), speeds=(0.25,) if slow else (), network=network)


def _optimizer(parameters: Sequence[nn.Parameter], recipe: Recipe, workers: int) -> torch.optim.Optimizer:
    """SGD whose rate is proportional to the samples of a round; no weight decay of vectors."""
    groups = [
        {"params": [x for x in parameters if x.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [x for x in parameters if x.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=recipe.rate * workers * recipe.batch / 256, momentum=0.9, fused=True)


def _factor(recipe: Recipe, rounds: int) -> Callable[[int], float]:
    """Linear warm-up, then ÷ 10 at half and at three quarters; `rounds` of an epoch."""
    total, warm = recipe.epochs * rounds, max(1, recipe.warm_up * rounds)

    def factor(step: int) -> float:
        decays = (step >= total // 2) + (step >= 3 * total // 4)
        return min(1.0, (step + 1) / warm) * math.pow(0.1, decays)

    return factor
