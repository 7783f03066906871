"""Cut any model into a chain of balanced stages.

A model is first taken apart into its finest pieces (models/pieces.py: nn.Sequential, models with a block list, Hugging
Face models), or at split points named by the user; the pieces are then grouped into J contiguous stages whose largest cost
is as small as it can be. Pieces without a weight matrix (activation, pooling, normalisation) stay with the piece before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import costs
from .chain import Chain, Stage
from .errors import CannotCut, choose
from .models import from_recipe
from .models.pieces import Piece, pieces_of
from .partition import partition
from .split_points import split_at

Balance = Literal["flops", "time", "parameters", "memory"]


def cut(
    model: nn.Module,
    stages: int | None = None,
    like: Tensor | None = None,
    balance: Balance = "flops",
    at: Sequence[str] | None = None,
) -> Chain:
    """Split `model` into a chain of stages that share its parameters.

    Args:
        model: an nn.Sequential, a model with `pieces()` (those of `unlocked.models`), a supported Hugging Face model, or,
            with `at`, any module that torch.fx can trace outside the named submodules.
        stages: number of stages J ≥ 1. Left out with `at`.
        like: an example batch, shape (B, …). Read, never trained on.
        balance: what to balance, per stage: "flops" of the forward, "time" of forward and backward (measured here),
            "parameters", or "memory" (bytes kept for the backward).
        at: names of submodules; each ends a stage. J is then one more than there are names, and nothing is balanced.

    Returns a Chain with chain(x) = model(x) bit for bit. Raises CannotCut, with a sentence, when that is not possible.
    """
    if like is None:
        raise CannotCut("cut needs an example batch to follow the shapes: cut(model, stages, like=x).")
    if at is not None:
        if stages is not None and stages != len(at) + 1:
            raise CannotCut(f"{len(at)} split point(s) make {len(at) + 1} stages, but stages={stages} was given too.")
        bodies = split_at(model, at, like)
        recipe = None
    else:
        choose("balance", balance, costs.MEASURES)
        units = _units(_pieces(model))
        sizes = _sizes(units, stages, like, balance)
        bodies = _bodies(units, sizes)
        recipe = {"model": model.recipe, "sizes": sizes} if hasattr(model, "recipe") else None
    chain = Chain([Stage(body) for body in bodies], like, _user_names(model, bodies), recipe)
    _check_same(model, chain, like)
    return chain


def from_recipe_of_chain(recipe: Mapping[str, Any], like: Tensor) -> Chain:
    """The chain that `cut` made from a model of `unlocked.models`, with fresh weights; `recipe` is `chain.recipe`."""
    model = from_recipe(recipe["model"])
    bodies = _bodies(_units(_pieces(model)), recipe["sizes"])
    return Chain([Stage(body) for body in bodies], like, _user_names(model, bodies), recipe)


def _pieces(model: nn.Module) -> list[Piece]:
    pieces = pieces_of(model)
    if pieces is None:
        points = [name for name, _ in model.named_modules() if name and name.count(".") <= 1][:8]
        raise CannotCut(
            f"{type(model).__name__} is neither an nn.Sequential, nor a supported Hugging Face model, nor has it a method "
            f"pieces(); name the submodules that end a stage instead: cut(model, at=[…], like=x), from for example {points}."
        )
    if not pieces:
        raise CannotCut(f"{type(model).__name__} has no modules to cut.")
    return pieces


def _units(pieces: list[Piece]) -> list[list[Piece]]:
    """Groups that are never cut apart: one piece with a weight matrix, and what follows it without one."""
    units: list[list[Piece]] = []
    heavy = False  # whether the current unit has a weight matrix yet
    for piece in pieces:
        has_matrix = any(parameter.dim() >= 2 for parameter in piece.module.parameters())
        if not units or (has_matrix and heavy):
            units.append([])
            heavy = False
        units[-1].append(piece)
        heavy = heavy or has_matrix
    return units


def _sizes(units: list[list[Piece]], stages: int | None, like: Tensor, balance: str) -> list[int]:
    if stages is None or isinstance(stages, bool) or not isinstance(stages, int) or not 1 <= stages <= len(units):
        names = ", ".join(unit[0].name for unit in units)
        raise CannotCut(
            f"stages={stages} is not possible: this model has {len(units)} parts with weights ({names}), "
            f"so give a whole number from 1 to {len(units)}."
        )
    measure = costs.MEASURES[balance]
    x, weights = like, []
    for unit in units:
        module = _body(unit)
        weights.append(float(measure(module, x)))
        x = costs.run_once(module, x)
        if not isinstance(x, Tensor):
            raise CannotCut(f"{unit[-1].name} returns a {type(x).__name__}; between stages there must be one tensor.")
    return partition(weights, stages)


def _bodies(units: list[list[Piece]], sizes: Sequence[int]) -> list[nn.Module]:
    bodies, begin = [], 0
    for size in sizes:
        bodies.append(_body([piece for unit in units[begin : begin + size] for piece in unit]))
        begin += size
    return bodies


def _body(pieces: Sequence[Piece]) -> nn.Module:
    """The pieces in a row; a first activation that works in place would write into the stage below, so it no longer does."""
    first = next(pieces[0].module.modules()) if not list(pieces[0].module.children()) else None
    if first is not None and getattr(first, "inplace", False):
        first.inplace = False  # type: ignore[assignment]
    body = nn.Sequential()
    for k, piece in enumerate(pieces):  # numbered: two pieces may differ in their dots only
        body.add_module(f"{k}_{piece.name.replace('.', '_')}", piece.module)
    return body


def _user_names(model: nn.Module, bodies: Sequence[nn.Module]) -> list[tuple[str, int, str]]:
    """Where each tensor of the model's state lies: found by identity, so any wrapping of pieces keeps the user's names."""
    place: dict[int, tuple[int, str]] = {}
    for j, body in enumerate(bodies):
        for inside, tensor in body.state_dict(keep_vars=True).items():
            place.setdefault(id(tensor), (j, inside))
    names, lost = [], []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in place:
            names.append((name, *place[id(tensor)]))
        else:
            lost.append(name)
    if lost:
        raise CannotCut(f"These weights of the model are in none of its pieces: {', '.join(lost[:5])}.")
    return names


def _check_same(model: nn.Module, chain: Chain, like: Tensor) -> None:
    expected = costs.run_once(model, like)
    expected = getattr(expected, "logits", expected)
    if not torch.equal(costs.run_once(chain, like), expected):
        raise CannotCut(
            "The pieces in a row do not compute what the model computes; check its pieces() or split points."
        )
