"""The pure parts of benchmarks/forward_gradients.py: its rows, its learning rates, and what a claim needs to hold."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def part(monkeypatch):
    """guessing.NAME"""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: importlib.import_module(f"guessing.{name}")


def test_every_claim_is_about_rows_that_are_run(part):
    rows = {case for full in (False, True) for case in part("cases").cases(full)}
    for claim, pairs in part("orderings").claims().items():
        assert pairs, claim
        for pair in pairs:
            assert set(pair) <= rows, (claim, pair)
            assert len({case.width for case in pair}) == 2 or "width" not in claim


def test_a_claim_holds_if_the_mean_difference_of_seeds_is_beyond_its_error(part):
    orderings = part("orderings")
    a, b = (part("cases").Case(8, "global", "local", "mlp", space) for space in ("weight", "activity"))
    pair = orderings.Pair(a, b)
    found = orderings.tested(pair, {a: {0: 12.0, 1: 13.0, 2: 14.0, 7: 90.0}, b: {0: 10.0, 1: 10.0, 2: 10.0, 8: 0.0}})
    assert (found.mean, found.seeds) == (3.0, 3)  # seeds 7 and 8 have no partner
    assert found.error == pytest.approx(1 / math.sqrt(3))
    assert found.verdict == "holds"  # 3 / 0.577 = 5.2 > 2.92
    back = orderings.tested(orderings.Pair(b, a), {a: {0: 12.0, 1: 13.0}, b: {0: 10.0, 1: 10.0}})
    assert (back.mean, back.seeds, back.verdict) == (-2.5, 2, "not settled")  # 5 errors, but only two seeds
    assert found._replace(mean=-3.0).verdict == "reversed"
    assert found._replace(mean=1.68).verdict == found._replace(mean=-1.68).verdict == "not settled"  # 2.91 errors
    assert orderings.tested(pair, {a: {0: 50.0}, b: {0: 10.0}}).verdict == "not settled"  # one seed says nothing
    assert orderings.tested(pair, {a: {0: 1.0}}) is None


def test_the_rates_of_the_thesis(part):
    cases = part("cases")
    told = {
        cases.Case(8, "end to end"): 0.05,
        cases.Case(8, "global", "gaussian", "", "activity"): 0.01,
        cases.Case(8, "global", "rademacher", "", "weight"): 0.005,
        cases.Case(16, "local", "gaussian", "mlp", "activity"): 0.005,
        cases.Case(16, "global", "local", "linear", "activity"): 0.005,
        cases.Case(16, "global", "local", "linear", "weight"): 0.05,
        cases.Case(16, "global", "ntk", "mlp", "weight"): 0.01,
        cases.Case(8, "global", "ntk", "mlp", "weight"): 0.05,
    }
    assert {case: cases.rate(case, "thesis") for case in told} == told


def test_the_rate_falls_after_30_60_and_90_percent(part):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    scheduler = part("training").schedule(100)(optimizer)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    changes = [k for k in range(1, 100) if rates[k] != rates[k - 1]]
    assert changes == [30, 60, 90] and rates[-1] == pytest.approx(0.2**3)
