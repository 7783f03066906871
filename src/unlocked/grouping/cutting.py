"""Cut a model into K depth modules of G neuron groups each, K·G stages that learn by themselves.

GN-DGL: Patel's thesis, sections 3.2.2 and 3.3.2, "each local module consists of approximately the same number of layers and the
same number of channels in a particular layer". The groups of a depth stand side by side in a Chain with a layout:

    (1, G, …, G, 1)      stem, K modules, final classifier: each one a depth of its own

    stem     one for all groups (resnet, cnn: the first convolution; gpt, vit: the embedding). mlp, vgg and nn.Sequential have
             none: each group of the first module reads the data. stem="split" gives each group of the first module its slice
             of the stem, which is then that module's dense layer (as Patel's figures count it; resnet and cnn)
    module   inside it group g sees only its own C/G channels; the first layer after a boundary is dense: it reads all channels
             and puts out C/G. So groups meet at boundaries only (slicing.py, models.py)
    final    the model's last layer with weights, dense, or a new head instead

Limits: G = 1 is the ordinary cut with stem and final layer as stages of their own, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..chain import Chain, Stage
from ..costs import run_once
from ..cutting import _body, _check_same, _costs, _pieces, _units
from ..errors import CannotCut
from ..heads.budget import HeadLike, build
from ..models import from_recipe
from ..models.pieces import Piece
from ..rng import seed_of
from .plan import Plan, Unit, groups_of, has_stem, modules_of, refuse_flat_sequences, refuse_tied
from .slicing import CannotDivide, Share, after, narrow


def grouped(
    model: nn.Module,
    groups: int | Sequence[int],
    like: Tensor,
    stages: int | None = None,
    balance: str = "flops",
    at: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    stem: str = "shared",
    final: HeadLike | None = None,
) -> Chain:
    """The grouped chain of `model`; the arguments are those of `cut` (../cutting.py). Raises CannotCut."""
    units = _units(_pieces(model))
    refuse_tied(units)
    first = int(has_stem(model, stem))
    middle = units[first:-1]
    if not middle:
        raise CannotCut(
            f"{type(model).__name__} has nothing between stem and final layer that could be split into groups."
        )
    if stages is None and sizes is None and at is None and not isinstance(groups, int):
        stages = len(middle)
    measured = sizes is None and at is None
    weights = _costs(units, like, balance)[first:-1] if measured else []
    modules = modules_of(middle, weights, stages, sizes, at)
    layout = groups_of(groups, len(modules))
    plan = Plan([1] * first + modules + [1], [1] * first + layout + [1])
    if max(layout) > 1:
        refuse_flat_sequences(units, like)
    recipe = None
    if hasattr(model, "recipe") and isinstance(final, (str, type(None))):
        recipe = {"model": model.recipe, "sizes": plan.sizes, "layout": plan.layout, "final": final}
    chain = assemble(model, units, plan, final, like, recipe)
    if max(layout) == 1 and final is None:
        _check_same(model, chain, like)
    return chain


def from_grouped_recipe(recipe: Mapping[str, Any], like: Tensor) -> Chain:
    """The chain that `grouped` made from a model of `unlocked.models`, with fresh weights."""
    model = from_recipe(recipe["model"])
    if like.is_floating_point():
        model = model.to(like.dtype)
    plan = Plan(list(recipe["sizes"]), list(recipe["layout"]))
    return assemble(model, _units(_pieces(model)), plan, recipe["final"], like, recipe)


def assemble(
    model: nn.Module,
    units: list[Unit],
    plan: Plan,
    final: HeadLike | None,
    like: Tensor,
    recipe: Mapping[str, Any] | None,
) -> Chain:
    """The chain with modules of its own, `model` not changed. Raises CannotCut."""
    rows = plan.rows(units)
    bodies: list[nn.Module] = []
    names: list[tuple[str, int, str]] = []
    for row, groups in list(zip(rows, plan.layout))[: len(rows) - (final is not None)]:
        for group in range(groups):
            parts = _slices(rows, plan, row, Share(group, groups))
            body = _body(parts)
            names += _names(parts, body, len(bodies), "" if groups == 1 else f"group{group}.")
            bodies.append(body)
    stages = [Stage(body) for body in bodies]
    if final is not None:
        below = Chain([*stages, Stage(nn.Identity())], layout=plan.layout)
        stages.append(_final(final, run_once(below, like), run_once(model, like)))
        names += [(f"final.{name}", len(bodies), name) for name in stages[-1].body.state_dict()]
    return Chain(stages, like, names, recipe, plan.layout)


def _slices(rows: list[list[Piece]], plan: Plan, row: list[Piece], share: Share) -> list[Piece]:
    """New pieces: this share of each; a depth of one group is copied."""
    try:
        return narrowed(row, share)
    except CannotDivide as error:
        alike = [other for other, groups in zip(rows, plan.layout) if groups == share.groups]
        fitting = [
            str(groups) for groups in range(2, error.count + 1) if error.count % groups == 0 and _fits(alike, groups)
        ]
        advice = (
            f"Of its divisors {', '.join(fitting)} would do." if fitting else "No number does; choose another width."
        )
        raise CannotCut(f"{error} {advice}") from None


def narrowed(row: list[Piece], share: Share) -> list[Piece]:
    """This share of the pieces of a module, as new ones. Raises CannotDivide and CannotCut."""
    parts = []
    for name, module in row:
        whole = share.groups == 1
        parts.append(Piece(name, copy.deepcopy(module) if whole else narrow(module, share, name)))
        share = after(module, share)
    return parts


def _fits(rows: list[list[Piece]], groups: int) -> bool:
    try:
        for row in rows:
            narrowed(row, Share(0, groups))
    except CannotDivide:
        return False
    return True


def _names(parts: list[Piece], body: nn.Module, j: int, prefix: str) -> list[tuple[str, int, str]]:
    """The user's own names where a depth is not split, with the group's number before them where it is."""
    return [
        (f"{prefix}{part.name}.{key}", j, f"{child}.{key}")
        for part, (child, module) in zip(parts, body.named_children())
        for key in module.state_dict()
    ]


def _final(final: HeadLike, features: Tensor, output: Tensor) -> Stage:
    """A new final head on all channels, drawn from the seed of (0, "final", 0) whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(0, "final", 0))
        head, loss, _ = build(
            final,
            features,
            output.shape[-1],
            per_token=output.dim() == 3,
            stage_flops=0,
            budget=None,
            where="the final head",
        )
    if not isinstance(run_once(head, features), Tensor):
        raise CannotCut(f"final={final!r} gives more than class scores; choose a head whose output is one tensor.")
    return Stage(head, loss=loss)
