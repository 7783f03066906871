"""Members from files: safetensors as `unlocked export` writes them, and folders of runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import models
from ..errors import InvalidChoice
from ..session import Trainer

Recipe = Mapping[str, Any]


class Member(NamedTuple):
    """A network with its weights; recipe: how `unlocked.models.from_recipe` builds it."""

    name: str
    model: nn.Module
    recipe: Recipe


def load_members(paths: Sequence[Path], fallback: Callable[[], Recipe | None]) -> list[Member]:
    """The networks in these files, and all members of the runs in these folders, on the CPU.

    fallback: gives the recipe of files without one, if there is one. Raises InvalidChoice for a file that is missing, cannot be
    read or does not hold the network's weights, and for different networks; BadCheckpoint for a folder without a run.
    """
    found: list[Member] = []
    for path in paths:
        found += _of_run(path) if path.is_dir() else [_of_file(path, fallback)]
    if not found:
        raise InvalidChoice("There are no members; give files of weights, or folders of runs.")
    for member in found[1:]:
        if dict(member.recipe) != dict(found[0].recipe):
            raise InvalidChoice(
                f"{found[0].name} holds {_in_words(found[0].recipe)}, but {member.name} {_in_words(member.recipe)}; members "
                "must be of one network."
            )
    return found


def _of_run(folder: Path) -> list[Member]:
    chains = Trainer.resume(folder / "checkpoint", device="cpu").members() or []
    if chains and chains[0].recipe is None:
        raise InvalidChoice(f"The network of {folder} was made by your own code; use unlocked.soups from Python.")
    if chains and "layout" in (chains[0].recipe or {}):
        raise InvalidChoice(f"The network of {folder} has neuron groups; use unlocked.soups from Python.")
    members = []
    for n, chain in enumerate(chains):
        assert chain.recipe is not None
        recipe = chain.recipe["model"]
        members.append(Member(f"{folder.name}:{n}", _built(recipe, chain.state_dict(), str(folder)), recipe))
    return members


def _of_file(path: Path, fallback: Callable[[], Recipe | None]) -> Member:
    try:
        with safe_open(path, "pt") as file:
            written = json.loads((file.metadata() or {}).get("recipe", "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    except FileNotFoundError as error:
        raise InvalidChoice(f"There is no file {path}; give weights as unlocked export writes them.") from error
    except (SafetensorError, ValueError) as error:
        raise InvalidChoice(f"{path} cannot be read as safetensors ({error}).") from error
    if not isinstance(written, (dict, type(None))):
        raise InvalidChoice(f"{path} names its network by {written!r}, which is no recipe of unlocked.models.")
    recipe = written or fallback()
    if recipe is None:
        raise InvalidChoice(f"{path} does not say of which network it is; give --model and its options.")
    return Member(path.name, _built(recipe, state, str(path)), recipe)


def _built(recipe: Recipe, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """The network of the recipe with these weights, in float32, as the data are."""
    with torch.random.fork_rng(devices=[]):
        model = models.from_recipe(recipe)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split(":", 1)[-1].split())[:200].rstrip(".")
        raise InvalidChoice(f"{source} does not hold the weights of {_in_words(recipe)}: {first}.") from error
    return model


def _in_words(recipe: Recipe) -> str:
    """cnn(width=8, depth=2) for 1×8×8, 10 classes"""
    options = ", ".join(f"{key}={value}" for key, value in recipe["options"].items())
    shape = "×".join(map(str, recipe["input_shape"]))
    kind = "an encoder, " if recipe.get("encoder") else ""
    return f"{kind}{recipe['name']}({options}) for {shape} and {recipe['classes']} classes"
