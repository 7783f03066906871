"""Populations: means, ensembles, soups, REPAIR, calibration, diversity, heat maps, and members of a trainer in every world."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import unlocked as ul
from unlocked import soups
from unlocked.errors import InvalidChoice
from unlocked.soups.calibration_error import COLDEST, HOTTEST
from unlocked.soups.diversity import mean_over_pairs
from unlocked.soups.heat_map import lattice, polygon, polygon_weights
from unlocked.soups.predicting import Batches, predict
from unlocked.soups.repairing import _measured
from unlocked.worlds import Distributed, Simulated

from methods import assert_same, batch, data, mlp, trainer
from processes import run_processes

SEEDS = st.integers(0, 2**20)
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def randomised(model, seed):
    """The network with random weights and statistics, as if trained."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if x.is_floating_point():
                drawn = torch.randn(x.shape, generator=source, dtype=x.dtype)
                x.copy_(drawn.abs() + 0.1 if name.endswith("running_var") else drawn)
            else:
                x.fill_(seed)
    return model


def population(count, seed=0, norm=True, depth=2, dtype=torch.float64):
    return [randomised(mlp(depth, norm=norm, dtype=dtype), seed + n) for n in range(count)]


class Images(nn.Module):
    """Convolutions with and without BatchNorm, a transposed one, a linear layer on maps, and a classifier."""

    def __init__(self, seed, bias=True):
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.norm1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, bias=bias)
        self.up = nn.ConvTranspose2d(6, 5, 2)
        self.conv3, self.norm3 = nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5, affine=False)
        self.mix = nn.Linear(5, 3)
        self.classifier = nn.Linear(3, 4)
        self.double()
        with torch.no_grad():
            for norm in (self.norm1, self.norm3):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
            self.norm1.weight.normal_()
            self.norm1.bias.normal_()

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.up(torch.relu(self.conv2(x))))
        x = torch.relu(self.norm3(self.conv3(x)))
        x = torch.relu(self.mix(x.movedim(1, -1)))
        return self.classifier(x.mean((1, 2)))


def image_batches(sizes=(9, 5, 12), seed=0):
    source = torch.Generator().manual_seed(seed)
    rows = [1 + 2 * torch.randn(size, 2, 6, 6, generator=source, dtype=torch.float64) for size in sizes]
    return [(x, torch.zeros(len(x)).long()) for x in rows]


# ---- the mean ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=5).filter(lambda w: sum(w) > 0.1), SEEDS)
def test_the_mean_is_that_of_every_tensor(weights, seed):
    models = population(len(weights), seed)
    states = [copy.deepcopy(model.state_dict()) for model in models]
    for given_weights, shares in ((weights, weights), (None, [1.0] * len(weights))):
        for name, x in soups.averaged(models, given_weights).state_dict().items():
            if x.is_floating_point():
                expected = sum(share * state[name] for share, state in zip(shares, states)) / sum(shares)
                torch.testing.assert_close(x, expected, **EXACT)
            else:
                assert torch.equal(x, states[0][name])
    for model, state in zip(models, states):
        assert_same(dict(model.state_dict()), state)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_mean_of_equal_models_is_the_model(count, dtype):
    model = randomised(mlp(norm=True, dtype=dtype), 3)
    mean = soups.averaged([model] * count)
    torch.testing.assert_close(dict(mean.state_dict()), dict(model.state_dict()), rtol=1e-6, atol=0)
    assert all(x is not y for x, y in zip(mean.parameters(), model.parameters()))


def test_all_weight_on_one_member_is_that_member_bit_for_bit():
    models = population(3)
    with torch.no_grad():
        next(models[0].parameters()).fill_(math.inf)
    found = soups.averaged(models, [0, 2.5, 0])
    wanted = models[1].state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in found.state_dict().items() if x.is_floating_point())


class Tied(nn.Module):
    """One weight, used twice, under two names."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(5, 5, bias=False)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.double()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_tied_parameters_stay_tied():
    models = [Tied(seed) for seed in range(3)]
    mean = soups.averaged(models)
    assert mean.first.weight is mean.second.weight
    torch.testing.assert_close(mean.first.weight, sum(model.first.weight for model in models) / 3)
    with pytest.raises(InvalidChoice, match=r"model 1 has a tensor second.weight that model 0 has not"):
        untied = Tied(0)
        untied.second.weight = nn.Parameter(untied.second.weight.detach().clone())
        soups.averaged([models[0], untied])


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(InvalidChoice, match="no models"):
        soups.averaged([])
    with pytest.raises(InvalidChoice, match=r"0.weight has the shape \(7, 5\) in model 0 and \(4, 5\) in model 1"):
        soups.averaged([nn.Sequential(nn.Linear(5, 7)), nn.Sequential(nn.Linear(5, 4))])
    with pytest.raises(InvalidChoice, match="model 0 has a tensor"):
        soups.averaged([mlp(norm=True), mlp()])
    for weights in ([1.0], [0.0, 0.0], [1.0, -1.0], [math.nan, 1.0]):
        with pytest.raises(InvalidChoice, match="weights"):
            soups.averaged(population(2), weights)


# ---- the ensemble ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_an_ensemble_gives_the_mean_prediction(count):
    models, (x, _) = population(count), batch(20)
    for model in models:
        model.eval()
    mean = sum(model(x).softmax(-1) for model in models) / count
    torch.testing.assert_close(soups.Ensemble(models)(x).exp(), mean, **EXACT)
    outputs = sum(model(x) for model in models) / count
    torch.testing.assert_close(soups.Ensemble(models, "outputs")(x), outputs, **EXACT)
    with pytest.raises(InvalidChoice, match="did you mean 'probabilities'"):
        soups.Ensemble(models, "probability")


# ---- the greedy soup ---------------------------------------------------------------------------------------------------


def accuracy_of(model, held_out):
    return (predict(model, Batches(held_out)).outputs.argmax(-1) == held_out.y).double().mean().item()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), SEEDS, st.sampled_from([0.02, 0.3, 1.0]), st.booleans())
def test_the_greedy_soup_is_never_below_its_best_member(count, seed, apart, refresh):
    start, held_out = randomised(mlp(2, norm=True), seed), data(40, seed)
    models = [soups.averaged([start, other], [1 - apart, apart]) for other in population(count, seed + 1)]
    found = soups.greedy_soup(models, held_out, refresh=data(40, 1) if refresh else None)
    alone = [accuracy_of(model, held_out) for model in models]
    assert found.alone == pytest.approx(alone)
    assert accuracy_of(found.model, held_out) == found.score >= max(alone)
    if not refresh:
        assert list(found.members) == reference(models, alone, held_out)


def reference(models, alone, held_out):
    """The recipe, with a running mean over state dicts."""
    order = sorted(range(len(models)), key=lambda n: (-alone[n], n))
    state, chosen, best = models[order[0]].state_dict(), [order[0]], alone[order[0]]
    for n in order[1:]:
        size, other = len(chosen), models[n].state_dict()
        mixed = {name: (x * size + other[name]) / (size + 1) for name, x in state.items()}
        trial = copy.deepcopy(models[0])
        trial.load_state_dict(mixed)
        if accuracy_of(trial, held_out) > best:
            state, chosen, best = mixed, [*chosen, n], accuracy_of(trial, held_out)
    return chosen


def test_a_member_that_changes_nothing_is_left_out():
    (model,) = population(1)
    assert soups.greedy_soup([model] * 4, data()).members == (0,)


def test_a_greedy_soup_of_targets_that_are_no_classes_lowers_the_loss():
    x = torch.randn(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, apart = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    models = [nn.Linear(5, 3, bias=False).double() for _ in range(3)]
    with torch.no_grad():
        for model, distance in zip(models, (3, -1, 1)):
            model.weight.copy_(weight + distance * apart)
    target = x @ weight.T
    found = soups.greedy_soup(models, (x, target))
    losses = [-F.mse_loss(model(x), target).item() for model in models]
    assert found.alone == pytest.approx(losses) and found.members == (1, 2)
    assert found.score == pytest.approx(0, abs=1e-20) and max(losses) < -0.1


# ---- BatchNorm ---------------------------------------------------------------------------------------------------------


def test_refreshed_statistics_are_plain_means_over_the_batches():
    (model,) = population(1, depth=1)
    model.eval()
    rows = [batch(n, n) for n in (8, 12, 30)]
    inside = [model[0](x) for x, _ in rows]
    soups.refresh_batchnorm(model, iter(rows))
    torch.testing.assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in inside]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([h.var(0) for h in inside]).mean(0))
    assert model[1].momentum == 0.1 and not model[1].training
    with pytest.raises(InvalidChoice, match="no data"):
        soups.refresh_batchnorm(model, [])


def test_refreshing_keeps_dropout_and_the_users_random_state():
    models = [randomised(mlp(2, norm=True, dropout=rate), 5) for rate in (0.0, 0.5)]
    rows = [batch(30, n) for n in range(3)]
    before = torch.get_rng_state()
    found = []
    for model, seed in ((models[0], 0), (models[1], 0), (models[1], 0), (models[1], 1)):
        soups.refresh_batchnorm(model, rows, seed)
        norms = [part for part in model if isinstance(part, nn.BatchNorm1d)]
        found.append(norms[-1].running_var.clone())  # the second norm lies behind a dropout
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found[1], found[2])
    assert not torch.allclose(found[0], found[1]) and not torch.equal(found[1], found[3])


def test_the_trainer_refreshes_by_the_same_rule():
    session = trainer(ul.credit.Backprop(), replicas=2, model=mlp(norm=True))
    for k in range(2):
        session.step(*batch(24, k))
    plain = session.averaged()
    soups.refresh_batchnorm(plain, session._refreshing(data(128)))
    assert_same(dict(plain.state_dict()), dict(session.averaged(refresh=data(128)).state_dict()))


# ---- REPAIR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_repairing_equal_models_changes_nothing(count, classifier):
    rows, model = image_batches(), Images(1)
    found = soups.repair(model, [copy.deepcopy(model) for _ in range(count)], rows, classifier=classifier)
    x = image_batches((10,), 7)[0][0]
    torch.testing.assert_close(found.model.eval()(x), model.eval()(x), rtol=1e-8, atol=1e-9)
    assert ("classifier" in found.corrected) == classifier and ("classifier" in found.left_out) != classifier


@pytest.mark.parametrize("one_pass", [False, True])
def test_after_repair_every_channel_has_its_targets(one_pass):
    rows = image_batches((40,) if one_pass else (9, 5, 12))
    members = [Images(seed) for seed in range(3)]
    mean = soups.averaged(members)
    found = soups.repair(mean, members, rows, classifier=True, one_pass=one_pass)
    names = ["norm1", "conv2", "up", "norm3", "mix", "classifier"]
    assert list(found.corrected) == names and not found.scaled and not found.left_out

    def statistics(model):
        """By hand: of all that comes out of each layer, in one row."""
        seen = {name: [] for name in names}
        parts = dict(model.named_modules())
        for name in names:
            parts[name].register_forward_hook(
                lambda part, given, y, name=name: seen[name].append(
                    (y if isinstance(part, nn.Linear) else y.movedim(1, -1)).flatten(0, -2)
                )
            )
        model.eval()
        for x, _ in rows:
            model(x)
        whole = {name: torch.cat(parts) for name, parts in seen.items()}
        return {name: (x.mean(0), x.std(0, correction=0)) for name, x in whole.items()}

    each = [statistics(copy.deepcopy(member)) for member in members]
    after, before = statistics(copy.deepcopy(found.model)), statistics(copy.deepcopy(mean))
    for name in names:
        for k in range(2):
            target = sum(one[name][k] for one in each) / 3
            torch.testing.assert_close(after[name][k], target, rtol=1e-8, atol=1e-8)
            assert not torch.allclose(before[name][k], target, rtol=1e-2)


def test_one_pass_over_one_batch_is_layer_by_layer():
    members, rows = [Images(seed) for seed in range(2)], image_batches((30,))
    found = [soups.repair(soups.averaged(members), members, rows, one_pass=way).model for way in (True, False)]
    torch.testing.assert_close(*(dict(model.state_dict()) for model in found), rtol=1e-8, atol=1e-9)


def test_a_repaired_batchnorm_has_its_own_inputs_statistics():
    members, rows = [Images(seed) for seed in range(2)], image_batches()
    found = soups.repair(soups.averaged(members), members, rows).model
    h = torch.cat([found.conv1(x) for x, _ in rows]).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(found.norm1.running_mean, h.mean(0))
    torch.testing.assert_close(found.norm1.running_var, h.var(0, correction=0))


def test_a_layer_without_a_bias_is_only_scaled():
    members, rows = [Images(seed, bias=False) for seed in range(2)], image_batches()
    found = soups.repair(soups.averaged(members), members, rows)
    assert found.scaled == ("conv2",) and found.model.conv2.bias is None
    target = sum(_measured(member, ["conv2"], rows)["conv2"].std for member in members) / 2
    torch.testing.assert_close(_measured(found.model, ["conv2"], rows)["conv2"].std, target)


class Odd(nn.Module):
    """Layers that REPAIR cannot correct."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.twice = nn.Linear(5, 5)
        self.one, self.other = nn.Linear(5, 5), nn.Linear(5, 5)
        self.other.weight = self.one.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
        self.norm = nn.BatchNorm1d(5, track_running_stats=False)
        self.unused = nn.Linear(2, 2)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        x = self.normed(self.other(self.one(self.twice(self.twice(x)))))
        return self.last(self.norm(torch.tanh(x)))


def test_what_repair_leaves_out_it_tells():
    model, rows = Odd().double(), [batch(20)]
    found = soups.repair(model, [Odd().double()], rows)
    assert list(found.left_out) == ["twice", "one", "other", "normed", "norm", "last"]
    assert "twice" not in found.corrected and found.corrected == found.scaled == ()
    assert_same(dict(found.model.state_dict()), dict(model.state_dict()))


def test_a_constant_channel_is_shifted_not_scaled():
    members = [mlp(1).double() for _ in range(2)]
    with torch.no_grad():
        for sign, member in zip((1, -1), members):
            member[0].weight[0] = sign  # they cancel
            member[0].bias[0] = 1 + sign
    found = soups.repair(soups.averaged(members), members, [batch(30)]).model
    assert all(x.isfinite().all() for x in found.parameters())
    output = found[0](batch(30)[0])[:, 0]
    target = sum(member[0](batch(30)[0])[:, 0].mean() for member in members) / 2
    torch.testing.assert_close(output, target.expand(30))


# ---- calibration -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(2, 6), st.integers(1, 20), SEEDS, st.sampled_from([0.3, 1.0, 4.0]))
def test_the_calibration_error_is_that_of_a_direct_loop(samples, classes, bins, seed, heat):
    source = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(samples, classes, generator=source, dtype=torch.float64)
    y = torch.randint(classes, (samples,), generator=source)
    total = 0.0
    p = (z / heat).softmax(-1)
    for m in range(bins):
        inside = [i for i in range(samples) if m / bins < p[i].max().item() <= (m + 1) / bins]
        if inside:
            right = sum(int(p[i].argmax() == y[i]) for i in inside) / len(inside)
            sure = sum(p[i].max().item() for i in inside) / len(inside)
            total += len(inside) / samples * abs(right - sure)
    assert soups.expected_calibration_error(z, y, heat, bins) == pytest.approx(total, abs=1e-12)


def test_known_calibration_errors():
    z = torch.tensor([[0.0, 0.0]] * 4, dtype=torch.float64)
    assert soups.expected_calibration_error(z, torch.tensor([0, 0, 1, 1])) == pytest.approx(0)
    edge = torch.tensor([[0.5, 0.5, 0.0], [0.4, 0.3, 0.3]], dtype=torch.float64).log()  # ½ belongs to (0, ½]
    assert soups.expected_calibration_error(edge, torch.tensor([0, 1]), bins=2) == pytest.approx(0.05)
    sure = torch.tensor([[50.0, 0.0]] * 4, dtype=torch.float64)
    assert soups.expected_calibration_error(sure, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.75)


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 80), st.integers(2, 5), SEEDS, st.floats(0.05, 20))
def test_the_optimal_temperature_has_the_least_likelihood_loss(samples, classes, seed, true):
    source = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(samples, classes, generator=source, dtype=torch.float64)
    y = torch.multinomial(z.softmax(-1), 1, generator=source).flatten()
    z = z * true  # so that T ≈ true
    found = soups.optimal_temperature(z, y)
    grid = [COLDEST * (HOTTEST / COLDEST) ** (k / 300) for k in range(301)]
    losses = [F.cross_entropy(z / heat, y).item() for heat in [found, *grid]]
    assert losses[0] <= min(losses) + 1e-12
    if COLDEST < found < HOTTEST / 3:
        assert soups.optimal_temperature(3 * z, y) == pytest.approx(3 * found, rel=1e-6)


def test_temperatures_without_an_optimum_are_the_bounds():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert soups.optimal_temperature(z, torch.tensor([0, 1])) == COLDEST
    assert soups.optimal_temperature(z, torch.tensor([1, 0])) == HOTTEST


# ---- diversity ---------------------------------------------------------------------------------------------------------


def test_disagreement_is_the_share_of_different_answers():
    answers = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 1], [2, 2, 2, 2]])
    found = soups.disagreement([F.one_hot(row, 3).double() for row in answers])
    assert found.tolist() == [[0, 0.5, 0.75], [0.5, 0, 1], [0.75, 1, 0]]
    assert mean_over_pairs(found) == pytest.approx((0.5 + 0.75 + 1) / 3)
    assert mean_over_pairs(soups.disagreement([torch.eye(3)])) == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), SEEDS)
def test_distance_to_consensus(count, seed):
    models = population(count, seed)
    rows = torch.stack([nn.utils.parameters_to_vector(model.parameters()).detach() for model in models])
    apart = rows - rows.mean(0)
    found = soups.distance_to_consensus(models)
    assert found.whole == pytest.approx(apart.norm(dim=1).mean().item())
    cuts = [len(rows[0]) * k // 4 for k in range(5)]
    wanted = [apart[:, a:b].norm(dim=1).mean().item() for a, b in itertools.pairwise(cuts)]
    assert found.quarters == pytest.approx(wanted)
    assert soups.distance_to_consensus([models[0]] * 3).whole == pytest.approx(0, abs=1e-12)


def test_the_distance_leaves_a_chains_heads_out():
    session = trainer(ul.credit.DGL(head="linear", budget=None), replicas=2)
    chains = session.members()
    with torch.no_grad():
        for x in chains[0][0].head.parameters():
            x.add_(1)
    assert soups.distance_to_consensus(chains).whole == 0
    with torch.no_grad():
        next(chains[0][2].body.parameters()).add_(1)
    assert soups.distance_to_consensus(chains).whole > 0


# ---- the heat map ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 4, 5])
def test_the_weights_of_a_point(count):
    corners = torch.tensor(polygon(count), dtype=torch.float64)
    points = lattice(count, 4)
    assert len(points) == len(set(points)) == 1 + count * 4 * 5 // 2
    for point in points:
        weights = polygon_weights(count, point)
        assert weights.min() >= 0 and weights.sum() == pytest.approx(1)
        torch.testing.assert_close(weights @ corners, torch.tensor(point, dtype=torch.float64), rtol=0, atol=1e-9)
    assert polygon_weights(count, (0.0, 0.0)).tolist() == pytest.approx([1 / count] * count)
    middle = tuple(((corners[0] + 3 * corners[1]) / 4).tolist())
    assert polygon_weights(count, middle).tolist() == pytest.approx([0.25, 0.75] + [0] * (count - 2))
    for n, corner in enumerate(polygon(count)):
        assert polygon_weights(count, corner).tolist() == [float(n == m) for m in range(count)]


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("count", [3, 5])
def test_the_corners_of_a_heat_map_are_the_members(count, refresh, tmp_path):
    models, held_out = population(count), data(50, 2)
    found = soups.heat_map(models, held_out, steps=2, refresh=data(40) if refresh else None)
    assert [found.values[k] for k in found.corners] == [accuracy_of(model, held_out) for model in models]
    centre = soups.averaged(models)
    if refresh:
        soups.refresh_batchnorm(centre, Batches(data(40)))
    assert found.values[0] == accuracy_of(centre, held_out) and found.what == "accuracy"
    for name in ("map.png", "map.svg"):
        found.draw(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    json.dumps(found.to_json())
    with pytest.raises(InvalidChoice, match=r"\.svg or \.png"):
        found.draw(tmp_path / "map.gif")


def test_a_heat_map_needs_three_to_five_members():
    for count in (2, 6):
        with pytest.raises(InvalidChoice, match=f"3 to 5 members as its corners, got {count}"):
            soups.heat_map(population(count), data())


# ---- all of it ---------------------------------------------------------------------------------------------------------


def test_the_scores_of_a_population_are_those_of_its_parts():
    models, train, held_out, test = population(3), data(80, 5), data(40, 6), data(60, 7)
    found = soups.evaluate_population(models, test, validation=held_out, train=train, batch_size=32, measure=True)
    assert all(model.training for model in models)
    assert [one.accuracy for one in found.members] == [accuracy_of(model, test) for model in models]
    assert found.members[found.best].accuracy == max(one.accuracy for one in found.members)
    assert found.members[found.worst].accuracy == min(one.accuracy for one in found.members)
    assert found.averaged.accuracy == accuracy_of(soups.averaged(models), test)
    together = soups.Ensemble(models).eval()(test.x)
    assert found.ensemble.loss == pytest.approx(F.cross_entropy(together, test.y).item())
    assert found.ensemble.accuracy == pytest.approx((together.argmax(1) == test.y).double().mean().item())
    assert found.ensemble.ece == pytest.approx(soups.expected_calibration_error(together, test.y))
    on_held_out = soups.Ensemble(models).eval()(held_out.x)
    heat = soups.optimal_temperature(on_held_out, held_out.y)
    assert found.ensemble.temperature == pytest.approx(heat)
    assert found.ensemble.calibrated_ece == pytest.approx(soups.expected_calibration_error(together, test.y, heat))
    assert found.mean_ece == pytest.approx(sum(one.ece for one in found.members) / 3)
    assert found.greedy_score >= max(found.validation_scores)
    assert found.validation_scores == [accuracy_of(model, held_out) for model in models]
    assert found.refreshed is not None and found.repaired is not None
    one, all_of_them = found.members[0].cost, found.ensemble.cost
    assert (one.passes, all_of_them.passes, found.averaged.cost.passes) == (1, 3, 1)
    assert all_of_them.flops == 3 * one.flops == 3 * 2 * (5 * 7 + 7 * 7 + 7 * 3)
    assert all_of_them.parameters == 3 * one.parameters == 3 * sum(x.numel() for x in models[0].parameters())
    assert one.seconds > 0
    assert json.loads(json.dumps(found.to_json()))["distances"]["whole"] == found.distances.whole


def test_nothing_is_chosen_by_the_test_data():
    models = population(4)
    found = soups.evaluate_population(models, data(50, 1))
    assert found.greedy is None and found.refreshed is None and found.repaired is None
    assert any("no greedy soup" in note for note in found.notes)
    assert any("temperatures are those of the test data" in note for note in found.notes)
    chosen = {soups.evaluate_population(models, data(50, s), validation=data(30)).greedy_members[0] for s in range(4)}
    assert len(chosen) == 1


def test_data_may_be_batches_pairs_or_data():
    models, test = population(2), data(50, 1)
    given = [test, (test.x, test.y), list(zip(test.x.split(16), test.y.split(16)))]
    given.append(iter(given[-1]))
    found = [soups.evaluate_population(models, one, repair=False) for one in given]
    for one in found[1:]:
        assert one.averaged.loss == pytest.approx(found[0].averaged.loss)
        assert one.disagreement == found[0].disagreement
    with pytest.raises(InvalidChoice, match="no data"):
        soups.evaluate_population(models, iter([]))


def test_targets_that_are_no_classes_have_losses_only():
    models, (x, _) = population(3, norm=False), batch(40)
    y = torch.randn(40, 3, dtype=torch.float64)
    found = soups.evaluate_population(models, (x, y), validation=(x, y), train=(x, y))
    mean = sum(model(x) for model in models) / 3
    assert found.ensemble.loss == pytest.approx(F.mse_loss(mean, y).item())
    assert found.ensemble.accuracy is found.ensemble.ece is found.disagreement is found.mean_ece is None
    assert found.members[found.best].loss == min(one.loss for one in found.members)
    assert "losses only" in found.notes[0]


def test_data_that_do_not_fit_are_refused_in_a_sentence():
    models = population(2)
    with pytest.raises(InvalidChoice, match=r"cannot take samples of shape \(4,\)"):
        soups.evaluate_population(models, (torch.zeros(5, 4).double(), torch.zeros(5).long()))
    with pytest.raises(InvalidChoice, match="class 3, but the network has only 3 outputs"):
        soups.evaluate_population(models, (torch.zeros(5, 5).double(), torch.full((5,), 3)))


def test_a_share_of_the_training_data_is_held_out():
    train = ul.data.from_tensors(torch.arange(100).double()[:, None], torch.arange(100) % 4)
    rest, held = soups.hold_out(train, 0.2)
    assert len(held) == 20 and len(rest) == 80
    assert sorted([*rest.x.flatten().tolist(), *held.x.flatten().tolist()]) == list(range(100))
    assert held.y.bincount().tolist() == [5] * 4
    assert torch.equal(soups.hold_out(train, 0.2)[1].x, held.x)
    assert not torch.equal(soups.hold_out(train, 0.2, seed=1)[1].x, held.x)
    for share in (0, 1, 0.001, -0.5):
        with pytest.raises(InvalidChoice, match="validation share"):
            soups.hold_out(train, share)
    text = ul.data.dataset.Data(torch.arange(200).byte(), None, 256, "text", (10,))
    rest, held = soups.hold_out(text, 0.25)
    assert torch.equal(torch.cat([rest.x, held.x]), text.x) and len(held.x) == 50


# ---- members that do not share a start ---------------------------------------------------------------------------------


def trained_on_digits(initial, order, train):
    """A small network that solves the digits."""
    torch.manual_seed(initial)
    sizes = [64, 32, 32, 32, 32]
    hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for epoch in range(5):
        for x, y in train.batches(32, epoch=epoch, seed=order):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def test_networks_of_different_initialisations_average_to_chance():
    """Each of them solves the digits, and so does their ensemble, and the mean of those that share a start."""
    train, test = ul.data.load("digits")
    rest, held = soups.hold_out(train)
    apart = [trained_on_digits(n, n, rest) for n in range(4)]
    found = soups.evaluate_population(apart, test, validation=held)
    assert min(one.accuracy for one in found.members) > 0.9 and found.ensemble.accuracy > 0.93
    assert found.averaged.accuracy < 0.25  # chance is 0.1
    assert len(found.greedy_members) == 1 and found.greedy.accuracy > 0.9
    near = [apart[0], trained_on_digits(0, 9, rest)]
    close = soups.evaluate_population(near, test)
    assert close.averaged.accuracy > 0.7 and close.distances.whole < found.distances.whole


# ---- a trainer's members -----------------------------------------------------------------------------------------------


def tied_stage():
    """A network whose first stage has a tied parameter."""
    torch.manual_seed(0)
    return nn.Sequential(Tied(0), nn.BatchNorm1d(5).double(), nn.Tanh(), nn.Linear(5, 3).double())


def session_of(kind, world=None):
    model = tied_stage() if kind == "tied" else mlp(norm=True)
    session = trainer(ul.credit.DGL(head="linear", budget=None), stages=2, replicas=2, model=model, world=world)
    for k in range(3):
        session.step(*batch(24, k))
    return session


@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_members_are_the_replicas(kind):
    session = session_of(kind)
    found = session.members()
    assert len(found) == 2
    for chain, own in zip(found, session.chains):
        assert_same(dict(chain.state_dict()), dict(own.state_dict()))
        assert not {id(x) for x in chain.parameters()} & {id(x) for x in own.parameters()}
    assert_same(dict(soups.averaged(found).state_dict()), dict(session.averaged().state_dict()))
    x, _ = batch(9, 4)
    torch.testing.assert_close(soups.Ensemble(found).eval()(x).exp(), session.ensemble(x), **EXACT)
    scores = soups.evaluate_population(found, data(40))
    whole = session.evaluate(data(40))
    assert whole.members == pytest.approx([one.accuracy for one in scores.members])
    assert (whole.accuracy, whole.ensemble) == pytest.approx((scores.averaged.accuracy, scores.ensemble.accuracy))


def test_a_parameter_tied_inside_a_stage_is_averaged_and_stays_tied():
    mean = session_of("tied").averaged()
    tied = next(part for part in mean.modules() if isinstance(part, Tied))
    assert tied.first.weight is tied.second.weight
    refreshed = session_of("tied").averaged(refresh=data(80))
    assert torch.equal(dict(refreshed.state_dict())["0.first.weight"], dict(mean.state_dict())["0.first.weight"])


def test_a_network_trained_by_all_replicas_is_one_member():
    session = trainer(ul.credit.Backprop(), ul.consensus.CDP(form="zero"), replicas=3)
    session.step(*batch(24))
    (only,) = session.members()
    assert_same(dict(only.state_dict()), dict(session.averaged().state_dict()))


def test_members_in_the_simulated_world():
    simulated = session_of("plain", Simulated(ul.simulation.Hardware())).members()
    for chain, own in zip(simulated, session_of("plain").members()):
        assert_same(dict(chain.state_dict()), dict(own.state_dict()))


def members_on(cluster, kinds):
    found = []
    for kind in kinds:
        with Distributed(cluster) as world:
            session = session_of(kind, world)
            members, mean = session.members(), session.averaged()
            here = None if members is None else [dict(chain.state_dict()) for chain in members]
            found.append((here, None if mean is None else dict(mean.state_dict())))
    return found


@pytest.mark.parametrize("count", [2, 4])
def test_members_on_processes_are_those_in_process(count):
    kinds = ["plain", "tied"]
    first, *others = run_processes(members_on, count, kinds)
    assert all(pair == (None, None) for rows in others for pair in rows)
    for kind, (members, mean) in zip(kinds, first):
        session = session_of(kind)
        for mine, chain in zip(members, session.chains, strict=True):
            assert_same(mine, dict(chain.state_dict()))
        assert_same(mean, dict(session.averaged().state_dict()))


def sharded_members(cluster):
    with Distributed(cluster) as world:
        session = trainer(ul.credit.Backprop(), ul.consensus.TorchFullyShard(), stages=1, replicas=2, world=world)
        for k in range(2):
            session.step(*batch(24, k))
        members, mean = session.members(), session.averaged()
    return None if members is None else [dict(chain.state_dict()) for chain in [*members, mean]]


def test_members_whose_parameters_are_in_parts_are_whole():
    found, nothing = run_processes(sharded_members, 2)
    assert nothing is None and len(found) == 3
    assert_same(found[0], found[2])
    assert_same(found[1], found[2])
