"""`unlocked soup`: what several trained networks are worth together, as an ensemble and as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from . import commands, data
from .batchnorm import batchnorms
from .config import RunConfig, require_at_least, resolve_device, resolve_model
from .data import Data
from .errors import InvalidChoice
from .exporting import refuse_existing, write_weights
from .models import TEXT
from .run_files import read_config
from .soups.files import Member, Recipe, load_members
from .soups.heat_map import heat_map, refuse_drawing
from .soups.making import Soups, hold_out, make_soups
from .soups.population import PopulationScores, evaluate_population
from .soups.predicting import Batches
from .soups.showing import as_rich, in_words

_PICTURES = (".png", ".svg")


def soup(command: commands.Soup, console: Console) -> int:
    """Evaluate, print and write as the command says; returns the exit code. Raises InvalidChoice, BadCheckpoint, BadData."""
    _refuse(command)
    device = resolve_device(command.device)
    runs = [read_config(path) for path in command.members if path.is_dir()]
    members = load_members(command.members, lambda: _recipe(command, runs))
    if members[0].recipe.get("encoder"):
        raise InvalidChoice(
            f"{members[0].name} learned without labels and has no classifier, so it predicts nothing that could be scored; "
            "unlocked probe scores its features, and unlocked export writes the mean of a run's members."
        )
    if command.heatmap is not None:
        refuse_drawing(len(members), command.steps)
    if command.take == "refreshed" and not batchnorms(members[0].model):
        raise InvalidChoice("The network has no BatchNorm, so there is no refreshed mean; take averaged.")
    train, test = _data(command, runs, members[0].recipe)
    rest, validation = hold_out(train, command.validation_share, command.seed)
    models = [member.model.to(device) for member in members]
    made = make_soups(
        models,
        validation=validation,
        train=rest,
        refresh=command.refresh or command.take == "refreshed",
        repair=command.repair or command.take == "repaired",
        greedy=command.greedy or command.take == "greedy",
        seed=command.seed,
        batch_size=command.batch_size,
    )
    scores = evaluate_population(
        models,
        test,
        validation=validation,
        train=rest,
        soups=made,
        names=_names(members),
        measure=command.measure,
        batch_size=command.batch_size,
    )
    note = (
        f"What is chosen is chosen on {len(validation)} samples of the training data, which the members may have been trained "
        "on; none is chosen by the test data."
    )
    written = {
        "heatmap": None if command.heatmap is None else _draw(command, models, scores.names, test, rest),
        "to": None if command.to is None else _save(command, made, members),
    }
    if command.json:
        found = scores.to_json()
        print(json.dumps({"event": "result", **found, "notes": [*found["notes"], note], **written}))
        return 0
    _show(console, scores, note, written)
    return 0


def _names(members: Sequence[Member]) -> list[str]:
    """As the files and runs are called; with their numbers if two are called the same."""
    names = [member.name for member in members]
    return names if len(set(names)) == len(names) else [f"{n} {name}" for n, name in enumerate(names)]


def _refuse(command: commands.Soup) -> None:
    """Before the work, not after it."""
    for name in ("subset", "batch_size", "steps"):
        require_at_least(name, getattr(command, name), 1)
    if command.heatmap is not None and command.heatmap.suffix not in _PICTURES:
        raise InvalidChoice(f"--heatmap {command.heatmap} is no picture; its name ends in .png or .svg.")
    if command.take != "averaged" and command.to is None:
        raise InvalidChoice(f"--take {command.take} says what to write; say where with --to FILE.safetensors.")
    if command.to is not None:
        refuse_existing(command.to, command.overwrite)
    if command.heatmap is not None:
        refuse_existing(command.heatmap, command.overwrite)
    for path in command.members:
        if not path.exists():
            raise InvalidChoice(f"There is no {path}; give files of weights, or folders of runs.")


# ---- data ------------------------------------------------------------------------------------------------------------


def _data(command: commands.Soup, runs: Sequence[RunConfig], recipe: Recipe) -> tuple[Data, Data]:
    """The data asked for, or those of the runs. Raises InvalidChoice for data that do not fit the network."""
    context = recipe["input_shape"][0] if recipe["name"] in TEXT else 128
    if command.data is not None or not runs:
        train, test = data.load(
            command.data or "digits", subset=command.subset, context=context, seed=command.seed, augment=None
        )
    else:
        sources = {(run.data, run.subset, run.seed if run.subset is not None else 0) for run in runs}
        if len(sources) > 1:
            raise InvalidChoice("The runs were trained on different data; say with --data which to evaluate on.")
        (spec, subset, seed) = sources.pop()
        train, test = data.load(spec, subset=command.subset or subset, context=context, seed=seed)
    if tuple(train.input_shape) != tuple(recipe["input_shape"]) or train.classes > recipe["classes"]:
        raise InvalidChoice(
            f"The network takes samples of shape {tuple(recipe['input_shape'])} and has {recipe['classes']} outputs, but those "
            f"of {train.name!r} have the shape {tuple(train.input_shape)} and {train.classes} classes; give with --data the "
            "data it was trained for."
        )
    return train, test


def _recipe(command: commands.Soup, runs: Sequence[RunConfig]) -> Recipe | None:
    """Of files that do not name their network: that of --model, for the shapes of the data."""
    if command.model is None:
        return None
    options = resolve_model(command)  # type: ignore[arg-type]
    train, _ = data.load(command.data or (runs[0].data if runs else "digits"), subset=command.subset)
    return {
        "name": command.model,
        "input_shape": list(train.input_shape),
        "classes": train.classes,
        "options": options,
    }


# ---- what is written and shown ---------------------------------------------------------------------------------------


def _draw(command: commands.Soup, models: Sequence[nn.Module], names: Sequence[str], test: Data, rest: Data) -> str:
    assert command.heatmap is not None
    refresh = Batches(rest, command.batch_size).sample(2048, command.seed) if command.refresh else None
    found = heat_map(models, test, steps=command.steps, refresh=refresh, names=names, batch_size=command.batch_size)
    found.draw(command.heatmap)
    return str(command.heatmap)


def _save(command: commands.Soup, made: Soups, members: Sequence[Member]) -> str:
    """Write the network asked for, so that it can be given to this command in turn."""
    assert command.to is not None
    model = {
        "averaged": made.averaged,
        "refreshed": made.refreshed,
        "repaired": None if made.repaired is None else made.repaired.model,
        "greedy": None if made.greedy is None else made.greedy.model,
    }[command.take]
    assert model is not None
    chosen = made.greedy.members if command.take == "greedy" and made.greedy else range(len(members))
    about = {"soup": command.take, "members": json.dumps([members[n].name for n in chosen])}
    return str(write_weights(Path(command.to), model.state_dict(), dict(members[0].recipe), about))


def _show(console: Console, scores: PopulationScores, note: str, written: dict[str, Any]) -> None:
    console.print(as_rich(scores))
    for sentence in [*in_words(scores), note]:
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)
    for what, path in written.items():
        if path is not None:
            console.print(f"{'Heat map' if what == 'heatmap' else 'Weights'}: {path}", highlight=False, soft_wrap=True)
