"""How the populations are trained: the thesis' optimizer, one network and one data order for all methods of a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.optim import lr_scheduler

import unlocked as ul
from unlocked.callbacks import Callback
from unlocked.consensus import Consensus
from unlocked.data import Data
from unlocked.population import Setting, of_setting
from unlocked.rng import seed_of

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
COLDEST = 1e-3  # of the first learning rate: where the cosine ends
PERIOD = 10  # of PAPA, in updates


@dataclass(frozen=True)
class Method:
    """A rule among the members, how they begin, and what becomes of BatchNorm's statistics."""

    consensus: Consensus
    initial: Literal["same", "different"] = "same"
    batchnorm: Literal["local", "average"] = "local"


@dataclass(frozen=True)
class Recipe:
    """What is alike for all methods. network: a name of ul.models; options: of the network; batch: of each member."""

    network: str
    epochs: int
    batch: int
    rate: float = 0.1
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)


def methods(probabilities: Sequence[float], shares: Sequence[float]) -> dict[str, Method]:
    """Those of Tables 6.2 and 6.3, PAPA for each share of the mean α, WASH and WASH+Opt for each p; and the baseline from
    different first weights."""
    rules = ul.consensus
    independent = {
        "baseline": Method(rules.Independent()),
        "baseline, different": Method(rules.Independent(), "different"),
    }
    papa = {f"PAPA {a:g}": Method(rules.PAPA(alpha=a, period=PERIOD), "different", "average") for a in shares}
    wash = {f"WASH {p:g}": Method(rules.WASH(p)) for p in probabilities}
    moving = {f"WASH+Opt {p:g}": Method(rules.WASH(p, optimizer=True)) for p in probabilities}
    return independent | papa | wash | moving


def trained(
    recipe: Recipe,
    method: Method,
    members: int,
    seed: int,
    train: Data,
    setting: Setting = "homogeneous",
    callbacks: Sequence[Callback] = (),
) -> tuple[ul.Trainer, float]:
    """A trainer that has trained so many members, and the mean loss of its last epoch. Raises NonFiniteLoss."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "model"))
        model = ul.models.build(recipe.network, input_shape=train.input_shape, classes=train.classes, **recipe.options)
    model = model.to(recipe.device, memory_format=torch.channels_last)
    updates = train.steps(recipe.batch) * recipe.epochs

    def schedule(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        return lr_scheduler.CosineAnnealingLR(optimizer, updates, eta_min=COLDEST * recipe.rate)

    trainer = ul.Trainer(
        ul.cut(model, 1, like=train.samples(torch.arange(2))[0].to(recipe.device)),
        consensus=method.consensus,
        replicas=members,
        optimizer=lambda ps: torch.optim.SGD(ps, lr=recipe.rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY),
        schedule=schedule,
        batchnorm=method.batchnorm,
        regularisers=of_setting(setting, members, seed),
        initial=method.initial,
        seed=seed,
        device=recipe.device,
    )
    records = trainer.fit(train, recipe.epochs, batch_size=recipe.batch, callbacks=callbacks)
    return trainer, records[-1]["losses"][-1]
