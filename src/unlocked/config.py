"""What a run is: the options of the command line, and the resolved configuration saved with every run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from . import models
from .cutting import Balance
from .errors import InvalidChoice, choose
from .labelled import refuse_probe
from .method_names import Method, OfStages, make_consensus, make_credit, make_mitigation, parse_method, value
from .population import Setting, check_initial

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["constant", "cosine", "step"]

_RATES = {"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3}
_MOMENTUM = 0.9


@dataclass(frozen=True)
class Options:
    """Options that `train` and `compare` share."""

    data: str = "digits"
    """Data: digits, parquet:DIR, folder:DIR or text:FILE; without labels parquet:DIR?label=none, folder:DIR?labels=none."""
    probe_on: str | None = None
    """Labelled data, as --data, for a network that learns without labels: its probe is fitted to their training images and
    scored on their test images; None: those of --data."""
    model: str = "cnn"
    """Network: cnn, mlp, gpt, vit, resnet18, -32, -34, -50, -110, vgg6a, vgg8b, vgg16a, vgg19a; revgpt, revvit, revresnet18,
    -34, -50."""
    width: float | None = None
    """Width of the network, if it has one (a factor for resnet and vgg)."""
    depth: int | None = None
    """Depth of the network, if it has one."""
    model_options: tuple[str, ...] = ()
    """Other options of the network, each as key=value."""
    stages: int = 4
    """Number of stages J the network is cut into."""
    balance: Balance = "flops"
    """What the stages share evenly; published: nothing, they end where papers have cut this network."""
    epochs: int = 10
    """Epochs (of each stage, for greedy learning)."""
    batch_size: int = 32
    """Samples per replica and update."""
    optimizer: Optimizer = "sgd"
    """Optimizer of every stage."""
    lr: float | None = None
    """Learning rate; None: 0.05 for sgd, 0.001 for adam and adamw."""
    momentum: float | None = None
    """Momentum of sgd; None: 0.9."""
    weight_decay: float = 0.0
    """Weight decay."""
    schedule: Schedule = "cosine"
    """Learning rate over a stage's own updates: constant, cosine to 0, or a tenth after each third (step)."""
    clip: float | None = None
    """Largest gradient norm of a stage."""
    accumulate: int = 1
    """Micro-batches per update."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: autocast."""
    batchnorm: Literal["local", "average", "refresh"] = "local"
    """BatchNorm statistics of several replicas."""
    population: Setting = "homogeneous"
    """Regularisers of the replicas: homogeneous: none; heterogeneous: mixup, cutmix, label smoothing and random erasing, drawn
    for each from lists for small images, or from those for ImageNet."""
    initial: Literal["same", "different"] = "same"
    """First weights of the replicas; different: drawn for each (rules whose replicas need no common start only)."""
    augment: str | None = None
    """Augmentation of training images: crop, flip, crop-flip, cutout:K, resized-crop, jitter, gray, joined by +; after views+
    two views of each image are drawn; simclr: views+resized-crop+flip+jitter+gray."""
    subset: int | None = None
    """Train on this many samples only."""
    context: int = 128
    """Window of a text, in bytes."""
    validate_every: int = 1
    """Epochs between two validations; the last epoch always has one."""
    threads: int | None = None
    """CPU threads per process; None: all cores for train, 1 for compare."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, …"""


@dataclass(frozen=True)
class RunConfig:
    """One run, nothing left open; `credit`, `consensus` and `mitigation` are texts of method_names.py. Saved as
    RUN/config.json."""

    data: str
    model: str
    model_options: dict[str, Any]
    stages: int
    balance: Balance
    credit: str
    consensus: str
    replicas: int
    seed: int
    epochs: int
    batch_size: int
    optimizer: Optimizer
    lr: float
    momentum: float | None
    weight_decay: float
    schedule: Schedule
    clip: float | None
    accumulate: int
    precision: Literal["float32", "bf16"]
    batchnorm: Literal["local", "average", "refresh"]
    augment: str | None
    subset: int | None
    context: int
    validate_every: int
    threads: int
    device: str
    mitigation: str | None = None
    population: Setting = "homogeneous"
    initial: Literal["same", "different"] = "same"
    probe_on: str | None = None
    cluster: dict[str, Any] | None = None  # of a simulated run: how it was described (simulation/options.py)

    @property
    def method(self) -> Method:
        """Credit, consensus, replicas and mitigation."""
        mitigation = "" if self.mitigation is None else f"+{self.mitigation}"
        return parse_method(f"{self.credit}{mitigation}/{self.consensus}@{self.replicas}")

    def to_json(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_json`; further entries are left alone. Raises InvalidChoice if one is missing."""
        fields = dataclasses.fields(cls)
        missing = [field.name for field in fields if field.name not in entries and field.default is dataclasses.MISSING]
        if missing:
            raise InvalidChoice(f"The saved configuration lacks {', '.join(missing)}; it is of another version.")
        return cls(**{field.name: entries[field.name] for field in fields if field.name in entries})


def resolve(
    options: Options, method: Method, seed: int, threads: int, cluster: dict[str, Any] | None = None
) -> RunConfig:
    """The configuration of one run. Raises InvalidChoice for whatever can be refused without looking at the data."""
    _check_numbers(options)
    credit = make_credit(method.credit, options.stages)
    if options.probe_on is not None:
        refuse_probe(credit)
    check_initial(options.initial, make_consensus(method.consensus, options.stages), method.replicas)
    make_mitigation(method.mitigation, options.stages)
    shared = {name: getattr(options, name) for name in _UNCHANGED}
    return RunConfig(
        **shared,
        model_options=resolve_model(options),
        credit=str(method.credit),
        consensus=str(method.consensus),
        mitigation=None if method.mitigation is None else str(method.mitigation),
        replicas=method.replicas,
        seed=seed,
        lr=_RATES[options.optimizer] if options.lr is None else options.lr,
        momentum=_momentum(options),
        threads=threads if options.threads is None else options.threads,
        device=resolve_device(options.device),
        cluster=cluster,
    )


_UNCHANGED = [
    field.name
    for field in dataclasses.fields(RunConfig)
    if field.name in {option.name for option in dataclasses.fields(Options)}
    and field.name not in ("model_options", "lr", "momentum", "threads", "device")
]


def resolve_model(options: Options) -> dict[str, Any]:
    """All options of the network, defaults included. Raises InvalidChoice for an unknown network or option."""
    defaults = models.options(options.model)
    given: dict[str, Any] = {}
    for text in options.model_options:
        key, equals, written = text.partition("=")
        if not equals:
            raise InvalidChoice(f"The model option {text!r} has no value; write key=value, e.g. depth=6.")
        given[key.strip()] = value(written)
    for key in ("width", "depth"):
        shortcut = getattr(options, key)
        if shortcut is not None:
            if key not in defaults:
                raise InvalidChoice(f"{options.model} has no {key}; its options are: {_listed(defaults)}.")
            given[key] = shortcut
    for key, one in given.items():
        if not defaults:
            raise InvalidChoice(f"{options.model} has no options; leave out {key!r}.")
        choose(f"option of {options.model}", key, defaults)
        if isinstance(one, OfStages):
            if not hasattr(options, "stages"):
                raise InvalidChoice(
                    f"{key}={one} depends on the number of stages, which this command has none of; give a number."
                )
            given[key] = one.at(options.stages)
        elif isinstance(defaults[key], int) and isinstance(one, float) and one.is_integer():
            given[key] = int(one)  # --width is a float for the networks that scale by a factor
    return {**defaults, **given}


def resolve_device(name: str) -> str:
    """`auto` settled, anything else checked. Raises InvalidChoice for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises both, depending on how it was built
        there = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
        raise InvalidChoice(f"There is no device {name!r} here; give auto or {', '.join(['cpu', *there])}.") from error
    return name


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _momentum(options: Options) -> float | None:
    if options.optimizer == "sgd":
        return _MOMENTUM if options.momentum is None else options.momentum
    if options.momentum is not None:
        raise InvalidChoice(f"{options.optimizer} has no momentum option; leave out --momentum or use --optimizer sgd.")
    return None


def _check_numbers(options: Options) -> None:
    for name in ("stages", "epochs", "batch_size", "accumulate", "subset", "context", "validate_every", "threads"):
        require_at_least(name, getattr(options, name), 1)
    for name in ("lr", "clip"):
        number = getattr(options, name)
        if number is not None and not 0 < number < float("inf"):
            raise InvalidChoice(f"--{name} {number} is not possible; give a number greater than 0.")
    for name in ("weight_decay", "momentum"):
        number = getattr(options, name)
        if number is not None and not 0 <= number < float("inf"):
            raise InvalidChoice(f"--{name.replace('_', '-')} {number} is not possible; give a number of at least 0.")


def require_at_least(name: str, number: int | None, smallest: int) -> None:
    """Raises InvalidChoice if the option `name` was given a smaller number."""
    if number is not None and number < smallest:
        raise InvalidChoice(
            f"--{name.replace('_', '-')} {number} is not possible; give a whole number of at least {smallest}."
        )


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} ({default})" for key, default in options.items()) or "none"
