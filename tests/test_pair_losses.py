"""Losses over pairs of views equal their formulas, written as loops over rows; their limits are other losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlocked import pairs
from unlocked.errors import InvalidChoice
from unlocked.infopro_loss import supervised_contrast
from unlocked.losses import WrongTarget
from unlocked.pairs import (
    PAIR_LOSSES,
    BarlowTwins,
    EasyNTXent,
    FalseNegatives,
    HardNegatives,
    NTXent,
    OracleNTXent,
    SubsampledNTXent,
    VICReg,
)

pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
quickly = settings(max_examples=25, deadline=None, derandomize=True)
images, entries = st.integers(1, 5), st.integers(1, 4)
temperatures = st.floats(0.05, 4.0)
cosine = st.floats(-1.0, 1.0)
seeds = st.integers(0, 10**6)


def drawn(seed, rows, columns, dtype=torch.float64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def labels(seed, b):
    return torch.randint(0, 3, (b,), generator=torch.Generator().manual_seed(seed)).repeat_interleave(2)


def cos(a, b):
    return (a @ b) / (a.norm() * b.norm())


def table(z):
    """s_il of all pairs, one by one."""
    return [[cos(one, other) for other in z] for one in z]


def other_view(i):
    return i + 1 if i % 2 == 0 else i - 1


def total(numbers, like):
    return sum(numbers, like.sum() * 0.0)


def assert_equals(loss, reference, z, *rest):
    """Same value and same gradient."""
    found = loss.judge(z, *rest).loss
    expected = reference(z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    (got,) = torch.autograd.grad(found, z)
    (wanted,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)


def nt_xent(z, tau, positive=lambda i, p: True, among=lambda i, other: True, mean="all"):
    """The contrast by its formula, with the indicators β and A as functions of two row numbers."""
    s, terms, n = table(z), [], len(z)
    for i in range(n):
        p = other_view(i)
        denominator = [torch.exp(s[i][k] / tau) for k in range(n) if k != i and among(i, k)]
        if positive(i, p) and denominator:
            terms.append(-torch.log(torch.exp(s[i][p] / tau) / sum(denominator)))
    return total(terms, z) / (n if mean == "all" else max(1, len(terms)))


@quickly
@given(seeds, images, entries, temperatures)
def test_nt_xent_equals_its_formula(seed, b, d, tau):
    assert_equals(NTXent(tau), lambda z: nt_xent(z, tau), drawn(seed, 2 * b, d), labels(seed, b))


@quickly
@given(seeds, images, entries, temperatures, cosine, st.sampled_from(["both", "positives", "negatives"]), st.booleans())
def test_subsampled_nt_xent_equals_its_formula(seed, b, d, tau, threshold, which, all_rows):
    z, mean = drawn(seed, 2 * b, d), "all" if all_rows else "kept"
    s = [[float(entry) for entry in row] for row in table(z.detach())]
    assume(all(abs(entry - threshold) > 1e-9 for row in s for entry in row))

    def alpha(i, k):
        return s[i][k] >= threshold

    def reference(z):
        if which == "both":
            return nt_xent(z, tau, alpha, alpha, mean)
        if which == "positives":
            return nt_xent(z, tau, alpha, mean=mean)
        return nt_xent(z, tau, among=lambda i, k: k == other_view(i) or alpha(i, k), mean=mean)

    loss = SubsampledNTXent(threshold, which, tau, mean)
    assert_equals(loss, reference, z, labels(seed, b))
    notes = loss.judge(z, labels(seed, b)).notes
    rows = range(2 * b)
    kept = [alpha(i, other_view(i)) for i in rows]
    others = [alpha(i, k) for i in rows for k in rows if k // 2 != i // 2]
    assert float(notes["positives kept"]) == pytest.approx(1 if which == "negatives" else sum(kept) / len(kept))
    none_masked = which == "positives" or not others
    assert float(notes["negatives kept"]) == pytest.approx(1 if none_masked else sum(others) / len(others))


@quickly
@given(seeds, images, entries, temperatures, cosine, cosine, st.booleans())
def test_oracle_nt_xent_equals_its_formula(seed, b, d, tau, positive, negative, always):
    z, oracle = drawn(seed, 2 * b, d), drawn(seed + 1, 2 * b, 3)
    s = [[float(entry) for entry in row] for row in table(oracle.detach())]
    assume(all(abs(entry - edge) > 1e-9 for row in s for entry in row for edge in (positive, negative)))

    def reference(z):
        def among(i, k):
            return s[i][k] <= negative or (always and k == other_view(i))

        return nt_xent(z, tau, lambda i, p: s[i][p] >= positive, among)

    assert_equals(OracleNTXent(positive, negative, tau, always), reference, z, labels(seed, b), oracle)
    judged = OracleNTXent(positive, negative, tau, always).judge(z, labels(seed, b), oracle)
    assert torch.autograd.grad(judged.loss, oracle, allow_unused=True) == (None,)


def algorithm_5(z, s, alpha, beta, tau):
    """DGSSL-LLM's loss as Algorithms 5 to 7 build it, sets and numbers from 1 included."""
    n = len(z) // 2
    own = table(z)
    mu = {k for k in range(1, n + 1) if s[2 * k - 1][2 * k - 2] >= alpha}
    omega = {a: {k for k in range(1, 2 * n + 1) if s[a - 1][k - 1] <= beta} for a in range(1, 2 * n + 1)}

    def ell(a, b):
        denominator = [torch.exp(own[a - 1][k - 1] / tau) for k in range(1, 2 * n + 1) if k != a and k in omega[a]]
        return -torch.log(torch.exp(own[a - 1][b - 1] / tau) / sum(denominator)) if denominator else None

    terms = [one for k in mu for one in (ell(2 * k - 1, 2 * k), ell(2 * k, 2 * k - 1)) if one is not None]
    return total(terms, z) / max(1, len(terms))  # 2|μ| wherever every denominator has an entry


@quickly
@given(seeds, images, entries, temperatures, cosine, cosine, st.sampled_from(["stage", "oracle"]))
def test_easy_nt_xent_equals_algorithm_5(seed, b, d, tau, alpha, beta, by):
    z, oracle = drawn(seed, 2 * b, d), drawn(seed + 1, 2 * b, 3)
    s = [[float(entry) for entry in row] for row in table((z if by == "stage" else oracle).detach())]
    edges = [abs(s[i][k] - edge) > 1e-9 for i in range(2 * b) for k in range(2 * b) for edge in (alpha, beta) if i != k]
    assume(all(edges))
    loss = EasyNTXent(alpha, beta, by, tau)
    assert loss.reads_oracle == (by == "oracle")
    assert_equals(loss, lambda z: algorithm_5(z, s, alpha, beta, tau), z, labels(seed, b), oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "loss",
    [
        SubsampledNTXent(-1.0, temperature=0.3),
        SubsampledNTXent(-1.0, "positives", 0.3, "kept"),
        SubsampledNTXent(-1.0, "negatives", 0.3),
        OracleNTXent(-1.0, 1.0, 0.3),
        OracleNTXent(-1.0, 1.0, 0.3, mean="kept"),
        EasyNTXent(-1.0, 1.0, temperature=0.3),
        EasyNTXent(-1.0, 1.0, "oracle", 0.3, mean="all"),
        FalseNegatives("top", top=0, temperature=0.3),
        FalseNegatives("threshold", threshold=1.0, temperature=0.3),
    ],
    ids=repr,
)
def test_what_masks_nothing_is_nt_xent_bit_for_bit(loss, dtype):
    z = drawn(5, 24, 7, dtype)
    with torch.no_grad():
        z[3] = -2 * z[2]  # cosines of -1 and 1, up to rounding either side of them, are kept as well
        z[5] = 3 * z[4] if not isinstance(loss, FalseNegatives) else z[5]
        z[9] = -z[4]
    found, plain = loss.judge(z, labels(5, 12), z), NTXent(0.3).judge(z, labels(5, 12))
    assert torch.equal(found.loss, plain.loss)
    assert torch.equal(torch.autograd.grad(found.loss, z)[0], torch.autograd.grad(plain.loss, z)[0])
    assert all(float(value) == 1 for value in found.notes.values())


def hard(z, beta, tau_plus, tau):
    s, terms, n = table(z), [], len(z)
    for i in range(n):
        p = other_view(i)
        e = [torch.exp(s[i][k] / tau) for k in range(n)]
        others = [e[k] for k in range(n) if k not in (i, p)]
        if not others:
            terms.append(0 * e[p])
            continue
        weights = [one**beta for one in others]
        expected = sum(w * one for w, one in zip(weights, others)) / sum(weights)
        g = (expected - tau_plus * e[p]) / (1 - tau_plus)
        if float(g.detach()) < math.exp(-1 / tau):
            g = math.exp(-1 / tau)
        terms.append(-torch.log(e[p] / (e[p] + len(others) * g)))
    return total(terms, z) / n


@quickly
@given(seeds, images, st.integers(2, 4), temperatures, st.floats(0, 4), st.floats(0, 0.8))
def test_hard_negatives_equal_their_formula(seed, b, d, tau, beta, tau_plus):
    z = drawn(seed, 2 * b, d)
    assert_equals(HardNegatives(beta, tau_plus, tau), lambda z: hard(z, beta, tau_plus, tau), z, labels(0, b))


@quickly
@given(seeds, images, st.integers(2, 4), temperatures)
def test_hard_negatives_without_weights_and_bias_are_nt_xent(seed, b, d, tau):
    assert_equals(
        HardNegatives(0.0, 0.0, tau), lambda z: NTXent(tau)(z, labels(0, b)), drawn(seed, 2 * b, d), labels(0, b)
    )


def test_concentration_goes_to_the_hardest_negative():
    """β → ∞ leaves the most similar negative alone, as often as there are negatives."""
    z, tau = drawn(1, 8, 3), 0.5
    s = table(z)
    terms = []
    for i in range(8):
        worst = max(s[i][k] for k in range(8) if k // 2 != i // 2)
        positive = torch.exp(s[i][other_view(i)] / tau)
        terms.append(-torch.log(positive / (positive + 6 * torch.exp(worst / tau))))
    torch.testing.assert_close(HardNegatives(1e4, 0.0, tau)(z, labels(1, 4)), sum(terms) / 8)


def suspects(loss, s, y, i):
    """F_i by its definition."""
    others = [k for k in range(len(s)) if k // 2 != i // 2]
    score = {k: max(s[i][k].item(), s[other_view(i)][k].item()) for k in others}
    if loss.by == "labels":
        return {k for k in others if y[k] == y[i]}
    if loss.by == "threshold":
        return {k for k in others if score[k] >= loss.threshold}
    return set(sorted(others, key=lambda k: -score[k])[: loss.top])


def cancelled(loss, z, y):
    s, terms, n = table(z), [], len(z)
    for i in range(n):
        p, false = other_view(i), suspects(loss, s, y, i)
        e = [torch.exp(s[i][k] / loss.temperature) for k in range(n)]
        if loss.cancel == "eliminate":
            terms.append(-torch.log(e[p] / sum(e[k] for k in range(n) if k != i and k not in false)))
        else:
            whole = sum(e[k] for k in range(n) if k != i)
            terms.append(-sum(torch.log(e[k] / whole) for k in {p} | false) / (1 + len(false)))
    return total(terms, z) / n


@quickly
@given(
    seeds,
    images,
    st.integers(2, 4),
    st.sampled_from(["labels", "top", "threshold"]),
    st.sampled_from(["eliminate", "attract"]),
    st.integers(0, 12),
    st.floats(-1, 1),
)
def test_false_negatives_equal_their_formula(seed, b, d, by, cancel, top, threshold):
    loss, y = FalseNegatives(by, cancel, top, threshold, 0.4), labels(seed, b)
    assert loss.reads_labels == (by == "labels")
    z = drawn(seed, 2 * b, d)
    assert_equals(loss, lambda z: cancelled(loss, z, y), z, y)
    others = b * 2 * (2 * b - 2)
    false = sum(len(suspects(loss, table(z.detach()), y, i)) for i in range(2 * b))
    assert float(loss.judge(z, y).notes["negatives kept"]) == pytest.approx(1 - false / others if others else 1)


def test_attraction_by_labels_is_supervised_contrast():
    z, y = drawn(3, 16, 4), labels(3, 8)
    assert_equals(FalseNegatives("labels", "attract", temperature=0.2), lambda z: supervised_contrast(z, y, 0.2), z, y)


def barlow_twins(z, weight):
    one, other, d = z[0::2], z[1::2], z.shape[1]

    def entries(view, k):
        centred = view[:, k] - view[:, k].mean()
        return centred / torch.sqrt((centred**2).mean() + 1e-5)

    c = [[(entries(one, a) * entries(other, b)).mean() for b in range(d)] for a in range(d)]
    straight = sum((1 - c[a][a]) ** 2 for a in range(d))
    return straight + weight * sum((c[a][b] ** 2 for a in range(d) for b in range(d) if a != b), z.sum() * 0)


@quickly
@given(seeds, st.integers(2, 6), entries, st.floats(0, 2))
def test_barlow_twins_equal_their_formula(seed, b, d, weight):
    assert_equals(BarlowTwins(weight), lambda z: barlow_twins(z, weight), drawn(seed, 2 * b, d), labels(0, b))


def vicreg(z, lam, mu, nu):
    b, d = len(z) // 2, z.shape[1]
    apart = sum(((z[2 * k] - z[2 * k + 1]) ** 2).sum() for k in range(b)) / (b * d)
    loss = lam * apart
    for view in (z[0::2], z[1::2]):
        centred = view - view.mean(0)
        covariance = sum(torch.outer(row, row) for row in centred) / (b - 1)
        for k in range(d):
            loss = loss + mu * torch.clamp(1 - torch.sqrt(covariance[k, k] + 1e-4), min=0) / d
            loss = loss + nu * sum(covariance[k, m] ** 2 for m in range(d) if m != k) / d
    return loss


@quickly
@given(seeds, st.integers(2, 6), entries, st.floats(0, 30), st.floats(0, 30), st.floats(0, 2))
def test_vicreg_equals_its_formula(seed, b, d, lam, mu, nu):
    assert_equals(VICReg(lam, mu, nu), lambda z: vicreg(z, lam, mu, nu), drawn(seed, 2 * b, d), labels(0, b))


def test_white_projections_that_agree_cost_nothing():
    white = torch.linalg.qr(torch.randn(8, 4, dtype=torch.float64) - 0.5).Q
    white = torch.linalg.qr(white - white.mean(0)).Q * 1e3
    z = white.repeat_interleave(2, 0)
    assert float(VICReg()(z, labels(0, 8))) == pytest.approx(0, abs=1e-12)
    assert float(BarlowTwins()(z, labels(0, 8))) == pytest.approx(0, abs=1e-12)


EVERY = [
    *PAIR_LOSSES.values(),
    SubsampledNTXent(0.2),
    SubsampledNTXent(0.2, "positives", mean="kept"),
    SubsampledNTXent(0.2, "negatives"),
    OracleNTXent(0.1, 0.2),
    EasyNTXent(0.1, 0.5),
    EasyNTXent(0.1, 0.2, "oracle", positive_in_denominator=True),
    FalseNegatives("labels", "attract"),
    FalseNegatives("top", "eliminate", top=3),
]
every = pytest.mark.parametrize("loss", EVERY, ids=repr)
needs_statistics = (BarlowTwins, VICReg)


@every
def test_neither_the_order_of_images_nor_of_views_matters(loss):
    b = 6
    z, oracle, y = drawn(2, 2 * b, 5), drawn(3, 2 * b, 4), labels(2, b)
    plain = loss.judge(z, y, oracle)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(1))
    images = (2 * order[:, None] + torch.tensor([0, 1])).flatten()
    views = torch.arange(2 * b) ^ 1
    for rows in (images, views, images[views]):
        moved = loss.judge(z[rows], y[rows], oracle[rows])
        torch.testing.assert_close(moved.loss, plain.loss)
        assert moved.notes == pytest.approx(plain.notes)


@every
def test_rows_of_other_replicas_change_no_gradient_of_ones_own(loss):
    z, oracle, y = drawn(2, 12, 5), drawn(3, 12, 4), labels(2, 6)
    (whole,) = torch.autograd.grad(loss.judge(z, y, oracle).loss, z)
    for own in (slice(0, 4), slice(4, 12)):
        mine = z.detach()[own].requires_grad_()
        parts = [z.detach()[: own.start], mine, z.detach()[own.stop :]]
        (gradient,) = torch.autograd.grad(loss.judge(torch.cat(parts), y, oracle).loss, mine)
        torch.testing.assert_close(gradient, whole[own])


def finite(loss, z, y=None, oracle=None):
    """The loss; it and its gradient are finite."""
    z = z.clone().requires_grad_()
    found = loss.judge(z, labels(0, len(z) // 2) if y is None else y, z.detach() if oracle is None else oracle)
    with torch.autograd.detect_anomaly(check_nan=True):  # not even on the way
        (gradient,) = torch.autograd.grad(found.loss, z)
    assert found.loss.isfinite() and gradient.isfinite().all()
    assert all(0 <= float(note) <= 1 and not note.requires_grad for note in found.notes.values())
    return found.loss.item(), gradient


@every
def test_degenerate_batches_have_finite_losses_and_gradients(loss):
    z = drawn(4, 12, 5, torch.float32).detach()
    for batch in (
        z,
        z[:1].expand(12, 5),
        z * 0,
        z * 1e-30,
        z * 1e30 if not isinstance(loss, needs_statistics) else z * 1e6,
    ):
        finite(loss, batch)
    opposite = z[:1] * torch.tensor([1.0, -1.0]).repeat(6)[:, None]
    finite(loss, opposite)
    if not isinstance(loss, needs_statistics):
        assert finite(loss, z[:2])[0] == 0  # one image: nothing to tell it from


@pytest.mark.parametrize("loss", [loss for loss in EVERY if not isinstance(loss, needs_statistics)], ids=repr)
def test_a_row_of_zeros_is_like_nothing_and_gets_no_gradient(loss):
    z = drawn(4, 12, 5, torch.float32).detach()
    z[3] = 0
    _, gradient = finite(loss, z)
    assert not gradient[3].any()
    assert gradient[[0, 1]].any() or not gradient.any()
    rows = pairs.contrasting.cosines(z)
    assert not rows[3].any() and not rows[:, 3].any()


def test_pairs_just_as_similar_as_a_threshold_are_kept():
    """Of orthogonal rows all similarities are 0."""
    z = torch.eye(4, dtype=torch.float64)
    y = labels(0, 2)
    for loss in (SubsampledNTXent(0.0), OracleNTXent(0.0, 0.0), EasyNTXent(0.0, 0.0), EasyNTXent(0.0, 0.0, "oracle")):
        judged = loss.judge(z, y, z)
        assert judged.notes == {"positives kept": 1, "negatives kept": 1}
        assert float(judged.loss) == pytest.approx(math.log(3))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lengths_do_not_matter_however_small_or_large(scale):
    z = drawn(4, 12, 5, torch.float32).detach()
    torch.testing.assert_close(NTXent()(z * scale, labels(0, 6)), NTXent()(z, labels(0, 6)))


def test_projections_that_are_all_the_same():
    z = torch.ones(8, 3, dtype=torch.float64)
    assert finite(NTXent(0.1), z)[0] == pytest.approx(math.log(7))
    assert finite(SubsampledNTXent(0.9), z)[0] == pytest.approx(math.log(7))
    assert finite(EasyNTXent(0.5, 0.9), z) == (0, pytest.approx(torch.zeros(8, 3)))  # no negative is easy
    assert finite(FalseNegatives(threshold=0.5), z)[0] == 0  # all negatives are eliminated


def test_all_negatives_masked():
    """Of orthogonal pairs of equal views only the positives are similar."""
    z = torch.eye(4, dtype=torch.float64).repeat_interleave(2, 0)
    for which in ("both", "negatives"):
        loss, gradient = finite(SubsampledNTXent(0.5, which), z)
        assert loss == 0 and not gradient.any()
    notes = SubsampledNTXent(0.5).judge(z, labels(0, 4)).notes
    assert notes == {"positives kept": 1, "negatives kept": 0}
    loss, gradient = finite(OracleNTXent(0.5, -0.5), z)  # the denominator is empty: the row is left out
    assert loss == 0 and not gradient.any()
    assert finite(OracleNTXent(0.5, -0.5, positive_in_denominator=True), z)[0] == 0


def test_all_positives_masked():
    """Of opposite views no positive is similar, and negatives are not pushed for their own sake."""
    z = torch.eye(4, dtype=torch.float64).repeat_interleave(2, 0) * torch.tensor([1, -1] * 4)[:, None]
    for loss in (SubsampledNTXent(0.0), SubsampledNTXent(0.0, "positives", mean="kept"), EasyNTXent(0.0, 1.0)):
        value, gradient = finite(loss, z)
        assert value == 0 and not gradient.any()
        assert loss.judge(z, labels(0, 4)).notes["positives kept"] == 0
    # its positive counts although it is below T, and stays in the denominator: −log(e^{-1/τ} / (e^{-1/τ} + 6 e^0))
    assert finite(SubsampledNTXent(-0.5, "negatives", 1.0), z)[0] == pytest.approx(math.log(1 + 6 * math.e))
    assert finite(SubsampledNTXent(0.5, "negatives", 1.0), z)[0] == 0


def test_the_mean_is_over_all_rows_or_over_those_kept():
    """Two of four images keep their positive: half of the rows have a term."""
    z = torch.eye(4, dtype=torch.float64).repeat_interleave(2, 0)
    z[[1, 3]] *= -1
    over_all, over_kept = (float(SubsampledNTXent(0.0, mean=mean)(z, labels(0, 4))) for mean in ("all", "kept"))
    assert over_all > 0 and over_kept == pytest.approx(2 * over_all)


@pytest.mark.parametrize("loss", [loss for loss in EVERY if not isinstance(loss, needs_statistics)], ids=repr)
def test_a_low_temperature_overflows_nothing(loss):
    loss = type(loss)(**(vars(loss) | {"temperature": 0.004}))
    z, y = drawn(6, 12, 5).detach(), labels(6, 6)
    for batch in (
        z,
        -z.abs() * torch.tensor([1.0, -1.0]).repeat(6)[:, None],
    ):  # opposite views: e^{-500} against e^{250}
        wide, _ = finite(loss, batch, y)
        narrow, _ = finite(loss, batch.float(), y)
        assert narrow == pytest.approx(wide, rel=1e-4, abs=1e-4)


@every
def test_what_is_not_a_number_shows(loss):
    z = drawn(4, 12, 5, torch.float32).detach()
    z[3, 1] = math.nan
    assert loss.judge(z, labels(4, 6), z).loss.isnan()


@every
def test_half_precision_is_judged_in_float32(loss):
    z, y = drawn(7, 12, 5, torch.float32).detach(), labels(7, 6)
    exact = loss.judge(z, y, z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss.judge(z, y, z).loss, exact.loss)
    half = z.bfloat16()
    judged = loss.judge(half, y, half).loss
    assert judged.dtype == torch.float32 and torch.equal(judged, loss.judge(half.float(), y, half.float()).loss)


@quickly
@given(st.floats(0.01, 1), st.integers(1, 20))
def test_ratios_are_powers_and_the_last_stage_keeps_all(ratio, stages):
    rising, falling = pairs.ratios(ratio, stages), pairs.ratios(ratio, stages, "decreasing")
    assert rising[-1] == falling[0] == 1 and rising == falling[::-1]
    for j in range(1, stages + 1):  # numbered from 1, as in the thesis
        assert rising[j - 1] == pytest.approx(ratio ** (stages - j))


@quickly
@given(seeds, st.integers(1, 200), st.integers(1, 200), st.data())
def test_thresholds_keep_exactly_the_wanted_share(seed, n, m, data):
    similar = [torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for size in (n, m)]
    assume(all(len(one.unique()) == len(one) for one in similar))
    a, b = data.draw(st.integers(1, n)), data.draw(st.integers(1, m))
    alpha, beta = pairs.thresholds(*similar, a / n, b / m)
    assert int((similar[0] >= alpha).sum()) == a
    assert int((similar[1] <= beta).sum()) == b
    part = data.draw(st.floats(1e-6, 1, exclude_max=True))
    kept = int((similar[0] >= pairs.thresholds(*similar, part, 1)[0]).sum())
    assert kept - 1 < part * n + 1e-6 and kept >= part * n - 1e-6  # the least number that is at least the share


def test_a_share_of_one_keeps_also_what_the_sample_does_not_show():
    assert pairs.thresholds([0.5], [0.1], 1, 1) == (-1, 1)
    assert pairs.thresholds([0.25, 0.5], [0.125, 0.0], 1e-12, 1e-12) == (0.5, 0.0)  # one pair is the least
    z = drawn(1, 8, 3)
    kept = EasyNTXent(*pairs.thresholds([0.5], [0.1], 1.0, 1.0))
    assert torch.equal(kept(z, labels(1, 4)), NTXent()(z, labels(1, 4)))


def test_thresholds_for_each_stage():
    loss = EasyNTXent((0.9, 0.5, -1.0), (-0.5, 0.0, 1.0), temperature=0.2)
    assert [loss.at(j, 3) for j in range(3)] == [
        EasyNTXent(0.9, -0.5, temperature=0.2),
        EasyNTXent(0.5, 0.0, temperature=0.2),
        EasyNTXent(-1.0, 1.0, temperature=0.2),
    ]
    assert EasyNTXent(0.3, 0.4).at(1, 2) == EasyNTXent(0.3, 0.4) and NTXent(0.3).at(0, 4) == NTXent(0.3)
    with pytest.raises(InvalidChoice, match="3 values of alpha for 4 stages"):
        loss.at(0, 4)
    with pytest.raises(InvalidChoice, match=r"loss.at\(stage, stages\)"):
        loss(torch.ones(4, 2), labels(0, 2))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: NTXent(0.0), "temperature"),
        (lambda: NTXent(math.nan), "temperature"),
        (lambda: SubsampledNTXent(-1.1), r"threshold.*\[-1, 1\]"),
        (lambda: SubsampledNTXent(which="neither"), "both, negatives, positives"),
        (lambda: SubsampledNTXent(mean="some"), "all, kept"),
        (lambda: OracleNTXent(positive=2.0), "positive"),
        (lambda: OracleNTXent(negative=math.nan), "negative"),
        (lambda: EasyNTXent((0.1, 1.2), 0.0), "alpha"),
        (lambda: EasyNTXent(by="stages"), "did you mean 'stage'"),
        (lambda: HardNegatives(beta=-1.0), "beta"),
        (lambda: HardNegatives(tau_plus=1.0), "tau_plus"),
        (lambda: FalseNegatives(by="label"), "did you mean 'labels'"),
        (lambda: FalseNegatives(cancel="ignore"), "attract, eliminate"),
        (lambda: FalseNegatives(top=-1), "top=-1"),
        (lambda: FalseNegatives(top=1.5), "top=1.5"),
        (lambda: NTXent("cold"), "given cold"),
        (lambda: SubsampledNTXent("high"), "given high"),
        (lambda: BarlowTwins(-0.1), "weight=-0.1"),
        (lambda: VICReg(25.0, -1.0), "-1.0"),
        (lambda: pairs.ratios(0.0, 4), "0.0"),
        (lambda: pairs.ratios(0.9, 0), "stages=0"),
        (lambda: pairs.ratios(0.9, 4, "rising"), "decreasing, increasing"),
        (lambda: pairs.thresholds([0.1], [0.1], 0.0, 0.5), "positives.*0.0"),
        (lambda: pairs.thresholds([0.1], [], 0.5, 0.5), "negative pairs, and there are none"),
        (lambda: pairs.thresholds([math.nan], [0.1], 0.5, 0.5), "positive pairs, and some are not finite"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(make, words):
    with pytest.raises(InvalidChoice, match=words):
        make()


@every
@pytest.mark.parametrize("z", [*map(torch.ones, [(3, 2), (4,), (0, 2), (4, 0), (4, 2, 2)]), (1, 2)])
def test_what_are_no_pairs_is_refused_in_a_sentence(loss, z):
    with pytest.raises(WrongTarget, match="two views of each image"):
        loss(z, labels(0, 2))


def test_what_a_loss_cannot_do_without_is_named():
    z, y = torch.ones(4, 2), labels(0, 2)
    for loss in (OracleNTXent(), EasyNTXent(by="oracle")):
        with pytest.raises(WrongTarget, match="oracle-simclr"):
            loss(z, y)
        with pytest.raises(WrongTarget, match="got 4 projections and 2 of the oracle"):
            loss.judge(z, y, z[:2])
    for wrong in (y.float(), y[:2]):
        with pytest.raises(WrongTarget, match="compares the labels"):
            FalseNegatives("labels")(z, wrong)
    for loss in (BarlowTwins(), VICReg()):
        with pytest.raises(WrongTarget, match="a batch of one image has none"):
            loss(z[:2], y[:2])


def test_every_named_loss_falls_under_gradient_descent():
    for loss in PAIR_LOSSES.values():
        z: Tensor = drawn(8, 16, 6).detach()
        before = float(loss(z, labels(8, 8)))
        for _ in range(30):
            z.requires_grad_()
            (gradient,) = torch.autograd.grad(loss(z, labels(8, 8)), z)
            z = z.detach() - 0.05 * gradient
        assert float(loss(z, labels(8, 8))) < before - 0.01
