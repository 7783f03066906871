"""Split any module after named submodules, by tracing its forward with torch.fx.

Only the ancestors of the named submodules are traced through; everything else stays an opaque call, so control flow inside
the blocks does not matter. Submodules keep their names, so the state keeps the user's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, fx, nn

from .errors import CannotCut


class _Tracer(fx.Tracer):
    def __init__(self, points: Sequence[str]) -> None:
        super().__init__()
        self._points = points

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(point.startswith(module_qualified_name + ".") for point in self._points)


def split_at(model: nn.Module, points: Sequence[str], like: Tensor) -> list[nn.Module]:
    """Bodies of the stages that end after each of the named submodules, and the rest.

    Raises CannotCut if a name does not exist, is called more than once or not at all, the forward cannot be traced around
    the names, they are not in the order of the forward, or more than one tensor crosses a split.
    """
    known = dict(model.named_modules())
    for point in points:
        if point not in known or not point:
            near = [name for name in known if name and name.endswith(point.rsplit(".", 1)[-1])][:5]
            raise CannotCut(f"{type(model).__name__} has no submodule {point!r}; similar: {near or list(known)[1:8]}.")
    graph = _trace(model, points)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    ends = [_position(nodes, point) for point in points]
    if ends != sorted(set(ends)):
        raise CannotCut(f"The split points {list(points)} are not in the order in which the forward passes them.")
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    bounds = [0, *(end + 1 for end in ends), len(nodes)]
    entry, bodies = inputs[0], []
    for begin, end in pairwise(bounds):
        leaving = output.args[0] if end == len(nodes) else _crossing(nodes, end, output, entry, begin)
        if not isinstance(leaving, fx.Node):
            raise CannotCut("The model returns more than one tensor; stages pass one.")
        bodies.append(_subgraph(model, nodes[begin:end], entry, leaving))
        entry = leaving
    return bodies


def _trace(model: nn.Module, points: Sequence[str]) -> fx.Graph:
    _check_inputs(model)
    kind = type(model)

    class OneInput(kind):  # type: ignore[misc, valid-type]
        """The model, of which fx sees one input: the others keep their defaults."""

        def forward(self, x: Any) -> Any:
            return kind.forward(self, x)

    model.__class__ = OneInput
    try:
        return _Tracer(points).trace(model)
    except Exception as error:  # fx raises many kinds; each means that the forward around the names is not traceable
        raise CannotCut(
            f"The forward of {kind.__name__} around {list(points)} cannot be traced ({error}); name submodules that "
            "are called in straight-line code, or build the stages by hand: Chain([Stage(…), …])."
        ) from error
    finally:
        model.__class__ = kind


def _check_inputs(model: nn.Module) -> None:
    """Raises CannotCut if the forward takes more than one input that has no default."""
    some = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    inputs = [one for one in inspect.signature(type(model).forward).parameters.values() if one.kind not in some][1:]
    needed = [one.name for one in inputs[1:] if one.default is one.empty]
    if needed:
        raise CannotCut(
            f"The forward of {type(model).__name__} takes {1 + len(needed)} inputs; stages pass one tensor. Give "
            f"{', '.join(needed)} a default, or wrap the model in a module that takes one input."
        )


def _position(nodes: list[fx.Node], point: str) -> int:
    calls = [k for k, node in enumerate(nodes) if node.op == "call_module" and node.target == point]
    if len(calls) != 1:
        raise CannotCut(f"{point!r} is called {len(calls)} times in the forward; a split point must be called once.")
    return calls[0]


def _crossing(nodes: list[fx.Node], end: int, output: fx.Node, entry: fx.Node, begin: int) -> fx.Node:
    """The one value made before `end` and used after it."""
    after = {*nodes[end:], output}
    made = [entry, *nodes[begin:end]]
    alive = [node for node in made if any(user in after for user in node.users)]
    if len(alive) != 1:
        raise CannotCut(
            f"{len(alive)} values cross the split after {nodes[end - 1].target!r} "
            f"({', '.join(node.name for node in alive)}); split where only one tensor passes."
        )
    return alive[0]


def _subgraph(model: nn.Module, nodes: list[fx.Node], entry: fx.Node, leaving: fx.Node) -> nn.Module:
    graph = fx.Graph()
    copies = {entry: graph.placeholder("x")}
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda old: copies[old])
    graph.output(copies[leaving])
    return fx.GraphModule(model, graph)
