"""A trained network's weights as one safetensors file, under the user's own names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .chain import Chain
from .checkpoint import save_tensors
from .errors import InvalidChoice
from .run_files import aside, read_config, refuse_unwritable
from .running import load_data
from .session import Trainer


def export(folder: Path, to: Path, member: str = "averaged", overwrite: bool = False) -> Path:
    """Write the weights of the run in `folder` to `to`; returns `to`.

    member: "averaged" (the mean of the replicas) or a replica's number, from 0. The file's metadata holds the recipe of
    the network ("recipe", JSON; `unlocked.models.from_recipe` builds it), and what was exported.
    Raises InvalidChoice (the file exists, no such member), BadCheckpoint (no such run).
    """
    refuse_existing(to, overwrite)
    config = read_config(folder)
    trainer = Trainer.resume(folder / "checkpoint", device="cpu")
    if member == "averaged":
        refresh = load_data(config)[0] if config.batchnorm == "refresh" else None
        chain = trainer.averaged(refresh=refresh)
    else:
        chain = trainer.chains[_number(member, trainer.replicas)]
    about = {"method": str(config.method), "member": member, "updates": str(trainer.steps)}
    return write_weights(to, chain.state_dict(), _recipe(chain), about)


def refuse_existing(to: Path, overwrite: bool) -> None:
    """Raises InvalidChoice if there is such a file and it is not to be replaced, or where none can be written."""
    if to.exists() and not overwrite:
        raise InvalidChoice(f"{to} exists; give another name, or --overwrite.")
    refuse_unwritable(to)


def write_weights(to: Path, state: Mapping[str, Tensor], recipe: object, about: Mapping[str, str]) -> Path:
    """Write a network's tensors to `to`, aside and then renamed; the metadata holds its recipe (None: unknown) and `about`."""
    tensors = {name: x.detach().contiguous().clone() for name, x in state.items()}
    with aside(to) as place:
        save_tensors(place, tensors, metadata={"format": "pt", "recipe": json.dumps(recipe), **about})
    return to


def _recipe(chain: Chain) -> object:
    """None: only the user's code can build it, or it has neuron groups, which `models.from_recipe` does not know."""
    return None if chain.recipe is None or "layout" in chain.recipe else chain.recipe["model"]


def _number(member: str, replicas: int) -> int:
    if member.isdecimal() and int(member) < replicas:
        return int(member)
    numbers = ", ".join(map(str, range(replicas)))
    raise InvalidChoice(f"There is no member {member!r} in this run; give averaged or a replica's number: {numbers}.")
