"""Tables of what the log has, and which of the theses' orderings it shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from scipy.stats import spearmanr
from scipy.stats import t as student

from .cases import MEASURES, PUBLISHED, Case, Found, Ordering
from .training import finite

LEVEL = 0.95


def spread(values: Iterable[float]) -> tuple[float, float] | None:
    """Mean and standard deviation (0 of one value)."""
    values = list(values)
    return (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None


def told(values: Iterable[float], digits: int = 1) -> str:
    """Mean ± standard deviation in a cell."""
    values = list(values)
    found = spread(values)
    if found is None:
        return "–"
    return f"{found[0]:.{digits}f}" + (f" ± {found[1]:.{digits}f}" if len(values) > 1 else "")


def of(rows: list[Found], name: str, stages: int) -> list[Found]:
    """The runs of a case that ended well."""
    return [row for row in rows if (row["name"], row["stages"]) == (name, stages) and finite(row)]


def accuracies(rows: list[Found], wanted: list[Case]) -> list[dict[str, Any]]:
    """The main table, printed."""
    print(
        "| rule | J | seeds | linear probe, last depth, % | neighbours, % | after a quarter of the blocks, % | effective rank "
        "| positives kept, first → last epoch, % | negatives kept | theses, % |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|"
    )
    lines = []
    for case in wanted:
        here = of(rows, case.name, case.stages)
        if not here:
            continue
        last = [row["depths"][-1] for row in here]
        cells = [
            told(MEASURES["probe"][1](row) for row in here),
            told(100 * depth["knn"] for depth in last),
            told(MEASURES["early"][1](row) for row in here),
            told(depth["rank"] for depth in last),
            kept(here, "positives kept"),
            kept(here, "negatives kept"),
            PUBLISHED.get((case.name, case.stages), "–"),
        ]
        lines.append({"name": case.name, "stages": case.stages, "seeds": len(here), "cells": cells})
        print(f"| {case.name} | {case.stages} | {len(here)} | {' | '.join(cells)} |")
    return lines


def kept(rows: list[Found], what: str) -> str:
    """Mean shares over the seeds, at the first and at the last stage."""
    if any(what not in epoch for row in rows for epoch in row["kept"]):
        return "all"
    parts = []
    for name, stage in (("stage 1", 0), ("last", -1)) if rows[0]["stages"] > 1 else (("", 0),):
        shares = [statistics.fmean(100 * row["kept"][epoch][what][stage] for row in rows) for epoch in (0, -1)]
        parts.append(f"{name} {shares[0]:.0f} → {shares[1]:.0f}".strip())
    return "; ".join(parts)


def by_depth(rows: list[Found], wanted: list[Case], what: str, scale: float) -> None:
    """Means over the seeds after every block, printed."""
    blocks = max((len(row["depths"]) for row in rows if finite(row)), default=0)
    print(f"| rule | J | {' | '.join(f'block {k + 1}' for k in range(blocks))} |\n|---|---:|{'---:|' * blocks}")
    for case in wanted:
        here = of(rows, case.name, case.stages)
        if here:
            means = [statistics.fmean(scale * row["depths"][k][what] for row in here) for k in range(blocks)]
            print(f"| {case.name} | {case.stages} | {' | '.join(f'{mean:.1f}' for mean in means)} |")


def agreement(rows: list[Found]) -> None:
    """The theses' trained layer beside the ridge, at every depth of the runs that have both; printed."""
    pairs = [
        (100 * depth["recipe"], 100 * depth["probe"])
        for row in rows
        if finite(row)
        for depth in row["depths"]
        if depth["recipe"] is not None
    ]
    if len(pairs) > 1:
        apart = spread(recipe - ridge for recipe, ridge in pairs)
        alike = statistics.correlation(*zip(*pairs))
        print(
            f"trained layer - ridge: {apart[0]:+.2f} ± {apart[1]:.2f} points over {len(pairs)} depths of networks; correlation "
            f"{alike:.3f}"
        )
        lasts = [row["depths"][-1] for row in rows if finite(row) and row["depths"][-1]["recipe"] is not None]
        if len(lasts) > 1:
            rank = float(spearmanr([d["recipe"] for d in lasts], [d["probe"] for d in lasts]).statistic)
            print(f"at the last depth alone: rank correlation over {len(lasts)} networks {rank:.3f}")


def verdicts(rows: list[Found], wanted: Iterable[Ordering]) -> list[dict[str, Any]]:
    """Which orderings hold, printed: differences of the same seed, with a 95 % interval of Student's t."""
    print(
        "| the theses find | source | more | less | measured in | difference | seeds | here |\n"
        "|---|---|---|---|---|---:|---:|---|"
    )
    lines = []
    for claim in wanted:
        unit, measure = MEASURES[claim.measure]
        differences = paired(rows, claim, measure)
        mean, half, verdict = judged(differences)
        names = [f"{name}, J = {stages}" for name, stages in (claim.more, claim.less)]
        line = {"claim": claim.claim, "more": names[0], "less": names[1], "measure": claim.measure, "mean": mean}
        lines.append(line | {"half": half, "seeds": len(differences), "verdict": verdict})
        difference = "–" if mean is None else f"{mean:+.2f}" + ("" if half is None else f" ± {half:.2f}")
        cells = [claim.claim, claim.source, *names, unit, difference, len(differences), verdict]
        print(f"| {' | '.join(map(str, cells))} |")
    return lines


def paired(rows: list[Found], claim: Ordering, measure: Callable[[Found], float]) -> list[float]:
    """more − less for each seed that has both; of one and the same run: the measure itself, which is a difference."""
    more, less = ({row["seed"]: measure(row) for row in of(rows, *side)} for side in (claim.more, claim.less))
    if claim.more == claim.less:
        return list(more.values())
    return [more[seed] - less[seed] for seed in sorted(more.keys() & less.keys())]


def judged(differences: list[float]) -> tuple[float | None, float | None, str]:
    """Mean, half the interval, verdict."""
    n = len(differences)
    if n < 2:
        return (differences[0] if n else None), None, "not run" if not n else "not settled (one seed)"
    mean = statistics.fmean(differences)
    half = float(student.ppf((1 + LEVEL) / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return mean, half, "not settled" if abs(mean) <= half else "holds" if mean > 0 else "reversed"
