"""Which parts of a model make up each depth of a grouped chain, and how many groups there are at each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from ..costs import run_once
from ..errors import CannotCut, choose
from ..models.pieces import Layered, Piece
from ..partition import partition

STEMS = ("shared", "split")
_STEM_NAMES = ("stem", "embedding")

Unit = list[Piece]


class Plan(NamedTuple):
    """For each depth: how many units (parts with weights) it takes, and how many groups it has."""

    sizes: list[int]
    layout: list[int]

    def rows(self, units: list[Unit]) -> list[list[Piece]]:
        """The pieces of each depth."""
        found, begin = [], 0
        for size in self.sizes:
            found.append([piece for unit in units[begin : begin + size] for piece in unit])
            begin += size
        return found


def has_stem(model: nn.Module, stem: str) -> bool:
    """Whether the first part is a depth of its own; raises InvalidChoice for an unknown `stem`."""
    choose("stem", stem, STEMS)
    if stem == "split" and isinstance(model, Layered) and model.pieces()[0].name == "embedding":
        raise CannotCut(
            "An embedding belongs to all groups and cannot be split; take stem='shared' (gn-dgl: 'groups' or 'own')."
        )
    return stem == "shared" and isinstance(model, Layered) and model.pieces()[0].name in _STEM_NAMES


def modules_of(
    middle: list[Unit], weights: list[float], stages: int | None, sizes: Sequence[int] | None, at: Sequence[str] | None
) -> list[int]:
    """How many units each of the K depth modules takes: as given, up to the named ones, or balanced by `weights`."""
    if sizes is not None and at is not None:
        raise CannotCut("Both sizes= and at= say where modules end; give one of them.")
    if at is not None:
        sizes = _up_to(middle, at)
    if sizes is None:
        _check_count(middle, stages)
        assert stages is not None
        return partition(weights, stages)
    wrong = any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes)
    if wrong or sum(sizes) != len(middle):
        raise CannotCut(
            f"sizes={list(sizes)} is not possible: give whole numbers of at least 1 that add up to the {len(middle)} part(s) "
            f"between stem and final layer ({_listed(middle)})."
        )
    if stages is not None and stages != len(sizes):
        raise CannotCut(f"The modules given are {len(sizes)}, but stages={stages} was given too.")
    return list(sizes)


def groups_of(groups: int | Sequence[int], modules: int) -> list[int]:
    """The number of groups of each depth module; a shorter list is filled up with 1, not split."""
    row = [groups] * modules if isinstance(groups, int) else list(groups)
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in [groups, *row][1:]):
        raise CannotCut(
            f"groups={groups!r} is not possible; give a whole number of at least 1, or one for each module."
        )
    if isinstance(groups, bool) or len(row) > modules:
        raise CannotCut(
            f"groups={groups!r} is not possible with {modules} module(s); give a number, or one for each of them."
        )
    return row + [1] * (modules - len(row))


def refuse_tied(units: list[Unit]) -> None:
    """Raises CannotCut if two pieces have a parameter in common: their slices could not."""
    owner: dict[int, str] = {}
    for unit in units:
        for piece in unit:
            for parameter in piece.module.parameters():
                first = owner.setdefault(id(parameter), piece.name)
                if first != piece.name:
                    raise CannotCut(
                        f"{first} and {piece.name} share a parameter; untie them to split the model into groups."
                    )


def refuse_flat_sequences(units: list[Unit], like: Tensor) -> None:
    """Raises CannotCut where (B, T, D) is flattened: a group's channels are no row of neighbours there."""
    pieces = [piece for unit in units for piece in unit]
    if any(isinstance(piece.module, nn.Flatten) for piece in pieces):
        x = like
        for piece in pieces:
            if isinstance(piece.module, nn.Flatten) and x.dim() == 3 and piece is not pieces[0]:
                raise CannotCut(
                    f"{piece.name} flattens a sequence {tuple(x.shape)}; such a model cannot be split into groups."
                )
            x = run_once(piece.module, x)


def _check_count(middle: list[Unit], stages: int | None) -> None:
    if stages is None or isinstance(stages, bool) or not isinstance(stages, int) or not 1 <= stages <= len(middle):
        raise CannotCut(
            f"stages={stages} is not possible with groups: between stem and final layer, which are depths of their own, this "
            f"model has {len(middle)} part(s) with weights ({_listed(middle)}), so give a whole number from 1 to {len(middle)}."
        )


def _up_to(middle: list[Unit], at: Sequence[str]) -> list[int]:
    places = {piece.name: k for k, unit in enumerate(middle) for piece in unit}
    for name in at:
        choose("end of a module", name, places)
    ends = [places[name] + 1 for name in at]
    bounds = [0, *ends, len(middle)]
    if ends != sorted(set(ends)) or bounds[-2] == bounds[-1]:
        raise CannotCut(f"at={list(at)}: give names in the order of the network, each once, and not the last part's.")
    return [end - begin for begin, end in pairwise(bounds)]


def _listed(units: list[Unit]) -> str:
    return ", ".join(unit[0].name for unit in units)
