"""The linear model of dimensional collapse: its dynamics are a gradient, and similar pairs alone leave its dimensions be."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.errors import InvalidChoice
from unlocked.pairs import NTXent, SubsampledNTXent
from unlocked.pairs.toy import dynamics, interleaved, noisy_views, spectrum, train

quickly = settings(max_examples=25, deadline=None, derandomize=True)


def data(seed, points, dimensions=5, noisy=2, sigma=1.5):
    generator = torch.Generator().manual_seed(seed)
    x, other = noisy_views(points, sigma, generator, dimensions, noisy)
    weight = torch.randn(3, dimensions, generator=generator, dtype=torch.float64) / 2
    return weight.requires_grad_(), x, other


def info_nce(weight, x, other, radius=math.inf):
    """L by its formula: B rows, the positive of a point its other view, its negatives the first views of other points."""
    z, z_other, loss = x @ weight.T, other @ weight.T, weight.sum() * 0
    for i in range(len(x)):
        square = ((z[i] - z_other[i]) ** 2).sum()
        if float(square.detach()) >= radius**2:
            continue
        e = torch.exp(-square / 2)
        whole = e
        for k in range(len(x)):
            square = ((z[i] - z[k]) ** 2).sum()
            if k != i and float(square.detach()) < radius**2:
                whole = whole + torch.exp(-square / 2)
        loss = loss - torch.log(e / whole)
    return loss


@quickly
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.2, 6) | st.just(math.inf))
def test_the_dynamics_are_minus_the_gradient_of_info_nce(seed, points, radius):
    weight, x, other = data(seed, points)
    (gradient,) = torch.autograd.grad(info_nce(weight, x, other, radius), weight)
    torch.testing.assert_close(dynamics(weight.detach(), x, other, radius), -gradient, rtol=1e-9, atol=1e-10)


@quickly
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_the_dynamics_are_equation_3_5_term_by_term(seed, points):
    """Σ_{i,l} s_il (z_i − z_l)(x_i − x_l)ᵀ − Σ_i (1 − s_ii') (z'_i − z_i)(x'_i − x_i)ᵀ"""
    weight, x, other = data(seed, points)
    weight = weight.detach()
    z, z_other, change = x @ weight.T, other @ weight.T, torch.zeros(3, 5, dtype=torch.float64)
    for i in range(points):
        e = {k: torch.exp(-((z[i] - z[k]) ** 2).sum() / 2) for k in range(points) if k != i}
        positive = torch.exp(-((z[i] - z_other[i]) ** 2).sum() / 2)
        whole = sum(e.values()) + positive
        for k in e:
            change += e[k] / whole * torch.outer(z[i] - z[k], x[i] - x[k])
        change -= (1 - positive / whole) * torch.outer(z_other[i] - z[i], other[i] - x[i])
    torch.testing.assert_close(dynamics(weight, x, other), change)


def test_the_identity_is_no_equilibrium_of_all_pairs_but_one_of_near_pairs():
    """At W = I the terms of a point are at most 2 r² in norm, and 0 once no negative is nearer than r."""
    _, x, other = data(0, 40)
    identity = torch.eye(5, dtype=torch.float64)
    assert dynamics(identity, x, other).norm() > 1
    distances = torch.cdist(x, x).fill_diagonal_(math.inf)
    nearest = float(distances.min()) * (1 - 1e-6)
    pushed = float(((other - x).norm(dim=1) < nearest).sum())
    assert pushed > 0  # positives are kept, and still nothing moves
    assert not dynamics(identity, x, other, nearest).any()
    moves = []
    for radius in (4.0, 2.5, 1.6):
        moves.append(float(dynamics(identity, x, other, radius).norm()))
        assert 0 < moves[-1] <= 2 * len(x) * radius**2
    assert moves[0] > moves[1] > moves[2]


@quickly
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_without_negatives_every_weight_is_an_equilibrium(seed, points):
    weight, x, other = data(seed, points)
    weight = weight.detach()
    z = x @ weight.T
    nearest = float(torch.cdist(z, z).fill_diagonal_(math.inf).min()) * (1 - 1e-6) if points > 1 else math.inf
    assert dynamics(weight, x, other, nearest).abs().max() < 1e-12


def test_the_identity_is_an_equilibrium_of_the_cosine_loss_too():
    """Gradient descent on similar pairs alone stays where it began, if no negative is similar; on all pairs it does not."""
    views = interleaved(*noisy_views(8, 1.5, torch.Generator().manual_seed(1)))
    rows = torch.nn.functional.normalize(views)
    image = torch.arange(16) // 2
    negative = (rows @ rows.T)[image[:, None] != image].max()
    loss = SubsampledNTXent(float(negative) + 1e-6)
    assert float(loss.judge(views, image).notes["positives kept"]) > 0
    identity = torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(train(loss, views, 20, 5.0), identity, rtol=0, atol=1e-9)
    assert (train(NTXent(), views, 1, 5.0) - identity).norm() > 0.1


def trailing(threshold, seed):
    """Mean of the 8 trailing singular values of the covariance of z over the greatest, after training."""
    views = interleaved(*noisy_views(64, 1.5, torch.Generator().manual_seed(seed)))
    return float(spectrum(views @ train(SubsampledNTXent(threshold), views, 120, 10.0).T)[-8:].mean())


def test_what_augmentation_moves_collapses_and_with_similar_pairs_alone_does_not():
    """Over seeds the means are many standard errors apart; without training the trailing values are no smaller than half."""
    seeds, found = range(4), {}
    for threshold in (-1.0, 0.5, 0.75):
        values = [trailing(threshold, seed) for seed in seeds]
        found[threshold] = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    (plain, plain_error), (some, some_error), (most, most_error) = found.values()
    assert plain + 3 * plain_error < 1e-4
    assert some - 3 * some_error > plain + 3 * plain_error
    assert most - 2 * most_error > some + 2 * some_error
    assert most - 3 * most_error > 0.01


def test_points_are_standard_normal_and_only_the_last_entries_are_noisy():
    x, other = noisy_views(4000, 1.5, torch.Generator().manual_seed(3), 6, 2)
    assert torch.equal(x[:, :4], other[:, :4])
    expected = torch.diag(torch.tensor([1.0] * 4 + [1 + 1.5**2] * 2, dtype=torch.float64))
    torch.testing.assert_close(torch.cov(x.T), expected, rtol=0, atol=0.25)
    torch.testing.assert_close(
        (x - other)[:, 4:].var(0), torch.full((2,), 2 * 1.5**2, dtype=torch.float64), rtol=0.15, atol=0
    )
    views = interleaved(x, other)
    assert torch.equal(views[0::2], x) and torch.equal(views[1::2], other)


def test_the_spectrum_is_of_the_covariance():
    z = torch.randn(50, 4, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0, 0.0]) + 7
    values = torch.linalg.eigvalsh((z - z.mean(0)).T @ (z - z.mean(0))).flip(0)
    torch.testing.assert_close(spectrum(z), values / values[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("radius", [0.0, -1.0, math.nan])
def test_a_radius_that_is_none_is_refused_in_a_sentence(radius):
    _, x, other = data(0, 3)
    with pytest.raises(InvalidChoice, match="above 0"):
        dynamics(torch.eye(5, dtype=torch.float64), x, other, radius)
