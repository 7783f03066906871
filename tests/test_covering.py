"""What is left out of large tables, and what never is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import methods
from covering import covering

ROWS = st.lists(st.fixed_dictionaries({name: st.integers(0, 3) for name in "abc"}), min_size=1, max_size=60)


def seen(rows, group):
    return {tuple(row[name] for name in group) for row in rows}


@given(rows=ROWS, strength=st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_whatever_occurs_together_still_does(rows, strength):
    kept = [rows[k] for k in covering(rows, (strength,))]
    for group in itertools.combinations("abc", min(strength, 3)):
        assert seen(kept, group) == seen(rows, group)


@given(rows=ROWS)
@settings(deadline=None, max_examples=50)
def test_groups_may_be_named(rows):
    kept = [rows[k] for k in covering(rows, ("a", ("b", "c")))]
    assert seen(kept, "a") == seen(rows, "a") and seen(kept, "bc") == seen(rows, "bc")


@pytest.mark.parametrize("salt", ["", "x", "y"])
def test_few_of_a_product_are_enough(salt):
    """As many as the longest parameter has values; for pairs not far above the two longest ones' product."""
    rows = [dict(zip("abcd", row)) for row in itertools.product(range(5), range(4), range(3), range(2))]
    assert len(covering(rows, (), salt)) == 5
    assert 20 <= len(covering(rows, (2,), salt)) <= 26
    assert covering(rows, (2,), salt) == covering(rows, (2,), salt)


def test_other_tests_of_one_table_take_other_rows():
    rows = [dict(zip("ab", row)) for row in itertools.product(range(6), range(6))]
    assert len({frozenset(covering(rows, (), salt)) for salt in "abcdef"}) > 3


def test_every_allowed_pair_is_in_some_part_and_every_rule_in_each(monkeypatch):
    monkeypatch.setattr(methods, "ALL_PAIRS", False)
    whole, parts = methods.allowed_pairs(), [methods.some_pairs(part) for part in range(4)]
    names = {(a.name, b.name) for a, b in whole}
    assert {(a.name, b.name) for part in parts for a, b in part} == names
    for part in parts:
        assert len(part) < len(whole) / 2 and len(part) == len({(a.name, b.name) for a, b in part})
        for k in (0, 1):
            assert {pair[k].name for pair in part} == {pair[k].name for pair in whole}
    monkeypatch.setattr(methods, "ALL_PAIRS", True)
    assert methods.some_pairs(1) == whole
