"""A model as a sequence of pieces: the places where it may be cut into stages.

A piece is a module that takes one tensor and returns one tensor; piece after piece is the model, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


class Piece(NamedTuple):
    """One module of the sequence. For own models and nn.Sequential `f"{name}.{key}"` is the model's state_dict key."""

    name: str
    module: nn.Module


class Layered(nn.Module):
    """A model that is the composition of its children, in the order they were assigned; ModuleLists are opened."""

    recipe: dict[str, Any]

    def pieces(self) -> list[Piece]:
        """The children in order. Made anew at each call, so a deep copy of the model lists its own modules."""
        found = []
        for name, child in self._modules.items():
            if isinstance(child, nn.ModuleList):
                found += [Piece(f"{name}.{index}", part) for index, part in enumerate(child)]
            elif child is not None:
                found.append(Piece(name, child))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Piece after piece."""
        for piece in self.pieces():
            x = piece.module(x)
        return x


def pieces_of(model: nn.Module) -> list[Piece] | None:
    """The finest known sequence of modules whose composition is the model, or None if there is none.

    Known are: a model with a method `pieces()` (every own model), a plain nn.Sequential (nested ones are opened; one
    whose class overrides `forward` is a piece of its own, and at the top it gives None), and four Hugging Face models
    (see `huggingface.py`; their pieces hold the model's own submodules). Hooks of an opened container do not run.
    """
    if _lists_its_pieces(model) or _is_plain_sequence(model):
        return list(_open("", model))
    from .huggingface import huggingface_pieces  # it needs Piece from this file

    return huggingface_pieces(model)


def _open(name: str, module: nn.Module) -> Iterator[Piece]:
    prefix = f"{name}." if name else ""
    if _lists_its_pieces(module):
        for inner, part in module.pieces():  # type: ignore[operator]
            yield Piece(prefix + inner, part)
    elif _is_plain_sequence(module):
        for inner, child in module._modules.items():  # named_children() would drop a module that comes twice
            if child is not None:
                yield from _open(prefix + inner, child)
    else:
        yield Piece(name, module)


def _lists_its_pieces(module: nn.Module) -> bool:
    return callable(getattr(type(module), "pieces", None))  # of the type: a child called `pieces` is no method


def _is_plain_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
