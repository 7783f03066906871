"""Representation probes: each number is its formula, and looking changes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import unlocked as ul
from unlocked.chain import Chain, Stage
from unlocked.cli import main
from unlocked.config import Options, resolve
from unlocked.errors import BadData, InvalidChoice
from unlocked.losses import cross_entropy, mean_squared_error
from unlocked.merging import digest
from unlocked.method_names import parse_method
from unlocked.probe_command import probe_comparison
from unlocked.probes import Explanation, explain
from unlocked.probes.features import to_rows
from unlocked.probes.linear_probe import RIDGES, Moments, ProbeScore, chosen, fit
from unlocked.probes.spectra import effective_rank, eigenvalues, participation_ratio, singular_values
from unlocked.report import write_report
from unlocked.running import run

import methods as m

pytestmark = pytest.mark.xdist_group("representation")  # the runs are made once


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(h: Tensor, y: Tensor, columns: int, parts: int = 4) -> Moments:
    """Row by row in some batches, counted from a point that is not the mean."""
    made = Moments((h[0].double(), y[0].double() if y.is_floating_point() else torch.zeros(columns).double()))
    for some, labels in zip(h.tensor_split(parts), y.tensor_split(parts)):
        made.add(some, labels)
    return made


def one_hot(y: Tensor, columns: int) -> np.ndarray:
    return nn.functional.one_hot(y, columns).double().numpy()


def by_hand(h: Tensor, targets: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The formula: standardise, solve, add the mean. (W, ȳ, μ, σ)"""
    rows = h.double().numpy()
    mean, deviation = rows.mean(0), rows.std(0)
    z = (rows - mean) / deviation
    goal = targets.mean(0)
    weight = np.linalg.solve(z.T @ z / len(z) + ridge * np.eye(z.shape[1]), z.T @ (targets - goal) / len(z))
    return weight, goal, mean, deviation


# ---- the probe ----------------------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("kind", ["classes", "values"])
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_the_probe_is_ridge_regression_on_standardised_features(kind: str, ridge: float) -> None:
    h = normal(60, 4) * torch.tensor([1.0, 30.0, 0.01, 2.0]) + torch.tensor([0.0, 500.0, 3.0, -7.0])
    y = torch.arange(60) % 3 if kind == "classes" else normal(60, 3, seed=1) + 1000
    targets = one_hot(y, 3) if kind == "classes" else y.numpy()
    weight, goal, mean, deviation = by_hand(h, targets, ridge)
    new = normal(9, 4, seed=2)
    expected = (new.numpy() - mean) / deviation @ weight + goal
    assert torch.allclose(fit(moments(h, y, 3), ridge).predict(new), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.covering
@pytest.mark.parametrize("kind", ["classes", "values"])
def test_the_ridge_chosen_errs_least_on_rows_not_fitted_to_and_all_rows_are_fitted_to(kind: str) -> None:
    h = normal(70, 30)  # nearly as many features as rows: the smallest ridge is not the best
    values = h[:, :2] + 2 * normal(70, 2, seed=1)
    y = values.argmax(1) if kind == "classes" else values
    targets = one_hot(y, 2) if kind == "classes" else y.numpy()
    errors = {}
    for ridge in RIDGES:
        weight, goal, mean, deviation = by_hand(h[:40], targets[:40], ridge)
        errors[ridge] = ((targets[40:] - (h[40:].numpy() - mean) / deviation @ weight - goal) ** 2).sum()
    best = min(errors, key=errors.__getitem__)
    assert best not in (RIDGES[0], 1e-3)
    origins = Moments((h[0], torch.zeros(2).double())).origins
    part, held = Moments(origins), Moments(origins)
    part.add(h[:40], y[:40])
    held.add(h[40:], y[40:])
    found = chosen(part, held)
    assert found.ridge == best
    assert torch.allclose(found.weight, fit(moments(h, y, 2), best).weight, rtol=1e-8)


def probed(h: Tensor, y: Tensor, columns: int, new: Tensor, labels: Tensor) -> float | None:
    score = ProbeScore(chosen(moments(h[::2], y[::2], columns), _same_origin(h, y, columns)))
    for some, answers in zip(new.tensor_split(3), labels.tensor_split(3)):
        score.add(some, answers)
    return score.value


def _same_origin(h: Tensor, y: Tensor, columns: int) -> Moments:
    made = Moments(moments(h[::2], y[::2], columns).origins)
    made.add(h[1::2], y[1::2])
    return made


def test_separable_features_are_read_without_a_mistake_and_noise_by_chance() -> None:
    y, labels = torch.arange(800) % 4, torch.arange(2000) % 4
    corners = torch.eye(6, dtype=torch.float64)[:4] * 8
    assert probed(normal(800, 6) + corners[y], y, 4, normal(2000, 6, seed=1) + corners[labels], labels) == 1.0
    by_chance = probed(normal(800, 6), y, 4, normal(2000, 6, seed=1), labels)
    assert by_chance is not None and abs(by_chance - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 2000)


def test_r2_is_one_of_a_linear_target_nought_or_less_of_noise_and_the_share_explained_between() -> None:
    h, new, weight = normal(400, 5), normal(300, 5, seed=1), normal(5, 2, seed=2)
    exact = probed(h, h @ weight + 9, 2, new, new @ weight + 9)
    assert exact == pytest.approx(1.0, abs=1e-9)
    noise = probed(h, normal(400, 2, seed=3), 2, new, normal(300, 2, seed=4))
    assert noise is not None and -0.1 < noise < 0.05
    y, labels = h @ weight + normal(400, 2, seed=3), new @ weight + normal(300, 2, seed=4)
    probe = chosen(moments(h[::2], y[::2], 2), _same_origin(h, y, 2))
    missed = (probe.predict(new) - labels).square().sum() / (labels - labels.mean(0)).square().sum()
    assert probed(h, y, 2, new, labels) == pytest.approx(1 - float(missed), rel=1e-9)


def test_scale_and_offset_of_a_feature_do_not_matter_and_one_that_never_changes_counts_as_nothing() -> None:
    h, y, new = normal(50, 3), torch.arange(50) % 2, normal(8, 3, seed=1)
    moved = lambda x: torch.cat([1e3 * x - 20, torch.full((len(x), 1), 0.1, dtype=x.dtype)], 1)  # noqa: E731
    a, b = fit(moments(h, y, 2), 0.01), fit(moments(moved(h), y, 2), 0.01)
    assert torch.allclose(a.predict(new), b.predict(moved(new)), rtol=1e-8)
    assert torch.equal(b.weight[3], torch.zeros(2).double())


# ---- the spectrum -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 8])
def test_k_equal_eigenvalues_have_rank_k_in_any_basis_and_at_any_scale(k: int) -> None:
    turned = torch.linalg.qr(normal(8, 8)).Q
    for scale in (1e-6, 1.0, 1e5):
        values = eigenvalues(turned @ torch.diag(scale * (torch.arange(8) < k).double()) @ turned.T)
        assert effective_rank(values) == pytest.approx(k, rel=1e-9)
        assert participation_ratio(values) == pytest.approx(k, rel=1e-9)
        assert torch.allclose(singular_values(values)[:k], torch.ones(k).double())


def test_ranks_are_their_formulas_and_participation_is_never_larger() -> None:
    values = torch.tensor([0.7, 0.2, 0.1, 0.0]).double() * 4
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert effective_rank(values) == pytest.approx(math.exp(entropy), rel=1e-7)
    assert participation_ratio(values) == pytest.approx(1 / (0.49 + 0.04 + 0.01), rel=1e-6)
    assert singular_values(values).tolist() == pytest.approx([1, (2 / 7) ** 0.5, (1 / 7) ** 0.5, 0])
    assert participation_ratio(values) < effective_rank(values)
    assert effective_rank(torch.zeros(3)) == participation_ratio(torch.zeros(3)) == 0.0


# ---- the cosine ---------------------------------------------------------------------------------------------------------


def headed(layout: tuple[int, ...] = (1, 1, 1), norm: bool = False) -> Chain:
    """Depths of one hidden layer each, 4 units to a group, heads below the last; 3 classes on vectors of 5; float64."""
    torch.manual_seed(0)
    stages, width = [], 5
    for depth, groups in enumerate(layout):
        last = depth == len(layout) - 1
        for _ in range(groups):
            more = [nn.BatchNorm1d(4)] if norm else []
            body = nn.Linear(width, 3) if last else nn.Sequential(nn.Linear(width, 4), *more, nn.Tanh())
            stages.append(Stage(body, None if last else nn.Linear(4, 3)))
        width = 4 * groups
    return Chain(stages, like=normal(2, 5), layout=layout).double()


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def direct(chain: Chain, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[float, float]]:
    """Both cosines of every stage, by `backward` through networks that are cut, and through the whole one."""
    total = sum(len(x) for x, _ in batches)
    weights: dict[str, list[Tensor]] = {}
    inner: dict[str, list[list[Tensor]]] = {}
    for which in ("local", "whole"):
        chain.zero_grad()
        inner[which] = [[] for _ in chain]
        for x, y in batches:
            outputs: list[Tensor] = []
            for row in chain.layout.rows:
                for j in row:
                    outputs.append(chain[j].body(x))
                    outputs[-1].retain_grad()
                x = torch.cat([outputs[j] for j in row], 1)
                x = x.detach() if which == "local" else x
            judged = list(zip(chain, outputs)) if which == "local" else [(chain[-1], outputs[-1])]
            for stage, h in judged:
                (cross_entropy(stage.read(h), y) * len(y) / total).backward()
            for j, h in enumerate(outputs):
                inner[which][j].append(h.grad)
        weights[which] = [flat([p.grad.clone() for p in stage.body.parameters()]) for stage in chain]
    chain.zero_grad(set_to_none=True)

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    return [
        (cosine(weights["local"][j], weights["whole"][j]), cosine(flat(inner["local"][j]), flat(inner["whole"][j])))
        for j in range(len(chain))
    ]


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [m.batch(size, seed) for seed, size in enumerate(sizes)]


def readings(found: Explanation) -> list:
    return [one for depth in found.depths for one in depth.stages]


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 2, 1)])
@pytest.mark.parametrize("norm", [False, True])
def test_cosines_are_the_direct_ones(layout: tuple[int, ...], norm: bool) -> None:
    chain, some = headed(layout, norm), batches(30, 18, 7)
    found = readings(explain(chain, some, batches(20), gradient_samples=55))
    expected = direct(chain, some)
    assert [[one.stage] for one in found] == [one.learns_from for one in found]
    for one, (weights, activations) in zip(found, expected):
        assert one.cosine == pytest.approx(weights, abs=1e-10)
        assert one.activation_cosine == pytest.approx(activations, abs=1e-10)
    assert found[-1].cosine == pytest.approx(1.0, abs=1e-12)  # the last stage's own loss is the network's
    assert all(abs(one.cosine) < 0.99 for one in found[:-1])  # and the others' are not


def test_one_stage_and_rules_that_learn_from_the_network_have_cosine_1_and_interlocking_is_between() -> None:
    data = m.data(60)
    whole = explain(Chain([Stage(m.mlp())]), data, data)
    assert [one.cosine for one in readings(whole)] == pytest.approx([1.0])
    chain = headed()
    for rule in (ul.credit.Backprop(), ul.credit.GPipe(2), ul.credit.PipeDream(), ul.credit.Interlocking(2)):
        found = readings(explain(chain, data, data, credit=rule))
        assert [one.cosine for one in found] == pytest.approx([1.0] * 3)
        assert [one.activation_cosine for one in found] == pytest.approx([1.0] * 3)
    own, local = explain(chain, data, data), explain(chain, data, data, credit=ul.credit.Interlocking(0))
    assert own == local == explain(chain, data, data, credit=ul.credit.DGL())
    between = readings(explain(chain, data, data, credit=ul.credit.Interlocking(1)))
    assert [one.learns_from for one in between] == [[1], [2], [2]]
    assert [one.cosine for one in between[1:]] == pytest.approx([1.0, 1.0]) != [one.cosine for one in readings(own)[1:]]
    x, y = data.x, data.y
    weights = list(chain[0].body.parameters())
    h = chain[1](chain[0](x))
    near = flat(list(torch.autograd.grad(cross_entropy(chain[1].read(h), y), weights)))
    far = flat(list(torch.autograd.grad(cross_entropy(chain(x), y), weights)))
    assert between[0].cosine == pytest.approx(float(near @ far / (near.norm() * far.norm())), abs=1e-6)


RULES = {
    "dgl": (ul.credit.DGL(head="linear", budget=None), (1, 1, 1), [[0], [1], [2]]),
    "predsim": (ul.credit.PredSim(budget=None), (1, 1, 1), [[0], [1], [2]]),
    "interlocking": (ul.credit.Interlocking(1, head="linear", budget=None), (1, 1, 1, 1), [[1], [2], [3], [3]]),
    "backprop": (ul.credit.Backprop(), (1, 1, 1), [[2], [2], [2]]),
    "groups": (ul.credit.GNDGL(head="linear", budget=None), (1, 2, 2, 1), [[1, 2], [1], [2], [3], [4], [5]]),
    "groups that see each other": (
        ul.credit.GNDGL(head="linear", budget=None, stop_gradient=True),
        (1, 2, 2, 1),
        [[1, 2], [1], [2], [3], [4], [5]],
    ),
    "groups with a stem of its own": (
        ul.credit.GNDGL(head="linear", budget=None, stem="own"),
        (1, 2, 1),
        [[0], [1], [2], [3]],
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_a_step_of_the_rule_goes_against_the_gradient_that_was_compared(name: str) -> None:
    credit, layout, learns_from = RULES[name]
    chain, (x, y) = headed(layout, norm=True), m.batch(40)
    for stage in chain:
        stage.head = None  # the rule builds its own
    trainer = ul.Trainer(chain, credit=credit, optimizer=lambda weights: torch.optim.SGD(weights, lr=1e-3))
    found = readings(explain(trainer, [(x, y)], m.data(20)))
    scores = trainer.evaluate(m.data(20)).stages
    assert [one.learns_from for one in found] == learns_from
    (trained,) = trainer.chains
    weights = [list(stage.body.parameters()) for stage in trained]
    with torch.random.fork_rng():
        cross_entropy(trained.train()(x), y).backward()
    exact = [flat([p.grad.clone() for p in row]) for row in weights]
    before = [flat([p.detach().clone() for p in row]) for row in weights]
    trained.zero_grad()
    trainer.step(x, y)
    for j, one in enumerate(found):
        step = before[j] - flat([p.detach() for p in weights[j]])
        assert one.cosine == pytest.approx(float(step @ exact[j] / (step.norm() * exact[j].norm())), abs=1e-8)
        assert (one.loss, one.accuracy) == (pytest.approx(scores[j]) if scores[j] else (None, None))


def test_frozen_stages_have_no_cosine_of_weights() -> None:
    chain = headed()
    chain[0].requires_grad_(False)
    found = readings(explain(chain, m.data(60), m.data(20)))
    assert found[0].cosine is None and found[0].activation_cosine is not None and found[1].cosine is not None


# ---- the whole ----------------------------------------------------------------------------------------------------------


def test_losses_and_accuracies_are_those_of_evaluate() -> None:
    trainer = m.trainer(ul.credit.DGL(head="linear", budget=None), model=m.mlp(norm=True))
    trainer.fit(m.data(), 2, batch_size=12)
    scores = trainer.evaluate(m.data(40, seed=1))
    found = explain(trainer, m.data(), m.data(40, seed=1), batch_size=7)
    for one, (loss, accuracy) in zip(readings(found), scores.stages, strict=True):
        assert (one.loss, one.accuracy) == pytest.approx((loss, accuracy))
    assert found.updates == trainer.steps == 10 and found.rows == 40 and found.classes
    bare = explain(m.trainer(ul.credit.Backprop()), m.data(), m.data())
    assert [one.loss is None for one in readings(bare)] == [True, True, False]


def test_features_ranks_and_probes_are_those_of_the_outputs_in_evaluation_mode() -> None:
    trainer = m.trainer(ul.credit.DGL(head="linear", budget=None), model=m.mlp(norm=True, dropout=0.5))
    trainer.fit(m.data(), 2, batch_size=12)
    chain, data = trainer.averaged().eval(), m.data(200)
    found, h = explain(trainer, data, m.data(50, seed=1)), data.x
    with torch.no_grad():
        for depth, stage in zip(found.depths, chain):
            h = stage(h)
            values = eigenvalues(torch.from_numpy(np.cov(h.numpy().T, bias=True)))
            assert depth.effective_rank == pytest.approx(effective_rank(values), rel=1e-9)
            assert depth.participation_ratio == pytest.approx(participation_ratio(values), rel=1e-9)
            assert depth.features == h.shape[1] == len(depth.spectrum)
    assert 0.5 < found.depths[0].probe <= 1.0  # the classes are nearly linear in the data
    torch.rand(1)
    assert found == explain(trainer, data, m.data(50, seed=1))  # nothing is left to chance


def test_groups_of_a_depth_have_one_probe_on_what_they_put_out_together() -> None:
    grouped, data, test = headed((1, 2, 1)), m.data(80), m.data(40, seed=1)
    found = explain(grouped, data, test)
    assert [depth.features for depth in found.depths] == [4, 8, 3]
    assert [[one.stage for one in depth.stages] for depth in found.depths] == [[0], [1, 2], [3]]

    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([grouped[1].body(x), grouped[2].body(x)], 1)

    plain = explain(Chain([Stage(grouped[0].body), Stage(Both()), Stage(grouped[3].body)]), data, test)
    for one, other in zip(found.depths, plain.depths):
        assert (one.probe, one.effective_rank, one.ridge) == (other.probe, other.effective_rank, other.ridge)
    assert len({one.loss for one in found.depths[1].stages}) == 2  # each group has its own head


def test_nothing_is_changed_by_looking() -> None:
    def make() -> ul.Trainer:
        trainer = m.trainer(ul.credit.DGL(head="mlp", budget=None), model=m.mlp(norm=True, dropout=0.3))
        trainer.fit(m.data(), 1, batch_size=12)
        trainer.chains[0][1].body.eval()  # frozen by hand
        return trainer

    looked, other = make(), make()
    chain = looked.chains[0]
    modes, gradients = [part.training for part in chain.modules()], [x.grad for x in chain.parameters()]
    before, state = digest(chain), torch.get_rng_state()
    for network in (looked, chain):
        explain(network, m.data(), m.data(20))
    assert digest(chain) == before and torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in chain.modules()] == modes
    assert all(x.grad is y for x, y in zip(chain.parameters(), gradients))
    for trainer in (looked, other):
        trainer.fit(m.data(), 2, batch_size=12)
    m.assert_same(m.state(looked), m.state(other))


def test_rows_of_features() -> None:
    maps, rows, one = normal(2, 3, 4, 6), normal(2, 5, 3), torch.zeros(2, dtype=torch.int64)
    each = torch.zeros(2, 5, dtype=torch.int64)
    assert torch.allclose(to_rows(maps, one, 1, 0), maps.mean((2, 3)))
    quarters = torch.stack([maps[..., a : a + 2, b : b + 3].mean((2, 3)) for a in (0, 2) for b in (0, 3)], 2)
    assert torch.allclose(to_rows(maps, one, 2, 0), quarters.flatten(1))
    assert torch.equal(to_rows(maps, one, 100, 0), maps.flatten(1))  # no more windows than pixels
    assert torch.equal(to_rows(rows, one, 1, 0), rows.mean(1))
    assert torch.equal(to_rows(rows, each, 1, 0), rows.flatten(0, 1))
    for h, y in ((rows[:, :4], each), (maps, each), (normal(2), one), (rows.long(), one), (normal(3, 3), one)):
        with pytest.raises(InvalidChoice, match="output of depth 7"):
            to_rows(h, y, 1, 7)


def test_a_label_for_every_position_is_a_row_for_every_position() -> None:
    bodies = headed()
    x, y = normal(40, 6, 5), torch.randint(3, (40, 6), generator=torch.Generator().manual_seed(0))
    found = explain(bodies, [(x, y)], [(x, y)])
    assert found.rows == 240
    for depth in found.depths:
        assert depth.probe is not None and 1 / 3 <= depth.probe < 0.7
    h = bodies[0](x).detach().flatten(0, 1)
    values = eigenvalues(torch.from_numpy(np.cov(h.numpy().T, bias=True)))
    assert found.depths[0].effective_rank == pytest.approx(effective_rank(values), rel=1e-9)


def test_values_have_r2_and_no_accuracy() -> None:
    torch.manual_seed(0)
    bodies = [nn.Sequential(nn.Linear(5, 20), nn.Tanh()), nn.Linear(20, 2)]
    chain = Chain([Stage(body.double(), loss=mean_squared_error) for body in bodies])
    x, new, weight = normal(300, 5), normal(100, 5, seed=1), normal(5, 2, seed=2)
    found = explain(chain, (x, x @ weight), (new, new @ weight))
    assert not found.classes and readings(found)[-1].accuracy is None
    assert found.depths[0].probe > 0.95 > found.depths[1].probe  # two random directions have lost most of it


def test_what_cannot_be_probed_is_a_sentence(tmp_path: Path) -> None:
    chain, data = headed(), m.data()
    with pytest.raises(InvalidChoice, match="pool=0 is not possible"):
        explain(chain, data, data, pool=0)
    with pytest.raises(InvalidChoice, match="too few"):
        explain(chain, m.data(1), data)
    x, y = m.batch()
    with pytest.raises(InvalidChoice, match="classes 2 to 4, but the network has 3 outputs"):
        explain(chain, (x, y.clamp(0, 0) + torch.arange(12) % 3 + 2), data)
    with pytest.raises(InvalidChoice, match=r"gap\.pdf is no picture"):
        explain(chain, data, data).plot(tmp_path / "gap.pdf")


# ---- command and report ------------------------------------------------------------------------------------------------

SMALL = Options(subset=120, width=4, batch_size=20, epochs=1, stages=2, device="cpu")
AS_TEXT = [
    "--subset=120",
    "--width=4",
    "--batch-size=20",
    "--epochs=1",
    "--stages=2",
    "--device=cpu",
    "--tensorboard=off",
    "--threads=1",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison's folder with two runs; by_train.json is what `unlocked train --probe` left."""
    folder = tmp_path_factory.mktemp("probed")
    local, shared = (parse_method(text) for text in ("dgl(budget=None)", "backprop/all-reduce@2"))
    run(resolve(SMALL, shared, seed=0, threads=1), folder / "runs" / f"{shared.slug}-seed0")
    trained = folder / "runs" / f"{local.slug}-seed0"
    assert main(["train", "--credit", "dgl(budget=None)", "--run", str(trained), "--probe", *AS_TEXT]) == 0
    (trained / "probes.json").rename(folder / "by_train.json")
    return folder


def test_the_command_writes_what_explain_finds_and_the_report_shows_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "What each stage has made" not in write_report(home).read_text()
    capsys.readouterr()
    options = ["--device", "cpu", "--gradient-samples", "60"]
    assert main(["probe", str(home), *options, "--json", "--plot", str(home / "figure" / "gap.svg")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["runs"]) == 2 and (home / "figure" / "gap.svg").read_text().count("<svg") == 1
    for one in said["runs"]:
        folder = Path(one["run"])
        trainer = ul.Trainer.resume(folder / "checkpoint")
        train, test = ul.data.load("digits", subset=120)
        expected = explain(trainer, train, test, gradient_samples=60).to_json()
        assert json.loads((folder / "probes.json").read_text()) == expected == {key: one[key] for key in expected}
    page = (home / "report.html").read_text()  # was there, so it is written anew
    for words in ("What each stage has made", "Linear probe of the features", "Effective rank of the features"):
        assert words in page
    assert main(["probe", str(home / "runs" / "dgl-budget-None-seed0"), *options]) == 0
    printed = capsys.readouterr().out
    assert "effective rank" in printed and "dgl(budget=None)" in printed and "nan" not in printed


def test_a_damaged_file_is_a_sentence_in_the_report(home: Path, tmp_path: Path) -> None:
    folder = next((home / "runs").glob("dgl*"))
    (tmp_path / "events.jsonl").write_text((folder / "events.jsonl").read_text())
    for text, words in (("{", "not valid JSON"), ('{"depths": [3]}', "damaged"), ('{"depths": {}}', "damaged")):
        (tmp_path / "probes.json").write_text(text)
        with pytest.raises(BadData, match=words):
            write_report(tmp_path)


def test_training_can_be_followed_by_probing_and_a_run_that_cannot_be_probed_stops_no_other(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bad,) = (home / "runs").glob("backprop*")
    (good,) = (home / "runs").glob("dgl*")
    (tmp_path / "runs" / bad.name).mkdir(parents=True)
    for name in ("config.json", "summary.json"):
        (tmp_path / "runs" / bad.name / name).write_text((bad / name).read_text())
    (tmp_path / "runs" / good.name).symlink_to(good)
    probe_comparison(tmp_path, Console(width=200), "cpu", quiet=False)
    assert f"{bad.name} was not probed: " in capsys.readouterr().out
    assert json.loads((home / "by_train.json").read_text()) == json.loads((good / "probes.json").read_text())


def test_the_command_refuses_in_sentences(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = next((home / "runs").glob("dgl*"))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((one / "config.json").read_text())
    (tmp_path / "text").write_text("words " * 2000)
    for arguments, words in (
        ([tmp_path / "nowhere"], "There is no folder"),
        ([tmp_path], "config.json"),
        ([bare], "has no checkpoint"),
        ([one, "--plot", "gap.pdf"], "its name ends in .png or .svg"),
        ([one, "--pool", 0], "--pool 0 is not possible"),
        ([one, "--data", "folder:/nowhere"], "There is no folder '/nowhere'"),
        ([one, "--data", f"text:{tmp_path / 'text'}"], "takes samples of shape (1, 8, 8)"),
    ):
        capsys.readouterr()
        assert main(["probe", *map(str, arguments)]) == 2
        assert words in capsys.readouterr().err
