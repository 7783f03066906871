"""MeZO and node perturbation: their formulas, what they tend to, their means, and what they leave alone."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import unlocked as ul
from unlocked.credit import mezo, node_perturbation
from unlocked.credit.mezo import MeZO
from unlocked.credit.node_perturbation import NodePerturbation
from unlocked.credit.per_sample import per_sample
from unlocked.errors import InvalidChoice
from unlocked.losses import cross_entropy, mean_squared_error
from unlocked.probes.memory import SavedBytes

from methods import batch, mlp, state, trainer


def trained(stage):
    """(name, weight) of what is not frozen in a stage's body."""
    return [(name, p) for name, p in stage.body.named_parameters() if p.requires_grad]


def estimates(session, count=1, x=None, y=None):
    """The gradients of `count` steps, each of the same weights: {(stage, name in the body): (count, …)}."""
    seen = {}
    for weights in session.weights:
        stage, j = weights.stage, weights.worker.stage

        def look(stage=stage, j=j):
            for name, p in trained(stage):
                seen.setdefault((j, name), []).append(p.grad.clone())
                p.grad = None

        weights.update = look
    for _ in range(count):
        session.step(*(batch() if x is None else (x, y)))
    return {key: torch.stack(rows) for key, rows in seen.items()}


def exact(chain, x, y, loss=cross_entropy):
    """(loss, gradients) of the whole network, under the same keys."""
    chain = copy.deepcopy(chain)
    value = loss(chain(x), y)
    value.backward()
    return value.detach(), {(j, name): p.grad for j, stage in enumerate(chain) for name, p in trained(stage)}


def spread(rows, target):
    """Of many estimates: how many standard errors their mean is off, root mean square and at most, over all entries."""
    flat = torch.cat([rows[key].flatten(1) for key in rows], 1)
    errors = (flat.mean(0) - torch.cat([target[key].flatten() for key in rows])) / (flat.std(0) / len(flat) ** 0.5)
    return errors.square().mean().sqrt().item(), errors.abs().max().item()


def recorded(monkeypatch, module):
    """What the rule draws, in the order in which it does."""
    drawn = []
    real = module.random_like

    def record(x, guess):
        drawn.append((x, real(x, guess)))
        return drawn[-1][1]

    monkeypatch.setattr(module, "random_like", record)
    return drawn


# ---- MeZO --------------------------------------------------------------------------------------------------------------


def directions(drawn, chain, samples):
    """z of every sample, {(stage, name): z}; and that each is drawn three times alike, and never else."""
    keys = {id(p): (j, name) for j, stage in enumerate(chain) for name, p in trained(stage)}
    by_weight = {key: [z for x, z in drawn if keys[id(x)] == key] for key in keys.values()}
    found = [{} for _ in range(samples)]
    for key, rows in by_weight.items():
        assert len(rows) == 3 * samples
        for k in range(samples):  # plus and minus of each pair, then all again when the scalars have come
            assert torch.equal(rows[2 * k], rows[2 * k + 1]) and torch.equal(rows[2 * k], rows[2 * samples + k])
            found[k][key] = rows[2 * k]
    return found


def loss_at(chain, x, y, z, step, loss=cross_entropy):
    """The loss of the whole network with its weights moved by step · z."""
    for j, stage in enumerate(chain):
        moved = {name: p + step * z[j, name] for name, p in stage.body.named_parameters()}
        x = functional_call(stage.body, moved, (x,))
    return loss(x, y).item()


@given(
    stages=st.integers(1, 5),
    samples=st.integers(1, 3),
    epsilon=st.sampled_from([1e-3, 0.5]),
    guess=st.sampled_from(["gaussian", "rademacher"]),
)
@settings(deadline=None, max_examples=8)
def test_mezo_is_its_formula(stages, samples, epsilon, guess):
    with pytest.MonkeyPatch.context() as patch:
        drawn = recorded(patch, mezo)
        session = trainer(MeZO(epsilon, samples, guess), stages=stages)
        chain, (x, y) = session.chains[0], batch()
        found = estimates(session)
        zs = directions(drawn, chain, samples)
    with torch.no_grad():
        losses = [(loss_at(chain, x, y, z, epsilon), loss_at(chain, x, y, z, -epsilon)) for z in zs]
    for key, rows in found.items():
        expected = sum((plus - minus) / (2 * epsilon) * z[key] for (plus, minus), z in zip(losses, zs)) / samples
        torch.testing.assert_close(rows[0], expected, rtol=1e-10, atol=1e-12)
    if guess == "rademacher":
        assert all(set(z.unique().tolist()) <= {-1, 1} for row in zs for z in row.values())


def scalar(monkeypatch, epsilon, model=None, loss=cross_entropy, **options):
    """(s z), ⟨∇L, z⟩ z and z, as long vectors, of one step with one sample."""
    with monkeypatch.context() as patch:
        drawn = recorded(patch, mezo)
        session = trainer(MeZO(epsilon), model=model, **options)
        session.chains[0][-1].loss = loss
        x, y = batch()
        y = y if loss is cross_entropy else x[:, :3].contiguous()
        found = estimates(session, 1, x, y)
        (z,) = directions(drawn, session.chains[0], 1)
    slope = exact(session.chains[0], x, y, loss)[1]
    z = torch.cat([z[key].flatten() for key in found])
    slope = torch.cat([slope[key].flatten() for key in found])
    return torch.cat([rows[0].flatten() for rows in found.values()]), (slope @ z) * z, z


def test_mezo_tends_to_the_forward_gradient_by_the_square_of_epsilon(monkeypatch):
    errors = []
    for epsilon in (4e-3, 2e-3, 1e-3):
        found, limit, _ = scalar(monkeypatch, epsilon)
        errors.append((found - limit).norm() / limit.norm())
    assert errors[2] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.01) and errors[1] / errors[2] == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("epsilon", [1e-2, 1.0, 30.0])
def test_mezo_is_exact_for_a_loss_that_is_quadratic_in_the_weights(monkeypatch, epsilon):
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3)).double()
    model[1].weight.requires_grad_(False)  # else the loss would be of fourth degree
    found, limit, _ = scalar(monkeypatch, epsilon, model, mean_squared_error, stages=2)
    torch.testing.assert_close(found, limit, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("guess", ["gaussian", "rademacher"])
def test_the_mean_of_mezo_is_the_gradient(guess):
    session = trainer(MeZO(1e-4, 4, guess), stages=2, model=mlp(1))
    rms, worst = spread(estimates(session, 200), exact(session.chains[0], *batch())[1])
    assert 0.6 < rms < 1.4 and worst < 5


def test_the_weights_keep_every_bit_and_batchnorm_counts_one_pass(monkeypatch):
    drawn = recorded(monkeypatch, mezo)
    session = trainer(MeZO(1e-2, 3), stages=2, model=mlp(norm=True, dtype=torch.float32))
    chain, (x, y) = session.chains[0], batch(dtype=torch.float32)
    before, reference = state(session), copy.deepcopy(chain)
    estimates(session, 1, x, y)
    z = directions(drawn, chain, 3)[0]
    for j, stage in enumerate(reference):
        moved = {name: p + 1e-2 * z[j, name] for name, p in stage.body.named_parameters()}
        x = functional_call(stage.body, moved, (x,))  # counts
    after, counted = state(session), dict(nn.Module.named_buffers(reference))
    for name, tensor in after.items():
        buffer = counted.get(name.replace("0.", "stages.", 1))
        assert torch.equal(tensor, before[name] if buffer is None else buffer), name
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_both_passes_of_a_pair_have_the_same_dropout():
    session = trainer(MeZO(1e-7), model=mlp(dropout=0.5))
    for rows in estimates(session, 5).values():
        assert rows.abs().max() < 1e3  # other masks would make a difference of about 1 / 1e-7


def test_remarks_say_how_long_an_estimate_is():
    session = trainer(MeZO(1e-4, 4), stages=2)
    rows, target = estimates(session, 60), exact(session.chains[0], *batch())[1]
    long = torch.cat([grads.flatten(1) for grads in rows.values()], 1).square().sum(1).mean().sqrt()
    gradient = torch.cat([g.flatten() for g in target.values()]).norm()
    (sentence,) = session.credit.remarks(session.chains[0], 12)
    weights = sum(g.numel() for g in target.values())
    said = float(re.search(r"about ([\d.]+) times as long", sentence)[1])
    assert f"With {weights} weights and samples=4" in sentence and said == pytest.approx(
        (long / gradient).item(), rel=0.15
    )


def test_a_head_of_the_last_stage_is_displaced_as_a_part_of_its_body(monkeypatch):
    def fixed(x, guess):
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()), dtype=x.dtype)

    monkeypatch.setattr(mezo, "random_like", fixed)
    found = []
    for apart in (True, False):
        parts = list(mlp(2))
        stages = [ul.Stage(nn.Sequential(*parts[:2]))]
        stages += [
            ul.Stage(nn.Sequential(*parts[2:4]), head=parts[4]) if apart else ul.Stage(nn.Sequential(*parts[2:]))
        ]
        optimizer = lambda ps: torch.optim.SGD(ps, lr=0.1)  # noqa: E731
        session = ul.Trainer(ul.Chain(stages), credit=MeZO(), optimizer=optimizer)
        session.step(*batch())
        found.append([x.detach() for x in nn.Module.parameters(session.chains[0])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_mezo_keeps_nothing_for_a_backward():
    for rule, nothing in ((MeZO(samples=2), True), (NodePerturbation(), False)):
        session = trainer(rule, model=mlp(norm=True))
        with SavedBytes() as meter:
            session.step(*batch())
        assert (meter.peak == 0) == nothing


def test_bytes_and_the_loss_of_the_record_are_those_of_the_formulas():
    session = trainer(MeZO(1e-5, 3), stages=4)
    (value, _), activation = exact(session.chains[0], *batch()), 12 * 7 * 8
    losses = session.step(*batch())
    assert session.bytes_sent == {"activation": 2 * 3 * 3 * activation, "scalars": 3 * 3 * 8}
    assert losses[:3] == [None] * 3 and losses[3] == pytest.approx(value.item(), rel=1e-6)
    for noise, noisy, scalars in (("joint", 3, 3), ("separate", 6, 6)):
        session = trainer(NodePerturbation(antithetic=True, noise=noise), stages=4)
        session.step(*batch())
        sizes = {"activation": 3 * activation, "noisy": 2 * noisy * activation, "scalars": scalars * 12 * 8}
        assert session.bytes_sent == sizes


@pytest.mark.parametrize("rule", [MeZO(1e-3, 2), NodePerturbation(1e-3), NodePerturbation(1e-3, True, "separate")])
def test_accumulated_micro_batches_are_weighted_by_their_samples(rule):
    """With directions that never change: the sum over micro-batches is what the whole batch gives."""

    def fixed(x, guess):
        size = x.shape[1:] if isinstance(rule, NodePerturbation) else x.shape
        one = torch.randn(size, generator=torch.Generator().manual_seed(x.dim()), dtype=x.dtype)
        return one.expand(x.shape).clone()

    found = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (mezo, node_perturbation):
            patch.setattr(module, "random_like", fixed)
        for accumulate in (1, 5):  # parts of 3 and 2 samples
            session = trainer(rule, accumulate=accumulate)
            found.append(estimates(session, 1))
    for key in found[0]:
        torch.testing.assert_close(found[1][key], found[0][key], rtol=1e-6, atol=1e-9)


# ---- node perturbation -------------------------------------------------------------------------------------------------


@given(
    samples=st.integers(1, 4),
    positions=st.integers(0, 3),
    kind=st.sampled_from(["classes", "soft", "numbers", "module"]),
)
@settings(deadline=None, max_examples=40)
def test_the_losses_of_the_samples_are_those_of_batches_of_one(samples, positions, kind):
    shape = (samples, positions, 5) if positions else (samples, 5)
    source = torch.Generator().manual_seed(7)
    output = torch.randn(shape, generator=source, dtype=torch.float64)
    y = {
        "classes": torch.randint(5, shape[:-1], generator=source),
        "soft": torch.randn(shape, generator=source).softmax(-1),  # float32 beside float64
    }.get(kind, torch.randn(shape, generator=source, dtype=torch.float64))
    loss = {"numbers": mean_squared_error, "module": nn.MSELoss()}.get(kind, cross_entropy)
    found = per_sample(loss, output, y)
    assert found.shape == (samples,)
    for i in range(samples):
        torch.testing.assert_close(found[i], loss(output[i : i + 1], y[i : i + 1]))


@given(positions=st.integers(2, 4), left_out=st.integers(0, 7))
@settings(deadline=None, max_examples=20)
def test_the_losses_of_the_samples_have_the_batch_s_mean_where_targets_are_left_out(positions, left_out):
    source = torch.Generator().manual_seed(left_out)
    output = torch.randn((2, positions, 5), generator=source, dtype=torch.float64)
    y = torch.randint(5, (2, positions), generator=source)
    y.flatten()[torch.randperm(2 * positions, generator=source)[: min(left_out, 2 * positions - 1)]] = -100
    found = per_sample(cross_entropy, output, y)
    torch.testing.assert_close(found.mean(), cross_entropy(output, y), rtol=1e-14, atol=0)
    one = cross_entropy(output[:1], y[:1]) * (y[0] != -100).sum() * 2 / (y != -100).sum()
    torch.testing.assert_close(found[0], torch.nan_to_num(one))


def limit(chain, x, y, noise, xis):
    """Stage by stage: (∂h/∂θ)ᵀ (Σ_k ⟨∂ℓ_i/∂h_k, ξ_ik⟩ ξ_i)_i / B for the stages k that count, from autograd."""
    chain = copy.deepcopy(chain)
    activations = []
    for stage in chain:
        x = stage.body(x)
        activations.append(x)
    slopes = torch.autograd.grad(len(y) * cross_entropy(x, y), activations[:-1], retain_graph=True)
    scalars = [(g * xi).sum(1, keepdim=True) for g, xi in zip(slopes, xis)]
    found = {}
    for j, (h, xi) in enumerate(zip(activations, xis)):
        s = sum(scalars) if noise == "joint" else scalars[j]
        weights = dict(chain[j].body.named_parameters())
        grads = torch.autograd.grad(h, list(weights.values()), s * xi / len(y), retain_graph=True)
        found |= {(j, name): g for name, g in zip(weights, grads)}
    return found


@pytest.mark.parametrize("noise", ["joint", "separate"])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("stages", [2, 4])
def test_node_perturbation_tends_to_its_formula(monkeypatch, noise, antithetic, stages):
    errors = []
    for sigma in (2e-3, 1e-3):
        with monkeypatch.context() as patch:
            drawn = recorded(patch, node_perturbation)
            session = trainer(NodePerturbation(sigma, antithetic, noise), stages=stages)
            found = estimates(session)
        xis = [xi for _, xi in drawn[: stages - 1]]
        again = [xi for _, xi in drawn[stages - 1 :]]  # from the top down
        assert all(torch.equal(a, b) for a, b in zip(xis, reversed(again), strict=True))
        expected = limit(session.chains[0], *batch(), noise, xis)
        whole = [torch.cat([rows[key].flatten() for key in expected]) for rows in (found, expected)]
        errors.append(((whole[0] - whole[1]).norm() / whole[1].norm()).item())
    assert errors[1] < (1e-4 if antithetic else 2e-2)
    assert errors[0] / errors[1] == pytest.approx(4 if antithetic else 2, rel=0.1)


def test_the_last_stage_learns_from_its_exact_gradient():
    session = trainer(NodePerturbation(0.1), stages=3)
    target = exact(session.chains[0], *batch())[1]
    for (j, name), rows in estimates(session).items():
        assert torch.allclose(rows[0], target[j, name], rtol=1e-12, atol=1e-15) == (j == 2)


@pytest.mark.parametrize(
    "rule", [NodePerturbation(1e-4, True), NodePerturbation(1e-5, False, "separate", "rademacher")]
)
def test_the_mean_of_node_perturbation_is_the_gradient(rule):
    session = trainer(rule, stages=3, model=mlp(2))
    x, y = batch()
    rows = estimates(session, 60, x.repeat(10, 1), y.repeat(10))
    rows = {key: grads for key, grads in rows.items() if key[0] < 2}  # the last is exact
    rms, worst = spread(rows, exact(session.chains[0], x, y)[1])
    assert 0.6 < rms < 1.4 and worst < 5.5


def test_separate_noise_of_two_stages_is_joint_noise():
    """There is one stage to disturb."""
    rows = [estimates(trainer(NodePerturbation(noise=noise), stages=2)) for noise in ("joint", "separate")]
    assert all(torch.equal(rows[0][key], rows[1][key]) for key in rows[0])


def test_separate_noise_varies_less_than_joint_noise():
    spreads = {}
    for noise in ("joint", "separate"):
        session = trainer(NodePerturbation(1e-4, True, noise), stages=4)
        rows = estimates(session, 40)
        spreads[noise] = rows[0, "0_0.weight"].var(0).sum()
    assert spreads["joint"] > 1.5 * spreads["separate"]


def test_all_passes_have_the_same_dropout_and_statistics_count_the_clean_one():
    session = trainer(NodePerturbation(1e-6, antithetic=True), model=mlp(norm=True, dropout=0.5))
    one = trainer(ul.credit.Backprop(), model=mlp(norm=True, dropout=0.5))
    for rows in estimates(session, 3).values():
        assert rows.abs().max() < 1e3
    for rows in estimates(one, 3).values():
        assert rows.abs().max() < 1e3
    buffers = [dict(nn.Module.named_buffers(trained.chains[0])) for trained in (session, one)]
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])


def test_what_is_not_possible_is_refused_in_a_sentence():
    with pytest.raises(InvalidChoice, match="epsilon=0 is no displacement; give a small number above 0"):
        MeZO(epsilon=0)
    with pytest.raises(InvalidChoice, match="samples=0 is not possible; give a whole number of at least 1"):
        MeZO(samples=0)
    with pytest.raises(InvalidChoice, match="Unknown guess 'gausian'; did you mean 'gaussian'"):
        MeZO(guess="gausian")
    with pytest.raises(InvalidChoice, match="sigma=-1 is no displacement"):
        NodePerturbation(sigma=-1)
    with pytest.raises(InvalidChoice, match="Unknown noise 'both'"):
        NodePerturbation(noise="both")
    chain = ul.cut(mlp(), 3, like=batch()[0])
    chain[-1].loss = nn.L1Loss()
    with pytest.raises(InvalidChoice, match=r"needs the loss of each sample.*this network's loss is L1Loss\. Take one"):
        ul.Trainer(chain, credit=NodePerturbation(), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
