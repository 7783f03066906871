"""`unlocked probe`: what each stage of trained networks has made of the data, in a table, a figure and the report.

The numbers are those of probes/representation.py; RUN/probes.json has them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from . import commands, data
from .config import RunConfig, require_at_least, resolve_device
from .data import Data
from .errors import BadCheckpoint, InvalidChoice, UnlockedError
from .probes import Explanation, explain
from .probes.recipe import Recipe
from .run_files import read_config, refuse_unwritable, write_json
from .session import Trainer

_WORDS = (
    "Probe: held-out accuracy (R² of values) of a linear map from the depth's frozen features. Loss, accuracy: held-out, at "
    "the stage's own head. Cosine: to backpropagation's gradient, of the stage's weights and of its output."
)
_PAIR_WORDS = (
    "Of a network that learned from pairs of views the loss is of held-out pairs, and there is no such gradient."
)


def probe(command: commands.Probe, console: Console) -> int:
    """Probe, print, write and draw as the command says; returns the exit code. Raises InvalidChoice, BadCheckpoint, BadData."""
    from .report.representation import draw_records, refuse_picture  # it brings matplotlib with it

    for name in ("subset", "pool", "gradient_samples", "knn", "recipe_epochs", "batch_size"):
        require_at_least(name, getattr(command, name), 1)
    if command.plot is not None:
        refuse_picture(command.plot)
    folders = [folder for path in command.runs for folder in _runs_in(path)]
    for folder in folders:
        refuse_unwritable(folder / "probes.json")
    found = probe_runs(folders, console, command, quiet=command.json)
    _renew_reports(command.runs)
    plot = None
    if command.plot is not None:
        plot = str(
            draw_records({name: [one.to_json() for _, one in rows] for name, rows in found.items()}, command.plot)
        )
    if command.json:
        runs = [
            {"run": str(folder), "method": name, **one.to_json()}
            for name, rows in found.items()
            for folder, one in rows
        ]
        print(json.dumps({"event": "result", "runs": runs, "plot": plot}))
        return 0
    for name, rows in found.items():
        for folder, one in rows:
            console.print(as_rich(f"{name}, {folder}", one))
    words = f"{_WORDS} {_PAIR_WORDS}" if any(one.pairs for rows in found.values() for _, one in rows) else _WORDS
    console.print(words, style="dim", highlight=False, soft_wrap=True)
    if plot is not None:
        console.print(f"Figure: {plot}", highlight=False, soft_wrap=True)
    return 0


def _runs_in(path: Path) -> Iterable[Path]:
    """The folder itself, or those of a comparison's runs. Raises InvalidChoice if there is none."""
    if (path / "runs").is_dir():
        runs = _complete(path)
        if not runs:
            raise InvalidChoice(f"No run of the comparison {path} is complete yet; let one come to its end first.")
        return runs
    if not path.is_dir():
        raise InvalidChoice(f"There is no folder {path}; give the folder of a run or of a comparison.")
    return [path]


def _complete(comparison: Path) -> list[Path]:
    return sorted(file.parent for file in (comparison / "runs").glob("*/summary.json"))


def _renew_reports(paths: Sequence[Path]) -> None:
    """Those that were written before show what was found now."""
    from .report import write_report

    for path in paths:
        if (path / "report.html").exists():
            write_report(path)


def probe_comparison(folder: Path, console: Console, device: str, quiet: bool) -> None:
    """Probe all complete runs of a comparison; one that cannot be probed is a sentence, and the others go on."""
    for run in _complete(folder):
        try:
            probe_runs([run], console, commands.Probe((run,), device=device), quiet)
        except UnlockedError as error:
            if not quiet:
                console.print(f"{run.name} was not probed: {error}", highlight=False, soft_wrap=True, markup=False)


def probe_runs(
    folders: Sequence[Path], console: Console, options: commands.Probe, quiet: bool = False
) -> dict[str, list[tuple[Path, Explanation]]]:
    """Probe the network of each run, from its checkpoint, and write its probes.json; by method."""
    found: dict[str, list[tuple[Path, Explanation]]] = {}
    device = resolve_device(options.device)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        for folder in folders:
            config = read_config(folder)
            trainer = _trainer(folder, device)
            train, probe_on, test = _data(config, options, trainer)
            fitted_to = train if probe_on is None else probe_on
            if trainer.credit.self_supervised and train.views == 2:
                trainer.credit.meet(trainer, train)  # some losses depend on the training data
            again = len(test) if trainer.credit.self_supervised else min(options.gradient_samples, len(train))
            task = progress.add_task(escape(folder.name), total=len(fitted_to) + len(test) + again)
            recipe = Recipe(epochs=options.recipe_epochs) if options.recipe is not None else None
            rows = options.recipe_epochs * len(fitted_to) * len(trainer.template.layout.groups)
            layers = None if recipe is None else progress.add_task(f"{options.recipe} at every depth", total=rows)
            one = explain(
                trainer,
                train,
                test,
                pool=options.pool,
                gradient_samples=options.gradient_samples,
                batch_size=options.batch_size,
                knn=options.knn,
                recipe=recipe,
                probe_on=probe_on,
                told=functools.partial(progress.advance, task),
                recipe_told=None if layers is None else functools.partial(progress.advance, layers),
            )
            if layers is not None:
                progress.remove_task(layers)
            write_json(folder / "probes.json", one.to_json())
            found.setdefault(str(config.method), []).append((folder, one))
    return found


def _trainer(folder: Path, device: str) -> Trainer:
    if not any((folder / "checkpoint").glob("step-*")):
        raise BadCheckpoint(f"{folder} has no checkpoint, so there is no network to probe; train to its first one.")
    return Trainer.resume(folder / "checkpoint", device=device)


def _data(config: RunConfig, options: commands.Probe, trainer: Trainer) -> tuple[Data, Data | None, Data]:
    """The run's own data, or those asked for: to train on, to fit probes to (None: the same), held out.

    Raises BadData, and InvalidChoice for data that do not fit the network.
    """
    if trainer.credit.self_supervised and (asked := options.data or config.probe_on) is not None:
        # its losses are of views of what it was trained on, whose statistics normalise the rest
        train, _ = _load(config, trainer, config.data, config.subset, config.augment)
        return train, *_load(config, trainer, asked, options.subset, None)
    subset = config.subset if options.subset is None and options.data is None else options.subset
    augment = config.augment if trainer.credit.self_supervised else None
    train, test = _load(config, trainer, options.data or config.data, subset, augment)
    return train, None, test


def _load(config: RunConfig, trainer: Trainer, spec: str, subset: int | None, augment: str | None) -> tuple[Data, Data]:
    train, test = data.load(spec, augment=augment, subset=subset, context=config.context, seed=config.seed)
    takes = tuple(trainer.template.example().shape[1:])
    if tuple(train.input_shape) != takes:
        raise InvalidChoice(
            f"The network takes samples of shape {takes}, but those of {spec!r} have the shape {tuple(train.input_shape)}; "
            "give with --data the data it was trained for."
        )
    return train, test


def as_rich(title: str, one: Explanation) -> Table:
    """One row for each depth; neuron groups beside each other."""
    from .report.records import Record
    from .report.representation import cells, headings

    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    record = Record(one.to_json(), title)
    for heading in (shown := headings([record])):
        table.add_column(heading, justify="right", overflow="fold")
    rows: Any = cells(record, shown)
    for row in rows:
        table.add_row(*row)
    return table
