"""The graphs that papers compare, each a function of the number of nodes; every edge at rate 1.

`named("torus(3)", 64)` makes one from a text, as the command line and the training rules take it. `Graph.at` sets how often
a node exchanges; `degrees` has rates that depend on the degrees.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from itertools import combinations
from math import prod
from typing import Any

import numpy as np

from ..errors import InvalidChoice, choose
from .graph import Graph, Integers
from .random_graphs import erdos_renyi, random_geometric, random_tree
from .reading import MOST, read_edges

_POSITIONAL = re.compile(r"(?P<name>[\w-]+)\s*\(\s*(?P<sides>\d+(?:\s*[x×]\s*\d+)*)\s*\)")
_FILE = re.compile(r".*\.(txt|csv|edges)", re.IGNORECASE)


def star(n: int) -> Graph:
    """Node 0 in the middle, joined to each of the others. χ₁ = 1, χ₂ = 1/2 (n ≥ 3)."""
    return Graph.make(_at_least("star", n, 1), [(0, k) for k in range(1, n)], name="star")


def line(n: int) -> Graph:
    """0 – 1 – … – n − 1. χ₁ = 1/(2 − 2 cos(π/n)), χ₂ = 1/2."""
    return Graph.make(_at_least("line", n, 1), [(k - 1, k) for k in range(1, n)], name="line")


def ring(n: int) -> Graph:
    """A line whose ends are joined. χ₁ = 1/(2 − 2 cos(2π/n)), χ₂ = (n − 1)/2n (n ≥ 3)."""
    return torus((_at_least("ring", n, 1),), name="ring")


def complete(n: int) -> Graph:
    """All pairs. χ₁ = χ₂ = 1/n."""
    return Graph.make(_at_least("complete graph", n, 1), _all_pairs(n), name="complete")


def grid(shape: Sequence[int]) -> Graph:
    """Points with whole coordinates in a box of these sides, joined to the nearest; numbered row by row.

    χ₁ = 1/(2 − 2 cos(π/longest side)). Raises InvalidChoice for a side below 1.
    """
    return Graph.make(prod(shape), _steps(shape, wrap=False), name=f"grid {_sides(shape)}")


def torus(shape: Sequence[int], name: str | None = None) -> Graph:
    """A grid whose opposite sides are joined; a side of 2 has one edge from end to end, not two.

    χ₁ = 1/(2 − 2 cos(2π/longest side)) and, if all d sides are equal and at least 3, χ₂ = (n − 1)/2dn.
    Raises InvalidChoice for a side below 1.
    """
    return Graph.make(prod(shape), _steps(shape, wrap=True), name=name or f"torus {_sides(shape)}")


def barbell(n: int, path: int = 0) -> Graph:
    """Two complete graphs, joined by an edge or by a path of so many nodes in between (networkx: barbell_graph).

    Table 5.2's exponents are those of path = 0: an edge from node ⌈n/2⌉ − 1 to node ⌈n/2⌉. If the nodes do not halve, the
    first complete graph has one more. Raises InvalidChoice: fewer than two nodes besides the path.
    """
    if path < 0 or n - path < 2:
        raise InvalidChoice(f"A barbell of {n} nodes with {path} on its path is not possible; leave 2 for its ends.")
    first = (n - path + 1) // 2
    second = range(first + path, n)
    between = [(k, k + 1) for k in range(first - 1, first + path)]
    return Graph.make(n, [*combinations(range(first), 2), *between, *combinations(second, 2)], name="barbell")


def hypercube(n: int) -> Graph:
    """Nodes joined if their numbers differ in one bit. χ₁ = 1/2, χ₂ = (n − 1)/(n log₂ n). n: a power of two."""
    if n < 1 or n & (n - 1):
        raise InvalidChoice(f"A hypercube of {n} nodes is not possible; give a power of two, {_around(n)}.")
    edges = [(i, i | bit) for bit in (1 << k for k in range(n.bit_length() - 1)) for i in range(n) if not i & bit]
    return Graph.make(n, edges, name="hypercube")


def exponential(n: int) -> Graph:
    """i joined to i ± 2^k mod n, k = 0, 1, …, ⌊log₂(n − 1)⌋: the static exponential graph (Assran et al. 2019), undirected."""
    nodes = np.arange(_at_least("exponential graph", n, 1))
    hops = [1 << k for k in range((n - 1).bit_length())]
    pairs = [np.stack([nodes, (nodes + hop) % n], axis=1) for hop in hops]
    return Graph.make(n, _once(pairs), name="exponential")


# ---- by name ---------------------------------------------------------------------------------------------------------


def _grid(n: int, d: int = 2, shape: Sequence[int] | None = None) -> Graph:
    return grid(_shape("grid", n, d, shape))


def _torus(n: int, d: int = 2, shape: Sequence[int] | None = None) -> Graph:
    return torus(_shape("torus", n, d, shape))


TOPOLOGIES: dict[str, Callable[..., Graph]] = {
    "star": star,
    "line": line,
    "ring": ring,
    "complete": complete,
    "grid": _grid,
    "torus": _torus,
    "barbell": barbell,
    "hypercube": hypercube,
    "exponential": exponential,
    "random-geometric": random_geometric,
    "erdos-renyi": erdos_renyi,
    "random-tree": random_tree,
}


def named(topology: str, n: int | None = None, **options: Any) -> Graph:
    """A graph of n nodes by its name, with options in brackets or as keywords.

    Examples: "ring"; "grid" (two-dimensional); "torus(3)" (three dimensions); "grid(4x8)" or shape=(4, 8); "barbell(path=2)";
    "random-geometric(radius=0.4,seed=3)"; "erdos-renyi(p=0.3)"; "edges.txt", a file as `read_edges` takes it.
    n: None where a shape or a file says it. Raises InvalidChoice: an unknown name or option, an n that does not fit.
    """
    if _FILE.fullmatch(topology.strip()):
        return read_edges(topology.strip(), n)
    name, given = _parse(topology.strip())
    make = TOPOLOGIES[choose("topology", name, TOPOLOGIES)]
    given |= options
    allowed = list(inspect.signature(make).parameters)[1:]
    for key in given:
        if not allowed:
            raise InvalidChoice(f"The topology {name} has no options; leave out {key!r}.")
        choose(f"option of the topology {name}", key, allowed)
    if n is None and given.get("shape") is None:
        raise InvalidChoice(f"How many nodes the {name} has is not said; give n.")
    size = prod(_checked_shape(given["shape"])) if n is None else n
    for key, value in {"n": size, **given}.items():
        _check_value(name, key, value)
    if size > MOST:
        raise InvalidChoice(f"A {name} of {size:,} nodes does not fit; give at most {MOST:,}.")
    return make(size, **given)


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    found = _POSITIONAL.fullmatch(text)
    if found is None and "(" not in text:
        return text, {}
    if found is None:
        from ..method_names import parse_call  # here, as it brings all rules with it, some of which name graphs

        call = parse_call(text)
        return call.name, dict(call.options)
    sides = [int(side) for side in re.split(r"\s*[x×]\s*", found["sides"])]
    if found["name"] not in ("grid", "torus"):
        choose("topology", found["name"], TOPOLOGIES)
        raise InvalidChoice(f"{text!r} is not clear; only a grid or a torus takes a dimension or its sides like that.")
    return found["name"], {"d": sides[0]} if len(sides) == 1 else {"shape": tuple(sides)}


def _check_value(name: str, key: str, value: Any) -> None:
    """n, d, path, seed: whole numbers; radius, p: numbers or None."""
    if key == "shape":
        return
    real = key in ("radius", "p")
    wanted = (int, float, np.integer, np.floating) if real else (int, np.integer)
    if isinstance(value, bool) or not (isinstance(value, wanted) or (real and value is None)):
        raise InvalidChoice(f"{key}={value!r} of the {name} must be a {'number' if real else 'whole number'}.")


def _shape(name: str, n: int, d: int, shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is not None:
        sides = _checked_shape(shape)
        if prod(sides) != n:
            raise InvalidChoice(f"A {name} of {_sides(sides)} has {prod(sides)} nodes, not {n}; give sides that fit.")
        return sides
    if d < 1:
        raise InvalidChoice(f"A {name} of {d} dimensions is not possible; give at least 1.")
    side = round(_at_least(name, n, 1) ** (1 / d))
    if side**d != n:
        first = next(k for k in range(2, n + 1) if n % k == 0)
        raise InvalidChoice(
            f"A {name} of {d} dimensions with equal sides cannot have {n} nodes; take {side**d}, or give the sides, "
            f'e.g. "{name}({first}x{n // first})".'
        )
    return (side,) * d


def _checked_shape(shape: Any) -> tuple[int, ...]:
    sides = tuple(shape) if isinstance(shape, (list, tuple)) else ()
    if not sides or not all(isinstance(side, (int, np.integer)) and side >= 1 for side in sides):
        raise InvalidChoice(f"{shape!r} are no sides of a grid or torus; give whole numbers from 1, e.g. (4, 8).")
    return sides


# ---- edges -----------------------------------------------------------------------------------------------------------


def _steps(shape: Sequence[int], wrap: bool) -> Integers:
    """(E, 2): each point and the next one along every axis; wrap: the last one's next is the first."""
    sides = _checked_shape(list(shape))
    nodes = np.arange(prod(sides), dtype=np.int64).reshape(sides)
    found = []
    for axis, side in enumerate(sides):
        here, there = nodes, np.roll(nodes, -1, axis)
        if not wrap:
            here, there = (np.delete(array, side - 1, axis) for array in (here, there))
        found.append(np.stack([here.ravel(), there.ravel()], axis=1))
    return _once(found)


def _once(pairs: Sequence[Integers]) -> Integers:
    """All pairs, without loops, each once."""
    joined = np.sort(np.concatenate([*pairs, np.empty((0, 2), dtype=np.int64)]), axis=1)
    return np.unique(joined[joined[:, 0] != joined[:, 1]], axis=0)


def _all_pairs(n: int) -> Integers:
    return np.stack(np.triu_indices(n, 1), axis=1)


def _sides(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _at_least(name: str, n: int, least: int) -> int:
    if n < least:
        raise InvalidChoice(f"A {name} of {n} nodes is not possible; give at least {least}.")
    return n


def _around(n: int) -> str:
    """The powers of two below and above."""
    above = 1 << max(n, 1).bit_length()
    return f"e.g. {above // 2} or {above}"
