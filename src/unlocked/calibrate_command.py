"""`unlocked calibrate`: measure this machine, and a network's stages on it, into a cost file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.status import Status
from rich.table import Table

from . import commands, data, models
from .calibration.measuring import Calibration, Plan, calibrate, date
from .config import require_at_least, resolve_model
from .cutting import cut
from .errors import InvalidChoice
from .method_names import make_credit, parse_call
from .run_files import machine, refuse_unwritable, versions
from .simulation import cost_file
from .work import WORKS

_OF_A_MODEL = ("data", "input", "width", "depth", "model_options")


def run(command: commands.Calibrate, console: Console) -> int:
    """Measure, write the file and print what is in it; returns the exit code. Raises InvalidChoice, CannotCut, LostProcess."""
    plan = _plan(command)
    _refuse_unwritable(command.out)
    with _progress(console, command.json) as tell:
        found = calibrate(plan, tell)
    about = {
        "date": date(),
        "machine": machine("cpu"),
        "versions": versions(),
        "threads": 1,
        "links": plan.links,
    }
    content = cost_file.save(command.out, found.hardware, found.costs, about=about, chain=_identity(plan, found))
    if command.json:
        print(json.dumps({"event": "result", "costs": str(command.out), **content}))
        return 0
    _show(found, console)
    console.print(f"Cost file: {command.out}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _identity(plan: Plan, found: Calibration) -> dict[str, Any]:
    """What the measured stages are of."""
    values = {name: value for name, value in asdict(plan).items() if name not in ("samples", "links")}
    return {**values, "input": list(plan.input), "samples": list(found.samples), "heads": list(found.heads)}


def _refuse_unwritable(out: Path) -> None:
    """Before the measuring, not after it."""
    if out.is_dir() or not out.parent.is_dir():
        raise InvalidChoice(f"--out {out} cannot be written: give a file in a folder that exists.")
    refuse_unwritable(out)


# ---- what to measure -------------------------------------------------------------------------------------------------


def _plan(command: commands.Calibrate) -> Plan:
    for name in ("stages", "batch_size", "classes"):
        require_at_least(name, getattr(command, name), 1)
    if command.model is None:
        for name in _OF_A_MODEL:
            if getattr(command, name):
                raise InvalidChoice(f"--{name.replace('_', '-')} is about a network; give --model as well.")
        return Plan(links=command.links)
    shape, integers, classes = _input(command)
    like = torch.randint(classes, (2, *shape)) if integers else torch.randn(2, *shape)
    options = resolve_model(command)  # type: ignore[arg-type]
    model = models.build(command.model, input_shape=shape, classes=classes, **options)
    call = parse_call(command.credit)
    rule = make_credit(call, command.stages)
    if rule.self_supervised:
        model = models.encoder(model)
    chain = cut(model, command.stages, like=like, balance=command.balance)
    rule.prepare(chain, 0)  # refuses here what the processes would have to refuse
    return Plan(
        chain.recipe,
        tuple(shape),
        integers,
        classes,
        str(call),
        "momentum" if command.optimizer == "sgd" else command.optimizer,  # as train has it by default
        command.batch_size,
        command.links,
    )


def _input(command: commands.Calibrate) -> tuple[tuple[int, ...], bool, int]:
    """Shape of one sample, whether it is made of whole numbers, how many outputs the network has."""
    if (command.data is None) == (command.input is None):
        raise InvalidChoice("The network's input is needed once: give --input, e.g. 3x32x32, or --data, e.g. digits.")
    if command.data is not None:
        train, _ = data.load(command.data)
        sample = train.samples(torch.arange(1))[0]
        return tuple(train.input_shape), not sample.is_floating_point(), train.classes
    return shape_of(command.input or ""), command.model in models.TEXT, command.classes


def shape_of(text: str) -> tuple[int, ...]:
    """3x32x32 as a shape. Raises InvalidChoice."""
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InvalidChoice(f"--input {text!r} is no shape; write for example 3x224x224.")
    return shape


# ---- what is shown ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(console: Console, as_json: bool) -> Iterator[Any]:
    """What tells a person what is being measured."""
    if as_json:
        yield lambda words: None
        return
    with Status("Starting two processes …", console=console) as status:
        yield lambda words: status.update(f"Measuring {words} …")


def _show(found: Calibration, console: Console) -> None:
    device, network = found.hardware.device, found.hardware.network
    table = Table("", "one core, one thread", show_header=True)
    table.add_row("operations", f"{device.flops / 1e9:.1f} GFLOP/s")
    table.add_row("memory", f"{device.memory_bandwidth / 1e9:.1f} GB/s read and written")
    for name, line in (("sending", network.send), ("receiving", network.receive), ("mean over two", network.exchange)):
        table.add_row(name, f"{1e6 * line.fixed:.0f} µs + {1e9 * line.each:.3f} ns per byte")
    wire = "unlimited" if network.edge.bandwidth == float("inf") else f"{network.edge.bandwidth / 1e9:.1f} GB/s"
    table.add_row("besides, under way", f"{1e6 * network.edge.latency:.0f} µs, {wire}")
    console.print(table)
    if found.costs is None:
        return
    samples = max(found.samples)
    stages = Table("stage", *(f"{part} ms" for part in WORKS), title=f"{samples} samples")
    for j, stage in enumerate(found.costs.stages):
        cells = [f"{1e3 * stage.of((part,), samples):.2f}" if part in stage.seconds else "" for part in WORKS]
        stages.add_row(str(j), *cells)
    console.print(stages)
