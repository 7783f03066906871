"""Graphs that come from elsewhere: edge lists, files, networkx."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidChoice
from .graph import Graph

MOST = 10_000_000  # nodes


def from_edges(edges: Iterable[Sequence[float]], n: int | None = None, name: str = "edge list") -> Graph:
    """A graph from rows (i, j) or (i, j, rate); without a rate it is 1.

    n: None for one more than the largest node. Raises InvalidChoice: a row of another length, a node that is no whole number
    from 0, and all that `Graph.make` refuses.
    """
    pairs, rates = [], []
    for row in edges:
        if len(row) not in (2, 3) or any(int(node) != node for node in row[:2]):
            raise InvalidChoice(f"{tuple(row)} is no edge; give two nodes, numbered from 0, and if you like a rate.")
        pairs.append((int(row[0]), int(row[1])))
        rates.append(float(row[2]) if len(row) == 3 else 1.0)
    if n is None and not pairs:
        raise InvalidChoice("There is no edge; give at least one, or the number of nodes.")
    size = 1 + max(map(max, pairs)) if n is None else n
    if size > MOST:
        raise InvalidChoice(
            f"{size:,} nodes are more than fit, at most {MOST:,}; number the nodes from 0 without gaps."
        )
    return Graph.make(size, pairs, rates, name)


def read_edges(path: str | Path, n: int | None = None) -> Graph:
    """A graph from a file of lines `i j` or `i j rate`, apart by blanks or commas; # begins a comment.

    n: as in `from_edges`. Raises InvalidChoice: no such file, one that is no text, a line that cannot be read (its number is
    named).
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InvalidChoice(f"{path} is no text; give a file of lines: i j, or i j rate.") from None
    except OSError as error:
        raise InvalidChoice(
            f"{path} cannot be read ({error.strerror}); give a file of lines: i j, or i j rate."
        ) from None
    rows = []
    for number, text in enumerate(lines, start=1):
        parts = text.partition("#")[0].replace(",", " ").split()
        if parts:
            rows.append(_row(parts, f"Line {number} of {path}", text))
    return from_edges(rows, n, path.stem)


def from_networkx(graph: Any, name: str | None = None) -> Graph:
    """Any undirected networkx graph; its nodes are numbered in its own order (list(graph)).

    The rate of an edge is its attribute `rate`, or else `weight`, or else 1. Raises InvalidChoice: a directed graph or one
    with several edges between two nodes, and all that `Graph.make` refuses.
    """
    if graph.is_directed() or graph.is_multigraph():
        raise InvalidChoice("Exchanges go both ways and an edge has one rate; give networkx.Graph(graph) instead.")
    number = {node: k for k, node in enumerate(graph)}
    rows = list(graph.edges(data=True))
    rates = [float(kept.get("rate", kept.get("weight", 1.0))) for *_, kept in rows]
    pairs = [(number[a], number[b]) for a, b, _ in rows]
    return Graph.make(len(number), pairs, rates, name or graph.name or "networkx graph")


def to_networkx(graph: Graph) -> Any:
    """The same as a networkx.Graph, with the rates as `weight`. Needs the extra `graphs`."""
    try:
        import networkx
    except ImportError as error:
        raise InvalidChoice("networkx is not installed; pip install 'unlocked[graphs]'.") from error
    made = networkx.Graph(name=graph.name)
    made.add_nodes_from(range(graph.n))
    made.add_weighted_edges_from(graph.pairs())
    return made


def _row(parts: list[str], where: str, text: str) -> tuple[float, ...]:
    try:
        row = (int(parts[0]), int(parts[1]), *map(float, parts[2:]))
    except (ValueError, IndexError):
        row = ()
    if len(row) not in (2, 3):
        raise InvalidChoice(f"{where} is no edge: {text.strip()!r}; write i j, or i j rate.")
    return row
