"""One run, from its configuration to the files of its folder."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import costs, data, models
from .allocator import keep_freed_memory
from .callbacks import Callback, EventLog
from .chain import Chain
from .config import RunConfig, cores
from .credit import GNDGL
from .cutting import cut
from .data import Data
from .errors import InvalidChoice
from .labelled import check_scoring, refuse_unlabelled
from .merging import recorded_steps
from .method_names import make_consensus, make_credit, make_mitigation
from .population import of_setting
from .residency import OneStage
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
from .saving import describe_regularisers
from .session import Trainer
from .simulation import cost_file
from .simulation.costs import Costs
from .simulation.options import of_description
from .timeline import Timeline
from .worlds import Distributed, InProcess, Simulated, World


def _read(
    spec: str, augment: str | None, subset: int | None, context: int, seed: int, device: str
) -> tuple[Data, Data]:
    train, test = data.load(spec, augment=augment, subset=subset, context=context, seed=seed)
    return (train, test) if device == "cpu" else (train.to(device), test.to(device))


_load, _load_labelled = functools.lru_cache(maxsize=1)(_read), functools.lru_cache(maxsize=1)(_read)


def load_data(config: RunConfig) -> tuple[Data, Data]:
    """The training and the test set; the last ones loaded are kept, for a process that makes several runs."""
    seed = 0 if config.subset is None else config.seed  # the seed only draws the subset
    return _load(config.data, config.augment, config.subset, config.context, seed, config.device)


def load_sets(config: RunConfig) -> tuple[Data, Data | None, Data]:
    """What is trained on; what a probe is fitted to, None: the same; what is held out.

    Raises BadData, InvalidChoice: also for data that the run's rule cannot learn from, or its network be scored on.
    """
    (train, test), probe_on = load_data(config), None
    if config.probe_on is not None:
        probe_on, test = _load_labelled(config.probe_on, None, None, config.context, 0, config.device)
    credit = make_credit(config.method.credit, config.stages)
    credit.check_data(train, config.batch_size, config.accumulate)
    check_scoring(credit, train, probe_on, test)
    return train, probe_on, test


def refuse_unprobed(config: RunConfig) -> None:
    """Raises BadData for a run of which nothing could be probed afterwards: what a probe is fitted to has no labels."""
    train, probe_on, test = load_sets(config)
    for one in (train if probe_on is None else probe_on, test):
        refuse_unlabelled(one)


def make_chain(config: RunConfig, train: Data) -> Chain:
    """The network, cut; its weights are drawn from the run's seed alone, so all methods of a seed start equal."""
    example = train.samples(torch.arange(min(2, len(train))))[0].cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, "model"))
        model = models.build(config.model, input_shape=train.input_shape, classes=train.classes, **config.model_options)
    rule = make_credit(config.method.credit, config.stages)
    if rule.self_supervised:
        model = models.encoder(model)
    if not isinstance(rule, GNDGL) or rule.groups is None:
        return cut(model, config.stages, like=example, balance=config.balance)
    stem = "split" if rule.stem == "split" else "shared"
    grouped = {"groups": rule.groups, "stem": stem, "final": rule.final}
    return cut(model, config.stages, like=example, balance=config.balance, **grouped)  # type: ignore[arg-type]


def groups_of(config: RunConfig) -> int | None:
    """Into how many groups the run's credit rule wants each module cut; None: rules that cut in depth only."""
    rule = make_credit(config.method.credit, config.stages)
    return rule.groups if isinstance(rule, GNDGL) else None


def workers_of(config: RunConfig) -> int:
    """Stages times replicas of a run; with groups there are more stages than the network is cut into in depth."""
    grouped = groups_of(config) is not None
    return config.replicas * (len(make_chain(config, load_data(config)[0])) if grouped else config.stages)


def make_trainer(
    config: RunConfig, train: Data, world: World | None = None, resident: OneStage | None = None
) -> Trainer:
    """The trainer of a run at its beginning."""
    credit = make_credit(config.method.credit, config.stages)
    consensus = make_consensus(config.method.consensus, config.stages)
    updates = config.epochs * train.steps(config.batch_size, config.replicas if consensus.shares_data else 1)
    return Trainer(
        make_chain(config, train),
        credit=credit,
        consensus=consensus,
        replicas=config.replicas,
        optimizer=functools.partial(_optimizer, config),
        schedule=_schedule(config, updates),
        world=world,
        seed=config.seed,
        clip=config.clip,
        accumulate=config.accumulate,
        precision=config.precision,
        batchnorm=config.batchnorm,
        mitigation=make_mitigation(config.method.mitigation, config.stages),
        regularisers=of_setting(config.population, config.replicas, config.seed),
        initial=config.initial,
        device=config.device,
        resident=resident,
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


class StepFile(Callback):
    """Keeps RUN/timeline.json, the acts of the latest steps; RUN/step.json, one step: each act as long as its median; and
    RUN/memory.json."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if trainer.measured is not None:
            write_json(self._folder / "timeline.json", trainer.measured, indent=None)
        if trainer.memory and "predicted" not in trainer.memory[-1]:
            trainer.memory[-1]["predicted"] = _predicted(trainer, trainer.memory[-1]["samples"])
            write_json(self._folder / "memory.json", trainer.memory, indent=None)

    def on_stop(self, trainer: Trainer, reason: str) -> None:
        steps = recorded_steps(trainer)
        if steps:
            write_step(self._folder, Timeline.median(steps).to_json(), trainer.activation_curve)


def _predicted(trainer: Trainer, samples: int) -> list[dict[str, Any]]:
    """The memory of each stage by its shapes; nothing for a network that does not run on shapes alone."""
    from .probes.predicted import predicted  # late: torch's fake tensors take a while to load

    try:
        steps = recorded_steps(trainer)
        # what is in flight comes from steps before, so their acts belong to it
        record = Timeline(act for step in steps for act in step) if trainer.credit.crossing else steps[-1]
        return predicted(trainer, record, samples)
    except Exception:  # a network may do anything; a prediction that cannot be made must not end the training
        return []


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


def refuse_other_run(folder: Path, config: RunConfig, but: Sequence[str] = ()) -> None:
    """Raises InvalidChoice if `folder` holds a run with other options, `but` these."""
    if not (folder / "config.json").exists():
        return
    before, now = read_config(folder).to_json(), config.to_json()
    for name, old in before.items():
        if old != now[name] and name not in but:
            raise InvalidChoice(
                f"{folder} holds a run with {name} {old!r}, not {now[name]!r}; give another folder, or the same options."
            )


def run(
    config: RunConfig,
    folder: Path,
    *,
    callbacks: Sequence[Callback] = (),
    command: str = "",
    world: World | None = None,
    resident: OneStage | None = None,
) -> dict[str, Any]:
    """Train as configured, or go on from the folder's checkpoint; returns the summary, and writes all files of a run.

    On several processes all call it; the callbacks are this process's own, the files of the run are the chief's.
    Raises Interrupted after Ctrl-C (saved), and UnlockedError kinds.
    """
    world = _world(config, world)
    later = isinstance(world, Distributed) and world.crew.seat.generation > 0
    with alone_in(folder, taken_over=later) if world.crew.chief else contextlib.nullcontext():
        return _run(config, folder, callbacks, command, world, resident)


def _world(config: RunConfig, given: World | None) -> World:
    """The world of a run: a simulated one for a run on a cluster that was only described."""
    if config.cluster is None:
        return given if given is not None else InProcess()
    if given is not None and not isinstance(given, InProcess):
        raise InvalidChoice("This run is on a simulated cluster, in one process; leave out --world distributed.")
    states = "momentum" if config.optimizer == "sgd" and config.momentum else config.optimizer
    file = config.cluster.get("costs")
    measured = None if file is None else functools.partial(_measured_costs, file)
    return Simulated(of_description(config.cluster), measured, optimizer=states)


def _measured_costs(file: str, chain: Chain) -> Costs | None:
    """Of a cost file's network, if it is about one; then it must be this one."""
    return cost_file.load(file, chain)[1]


def _run(
    config: RunConfig,
    folder: Path,
    callbacks: Sequence[Callback],
    command: str,
    world: World,
    resident: OneStage | None,
) -> dict[str, Any]:
    crew, checkpoint = world.crew, folder / "checkpoint"
    if crew.chief:
        refuse_other_run(folder, config, but=("stages",))
    if crew.broadcast(crew.chief and is_complete(folder, config)):
        return crew.broadcast(crew.chief and read_json(folder / "summary.json"))
    torch.set_num_threads(_threads(config, world))
    if config.device == "cpu":
        keep_freed_memory()
    train, probe_on, test = load_sets(config)  # refused before there is a folder of the run
    if crew.broadcast(any(checkpoint.glob("step-*"))):
        stages = config.stages if groups_of(config) is None else None  # a network with groups is not cut anew
        trainer = Trainer.resume(checkpoint, device=config.device, world=world, stages=stages, resident=resident)
        if crew.chief:
            forget_after(folder, trainer.epoch)
            _note_stages(folder, config, trainer)
    else:
        trainer = make_trainer(config, train, world, resident)
        if crew.chief:
            _begin(config, folder, trainer, command)
    watching = [EventLog(folder / "events.jsonl"), StepFile(folder), *callbacks] if crew.chief else callbacks
    trainer.fit(
        train,
        config.epochs,
        validate=test,
        validate_every=config.validate_every,
        batch_size=config.batch_size,
        callbacks=watching,
        checkpoint=checkpoint,
        checkpoint_every=_checkpoint_every(config),
        probe_on=probe_on,
    )
    if crew.chief:
        parameters = sum(costs.parameters(stage.body) for stage in trainer.chains[0])
        write_json(folder / "summary.json", summarise(folder, parameters))
    return crew.broadcast(crew.chief and read_json(folder / "summary.json"))


def _note_stages(folder: Path, config: RunConfig, trainer: Trainer) -> None:
    """A run that goes on with another number of stages says so in its configuration."""
    file = folder / "config.json"
    before = read_json(file)
    if before["stages"] != config.stages:
        recipe = trainer.chains[0].recipe
        write_json(file, {**before, "stages": config.stages, "stage_sizes": recipe.get("sizes") if recipe else None})


def _threads(config: RunConfig, world: World) -> int:
    """A process that shares its host with others of the run gets its share of the cores."""
    if not isinstance(world, Distributed):
        return config.threads
    neighbours = world.crew.hosts.count(world.crew.hosts[world.crew.rank])
    return max(1, min(config.threads, cores() // neighbours))


def _checkpoint_every(config: RunConfig) -> int:
    """Ctrl-C saves anyway; this is for power cuts, and must not cost more than it saves where epochs are short."""
    return max(1, config.epochs // 10)


def _begin(config: RunConfig, folder: Path, trainer: Trainer, command: str) -> None:
    """Write what is known before the first step; what a run that never came to a checkpoint had logged goes."""
    (folder / "events.jsonl").unlink(missing_ok=True)
    for name in ("step.json", "timeline.json", "memory.json", "probes.json"):
        (folder / name).unlink(missing_ok=True)
    write_json(
        folder / "config.json",
        {
            **config.to_json(),
            "regularisers": describe_regularisers(trainer.regularisers),
            "heads": [str(head) for head in trainer.heads],
            "remarks": trainer.credit.remarks(trainer.template, config.batch_size),
            "stage_sizes": (trainer.chains[0].recipe or {}).get("sizes"),
            "versions": versions(),
            "machine": machine(config.device),
            "command": command,
        },
    )
