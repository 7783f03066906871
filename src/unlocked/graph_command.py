"""`unlocked graph`: what a graph promises, which rates would be best on it, and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from . import commands
from .errors import InvalidChoice
from .graphs.constants import Constants, communications, constants
from .graphs.degrees import by_degree, metropolis
from .graphs.drawing import draw, refuse_picture
from .graphs.graph import Graph
from .graphs.reading import read_edges
from .graphs.topologies import named

if TYPE_CHECKING:
    from .graphs.optimal import Constraint, Optimal

_ROWS = (
    ("edges", "|E|"),
    ("trace", "Tr Λ, exchanges per unit of time, at both ends"),
    ("lambda2", "λ₂"),
    ("chi1", "χ₁ = 1/λ₂"),
    ("chi2", "χ₂ = ½ max R_ij over the edges"),
    ("accelerated", "√(χ₁χ₂)"),
    ("norm", "‖Λ‖"),
    ("gap", "γ = ‖Λ‖ χ₁"),
    ("largest_share", "max λ_ij R_ij, at most 1"),
    ("foster", "Σ λ_ij R_ij, Foster's sum"),
)
_FORMULAS = {
    "synchronous": "|E| γ",
    "accelerated synchronous": "|E| √γ",
    "randomized": "Tr Λ χ₁",
    "accelerated randomized": "Tr Λ √(χ₁χ₂)",
}
_RATES: dict[str, Callable[[Graph], Graph]] = {
    "uniform": lambda graph: graph.with_rates(1.0),
    "degree": by_degree,
    "metropolis": metropolis,
}


def graph(command: commands.Graph, console: Console) -> int:
    """Print, and draw, as the command says; returns the exit code. Raises InvalidChoice, UnlockedError."""
    try:
        made = _made(command)
        picture = _picture(command, made)
        given = constants(made)
    except MemoryError:
        raise InvalidChoice(
            "The graph does not fit in the memory of this machine; give fewer nodes or edges."
        ) from None
    needs = communications(given, command.epsilon)
    best = _optimal(command, made)
    if picture is not None:
        draw(picture, made if best is None else best.graph, _title(made, best is not None))
    if command.json:
        print(json.dumps(_as_json(command, made, given, needs, best, picture)))
        return 0
    better = None if best is None else constants(best.graph)
    console.print(f"{made.name}, n = {made.n}", highlight=False, markup=False)
    console.print(_constants_table(given, better))
    console.print(_needs_table(needs, better, command.epsilon))
    for sentence in _sentences(made, best):
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)
    if picture is not None:
        console.print(f"Picture: {picture}", highlight=False, soft_wrap=True, markup=False)
    return 0


# ---- what was asked for ----------------------------------------------------------------------------------------------


def _made(command: commands.Graph) -> Graph:
    """The graph with its rates. Raises InvalidChoice."""
    if (command.edges is None) == (command.topology is None):
        raise InvalidChoice("Which graph is not clear; give either --topology with --n, or --edges FILE.")
    communications(constants(Graph.make(1, [])), command.epsilon)  # a wrong epsilon is refused before the work
    edges = command.edges
    found = named(command.topology or "", command.n) if edges is None else read_edges(edges, command.n)
    if command.rates != "given":
        found = _RATES[command.rates](found)
    if command.rate is None or not len(found):
        return found
    if not (math.isfinite(command.rate) and command.rate > 0):
        raise InvalidChoice(f"--rate {command.rate:g} is not possible; give exchanges per unit of time, more than 0.")
    return found.at(command.rate)


def _picture(command: commands.Graph, made: Graph) -> Path | None:
    """Where to draw; --plot without a name takes that of the graph."""
    if command.plot is None:
        return None
    if len(command.plot) > 1:
        raise InvalidChoice(f"--plot writes one picture, not {len(command.plot)}; give one name.")
    path = command.plot[0] if command.plot else Path(f"{made.name.replace(' ', '-')}-{made.n}.png")
    refuse_picture(path, made.n)
    return path


def _optimal(command: commands.Graph, made: Graph) -> Optimal | None:
    bounds = {"trace": command.trace, "per_node": command.per_node, "caps": command.cap}
    if not command.optimal:
        if any(bound is not None for bound in bounds.values()):
            raise InvalidChoice("--trace, --per-node and --cap bound the optimal rates; give --optimal as well.")
        return None
    from .graphs.optimal import Constraint, optimal_rates

    constraint: Constraint | None = (
        Constraint(**bounds) if any(bound is not None for bound in bounds.values()) else None
    )
    return optimal_rates(made, constraint=constraint)


# ---- what is said ----------------------------------------------------------------------------------------------------


def _constants_table(given: Constants, best: Constants | None) -> Table:
    table = _table("constant", best is not None)
    for key, name in _ROWS:
        _add(table, name, float(getattr(given, key)), None if best is None else float(getattr(best, key)))
    return table


def _needs_table(needs: dict[str, float], best: Constants | None, epsilon: float) -> Table:
    table = _table(f"exchanges until ‖πx‖² is {epsilon:g} of what it was", best is not None)
    after = None if best is None else communications(best, epsilon)
    for kind, need in needs.items():
        _add(table, f"{kind} gossip: {_FORMULAS[kind]} log 1/ε", need, None if after is None else after[kind])
    return table


def _table(heading: str, compared: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for k, name in enumerate([heading, "these rates", *["optimal rates", "factor"] * compared]):
        table.add_column(name, justify="right" if k else "left", overflow="fold")
    return table


def _add(table: Table, name: str, before: float, after: float | None) -> None:
    cells = [_number(before)]
    if after is not None:
        cells += [_number(after), f"{after / before:.3g}" if before and math.isfinite(before) else "–"]
    table.add_row(name, *cells)


def _number(value: float) -> str:
    if math.isinf(value):
        return "∞"
    return (
        f"{value:,.0f}" if value == int(value) and value < 1e15 else f"{value:,.0f}" if value >= 1e4 else f"{value:.6g}"
    )


def _sentences(made: Graph, best: Optimal | None) -> list[str]:
    said = [
        "χ₁ and χ₂ are times, in units in which an edge of rate 1 is used once. Exchanges are counted once per edge; for "
        "randomized gossip the number is a bound on the mean, for the others the order, with constant 1 (Oyallon §5.1)."
    ]
    if not made.connected:
        parts = int(made.components().max()) + 1
        said.append(
            f"The graph is not connected: it has {parts} parts, which never agree, so χ₁, χ₂, γ and all four numbers of "
            "exchanges are infinite. The largest λ_ij R_ij and Foster's sum (n less the number of parts) stay finite."
        )
    if best is not None:
        unused = f" {best.dropped} of the edges get no rate." if best.dropped else ""
        said.append(
            f"Optimal rates: by {best.solver}, √(χ₁χ₂) with all given edges is {best.value:.6g}, at most {best.gap:.1e} of it "
            f"above the least possible.{unused}"
        )
    return said


def _title(made: Graph, optimal: bool) -> str:
    return f"{made.name}, n = {made.n}" + (", optimal rates" if optimal else "")


def _as_json(
    command: commands.Graph,
    made: Graph,
    given: Constants,
    needs: dict[str, float],
    best: Optimal | None,
    picture: Path | None,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "event": "result",
        "name": made.name,
        "connected": bool(made.connected),
        "epsilon": command.epsilon,
    }
    found |= {"constants": _finite(asdict(given)), "exchanges": _finite(needs), "optimal": None}
    if best is not None:
        after = constants(best.graph)
        found["optimal"] = {
            "constants": _finite(asdict(after)),
            "exchanges": _finite(communications(after, command.epsilon)),
            "rates": [list(row) for row in best.graph.pairs()],
            **{key: getattr(best, key) for key in ("value", "gap", "dropped", "solver")},
        }
    return found | {"picture": None if picture is None else str(picture)}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: null."""
    return {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in values.items()}
