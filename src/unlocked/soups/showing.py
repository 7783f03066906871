"""A population's scores as a table in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from .population import PopulationScores, Scores

UNITS = (
    "On the test data. ECE: expected calibration error; ECE*: at the optimal temperature T*. Passes: forwards per sample. "
    "MFLOP: per sample, a multiply-add is 2. Best, worst member: by test accuracy, to show the spread."
)


def as_rich(scores: PopulationScores) -> Table:
    """One row for each member and each network made of them."""
    timed = scores.ensemble.cost.seconds is not None
    table = Table(box=SIMPLE_HEAD, caption=UNITS, caption_justify="left", show_edge=False)
    headings = ["", "accuracy %", "loss", "ECE %", "ECE* %", "T*", "passes", "MFLOP", "parameters"]
    for heading in headings + ["µs/sample"] * timed:
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for name, one in _rows(scores):
        table.add_row(escape(name), *_cells(one, timed))
    return table


def in_words(scores: PopulationScores) -> list[str]:
    """What the table has no column for."""
    said = []
    if scores.greedy_members is not None:
        taken = ", ".join(scores.names[n] for n in scores.greedy_members)
        said.append(f"Greedy soup: {taken}.")
    quarters = ", ".join(f"{distance:.3g}" for distance in scores.distances.quarters)
    said.append(f"Distance to consensus: {scores.distances.whole:.3g}; by quarter of depth: {quarters}.")
    if scores.mean_disagreement is not None:
        said.append(f"Two members disagree on {100 * scores.mean_disagreement:.1f} % of the test samples, on average.")
    return said + scores.notes


def _rows(scores: PopulationScores) -> Iterator[tuple[str, Scores]]:
    for n, (name, one) in enumerate(zip(scores.names, scores.members)):
        mark = " (best)" * (n == scores.best) + " (worst)" * (n == scores.worst != scores.best)
        yield name + mark, one
    yield "ensemble", scores.ensemble
    yield "averaged", scores.averaged
    for name, made in (
        ("averaged, refreshed BatchNorm", scores.refreshed),
        ("averaged, REPAIR", scores.repaired),
        ("greedy soup", scores.greedy),
    ):
        if made is not None:
            yield name, made


def _cells(one: Scores, timed: bool) -> list[str]:
    cells = [
        _percent(one.accuracy),
        f"{one.loss:.4g}",
        _percent(one.ece),
        _percent(one.calibrated_ece),
        "–" if one.temperature is None else f"{one.temperature:.3g}",
        str(one.cost.passes),
        f"{one.cost.flops / 1e6:,.3g}",
        f"{one.cost.parameters:,}",
    ]
    return cells + [f"{1e6 * (one.cost.seconds or 0):,.1f}"] * timed


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}"
