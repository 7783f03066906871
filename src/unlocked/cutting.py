"""Cut any model into a chain of balanced stages.

A model is first taken apart into its finest pieces (models/pieces.py: nn.Sequential, models with a block list, Hugging
Face models), or at split points named by the user; the pieces are then grouped into J contiguous stages whose largest cost
is as small as it can be. Pieces without a weight matrix (activation, pooling, normalisation) stay with the piece before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from . import costs
from .chain import Chain, Stage
from .errors import CannotCut, choose
from .heads.budget import HeadLike
from .losses import Loss, cross_entropy
from .models import from_recipe
from .models.pieces import Piece, pieces_of
from .partition import partition
from .split_points import split_at
from .split_tables import split_table

Balance = Literal["flops", "time", "parameters", "memory", "published"]


def cut(
    model: nn.Module,
    stages: int | None = None,
    like: Tensor | None = None,
    balance: Balance = "flops",
    at: Sequence[str] | None = None,
    loss: Loss | None = None,
    groups: int | Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    stem: str = "shared",
    final: HeadLike | None = None,
) -> Chain:
    """Split `model` into a chain of stages that share its parameters, or, with `groups`, into neuron groups that do not.

    Args:
        model: an nn.Sequential, a model with `pieces()` (those of `unlocked.models`), a supported Hugging Face model, or,
            with `at`, any module that torch.fx can trace outside the named submodules.
        stages: number of stages J ≥ 1. Left out with `at`.
        like: an example batch, shape (B, …). Read, never trained on.
        balance: what to balance, per stage: "flops" of the forward, "time" of forward and backward (measured here),
            "parameters", or "memory" (bytes kept for the backward). "published": nothing; stages end where papers have cut
            this network of ul.models (split_tables.py).
        at: names of submodules; each ends a stage. J is then one more than there are names, and nothing is balanced.
        loss: (output, target) → scalar, the network's own; local heads take it over. None: cross-entropy.
        groups: None: the ordinary cut. G: each of the `stages` depth modules is split into G groups along its channels
            (grouping/cutting.py), `layout` (1, G, …, G, 1) with the stem and the final layer as depths of their own. Several
            numbers: one for each module (1: not split; those left out, too); every layer is a module if `stages` is left out.
        sizes: instead of balancing, how many parts with weights each stage takes; with groups: each module, without stem and
            final layer.
        stem: with groups: "shared", a depth of its own, or "split", each group of the first module has its slice of it.
        final: with groups: a head (name, recipe or function; heads/) in the place of the model's last layer, drawn from a seed
            of its own, seed_of(0, "final", 0); None: the model's own.

    Returns a Chain with chain(x) = model(x) bit for bit; with groups the weights are copies of the model's slices, scaled for
    the inputs that a group does not see (grouping/slicing.py). Raises CannotCut, with a sentence, when that is not possible.
    """
    if like is None:
        raise CannotCut("cut needs an example batch to follow the shapes: cut(model, stages, like=x).")
    choose("balance", balance, get_args(Balance))
    if groups is not None:
        from .grouping import grouped  # it needs this file

        if balance == "published":
            raise CannotCut(
                "balance='published' is for cuts in depth only; with groups= give another balance, or sizes=…."
            )

        chain = grouped(model, groups, like, stages, balance, at, sizes, stem, final)
    elif final is not None or stem != "shared":
        raise CannotCut("stem= and final= belong to neuron groups; give groups=, too.")
    else:
        chain = _ungrouped(model, stages, like, balance, at, sizes)
    if loss is not None and loss is not cross_entropy:
        chain[-1].loss, chain.recipe = loss, None  # a checkpoint cannot say what the user's own function is
    return chain


def _ungrouped(
    model: nn.Module,
    stages: int | None,
    like: Tensor,
    balance: str,
    at: Sequence[str] | None,
    sizes: Sequence[int] | None,
) -> Chain:
    if at is not None:
        if sizes is not None:
            raise CannotCut("Both sizes= and at= say where stages end; give one of them.")
        if stages is not None and stages != len(at) + 1:
            raise CannotCut(f"{len(at)} split point(s) make {len(at) + 1} stages, but stages={stages} was given too.")
        bodies = split_at(model, at, like)
        _check_passed_on(bodies, at, like)
        recipe = None
    else:
        units = _units(_pieces(model))
        if sizes is None and balance == "published":
            sizes = _published(model, stages)
        row = _sizes(units, stages, like, balance) if sizes is None else _given_sizes(units, stages, sizes)
        bodies = _bodies(units, row)
        recipe = {"model": model.recipe, "sizes": row} if hasattr(model, "recipe") else None
    chain = Chain([Stage(body) for body in bodies], like, _user_names(model, bodies), recipe)
    _check_same(model, chain, like)
    return chain


def from_recipe_of_chain(recipe: Mapping[str, Any], like: Tensor) -> Chain:
    """The chain that `cut` made from a model of `unlocked.models`, with fresh weights; `recipe` is `chain.recipe`."""
    if "layout" in recipe:
        from .grouping import from_grouped_recipe  # it needs this file

        return from_grouped_recipe(recipe, like)
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
    return partition(_costs(units, like, balance), stages)


def _published(model: nn.Module, stages: int | None) -> list[int]:
    """Where papers have cut this network. Raises CannotCut, or InvalidChoice for a network or number without a table."""
    recipe = getattr(model, "recipe", None)
    if recipe is None or not recipe["options"].get("skip", True):
        raise CannotCut(
            "balance='published' is for networks of ul.models as papers have them (residual ones with their shortcuts); take "
            "balance='flops', or say where stages end: sizes=… or at=…."
        )
    if stages is None:
        raise CannotCut(
            "balance='published' needs the number of stages: cut(model, stages, like=x, balance='published')."
        )
    return split_table(recipe["name"], stages, bool(recipe.get("encoder"))).sizes


def _given_sizes(units: list[list[Piece]], stages: int | None, sizes: Sequence[int]) -> list[int]:
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes)
    if not whole or sum(sizes) != len(units) or stages not in (None, len(sizes)):
        raise CannotCut(
            f"sizes={list(sizes)} is not possible"
            + (f" with stages={stages}" if stages is not None else "")
            + ": give, for "
            f"each stage, a whole number of at least 1; they must add up to the {len(units)} parts with weights of this model."
        )
    return list(sizes)


def _costs(units: list[list[Piece]], like: Tensor, balance: str) -> list[float]:
    """What each unit costs, by the measure `balance`."""
    measure = costs.MEASURES[balance]
    x, weights = like, []
    for unit in units:
        module = _body(unit)
        weights.append(float(measure(module, x)))
        x = costs.run_once(module, x)
        if not isinstance(x, Tensor):
            raise CannotCut(f"{unit[-1].name} returns a {type(x).__name__}; between stages there must be one tensor.")
    return weights


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


def _check_passed_on(bodies: Sequence[nn.Module], at: Sequence[str], like: Tensor) -> None:
    """Raises CannotCut unless it is a tensor that every stage passes on."""
    x: Any = like
    for body, point in zip(bodies, at):
        x = costs.run_once(body, x)
        if not isinstance(x, Tensor):
            raise CannotCut(
                f"What {point!r} returns is a {type(x).__name__}, as of an LSTM; between stages there must be one tensor. End "
                "the stage at a module after it, or wrap it in one that returns the tensor alone."
            )


def _check_same(model: nn.Module, chain: Chain, like: Tensor) -> None:
    expected = costs.run_once(model, like)
    expected = getattr(expected, "logits", expected)
    if not torch.equal(costs.run_once(chain, like), expected):
        raise CannotCut(
            "The pieces in a row do not compute what the model computes; check its pieces() or split points."
        )
