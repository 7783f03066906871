"""`unlocked plan`: which method on a cluster that a person describes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from rich.console import Console

from .. import commands, models
from ..calibrate_command import shape_of
from ..config import require_at_least, resolve_model
from ..errors import InvalidChoice
from ..method_names import make_credit, parse_call
from ..simulation.options import ClusterOptions
from .planner import Plan, plan
from .predicting import Row
from .wording import LEGEND, known, refused

_SHOWN, _REASONS = 20, 5
_LARGE = 128  # pixels from which a ResNet is usually given the large stem


@dataclass(frozen=True)
class _Network:
    """The network asked for. notes: what was assumed about it."""

    model: torch.nn.Module
    like: torch.Tensor
    notes: tuple[str, ...]
    options: tuple[str, ...]


def run(command: commands.Plan, console: Console) -> int:
    """Print the plan; returns the exit code: 0, or 1 if nothing fits. Raises InvalidChoice, CannotCut."""
    for name in ("devices", "batch", "accumulate", "classes", "context"):
        require_at_least(name, getattr(command, name), 1)
    network = _network(command)
    cluster = {field.name: getattr(command, field.name) for field in fields(ClusterOptions)}
    found = plan(
        network.model,
        network.like,
        batch=command.batch,
        devices=command.devices,
        optimizer=command.optimizer,
        accumulate=command.accumulate,
        objective=command.objective,
        credit=command.credit,
        consensus=command.consensus,
        **{name: value for name, value in cluster.items() if value is not None},
    )
    train = None if found.best is None else train_command(command, network.options, found.best)
    if command.json:
        content = found.to_json()
        content["assumptions"] = [*network.notes, *content["assumptions"]]
        print(json.dumps({"event": "result", **content, "train": train}))
    else:
        _show(command, found, network, train, console)
    return int(found.best is None)


def _show(command: commands.Plan, found: Plan, network: _Network, train: str | None, console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    limit = None if command.all else _SHOWN
    say(found.headline)
    if found.rows:
        say("")
        wide = console if console.is_terminal else Console(width=max(console.width, 200))
        wide.print(found.table(limit))
        if limit is not None and len(found.rows) > limit:
            say(f"… and {len(found.rows) - limit} more (--all)")
        say(f"\n{LEGEND}")
        say("\nWhat is known about accuracy")
        for line in known(found.rows[:limit]):
            say(f"  {line}")
    if found.infeasible:
        say("\nWhat does not fit")
        for line in refused(found.infeasible, None if command.all else _REASONS):
            say(f"  {line}")
    say("\nAssumptions")
    for line in (*network.notes, *found.assumptions):
        say(f"  {line}")
    if train is not None:
        say(f"\nTo train by the first of them: {train}")


# ---- the network -----------------------------------------------------------------------------------------------------


def _network(command: commands.Plan) -> _Network:
    text = command.model in models.TEXT
    defaults = models.options(command.model)
    if command.input is None and not text:
        raise InvalidChoice(f"{command.model} needs the shape of one input; give for example --input 3x224x224.")
    shape = (command.context,) if command.input is None else shape_of(command.input)
    options, notes = command.model_options, []
    large = len(shape) == 3 and min(shape[1:]) >= _LARGE
    if "stem" in defaults and large and not any(option.startswith("stem=") for option in options):
        options = (*options, "stem=large")
        notes.append("Network: stem=large, as the images are large; --model-options stem=small for the other.")
    classes = command.classes or (256 if text else 1000 if large else 10)
    if command.classes is None:
        notes.append(f"Network: {classes} outputs (assumed; give --classes).")
    chosen = resolve_model(_Given(command, options))  # type: ignore[arg-type]
    with torch.device("meta"):  # no weight is allocated, so the size does not matter
        model = models.build(command.model, input_shape=shape, classes=classes, **chosen)
    like = torch.empty((2, *shape), dtype=torch.int64 if text else torch.float32, device="meta")
    return _Network(model, like, tuple(notes), options)


class _Given:
    """The command with other options of the network."""

    def __init__(self, command: commands.Plan, options: tuple[str, ...]) -> None:
        self.model, self.width, self.depth = command.model, command.width, command.depth
        self.model_options, self.stages = options, command.devices


# ---- how to train so -------------------------------------------------------------------------------------------------


def train_command(command: commands.Plan, options: tuple[str, ...], row: Row) -> str:
    """The command line that trains as the row says; DIR or FILE is the user's data."""
    words = ["unlocked"]
    if row.devices > 1:
        words += ["launch", "--processes", str(row.devices), "--"]
    words += [
        "train",
        "--data",
        "text:FILE" if command.model in models.TEXT else "folder:DIR",
        "--model",
        command.model,
    ]
    words += _model_words(command, options)
    credit, _, consensus = row.method.rpartition("@")[0].partition("/") if row.replicas > 1 else (row.method, "", "")
    words += ["--stages", str(row.stages), "--credit", credit]
    if make_credit(parse_call(credit), row.stages).self_supervised:
        words += ["--augment", "simclr"]
    if row.replicas > 1:
        words += ["--consensus", consensus or "independent", "--replicas", str(row.replicas)]
    share = command.batch if row.networks == row.replicas else command.batch // row.replicas
    words += ["--batch-size", str(share)]
    if row.accumulate > 1:
        words += ["--accumulate", str(row.accumulate)]
    words += {"momentum": [], "sgd": ["--momentum", "0"]}.get(command.optimizer, ["--optimizer", command.optimizer])
    return shlex.join(words)


def _model_words(command: commands.Plan, options: tuple[str, ...]) -> Iterator[str]:
    for name in ("width", "depth"):
        if getattr(command, name) is not None:
            yield from (f"--{name}", f"{getattr(command, name):g}")
    if options:
        yield from ("--model-options", *options)
    if command.model in models.TEXT:
        yield from ("--context", command.input or str(command.context))
