"""What is kept of a population's scores, and the table of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from torch import nn

import unlocked as ul
from unlocked.data import Data

Row = dict[str, Any]
Spread = tuple[float, float]  # mean and standard deviation

KINDS = ("ensemble", "averaged", "refreshed", "repaired", "greedy", "best", "worst")


def scored(members: Sequence[nn.Module], test: Data, validation: Data, train: Data, samples: int) -> Row:
    """Accuracies in percent, of each kind of KINDS; how different the members are; calibration. `samples`: for statistics."""
    found = ul.soups.evaluate_population(members, test, validation=validation, train=train, samples=samples)
    shares = {
        "ensemble": found.ensemble.accuracy,
        "averaged": found.averaged.accuracy,
        "refreshed": found.refreshed and found.refreshed.accuracy,
        "repaired": found.repaired and found.repaired.accuracy,
        "greedy": found.greedy and found.greedy.accuracy,
        "best": found.members[found.best].accuracy,
        "worst": found.members[found.worst].accuracy,
    }
    return {
        **{kind: None if share is None else 100 * share for kind, share in shares.items()},
        "taken": len(found.greedy_members or ()),
        "disagreement": 100 * (found.mean_disagreement or 0.0),
        "distance": found.distances.whole,
        "ece": {
            "members": 100 * (found.mean_calibrated_ece or 0.0),
            "ensemble": 100 * (found.ensemble.calibrated_ece or 0.0),
            "averaged": 100 * (found.averaged.calibrated_ece or 0.0),
        },
    }


def spread(values: Iterable[float]) -> Spread:
    """Of at least one value."""
    rows = list(values)
    return fmean(rows), stdev(rows) if len(rows) > 1 else 0.0


def shown(found: Spread, digits: int = 1) -> str:
    """`12.3 ± 0.4`"""
    return f"{found[0]:.{digits}f} ± {found[1]:.{digits}f}"


def table(rows: Sequence[Row], paid: str) -> list[Row]:
    """A line for each setting, N and method, with the spread over the seeds. `paid`: the method whose bytes are 1."""
    lines: list[Row] = []
    for setting, count in dict.fromkeys((row["setting"], row["members"]) for row in rows):
        here = [row for row in rows if (row["setting"], row["members"]) == (setting, count)]
        whole = fmean(row["bytes"] for row in here if row["method"] == paid) if _ran(here, paid) else None
        block = [_line(setting, count, name, here, whole) for name in dict.fromkeys(row["method"] for row in here)]
        lines += block
        _print_accuracies(setting, count, block)
    _print_rest(lines, paid)
    return lines


def _ran(rows: Sequence[Row], method: str) -> bool:
    return any(row["method"] == method for row in rows)


def _line(setting: str, count: int, method: str, rows: Sequence[Row], whole: float | None) -> Row:
    here = [row for row in rows if row["method"] == method]
    return {
        "setting": setting,
        "members": count,
        "method": method,
        "seeds": len(here),
        **{kind: spread(row["scores"][kind] for row in here) for kind in KINDS},
        "gap": spread(row["scores"]["averaged"] - row["scores"]["ensemble"] for row in here),
        "distance": spread(row["scores"]["distance"] for row in here),
        "disagreement": spread(row["scores"]["disagreement"] for row in here),
        "taken": fmean(row["scores"]["taken"] for row in here),
        "ece": {kind: spread(row["scores"]["ece"][kind] for row in here) for kind in here[0]["scores"]["ece"]},
        "bytes": fmean(row["bytes"] for row in here),
        "ratio": None if not whole else fmean(row["bytes"] for row in here) / whole,
        "seconds": fmean(row["seconds"] for row in here),
    }


def _print_accuracies(setting: str, count: int, lines: Sequence[Row]) -> None:
    print(f"\n{setting}, N = {count}: test accuracy (%)")
    titles = ("ensemble", "averaged", "avg − ens", "+ refresh", "+ REPAIR", "greedy soup", "best", "worst")
    print(f"{'':21s}seeds" + "".join(f"{title:>13s}" for title in titles))
    for line in lines:
        kinds = ("ensemble", "averaged", "gap", "refreshed", "repaired", "greedy", "best", "worst")
        print(f"{line['method']:21s}{line['seeds']:5d}" + "".join(f"{shown(line[kind]):>13s}" for kind in kinds))


def _print_rest(lines: Sequence[Row], paid: str) -> None:
    titles = (
        "disagree %",
        "distance",
        "ECE members",
        "ECE ensemble",
        "ECE averaged",
        "taken",
        "bytes/step",
        f"of {paid}",
    )
    print("\n" + f"{'':37s}" + "".join(f"{title:>14s}" for title in titles))
    for line in lines:
        cells = [shown(line["disagreement"]), shown(line["distance"], 2)]
        cells += [shown(line["ece"][kind]) for kind in ("members", "ensemble", "averaged")]
        cells += [f"{line['taken']:.1f}", f"{line['bytes']:,.0f}"]
        cells.append("" if line["ratio"] is None else f"{line['ratio']:.4f}")
        start = f"{line['setting']:14s}{line['members']:2d} {line['method']:20s}"
        print(start + "".join(f"{cell:>14s}" for cell in cells))
