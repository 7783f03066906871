"""One training, and what the network is worth afterwards."""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked.chain import Chain
from unlocked.credit import Credit
from unlocked.data import Data
from unlocked.errors import NonFiniteLoss
from unlocked.rng import seed_of

from .cases import ORACLE, TEACHER, Case

BLOCKS = {"resnet18": 8, "resnet50": 16}
SIZES = {("resnet18", 4): [3, 2, 2, 2]}  # the stem and two blocks; the theses have no table for it
KEPT = 128  # singular values in the log
NEIGHBOURS = 200


class Settings(NamedTuple):
    """What every run of a table has in common. recipe: epochs of the theses' layer, for the first seed."""

    network: str
    width: float
    size: int | None
    images: int | None
    probed: int | None
    tested: int
    batch: int
    epochs: int
    lr: float
    decay: float
    recipe: int

    @property
    def text(self) -> str:
        return json.dumps(self._asdict(), sort_keys=True)


class Sets(NamedTuple):
    """train: views, for the pairs; probe: plain images, for the linear layers; test."""

    train: Data
    probe: Data
    test: Data


def load(place: str, settings: Settings) -> Sets:
    """The images that are trained on are the first of those that the probe is fitted to."""
    probe, test = ul.data.load(f"parquet:{place}", subset=settings.probed, size=settings.size)
    x, y = probe.x[: settings.images], probe.y[: settings.images]
    return Sets(
        ul.data.from_tensors(x, y, augment="simclr", like=probe),
        probe,
        ul.data.from_tensors(test.x[: settings.tested], test.y[: settings.tested], like=probe),
    )


def encoder(settings: Settings, shape: Any, classes: int, seed: int) -> nn.Module:
    """The network without its classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "model"))
        return ul.models.encoder(
            ul.models.build(settings.network, input_shape=shape, classes=classes, width=settings.width)
        )


def cut(model: nn.Module, network: str, stages: int, like: Tensor) -> Chain:
    """Where the theses cut it."""
    if stages == 1:
        return ul.cut(model, 1, like=like)
    if (network, stages) in SIZES:
        return ul.cut(model, sizes=SIZES[network, stages], like=like)
    return ul.cut(model, stages, like=like, balance="published")


def oracle_folder(log: Path, settings: Settings, seed: int) -> Path:
    """Where the teacher of this seed is kept, beside the log."""
    return log.with_suffix("") / f"oracle-{hashlib.sha256(settings.text.encode()).hexdigest()[:10]}-seed{seed}"


def rule(case: Case, oracle: Path | None) -> Credit:
    """The credit rule of a case."""
    options = {name: str(oracle) if value == ORACLE else value for name, value in case.options.items()}
    return getattr(ul.credit, case.rule)(**options)


def run(case: Case, seed: int, sets: Sets, settings: Settings, oracle: Path, recipe: bool, device: str) -> Any:
    """The line of one training; without "depths" if a loss was not finite."""
    model, like = (
        encoder(settings, sets.train.input_shape, sets.train.classes, seed),
        sets.probe.samples(torch.arange(2))[0],
    )
    trainer = ul.Trainer(
        cut(model, settings.network, case.stages, like),
        credit=rule(case, oracle),
        optimizer=lambda ps: torch.optim.Adam(ps, settings.lr, weight_decay=settings.decay),
        seed=seed,
        device=device,
    )
    row: dict[str, Any] = {"name": case.name, "stages": case.stages, "seed": seed}
    begin = time.process_time()
    try:
        epochs = trainer.fit(
            sets.train,
            settings.epochs,
            batch_size=settings.batch,
            checkpoint=oracle if case == TEACHER else None,
            checkpoint_every=settings.epochs,
        )
    except NonFiniteLoss as error:
        return {**row, "lost": str(error)}
    seconds = time.process_time() - begin
    row |= {
        "updates": trainer.steps,
        "losses": [epochs[k]["losses"] for k in (0, -1)],
        "kept": [epochs[k].get("notes", {}) for k in (0, -1)],
        "memory": memory(trainer),
        "cpu_seconds": seconds,
    }
    begin = time.process_time()
    row["depths"] = depths(model, sets, settings, like, recipe)
    return row | {"cpu_seconds_probes": time.process_time() - begin}


def memory(trainer: ul.Trainer) -> dict[str, int]:
    """Bytes of the second update.

    process, stage: live at the worst moment, in the process and of the greediest stage; kept_process, kept: for backward, in
    the same way; fixed: weights, their gradients and the optimizer's state, of all stages.
    """
    (record,) = trainer.memory
    (process,), workers = record["processes"], record["workers"]
    fixed = ("parameters", "gradients", "optimizer_state")
    return {
        "process": process["peak"],
        "stage": max(worker.get("peak", 0) for worker in workers),
        "kept_process": process["saved"],
        "kept": max(worker["saved"] for worker in workers),
        "fixed": sum(worker.get(name, 0) for worker in workers for name in fixed),
    }


def depths(model: nn.Module, sets: Sets, settings: Settings, like: Tensor, recipe: bool) -> list[dict[str, Any]]:
    """After every block, whatever the stages were: linear probe, neighbours, dimensions."""
    found = ul.probes.explain(
        cut(model, settings.network, BLOCKS[settings.network], like.to(next(model.parameters()).device)),
        sets.probe,
        sets.test,
        credit=ul.credit.SimCLR(),
        knn=NEIGHBOURS,
        recipe=ul.probes.Recipe(epochs=settings.recipe) if recipe else None,
    )
    return [
        {
            "probe": depth.probe,
            "knn": depth.knn,
            "recipe": depth.recipe,
            "rank": depth.effective_rank,
            "participation": depth.participation_ratio,
            "spectrum": [float(f"{value**2:.3g}") for value in depth.spectrum[:KEPT]],
        }
        for depth in found.depths
    ]


def finite(row: Any) -> bool:
    """Whether a line has numbers."""
    return "depths" in row and all(math.isfinite(depth["probe"]) for depth in row["depths"])
