"""The blocks of a stage's body: what a cut would not take apart, as WASH's layers.

A block is a piece with a weight matrix (a residual block, a linear layer), and the pieces without one that follow it: what
`cut` groups its pieces into, so that blocks are the same for every number of stages. For a body split off by names (`at=`)
pieces are the modules that its graph calls, sequences opened: blocks are then the same for all names that end a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import fx, nn

from .cutting import _units
from .models.pieces import Piece, pieces_of


class Block(NamedTuple):
    """`name` of its first piece, and its parameters."""

    name: str
    parameters: list[nn.Parameter]


def blocks_of(body: nn.Module) -> list[Block]:
    """The blocks of a body, in forward order; together they have each parameter once."""
    blocks: list[Block] = []
    seen: set[int] = set()
    for unit in _units(_pieces(body)):
        own = [x for piece in unit for x in piece.module.parameters() if id(x) not in seen]
        seen.update(map(id, own))
        if own:
            blocks.append(Block(unit[0].name, list(dict.fromkeys(own))))
    return blocks


def _pieces(body: nn.Module) -> list[Piece]:
    if isinstance(body, fx.GraphModule):
        return list(_called(body))
    return pieces_of(body) or [Piece("", body)]


def _called(body: fx.GraphModule) -> Iterator[Piece]:
    for node in body.graph.nodes:
        name = str(node.target)
        if node.op == "call_module":
            module = body.get_submodule(name)
            opened = pieces_of(module)
            yield from (
                [Piece(name, module)] if opened is None else (Piece(f"{name}.{x.name}", x.module) for x in opened)
            )
        elif node.op == "get_attr":
            parent, _, last = name.rpartition(".")
            x = getattr(body.get_submodule(parent), last)
            if isinstance(x, nn.Parameter):  # a weight that the model's own forward uses
                yield Piece(name, nn.ParameterList([x]))
