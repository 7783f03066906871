"""Graphs drawn at random, every edge at rate 1, the same for the same seed.

Those that can come out in several parts are drawn again until they are connected: their law is that of the connected ones.
`seed`: an integer, or a numpy generator that goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.spatial import cKDTree

from ..errors import InvalidChoice
from .graph import Floats, Graph, Integers

Seed = int | np.random.Generator
TRIES = 200


def random_geometric(n: int, radius: float | None = None, seed: Seed = 0) -> Graph:
    """Points drawn evenly in the unit square, joined if their distance is at most `radius`; drawn again until connected.

    radius: None for √(4 ln n / πn), four times the area above which a large graph is connected almost surely, ln n / n
    (Gupta & Kumar 1998). Raises InvalidChoice: a radius that is not positive; not connected in 200 draws.
    """
    if radius is not None and not radius > 0:
        raise InvalidChoice(f"A radius of {radius:g} joins no points; give a positive one, or None.")
    reach = math.sqrt(4 * math.log(n) / (math.pi * n)) if radius is None and n > 1 else radius or 1.0
    generator = np.random.default_rng(seed)
    draw = lambda: _near(points(n, generator), reach)  # noqa: E731
    return _until_connected(n, draw, "random geometric", f"a radius of {reach:.3g}")


def points(n: int, seed: Seed) -> Floats:
    """(n, 2): drawn evenly in the unit square."""
    return np.random.default_rng(seed).random((n, 2))


def erdos_renyi(n: int, p: float | None = None, seed: Seed = 0) -> Graph:
    """Every pair is an edge with probability p, independently; drawn again until connected.

    p: None for 2 ln n / n, twice the value above which a large graph is connected almost surely (Erdős & Rényi 1960), and at
    most 1. Raises InvalidChoice: p outside (0, 1]; not connected in 200 draws.
    """
    if p is not None and not 0 < p <= 1:
        raise InvalidChoice(f"p={p:g} is no probability of an edge; give a number above 0 and up to 1, or None.")
    share = min(1.0, 2 * math.log(max(n, 2)) / max(n, 2)) if p is None else p
    generator = np.random.default_rng(seed)
    draw = lambda: _pairs(n, share, generator)  # noqa: E731
    return _until_connected(n, draw, "Erdős-Rényi", f"p={share:.3g}")


def random_tree(n: int, seed: Seed = 0) -> Graph:
    """A tree, each of the n^(n−2) equally likely: those by which a walk on all nodes first comes to a node (Aldous 1990)."""
    _at_least_one(n)
    generator = np.random.default_rng(seed)
    here, edges = int(generator.integers(n)), []
    met = {here}
    while len(met) < n:
        there = int(generator.integers(n))
        if there not in met:
            edges.append((here, there))
            met.add(there)
        here = there
    return Graph.make(n, edges, name="random tree")


def _near(where: Floats, radius: float) -> Integers:
    """(E, 2): the pairs of points within that distance."""
    return np.asarray(cKDTree(where).query_pairs(radius, output_type="ndarray"), dtype=np.int64).reshape(-1, 2)


def _pairs(n: int, p: float, generator: np.random.Generator) -> Integers:
    """(E, 2): row by row, so that memory does not grow as n²."""
    rows = [i + 1 + np.nonzero(generator.random(n - 1 - i) < p)[0] for i in range(n)]
    return np.stack([np.repeat(np.arange(n), [len(row) for row in rows]), np.concatenate(rows)], axis=1)


def _until_connected(n: int, draw: Callable[[], Integers], name: str, given: str) -> Graph:
    _at_least_one(n)
    for _ in range(TRIES):
        graph = Graph.make(n, draw(), name=name)
        if graph.connected:
            return graph
    raise InvalidChoice(
        f"A {name} graph of {n} nodes with {given} was not connected in {TRIES} draws; give a larger number."
    )


def _at_least_one(n: int) -> None:
    if n < 1:
        raise InvalidChoice(f"A random graph of {n} nodes is not possible; give at least 1.")
