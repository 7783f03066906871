"""What `unlocked timeline` is asked for: a method, its costs, a cluster."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import commands, models
from .chain import Chain
from .config import require_at_least, resolve_model
from .consensus import Consensus
from .credit import Credit
from .errors import InvalidChoice
from .live import in_bytes
from .method_names import Method, make_consensus, make_credit, parse_call
from .report.words import several
from .simulation import cost_file
from .simulation.costs import Costs, costs_of, unit
from .simulation.hardware import Device, Hardware
from .simulation.options import hardware
from .worker import Place
from .worlds.placement import placement

WORKERS, UPDATES = 4096, 50_000
ORDINARY = Hardware(Device(flops=1e12))
MADE_UP = {"forward": 1.0, "backward": 1.0, "head": 0.0, "update": 0.0}
REAL = ("data", "input")
MODELLED = ("flops", "memory_bandwidth")
CLUSTER = ("bandwidth", "latency", "per_node", "inside_bandwidth", "inside_latency", "speeds", "slow_downs", "memory")


@dataclass(frozen=True)
class Case:
    """A method on a cluster. samples: rows of a batch, two views of each image where that is learned from. made_up: whether
    the costs are."""

    method: Method
    credit: Credit
    consensus: Consensus
    costs: Costs
    chain: Chain | None
    hardware: Hardware
    devices: dict[Place, int] | None
    samples: int
    made_up: bool
    assumptions: str


def case_of(command: commands.Timeline) -> Case:
    """The case that the options describe. Raises InvalidChoice, CannotCut, HeadTooLarge."""
    _check(command)
    method = Method(parse_call(command.credit), parse_call(command.consensus), command.replicas)
    credit, consensus = make_credit(method.credit, command.stages), make_consensus(method.consensus, command.stages)
    consensus.check(credit, command.accumulate)
    credit.check(consensus)
    base = ORDINARY if command.costs is None else cost_file.base_hardware(command.costs)
    cluster = hardware(command, command.devices, base)
    devices = None
    if command.devices is not None:
        devices = placement(command.replicas, command.stages, command.devices)
    made_up = command.model is None and command.costs is None
    usual = credit.parts if made_up else 32
    samples = usual if command.batch is None else command.batch
    views = 2 if credit.self_supervised else 1
    chain: Chain | None = None
    if made_up:
        costs = _made_up(command)
    elif command.model is None:
        costs = _measured(command)
    else:
        costs, chain = _real(command, credit, cluster.device)
    words = _words(command, samples, cluster.device)
    return Case(method, credit, consensus, costs, chain, cluster, devices, views * samples, made_up, words)


def _made_up(command: commands.Timeline) -> Costs:
    forward, backward, head, update = (_usual(command, name) for name in MADE_UP)
    return unit(command.stages, forward=forward, backward=backward, head=head, update=update)


def _usual(command: commands.Timeline, name: str) -> float:
    given = getattr(command, name)
    return MADE_UP[name] if given is None else given


def _measured(command: commands.Timeline) -> Costs:
    """Of the network that a cost file is about."""
    assert command.costs is not None
    _, costs = cost_file.load(command.costs)
    if costs is None:
        raise InvalidChoice(f"{command.costs} is about a machine only, not about a network; give --model as well.")
    if len(costs) != command.stages:
        raise InvalidChoice(
            f"{command.costs} was measured on {len(costs)} stage(s); give --stages {len(costs)}, or calibrate again."
        )
    return costs


def _real(command: commands.Timeline, credit: Credit, device: Device) -> tuple[Costs, Chain]:
    """Of a network by its name: measured ones, if there is a cost file that has them, else counted ones."""
    from .planning.cuts import Cuts

    chain, profile = Cuts(*_network(command)).profiled(command.stages, credit)
    measured = None if command.costs is None else cost_file.load(command.costs, chain)[1]
    return (costs_of(profile, device) if measured is None else measured), chain


def _network(command: commands.Timeline) -> tuple[torch.nn.Module, torch.Tensor]:
    """The network and a batch of it, both without values."""
    from . import data
    from .calibrate_command import shape_of

    assert command.model is not None
    if (command.data is None) == (command.input is None):
        raise InvalidChoice("The network's input is needed once: give --input, e.g. 3x224x224, or --data, e.g. digits.")
    if command.data is not None:
        train, _ = data.load(command.data)
        shape, classes = train.input_shape, train.classes
    else:
        shape, classes = shape_of(command.input or ""), command.classes
    with torch.device("meta"):
        model = models.build(command.model, input_shape=shape, classes=classes, **resolve_model(command))  # type: ignore[arg-type]
    kind = torch.int64 if command.model in models.TEXT else torch.float32
    return model, torch.empty((2, *shape), dtype=kind, device="meta")


# ---- what can be refused at once, and what is told of it ---------------------------------------------------------------


def _check(command: commands.Timeline) -> None:
    for name in ("stages", "replicas", "steps", "accumulate", "batch", "devices", "classes"):
        require_at_least(name, getattr(command, name), 1)
    workers = command.stages * command.replicas
    if workers > WORKERS:
        raise InvalidChoice(
            f"{workers} workers are too many to look at, at most {WORKERS}; take fewer --stages or --replicas."
        )
    if workers * command.steps * command.accumulate > UPDATES:
        raise InvalidChoice(
            f"{command.steps * command.accumulate} batches of {workers} workers are too many to look at; take fewer --steps."
        )
    real = command.model is not None or command.costs is not None
    for name in MADE_UP:
        seconds = getattr(command, name)
        if seconds is not None and not 0 <= seconds < float("inf"):
            raise InvalidChoice(f"--{name} {seconds} is not possible; give a number of at least 0.")
        if seconds is not None and real:
            raise InvalidChoice(
                f"--{name} is made up, but --model and --costs are real; leave out the one or the other."
            )
    refused = (() if command.model is not None else REAL) + (() if real else MODELLED)
    for name in refused:
        if getattr(command, name) is not None:
            raise InvalidChoice(f"--{name.replace('_', '-')} is about a real network; give --model as well.")
    if command.to is not None and command.to.suffix not in (".svg", ".png"):
        raise InvalidChoice(f"--to {command.to} is no picture; let its name end in .svg or .png.")


def _words(command: commands.Timeline, samples: int, device: Device) -> str:
    """All that was assumed."""
    if command.model is None and command.costs is None:
        text = "made-up costs: " + ", ".join(f"{name} {_usual(command, name):g}" for name in MADE_UP)
    else:
        text = f"{command.model or 'the network measured'}, {several(samples, 'sample')} per replica, "
        text += _device_words(device) if command.costs is None else f"costs of {command.costs}"
    parts = [f"{name.replace('_', ' ')} {getattr(command, name)}" for name in CLUSTER if getattr(command, name)]
    free = not any(getattr(command, name) for name in ("bandwidth", "latency", "per_node", "costs"))
    if free:
        parts.insert(0, "a network that takes no time")
    if command.devices is not None:
        parts.append(several(command.devices, "device"))
    return "; ".join([text, ", ".join(parts)] if parts else [text])


def _device_words(device: Device) -> str:
    text = f"devices of {device.flops:.3g} operations/s"
    return text if device.memory_bandwidth == float("inf") else f"{text} and {in_bytes(device.memory_bandwidth)}/s"
