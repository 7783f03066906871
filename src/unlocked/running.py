"""One run, from its configuration to the files of its folder."""

from __future__ import annotations

import functools
import json
import signal
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import costs, data, models
from .allocator import keep_freed_memory
from .callbacks import Callback, EventLog
from .chain import Chain
from .config import RunConfig
from .cutting import cut
from .data import Data
from .errors import InvalidChoice
from .method_names import make_consensus, make_credit
from .rng import seed_of
from .run_files import (
    alone_in,
    forget_after,
    machine,
    read_config,
    read_json,
    summarise,
    versions,
    write_json,
    write_step,
)
from .session import Trainer
from .timeline import Timeline


@functools.lru_cache(maxsize=1)
def _load(
    spec: str, augment: str | None, subset: int | None, context: int, seed: int, device: str
) -> tuple[Data, Data]:
    train, test = data.load(spec, augment=augment, subset=subset, context=context, seed=seed)
    return (train, test) if device == "cpu" else (train.to(device), test.to(device))


def load_data(config: RunConfig) -> tuple[Data, Data]:
    """The training and the test set; the last ones loaded are kept, for a process that makes several runs."""
    seed = 0 if config.subset is None else config.seed  # the seed only draws the subset
    return _load(config.data, config.augment, config.subset, config.context, seed, config.device)


def make_chain(config: RunConfig, train: Data) -> Chain:
    """The network, cut; its weights are drawn from the run's seed alone, so all methods of a seed start equal."""
    example = train.samples(torch.arange(min(2, len(train))))[0].cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, "model"))
        model = models.build(config.model, input_shape=train.input_shape, classes=train.classes, **config.model_options)
    return cut(model, config.stages, like=example, balance=config.balance)


def make_trainer(config: RunConfig, train: Data) -> Trainer:
    """The trainer of a run at its beginning."""
    consensus = make_consensus(config.method.consensus, config.stages)
    updates = config.epochs * train.steps(config.batch_size, config.replicas if consensus.shares_data else 1)
    return Trainer(
        make_chain(config, train),
        credit=make_credit(config.method.credit, config.stages),
        consensus=consensus,
        replicas=config.replicas,
        optimizer=functools.partial(_optimizer, config),
        schedule=_schedule(config, updates),
        seed=config.seed,
        clip=config.clip,
        accumulate=config.accumulate,
        precision=config.precision,
        batchnorm=config.batchnorm,
        device=config.device,
    )


def _optimizer(config: RunConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    decay = config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum or 0.0, weight_decay=decay)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=config.lr, weight_decay=decay)


def _schedule(config: RunConfig, updates: int) -> Callable[[torch.optim.Optimizer], Any] | None:
    """Over a stage's own updates: under greedy learning, too, each stage goes through all of it."""
    if config.schedule == "constant":
        return None
    if config.schedule == "cosine":
        return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    third = max(1, -(-updates // 3))
    return lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, third, 0.1)


# ---- what looks on ---------------------------------------------------------------------------------------------------


class Traffic(Callback):
    """Adds to each epoch's record what a replica sent: bytes up and down between stages, and among the replicas."""

    def __init__(self) -> None:
        self._sent: Counter[str] = Counter()

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self._sent["updates"] += 1
        for act in trainer.timeline:
            if act.kind == "M":
                self._sent["replicas"] += act.bytes
            elif act.kind == "S" and act.peer is not None:
                self._sent["up" if act.peer[1] > act.stage else "down"] += act.bytes

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        share = {way: self._sent[way] / trainer.replicas for way in ("up", "down", "replicas")}
        record["traffic"] = {**share, "updates": self._sent["updates"]}
        self._sent.clear()


class StepFile(Callback):
    """Keeps RUN/step.json: how the latest step went, each act as long as its median over the latest steps."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._steps: deque[Timeline] = deque(maxlen=21)

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self._steps.append(trainer.timeline)

    def on_stop(self, trainer: Trainer, reason: str) -> None:
        if self._steps:
            write_step(self._folder, Timeline.median(list(self._steps)).to_json(), trainer.activation_curve)


class JsonLines(Callback):
    """Prints each epoch's record as a line of JSON."""

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        print(json.dumps(record), flush=True)


class Stopper(Callback):
    """Turns a wish to stop, however it came, into the Ctrl-C that `fit` knows how to obey."""

    def __init__(self, wanted: Callable[[], bool]) -> None:
        self._wanted = wanted

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if self._wanted():
            signal.raise_signal(signal.SIGINT)


# ---- the run ---------------------------------------------------------------------------------------------------------


def is_complete(folder: Path, config: RunConfig) -> bool:
    """Whether `folder` holds this very run, finished."""
    return (folder / "summary.json").exists() and read_config(folder) == config


def refuse_other_run(folder: Path, config: RunConfig) -> None:
    """Raises InvalidChoice if `folder` holds a run with other options."""
    if not (folder / "config.json").exists():
        return
    before, now = read_config(folder).to_json(), config.to_json()
    for name, old in before.items():
        if old != now[name]:
            raise InvalidChoice(
                f"{folder} holds a run with {name} {old!r}, not {now[name]!r}; give another folder, or the same options."
            )


def run(config: RunConfig, folder: Path, *, callbacks: Sequence[Callback] = (), command: str = "") -> dict[str, Any]:
    """Train as configured, or go on from the folder's checkpoint; returns the summary, and writes all files of a run.

    Raises Interrupted after Ctrl-C (saved), and UnlockedError kinds.
    """
    with alone_in(folder):
        return _run(config, folder, callbacks, command)


def _run(config: RunConfig, folder: Path, callbacks: Sequence[Callback], command: str) -> dict[str, Any]:
    refuse_other_run(folder, config)
    if is_complete(folder, config):
        return read_json(folder / "summary.json")
    torch.set_num_threads(config.threads)
    if config.device == "cpu":
        keep_freed_memory()
    train, test = load_data(config)
    checkpoint = folder / "checkpoint"
    if any(checkpoint.glob("step-*")):
        trainer = Trainer.resume(checkpoint, device=config.device)
        forget_after(folder, trainer.epoch)
    else:
        trainer = make_trainer(config, train)
        _begin(config, folder, trainer, command)
    watching = [Traffic(), EventLog(folder / "events.jsonl"), StepFile(folder), *callbacks]
    trainer.fit(
        train,
        config.epochs,
        validate=test,
        validate_every=config.validate_every,
        batch_size=config.batch_size,
        callbacks=watching,
        checkpoint=checkpoint,
        checkpoint_every=_checkpoint_every(config),
    )
    parameters = sum(costs.parameters(stage.body) for stage in trainer.chains[0])
    summary = summarise(folder, parameters)
    write_json(folder / "summary.json", summary)
    return summary


def _checkpoint_every(config: RunConfig) -> int:
    """Ctrl-C saves anyway; this is for power cuts, and must not cost more than it saves where epochs are short."""
    return max(1, config.epochs // 10)


def _begin(config: RunConfig, folder: Path, trainer: Trainer, command: str) -> None:
    """Write what is known before the first step; what a run that never came to a checkpoint had logged goes."""
    (folder / "events.jsonl").unlink(missing_ok=True)
    (folder / "step.json").unlink(missing_ok=True)
    write_json(
        folder / "config.json",
        {
            **config.to_json(),
            "heads": [str(head) for head in trainer.heads],
            "stage_sizes": trainer.chains[0].recipe["sizes"] if trainer.chains[0].recipe else None,
            "versions": versions(),
            "machine": machine(config.device),
            "command": command,
        },
    )
