"""What goes through frozen features again: the vote of neighbours, and the layer of the thesis' recipe, beside plain loops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unlocked.chain import Chain, Stage
from unlocked.errors import InvalidChoice
from unlocked.probe_command import as_rich
from unlocked.probes import Explanation, Recipe, explain
from unlocked.probes import knn as votes
from unlocked.probes.knn import knn_accuracy
from unlocked.report.records import Record
from unlocked.report.representation import cells, charts, draw_records, headings
from unlocked.report.spectra import chosen, spectra

import methods as m


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- neighbours ---------------------------------------------------------------------------------------------------------


def by_hand(train: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], k: int, temperature: float) -> float:
    """Row by row, neighbour by neighbour."""
    hits = 0
    for row, answer in zip(*new):
        near = sorted(((float(row @ h / (row.norm() * h.norm())), int(y)) for h, y in zip(*train)), reverse=True)[:k]
        tally: dict[int, float] = {}
        for similarity, label in near:
            tally[label] = tally.get(label, 0.0) + math.exp(similarity / temperature)
        hits += max(tally, key=tally.__getitem__) == int(answer)
    return hits / len(new[1])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 12), st.integers(1, 40), st.sampled_from([0.07, 0.5, 5.0]), st.integers(0, 99)
)
def test_the_vote_is_that_of_a_loop(n: int, rows: int, k: int, temperature: float, seed: int) -> None:
    train = normal(n, 4, seed=seed), torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))
    new = normal(rows, 4, seed=seed + 1), torch.randint(3, (rows,), generator=torch.Generator().manual_seed(seed + 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(votes, "_ENTRIES", 3 * n)  # three rows at a time
        assert knn_accuracy(train, new, k, temperature) == by_hand(train, new, k, temperature)


def test_scale_does_not_matter_and_the_nearest_of_all_is_oneself() -> None:
    h, y = normal(40, 5), torch.arange(40) % 4
    longer = h * torch.arange(1, 41)[:, None]
    assert knn_accuracy((h, y), (longer, y), k=1) == knn_accuracy((h, y), (longer, y), k=40, temperature=1e-3) == 1.0
    new = normal(30, 5, seed=1), torch.arange(30) % 4
    assert knn_accuracy((longer, y), new, k=7) == knn_accuracy((h, y), new, k=7)
    assert knn_accuracy((h, y), new) == knn_accuracy((h, y), new, k=40)  # 200 are no more than there are


def test_votes_that_cannot_be_are_refused() -> None:
    rows = normal(4, 2), torch.arange(4)
    for k in (0, -1, 1.5, True):
        with pytest.raises(InvalidChoice, match="knn="):
            knn_accuracy(rows, rows, k)  # type: ignore[arg-type]
    with pytest.raises(InvalidChoice, match="temperature=0"):
        knn_accuracy(rows, rows, 1, 0)
    with pytest.raises(InvalidChoice, match="targets here are values"):
        knn_accuracy(rows, (rows[0], normal(4)), 1)


# ---- the recipe ---------------------------------------------------------------------------------------------------------


def loop(h: Tensor, y: Tensor, classes: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Adam (Kingma & Ba) with its gradients written out, in the recipe's order and from its first weights."""
    numbers = torch.Generator().manual_seed(_seed(recipe))
    bound = 1 / math.sqrt(h.shape[1])
    weight = (2 * torch.rand((classes, h.shape[1]), generator=numbers, dtype=torch.float64) - 1) * bound
    bias = (2 * torch.rand((classes,), generator=numbers, dtype=torch.float64) - 1) * bound
    first = {"w": torch.zeros_like(weight), "b": torch.zeros_like(bias)}
    second = {"w": torch.zeros_like(weight), "b": torch.zeros_like(bias)}
    step = 0
    for _ in range(recipe.epochs):
        order = torch.randperm(len(h), generator=numbers)
        for begin in range(0, len(h), recipe.batch_size):
            some, step = order[begin : begin + recipe.batch_size], step + 1
            p = torch.softmax(h[some] @ weight.T + bias, 1)
            p[torch.arange(len(some)), y[some]] -= 1
            for name, x, slope in (("w", weight, p.T @ h[some] / len(some)), ("b", bias, p.mean(0))):
                slope = slope + recipe.weight_decay * x
                first[name] = 0.9 * first[name] + 0.1 * slope
                second[name] = 0.999 * second[name] + 0.001 * slope**2
                x -= recipe.lr * (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight, bias


def _seed(recipe: Recipe) -> int:
    from unlocked.rng import seed_of

    return seed_of(recipe.seed, "recipe")


@pytest.mark.parametrize("size", [8, 20, 64])  # whole batches, a smaller last one, one batch
def test_the_layer_is_that_of_a_plain_loop(size: int) -> None:
    h, y = normal(48, 5), torch.arange(48) % 3
    recipe = Recipe(epochs=7, lr=0.01, weight_decay=0.1, batch_size=size, seed=4)
    layer, (weight, bias) = recipe.train(h, y, 3), loop(h, y, 3, recipe)
    assert torch.allclose(layer.weight, weight, rtol=1e-10, atol=1e-12)
    assert torch.allclose(layer.bias, bias, rtol=1e-10, atol=1e-12)
    new, labels = normal(30, 5, seed=1), torch.arange(30) % 3
    assert layer.accuracy(new, labels) == float(((new @ weight.T + bias).argmax(1) == labels).double().mean())


def test_the_thesis_recipe_separates_what_is_separable_and_is_a_function_of_its_seed() -> None:
    recipe = Recipe()
    assert (recipe.epochs, recipe.lr, recipe.weight_decay, recipe.batch_size) == (200, 1e-3, 1e-6, 256)
    y = torch.arange(300) % 3
    h = (normal(300, 6) + 4 * torch.eye(6, dtype=torch.float64)[y]).float()
    told: list[int] = []
    state = torch.get_rng_state()
    layer = recipe.train(h[:200], y[:200], 3, told=told.append)
    assert layer.accuracy(h[200:], y[200:]) > 0.97 and told == [200] * 200
    torch.rand(1)
    again = recipe.train(h[:200], y[:200], 3)
    assert torch.equal(layer.weight, again.weight) and torch.equal(layer.bias, again.bias)
    assert not torch.equal(layer.weight, Recipe(seed=1).train(h[:200], y[:200], 3).weight)
    torch.set_rng_state(state)
    Recipe(epochs=1).train(h, y, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_recipes_that_cannot_be_are_refused() -> None:
    for options in ({"epochs": 0}, {"batch_size": 1.5}, {"lr": 0.0}, {"weight_decay": -1.0}, {"lr": math.nan}):
        with pytest.raises(InvalidChoice, match=f"{next(iter(options))}=.* is not possible in a recipe"):
            Recipe(**options)  # type: ignore[arg-type]
    with pytest.raises(InvalidChoice, match="targets here are values"):
        Recipe().train(normal(4, 2), normal(4), 2)


# ---- in what explain finds ----------------------------------------------------------------------------------------------


def headed() -> Chain:
    torch.manual_seed(0)
    bodies = [nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Linear(6, 3)]
    return Chain([Stage(body.double()) for body in bodies], like=normal(2, 5))


@pytest.fixture(scope="module")
def found() -> Explanation:
    return explain(headed(), m.data(70), m.data(40, seed=1), knn=9, recipe=Recipe(epochs=20, lr=0.05), batch_size=32)


def test_at_every_depth_they_read_its_features(found: Explanation) -> None:
    chain, train, test = headed(), m.data(70), m.data(40, seed=1)
    h, new = train.x, test.x
    with torch.no_grad():
        for depth, stage in zip(found.depths, chain):
            h, new = stage(h), stage(new)
            assert depth.knn == knn_accuracy((h, train.y), (new, test.y), 9)
            assert depth.recipe == Recipe(epochs=20, lr=0.05).train(h, train.y, 3).accuracy(new, test.y)
            assert depth.recipe > 0.4 < depth.knn
    plain = explain(chain, train, test)
    assert [(depth.knn, depth.recipe) for depth in plain.depths] == [(None, None)] * 2
    assert [depth.probe for depth in plain.depths] == [depth.probe for depth in found.depths]


def test_progress_is_told_row_by_row() -> None:
    samples: list[int] = []
    rows: list[int] = []
    explain(headed(), m.data(70), m.data(40), recipe=Recipe(epochs=3), told=samples.append, recipe_told=rows.append)
    assert sum(rows) == 3 * 70 * 2 and sum(samples) >= 110


def test_values_have_no_neighbours_that_vote() -> None:
    for options in ({"knn": 3}, {"recipe": Recipe(epochs=1)}):
        with pytest.raises(InvalidChoice, match="the targets here are values"):
            explain(headed(), (normal(30, 5), normal(30, 3)), (normal(9, 5), normal(9, 3)), **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidChoice, match="knn=0"):
        explain(headed(), m.data(), m.data(), knn=0)


def test_they_are_in_the_file_the_table_and_the_figures(found: Explanation, tmp_path: Path) -> None:
    told = json.loads(json.dumps(found.to_json()))
    assert told["knn"] == 9 and told["recipe"]["epochs"] == 20 and told["depths"][1]["knn"] == found.depths[1].knn
    record = Record(told, "here")
    assert headings([record])[-2:] == ("knn", "recipe")
    assert cells(record, headings([record]))[0][-2] == f"{100 * found.depths[0].knn:.2f} %"
    assert [column.header for column in as_rich("net", found).columns][-2:] == ["knn", "recipe"]
    plain = Record(json.loads(json.dumps(explain(headed(), m.data(70), m.data(40)).to_json())), "there")
    assert "knn" not in headings([plain]) and {len(row) for row in cells(plain, headings([plain]))} == {9}
    both = headings([plain, record])
    assert cells(plain, both)[0][-1] == "–" and len(both) == 11
    titles = {title: curves for title, curves, _ in charts({"a": [record], "b": [plain]})}
    drawn = titles["Vote of the nearest neighbours"]
    assert [curve.name for curve in drawn] == ["a"] and drawn[0].y == [100 * depth.knn for depth in found.depths]
    picture = draw_records({"a": [told], "b": [plain.value]}, tmp_path / "p.svg").read_text()
    assert all(title in picture for title in titles)
    assert "Vote" not in {title for title, _, _ in charts({"b": [plain]})}


# ---- spectra ------------------------------------------------------------------------------------------------------------


def test_the_spectrum_drawn_is_the_covariance_s_over_its_largest(found: Explanation) -> None:
    h, record = m.data(70).x, Record(found.to_json(), "here")
    drawn = spectra({"net": [record], "more": []})
    assert [title for title, _ in drawn] == [f"Spectrum of the features at depth {depth}" for depth in (0, 1)]
    with torch.no_grad():
        for (_, (curve,)), stage in zip(drawn, headed()):
            h = stage(h)
            values = torch.linalg.svdvals(torch.cov(h.T))
            assert curve.x == [float(k) for k in range(1, len(values) + 1)]
            assert curve.y == pytest.approx((values / values[0]).tolist(), rel=2e-3) and not any(curve.spread)


def test_some_depths_are_chosen_and_collapsed_directions_end_the_line() -> None:
    assert chosen(1) == [0] and chosen(4) == [0, 1, 2, 3] and chosen(16) == [3, 7, 11, 15] and chosen(6) == [1, 2, 4, 5]
    assert chosen(0) == []
    dead = Record({"depths": [{"spectrum": [1.0, 0.5, 1e-7, 0.0]}]}, "here")
    ((_, (curve,)),) = spectra({"net": [dead]})
    assert curve.y == [1.0, 0.25]


def test_two_networks_of_a_method_are_one_line_and_a_shorter_one_ends_before() -> None:
    rows: list[Callable[[], Record]] = [
        lambda: Record({"depths": [{"spectrum": [1.0, 0.6]}, {"spectrum": [1.0]}]}, "a"),
        lambda: Record({"depths": [{"spectrum": [1.0, 0.2]}]}, "b"),
    ]
    drawn = spectra({"net": [make() for make in rows]})
    assert drawn[0][1][0].y == pytest.approx([1.0, 0.2]) and drawn[1][1][0].y == [1.0]
