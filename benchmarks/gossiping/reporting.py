"""Tables of the trainings, and the paper's claim tested on them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from unlocked.graphs import chi1, chi2
from unlocked.graphs.topologies import ring

Row = dict[str, Any]
Group = tuple[int, str, bool]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard deviation); 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def middle(row: Row) -> float:
    """The consensus distance before the learning rate is first divided."""
    return float(row["distances"][len(row["distances"]) // 2 - 1])


def report(rows: Sequence[Row]) -> list[Row]:
    """Print everything; the lines of the tables."""
    lost = [row for row in rows if row["accuracy"] is None]
    print(f"\n{len(lost)} runs with a loss that was not finite")
    rows = [row for row in rows if row["accuracy"] is not None]
    lines = []
    for group in dict.fromkeys((row["workers"], row["pairing"], row["slow"]) for row in rows):
        lines += _of_group(group, [row for row in rows if (row["workers"], row["pairing"], row["slow"]) == group])
    return lines


def _of_group(group: Group, rows: Sequence[Row]) -> list[Row]:
    workers, pairing, slow = group
    graph = ring(workers).with_rates(1.0).at(1.0)
    first, fast = chi1(graph), math.sqrt(chi1(graph) * chi2(graph))
    print(
        f"\nN = {workers}, {pairing}{', one worker 4 times slower' if slow else ''};  at rate 1: χ₁ = {first:.3g}, "
        f"√(χ₁χ₂) = {fast:.3g}"
    )
    names = list(dict.fromkeys(row["method"] for row in rows))
    names.sort(key=lambda name: (not name.startswith("AR"), name.startswith("A²"), name))
    lines = [_line(group, name, [row for row in rows if row["method"] == name]) for name in names]
    for line in lines:
        print(
            f"  {line['method']:15s} {line['accuracy'][0]:5.1f} ± {line['accuracy'][1]:.1f} %   workers alone "
            f"{line['alone'][0]:5.1f} %   distance {line['middle'][0]:.4f}, at the end {line['end'][0]:.4f}   "
            f"{line['simulated'][0]:6.2f} s   {line['exchanges']:.2f} exchanges, slowest does {line['least']:.2f}   "
            f"({line['seeds']} seeds)"
        )
    for one, other in (("A²CiD², rate 1", "gossip, rate 2"), ("A²CiD², rate 1", "gossip, rate 1")):
        _compare(rows, one, other)
    return lines


def _line(group: Group, name: str, rows: Sequence[Row]) -> Row:
    def of(value: Callable[[Row], float]) -> tuple[float, float]:
        return spread([value(row) for row in rows])

    return {
        "workers": group[0],
        "pairing": group[1],
        "slow": group[2],
        "method": name,
        "seeds": len(rows),
        "accuracy": of(lambda row: 100 * row["accuracy"]),
        "alone": of(lambda row: 100 * row["alone"]),
        "middle": of(middle),
        "end": of(lambda row: row["distances"][-1]),
        "simulated": of(lambda row: row["simulated"]),
        "exchanges": of(lambda row: row["exchanges"])[0],
        "least": of(lambda row: row["least"])[0],
    }


def _compare(rows: Sequence[Row], one: str, other: str) -> None:
    """Differences of runs with the same seed."""
    by = {(row["method"], row["seed"]): row for row in rows}
    pairs = [(by[one, seed], by[other, seed]) for name, seed in by if name == one and (other, seed) in by]
    if pairs:
        points, deviation = spread([100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs])
        ratios = [spread([of(a) / of(b) for a, b in pairs])[0] for of in (middle, lambda row: row["distances"][-1])]
        print(
            f"    {one} against {other}: {points:+.1f} ± {deviation:.1f} points; distance × {ratios[0]:.2f}, at the end × "
            f"{ratios[1]:.2f}"
        )
