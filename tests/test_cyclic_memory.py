"""What replicas retain that begin one after another: the thesis' identities, and sums made another way."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import unlocked as ul
from unlocked.errors import InvalidChoice
from unlocked.simulation.costs import Costs, unit
from unlocked.simulation.cyclic import (
    StageMemory,
    even_starts,
    in_rounds,
    one_gradient,
    retained,
    stage_memories,
    staggered,
)
from unlocked.simulation.cyclic_cuts import best_sizes
from unlocked.simulation.network import Line

seconds = st.floats(0.01, 100.0)
stages = st.lists(
    st.builds(StageMemory, seconds, seconds, st.integers(0, 10**9), st.integers(0, 10**6)), min_size=1, max_size=6
)
replicas = st.integers(1, 9)
patient = settings(deadline=None)  # a busy machine may take long over exact sums
shares = st.fractions(0, 3, max_denominator=50)


def equal(count: int, forward: float = 1.0, backward: float = 1.0, kept: int = 1) -> list[StageMemory]:
    return [StageMemory(forward, backward, kept)] * count


# ---- the thesis' numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 13))
@settings(deadline=None, max_examples=25)
@given(forward=seconds, backward=seconds, kept=st.integers(1, 10**12))
def test_as_many_equal_stages_as_replicas_retain_half_and_a_bit(n, forward, backward, kept):
    """N (N + 1) / 2 activations at every moment, against N · N at once: (N + 1) / (2 N)."""
    rows = equal(n, forward, backward, kept)
    cyclic, at_once = retained(rows, n), retained(rows, n, cyclic=False)
    assert {level for _, level in cyclic.curve} == {kept * n * (n + 1) // 2}
    assert at_once.peak == kept * n * n


@patient
@given(j=st.integers(1, 12), n=st.integers(1, 12))
def test_any_number_of_equal_stages(j, n):
    """In rounds, a replica that is p acts into its gradient retains min(p + 1, 2 J − p) activations."""

    def at(moment: Fraction) -> int:
        acts = [math.floor((moment - Fraction(2 * j * k, n)) % (2 * j)) for k in range(n)]
        return sum(min(p + 1, 2 * j - p) for p in acts)

    found = retained(equal(j), n)
    assert found.peak == max(at(Fraction(i, n)) for i in range(2 * j * n))
    assert found.mean == pytest.approx(n * (j + 1) / 2)
    assert retained(equal(j), n, cyclic=False).peak == n * j
    if n % j == 0 and (2 * j * j) % n == 0:
        assert found.peak == n * (j + 1) / 2


@pytest.mark.parametrize("n", range(1, 13))
def test_one_device_that_ends_backwards_first_needs_half(n):
    assert retained(equal(n, kept=3), n, serial=True).peak == 3 * ((n * n + 1) // 2)


def test_a_pyramid_of_devices_is_enough():
    """Stage j of N is held by N − j replicas at any time (the thesis' Proposition C.2.2)."""
    n = 7
    for j in range(n):
        only = [StageMemory(1, 1, int(k == j)) for k in range(n)]
        assert {level for _, level in retained(only, n).curve} == {n - j}


# ---- any stages ------------------------------------------------------------------------------------------------------


@patient
@given(rows=stages, n=replicas)
def test_peak_is_that_of_intervals_counted_one_by_one(rows, n):
    period = sum(Fraction(row.forward) + Fraction(row.backward) for row in rows)
    spans, begin, end = [], Fraction(0), period
    for row in rows:
        spans += [(begin, end, row.kept), (end - Fraction(row.backward), end, row.again)]
        begin, end = begin + Fraction(row.forward), end - Fraction(row.backward)
    starts = [period * k / n for k in range(n)]

    def at(moment: Fraction) -> int:
        return sum(size for s in starts for b, e, size in spans for p in [(moment - s) % period] if b <= p < e)

    found = retained(rows, n)
    assert found.peak == max(at((b + s) % period) for s in starts for b, _, _ in spans)
    assert found.period == pytest.approx(float(period))
    assert found.mean == pytest.approx(float(n * sum(size * (e - b) for b, e, size in spans) / period))


@patient
@given(rows=stages, n=replicas)
def test_cyclic_never_retains_more_than_all_at_once(rows, n):
    cyclic, at_once = retained(rows, n), retained(rows, n, cyclic=False)
    assert cyclic.peak <= at_once.peak == n * retained(rows, 1).peak


@patient
@given(rows=stages, starts=st.lists(shares, min_size=1, max_size=8))
def test_no_starts_change_the_mean_or_come_below_it(rows, starts):
    found = staggered(*one_gradient(rows), starts)
    assert found.mean == pytest.approx(retained(rows, len(starts)).mean, rel=1e-12)
    assert found.mean <= found.peak * (1 + 1e-12)
    assert found.peak <= len(starts) * retained(rows, 1).peak


@patient
@given(rows=stages, n=replicas, power=st.integers(-8, 8), factor=st.integers(0, 50))
def test_scaling(rows, n, power, factor):
    """Seconds only stretch the curve; bytes only raise it."""
    scaled = [
        StageMemory(row.forward * 2.0**power, row.backward * 2.0**power, row.kept * factor, row.again * factor)
        for row in rows
    ]
    before, after = retained(rows, n), retained(scaled, n)
    assert after.peak == factor * before.peak
    assert after.mean == pytest.approx(factor * before.mean)
    if factor:
        assert [when for when, _ in after.curve] == pytest.approx([when * 2.0**power for when, _ in before.curve])


@patient
@given(rows=stages, n=replicas, share=shares)
def test_only_differences_of_starts_count(rows, n, share):
    curve, period = one_gradient(rows)
    later = [start + share for start in even_starts(n)]
    assert staggered(curve, period, later).peak == staggered(curve, period, even_starts(n)).peak


def test_a_curve_that_was_measured():
    """Two replicas half a period apart: 5, 5 from one, 0, 1 from the other, and the other way round."""
    found = staggered([(0.0, 5), (2.0, 0), (3.0, 1), (4.0, 99)], 4.0, [0.0, 0.5])
    assert found.curve == [(0.0, 5), (1.0, 6), (2.0, 5), (3.0, 6)]
    assert (found.peak, found.mean) == (6, 5.5)


def test_in_rounds_every_act_takes_as_long():
    rows = [StageMemory(5, 1, 10, 3), StageMemory(0, 7, 20)]
    assert in_rounds(rows) == [StageMemory(1, 1, 10, 3), StageMemory(1, 1, 20)]


def test_stages_of_a_simulated_chain():
    """The head of the last stage belongs to it: a third of its time forward."""
    first, last = unit(2, forward=[1, 2], backward=[3, 4], head=[0, 3], activation=5).stages
    last = replace(last, profile=replace(last.profile, head_kept=Line(1.0, 2.0)))
    assert stage_memories(Costs((first, last)), samples=6) == [StageMemory(1, 3, 120), StageMemory(3, 6, 120 + 13)]


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_refuses_what_cannot_be(bad):
    with pytest.raises(InvalidChoice, match="finite and at least 0"):
        StageMemory(bad, 1.0, 1)
    with pytest.raises(InvalidChoice, match="at least 1"):
        retained(equal(2), 0)
    with pytest.raises(InvalidChoice, match="more than 0 seconds"):
        retained([StageMemory(0, 0, 1)], 2)


# ---- cuts ------------------------------------------------------------------------------------------------------------


@patient
@given(
    pieces=st.lists(st.builds(StageMemory, st.integers(1, 9), st.just(0), st.integers(0, 9)), min_size=1, max_size=7),
    data=st.data(),
    holder=st.sampled_from(["together", "each"]),
    slowest=st.sampled_from([1.0, 1.25, 1.5, 2.0, math.inf]),
)
def test_the_best_cut_is_the_best_of_all(pieces, data, holder, slowest):
    j = data.draw(st.integers(1, len(pieces)))

    def measures(sizes: tuple[int, ...]) -> tuple[float, int]:
        """(slowest stage, bytes)"""
        groups, rest = [], iter(pieces)
        for size in sizes:
            groups.append(list(itertools.islice(rest, size)))
        held = [(j - k) * sum(piece.kept for piece in group) for k, group in enumerate(groups)]
        return max(sum(p.seconds for p in group) for group in groups), sum(held) if holder == "together" else max(held)

    cuts = [sizes for sizes in itertools.product(range(1, len(pieces) + 1), repeat=j) if sum(sizes) == len(pieces)]
    least = min(measures(sizes)[0] for sizes in cuts)
    allowed = [measures(sizes) for sizes in cuts if measures(sizes)[0] <= least * slowest]
    best = min((size, time) for time, size in allowed)
    time, size = measures(tuple(best_sizes(pieces, j, holder, slowest)))
    assert (size, time) == best


def test_bytes_of_the_best_cut_are_those_of_its_rounds():
    pieces = [StageMemory(1, 2, kept) for kept in (9, 7, 5, 4, 2, 1, 1)]
    sizes = best_sizes(pieces, 3, "together", slowest=1.5)
    cut = list(itertools.pairwise([0, *itertools.accumulate(sizes)]))
    rows = [StageMemory(1, 1, sum(piece.kept for piece in pieces[i:k])) for i, k in cut]
    assert retained(rows, 3).peak == sum((3 - j) * row.kept for j, row in enumerate(rows))


def test_unbounded_the_last_stage_takes_the_rest():
    assert best_sizes(equal(9), 4, "together") == [1, 1, 1, 6]


def test_each_device_of_a_pipeline_is_as_full():
    """Two micro-batches of two pieces on the first, one of four on the second."""
    assert best_sizes(equal(6), 2, "each") == [2, 4]


@pytest.mark.parametrize("stages, slowest", [(0, 1.0), (4, 1.0), (2, 0.5)])
def test_refuses_cuts_that_cannot_be(stages, slowest):
    with pytest.raises(InvalidChoice, match="give 1 to 3 stages"):
        best_sizes(equal(3), stages, "each", slowest)
    with pytest.raises(ul.errors.UnlockedError, match="holder"):
        best_sizes(equal(3), 2, "all")  # type: ignore[arg-type]
