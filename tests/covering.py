"""Few of many cases, so that all there is to combine still occurs.

A test of a law goes through a table of cases: rules × optimizers × sizes × … What breaks a law is nearly always one value, or
two of them together. So instead of the whole product a test with the mark `covering` runs a covering array of it (Cohen, Dalal,
Fredman, Patton, "The AETG system", 1997): every value of every parameter is in some case, with `covering(2)` every pair of
values of two parameters, with `covering("case", ("name", "optimizer"))` every case, and every name with every optimizer.
Which cases is the same on every machine and in every run. `--all-pairs` runs the product.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Hashable, Sequence
from typing import Any

import pytest

Row = dict[str, Hashable]


def left_out(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """The cases of marked tests that the covering does without."""
    tables: dict[tuple[Any, str], list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("covering") and hasattr(item, "callspec"):
            tables.setdefault((item.parent, item.originalname), []).append(item)
    found: set[pytest.Item] = set()
    for (_, name), cases in tables.items():
        mark = cases[0].get_closest_marker("covering")
        known: dict[int, int] = {}
        kept = covering([values(case, known) for case in cases], mark.args if mark is not None else (), name)
        found |= {case for k, case in enumerate(cases) if k not in kept}
    return found


def values(case: pytest.Function, known: dict[int, int]) -> Row:
    """What tells the arguments of a case apart: plain values by themselves, rows of a table by their names, others by which of
    the objects `known` they are."""
    return {key: _named(value, known) for key, value in case.callspec.params.items()}


def _named(value: Any, known: dict[int, int]) -> Hashable:
    if isinstance(value, (str, int, float, bool, type(None))):
        return repr(value)
    name = getattr(value, "name", None)
    if isinstance(name, str) and not hasattr(value, "properties"):  # rules with other parameters have one name
        return name
    return known.setdefault(id(value), len(known))


def covering(rows: Sequence[Row], wanted: Sequence[Any] = (), salt: str = "") -> set[int]:
    """Numbers of rows, greedily few, in which everything occurs that is wanted and occurs in any.

    wanted: one number, of how many values together (1 without it); or names of parameters and of groups of parameters.
    """
    keys = sorted(rows[0])
    if not wanted or isinstance(wanted[0], int):
        groups = list(itertools.combinations(keys, min([len(keys), *wanted] if wanted else [1])))
    else:
        groups = [(one,) if isinstance(one, str) else tuple(one) for one in wanted]
    combinations = [{(group, tuple(row[key] for key in group)) for group in groups} for row in rows]
    missing = set().union(*combinations)
    # between equally good rows one that is as good as drawn: other tests of the same table take others
    order = sorted(range(len(rows)), key=lambda k: zlib.crc32(f"{salt} {sorted(rows[k].items())}".encode()))
    kept: set[int] = set()
    while missing:
        best = max(order, key=lambda k: len(combinations[k] & missing))
        kept.add(best)
        missing -= combinations[best]
    return kept
