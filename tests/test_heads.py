"""Heads and local losses: formulas against double loops, causality, and FLOP budgets that hold and are tight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unlocked import heads, losses
from unlocked.costs import flops
from unlocked.errors import HeadTooLarge, InvalidChoice
from unlocked.heads.of_chain import OfChain
from unlocked.heads.predsim import pool_kernel
from unlocked.losses import PredSim, cross_entropy, logits, mean_squared_error, similarity

# No shrinking: an example builds a dozen heads, and a smaller failing one is not worth minutes.
few = settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
CLASSES = 5

# kind: (features, one label per token?, the shape of y, the heads that work there)
ANYWHERE = {"linear", "mlp", "dgl-mlp", "predsim"}
ROWS = ANYWHERE | {"unembedding", "0c1f", "1c2f", "projector", "projector-mlp"}
NAMED = {name for name, head in heads.HEADS.items() if not isinstance(head, OfChain)}
MAPS = NAMED - {"unembedding"}
KINDS: dict[str, tuple[tuple[int, ...], bool, set[str]]] = {
    "maps": ((4, 6, 8, 8), False, MAPS),
    "odd maps": ((4, 6, 5, 3), False, MAPS),
    "pixels": ((4, 6, 1, 1), False, MAPS),
    "vectors": ((4, 12), False, ROWS),
    "sequences": ((4, 7, 12), False, ROWS),
    "tokens": ((4, 7, 12), True, ROWS),
}
WORKING = [(kind, name) for kind, (_, _, names) in KINDS.items() for name in sorted(names)]
REFUSED = [(kind, name) for kind, (_, _, names) in KINDS.items() for name in sorted(NAMED - names)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape: int, seed: int = 1, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def unlimited(spec: heads.HeadLike, x: Tensor, per_token: bool = False, outputs: int = CLASSES) -> Any:
    torch.manual_seed(3)
    return heads.build(spec, x, outputs, per_token=per_token, stage_flops=1, budget=None)


def shapes(head: nn.Module, *kinds: type[nn.Module]) -> list[tuple[int, ...]]:
    return [tuple(part.get_parameter("weight").shape) for part in head.modules() if isinstance(part, kinds)]


# ------------------------------------------------------------------------------------------------------------ losses


def similarity_by_loops(rows: list[list[float]]) -> list[list[float]]:
    unit = []
    for row in rows:
        mean = sum(row) / len(row)
        norm = math.sqrt(sum((v - mean) ** 2 for v in row))
        unit.append([(v - mean) / (1e-8 + norm) for v in row])
    return [[max(-1.0, min(1.0, sum(a * b for a, b in zip(u, v)))) for v in unit] for u in unit]


def predsim_by_loops(predicted: Tensor, rows: Tensor, y: Tensor, of_pairs: Tensor, beta: float) -> float:
    """`rows`, `of_pairs`: the features and labels compared; `predicted`, `y`: all of them, flattened."""
    ce = sum(math.log(sum(math.exp(v) for v in p)) - p[c] for p, c in zip(predicted.tolist(), y.tolist())) / len(y)
    classes = predicted.shape[-1]
    one_hot = [[float(k == c) for k in range(classes)] for c in of_pairs.tolist()]
    s, t = similarity_by_loops(rows.tolist()), similarity_by_loops(one_hot)
    matching = sum((a - b) ** 2 for r, q in zip(s, t) for a, b in zip(r, q)) / len(s) ** 2
    return (1 - beta) * ce + beta * matching


@few
@given(batch=st.integers(1, 7), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_similarity_is_its_formula(batch: int, width: int, seed: int) -> None:
    x = drawn(batch, width, seed=seed)
    x[0] = 1.5  # a constant row has no direction: similar to nothing, and no NaN
    expected = torch.tensor(similarity_by_loops(x.tolist()), dtype=torch.float64)
    torch.testing.assert_close(similarity(x), expected, rtol=0, atol=1e-12)


@few
@given(classes=st.integers(1, 9), seed=st.integers(0, 99))
def test_label_similarity_is_the_similarity_of_one_hot_rows(classes: int, seed: int) -> None:
    y = labels(8, classes=classes, seed=seed)
    one_hot = torch.nn.functional.one_hot(y, classes).double()
    torch.testing.assert_close(
        losses.label_similarity(y, classes, torch.float64), similarity(one_hot), rtol=0, atol=1e-14
    )


@few
@given(seed=st.integers(0, 99), beta=st.sampled_from([0.0, 0.3, 0.99, 1.0]))
def test_predsim_on_maps_is_its_formula(seed: int, beta: float) -> None:
    x, predicted, y = drawn(6, 3, 4, 2, seed=seed), drawn(6, CLASSES, seed=seed + 1), labels(6, seed=seed)
    flat = torch.stack([sample.flatten() for sample in x])
    deviation = torch.stack([torch.stack([channel.std() for channel in sample]) for sample in x])
    for statistic, rows in (("flatten", flat), ("std", deviation)):
        found = PredSim(beta, statistic)((predicted, x), y).item()
        assert found == pytest.approx(predsim_by_loops(predicted, rows, y, y, beta), abs=1e-12)


@pytest.mark.parametrize("rows", [3, 7, 24, 256])
def test_predsim_on_tokens_compares_evenly_spaced_positions(rows: int) -> None:
    x, predicted, y = drawn(4, 6, 3), drawn(4, 6, CLASSES), labels(4, 6)
    kept = [i * 24 // rows for i in range(rows)] if rows < 24 else list(range(24))
    flat, words = x.reshape(24, 3), y.reshape(24)
    expected = predsim_by_loops(predicted.reshape(24, CLASSES), flat[kept], words, words[kept], 0.5)
    assert PredSim(0.5, rows=rows)((predicted, x), y).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("statistic", ["flatten", "std"])
def test_predsim_gradient_is_finite_and_exact(statistic: str) -> None:
    y = labels(4)
    loss = PredSim(0.5, statistic)
    predicted, x = drawn(4, CLASSES).requires_grad_(), drawn(4, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, h: loss((p, h), y), (predicted, x), eps=1e-7, atol=1e-5)
    flat = torch.zeros(4, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    loss((predicted, flat), y).backward()
    assert flat.grad is not None and flat.grad.isfinite().all()


def test_cross_entropy_per_token_is_the_mean_over_positions() -> None:
    x, y = drawn(3, 4, CLASSES), labels(3, 4)
    one_by_one = [cross_entropy(x[b, t][None], y[b, t][None]) for b in range(3) for t in range(4)]
    torch.testing.assert_close(cross_entropy(x, y), torch.stack(one_by_one).mean())
    by_hand = -(x[0, 0, y[0, 0]] - x[0, 0].exp().sum().log())
    torch.testing.assert_close(one_by_one[0], by_hand)


def test_mean_squared_error_is_the_mean_over_all_entries() -> None:
    x, y = drawn(3, 2), drawn(3, 2, seed=8)
    expected = sum((x[i, j] - y[i, j]) ** 2 for i in range(3) for j in range(2)) / 6
    torch.testing.assert_close(mean_squared_error(x, y), expected)


@pytest.mark.parametrize(
    ("loss", "output", "y", "says"),
    [
        (cross_entropy, drawn(3, 5), torch.zeros(3), "int64"),
        (cross_entropy, drawn(3, 5), labels(3, 5), "(3, 5)"),
        (cross_entropy, drawn(3, 5, 4), labels(3, 4), "classes come last"),
        (cross_entropy, drawn(3), torch.tensor(1), "(B, K)"),
        (cross_entropy, (drawn(3, 5), drawn(3, 2)), labels(3), "tuple"),
        (mean_squared_error, drawn(3, 1), drawn(3), "(3, 1)"),
        (PredSim(), drawn(3, 5), labels(3), "predsim"),
    ],
)
def test_wrong_targets_are_refused_in_a_sentence(loss: losses.Loss, output: Any, y: Tensor, says: str) -> None:
    with pytest.raises(losses.WrongTarget) as error:
        loss(output, y)
    assert says in str(error.value) and str(error.value).endswith(".")


# ------------------------------------------------------------------------------------------------ what heads compute


@pytest.mark.parametrize(("kind", "name"), WORKING)
def test_every_head_gives_logits_its_loss_accepts_and_leaves_its_input_alone(kind: str, name: str) -> None:
    shape, per_token, _ = KINDS[kind]
    x = drawn(*shape).requires_grad_()
    before, y = x.detach().clone(), labels(*shape[: 2 if per_token else 1])
    head, loss, report = unlimited(name, x, per_token)
    assert all(p.dtype == torch.float64 for p in head.parameters()) and not x.is_meta
    hidden = x * 1.0  # not a leaf: an in-place operation on it would be allowed, and seen
    output = head(hidden)
    assert logits(output).shape == (*y.shape, CLASSES)
    loss(output, y).backward()
    assert x.grad is not None and x.grad.isfinite().all() and all(p.grad is not None for p in head.parameters())
    assert torch.equal(hidden, before) and hidden._version == 0
    assert report.flops == flops(head, x.detach()) and report.name == name


@pytest.mark.parametrize("name", sorted(ANYWHERE))
@pytest.mark.parametrize("training", [True, False])
def test_on_tokens_an_output_depends_on_its_own_position_only(name: str, training: bool) -> None:
    x = drawn(2, 5, 8)
    head, _, _ = unlimited(name, x, per_token=True)
    head.train(training)
    with torch.no_grad():
        for part in head.modules():
            if isinstance(part, nn.Linear):
                part.weight.normal_(generator=torch.Generator().manual_seed(4))  # predsim's decoder starts at zero
    before = head(x)
    for t in range(5):
        moved = x.clone()
        moved[1, t] += drawn(8, seed=t)
        after = head(moved)
        for old, new in zip(*(o if isinstance(o, tuple) else (o,) for o in (before, after))):
            changed = (old != new).any(2)
            assert changed[1, t] and changed.sum() == 1


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_a_head_that_makes_no_sense_is_refused_and_the_named_ones_work(kind: str, name: str) -> None:
    shape, per_token, working = KINDS[kind]
    with pytest.raises(InvalidChoice) as error:
        unlimited(name, drawn(*shape), per_token)
    advised = {word for word in heads.HEADS if f"'{word}'" in str(error.value)} - {name}
    assert ANYWHERE <= advised <= working


@pytest.mark.parametrize(
    ("spec", "x", "options", "says"),
    [
        ("mpl", drawn(4, 6), {}, "did you mean 'mlp'"),
        (nn.Linear(6, 5), drawn(4, 6), {}, "every stage needs a head of its own"),
        (lambda x, outputs: None, drawn(4, 6), {}, "must return a torch.nn.Module"),
        (lambda x, outputs: nn.Linear(6, outputs + 1), drawn(4, 6), {}, "(4, 6); they must have (4, 5)"),
        ("linear", drawn(4, 6), {"per_token": True}, "per_token=False"),
        ("linear", drawn(4), {}, "(B, D)"),
        ("linear", labels(4, 6), {}, "int64"),
        ("linear", drawn(4, 6), {"budget": 0.0}, "positive share"),
        ("linear", drawn(4, 6), {"stage_flops": -1}, "costs.flops"),
        ("linear", drawn(4, 6), {"outputs": 0}, "at least one output"),
    ],
)
def test_what_no_head_can_be_built_from_is_refused_in_a_sentence(
    spec: Any, x: Tensor, options: dict[str, Any], says: str
) -> None:
    settings = {"outputs": CLASSES, "per_token": False, "stage_flops": 10**6, "budget": 0.1} | options
    with pytest.raises(InvalidChoice) as error:
        heads.build(spec, x, **settings)
    assert says in str(error.value) and str(error.value).rstrip().endswith(".")


@pytest.mark.parametrize(
    "make",
    [
        lambda: heads.MLPHead(hidden=0),
        lambda: heads.CNNHead(depth=0),
        lambda: heads.DGLMLPHead(reductions=-1),
        lambda: heads.DGLCNNHead(depth=0),
        lambda: heads.PredSimHead(beta=1.5),
        lambda: heads.PredSimHead(statistic="mean"),
        lambda: heads.PredSimHead(rows=1),
    ],
)
def test_recipes_check_their_options(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidChoice):
        make()


# --------------------------------------------------------------------------------------------------- papers' shapes


def test_dgl_heads_have_the_papers_shapes() -> None:
    x = drawn(2, 6, 17, 8)  # quarter of the sides: 5 × 2
    fully = [(24, 24)] * 3 + [(CLASSES, 24)]
    mlp, sr, cnn = (unlimited(name, x)[0] for name in ("dgl-mlp", "dgl-mlp-sr", "dgl-cnn"))
    assert shapes(mlp, nn.Linear) == fully and shapes(mlp, nn.Conv2d) == []
    assert shapes(sr, nn.Linear) == fully and shapes(sr, nn.Conv2d) == [(6, 6, 1, 1)] * 3
    assert shapes(cnn, nn.Conv2d) == [(6, 6, 3, 3)] * 2 and shapes(cnn, nn.Linear) == [(CLASSES, 24)]
    assert shapes(mlp, nn.BatchNorm1d) == shapes(sr, nn.BatchNorm1d) == [(24,)] * 3
    assert shapes(sr, nn.BatchNorm2d) == shapes(cnn, nn.BatchNorm2d) == [(6,)] * 3
    assert [part(x).shape[2:] for part in (mlp[0], sr[0], cnn[:6])] == [(5, 2), (5, 2), (17, 8)]
    assert all(part.bias is None for head in (sr, cnn) for part in head.modules() if isinstance(part, nn.Conv2d))
    assert all(part.bias is not None for part in mlp.modules() if isinstance(part, nn.Linear))


def test_fournier_heads_have_the_thesis_shapes() -> None:
    x = drawn(2, 6, 16, 16)
    linear, mlp, cnn = (unlimited(name, x)[0] for name in ("linear", "mlp", "cnn"))
    assert shapes(linear, nn.BatchNorm2d) == [(6,)] and shapes(linear, nn.Linear) == [(CLASSES, 24)]
    assert shapes(mlp, nn.Linear) == [(1024, 24), (1024, 1024), (1024, 1024), (CLASSES, 1024)]
    assert [part.bias is None for part in mlp.modules() if isinstance(part, nn.Linear)] == [True] * 3 + [False]
    assert shapes(cnn, nn.Conv2d) == [(32, 6, 1, 1)] + [(32, 32, 3, 3)] * 3
    assert shapes(cnn, nn.Linear) == [(CLASSES, 128)]
    assert cnn[:12](x).shape == (2, 32, 2, 2)  # three halvings
    by_hand = nn.functional.adaptive_avg_pool2d(linear[0](x), 2).flatten(1)
    torch.testing.assert_close(linear(x), linear[-1](by_hand))


def test_predsim_starts_at_the_uniform_prediction() -> None:
    x, y = drawn(4, 6, 8, 8), labels(4)
    head, loss, _ = unlimited(heads.PredSimHead(beta=0.0), x)
    assert loss(head(x), y).item() == pytest.approx(math.log(CLASSES), abs=1e-12)
    assert unlimited(heads.PredSimHead(beta=0.2, statistic="std", rows=9), x)[1] == PredSim(0.2, "std", 9)
    assert shapes(head, nn.Conv2d) == [(6, 6, 3, 3)] and head.similar.bias is None


@pytest.mark.parametrize(
    ("channels", "sides", "largest", "kernel"),
    [
        (64, (8, 8), 4096, (1, 1)),  # 4096 values: none too many
        (65, (8, 8), 4096, (2, 1)),  # the height first
        (512, (8, 8), 2048, (4, 4)),
        (128, (32, 32), 4096, (8, 4)),
        (3, (2, 9), 6, (2, 8)),  # the height is used up, the width goes on
        (3, (5, 1), 6, (4, 1)),
        (7, (5, 3), 6, (8, 4)),  # the channels alone are too many: one window
    ],
)
def test_predsim_pools_height_and_width_in_turn_until_few_values_are_left(
    channels: int, sides: tuple[int, int], largest: int, kernel: tuple[int, int]
) -> None:
    assert pool_kernel(channels, sides, largest) == kernel


def test_predsim_pool_averages_each_window_over_the_pixels_it_has() -> None:
    x = drawn(2, 3, 5, 5)
    head, _, _ = unlimited(heads.PredSimHead(decoder_inputs=12), x)  # windows of 4 × 4: 2 × 2 of them
    windows = [x[:, :, i, j].mean((2, 3)) for i in (slice(0, 4), slice(4, 5)) for j in (slice(0, 4), slice(4, 5))]
    torch.testing.assert_close(head.pool(x), torch.stack(windows, 2).flatten(1))


# ----------------------------------------------------------------------------------------------------------- budgets


@few
@given(
    name=st.sampled_from(sorted(NAMED)),
    shape=st.sampled_from([(2, 3, 9, 9), (2, 16, 4, 4), (3, 24, 7, 5), (2, 64, 1, 1), (2, 16), (3, 70), (2, 5, 20)]),
    per_token=st.booleans(),
    stage_flops=st.integers(10**4, 10**8),
    budget=st.sampled_from([0.02, 0.1, 0.5]),
)
def test_a_budget_holds_and_is_tight(
    name: str, shape: tuple[int, ...], per_token: bool, stage_flops: int, budget: float
) -> None:
    x, per_token, spec = drawn(*shape), per_token and len(shape) == 3, heads.HEADS[name]
    if name not in (MAPS if len(shape) == 4 else ROWS):
        return
    paper = spec.paper_width(x)

    def cost(width: int | None) -> int:
        return flops(spec.make(x, CLASSES, per_token, width), x)

    try:
        head, _, report = heads.build(name, x, CLASSES, per_token=per_token, stage_flops=stage_flops, budget=budget)
    except HeadTooLarge:
        assert cost(None if paper is None else min(spec.smallest, paper)) > budget * stage_flops
        return
    assert report.flops == flops(head, x) == cost(report.width) <= budget * stage_flops
    assert report.share == report.flops / stage_flops
    if report.width != paper:
        assert report.width is not None and cost(report.width + 1) > budget * stage_flops


def test_the_search_for_a_width_leaves_no_trace_in_the_weights() -> None:
    x, recipe = drawn(2, 16), heads.MLPHead()
    torch.manual_seed(5)
    found, _, report = heads.build(recipe, x, CLASSES, per_token=False, stage_flops=10**6)
    torch.manual_seed(5)
    direct = recipe.make(x, CLASSES, False, report.width)
    assert report.width is not None and 8 < report.width < 1024
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), direct.state_dict().values()))


@few
@given(smallest=st.integers(1, 50), span=st.integers(0, 5000), allowed=st.integers(0, 10**7))
def test_bisection_finds_the_widest_in_few_counts(smallest: int, span: int, allowed: int) -> None:
    asked = []

    def cost(width: int) -> int:
        asked.append(width)
        return width * (width + 3)

    found = heads.budget.widest(cost, smallest, smallest + span, allowed)
    fitting = [width for width in range(smallest, smallest + span + 1) if width * (width + 3) <= allowed]
    assert found == (max(fitting) if fitting else None)
    assert len(asked) <= 2 + math.ceil(math.log2(max(span, 1)))


@pytest.mark.parametrize("name", ["dgl-cnn", "predsim", "cnn"])
def test_too_large_is_a_sentence_whose_advice_works(name: str) -> None:
    x, stage_flops = drawn(4, 16, 8, 8), 120_000
    build: dict[str, Any] = {"per_token": False, "stage_flops": stage_flops, "where": "stage 3 of 4"}
    with pytest.raises(HeadTooLarge) as error:
        heads.build(name, x, 10, **build)
    text = str(error.value)
    smallest = heads.HEADS[name].make(x, 10, False, heads.HEADS[name].smallest)
    share = 100 * flops(smallest, x) / stage_flops
    for part in (f"'{name}' of stage 3 of 4", f"{share:.3g} %", "budget is 10 %", "fewer, larger stages"):
        assert part in text
    advised = float(text.split("raise budget= to ")[1].split(" ")[0])
    assert heads.build(name, x, 10, budget=advised, **build)[2].share <= advised
    assert advised * 100 - share < 0.2  # and it advises no more than needed
    fitting = {other for other in heads.HEADS if f"'{other}'" in text} - {name}
    assert "linear" in fitting
    for other in fitting:
        heads.build(other, x, 10, **build)
    assert heads.build(name, x, 10, budget=None, **build)[2].share > 0.1


def test_too_large_a_vocabulary_is_named_as_the_reason() -> None:
    x, words = drawn(2, 8, 32), 5000
    projection = 2 * 16 * 32 * words
    with pytest.raises(HeadTooLarge, match=r"output projection alone \(32 → 5000\), 200 %, exceeds it") as error:
        heads.build("linear", x, words, per_token=True, stage_flops=projection // 2)
    assert "No named head would fit." in str(error.value)
    with pytest.raises(HeadTooLarge) as error:
        heads.build("dgl-cnn", drawn(2, 8, 9, 9), 3, per_token=False, stage_flops=10_000)
    assert "projection" not in str(error.value)


def test_a_stage_that_costs_nothing_affords_no_head() -> None:
    with pytest.raises(HeadTooLarge, match="none that can be counted"):
        heads.build("linear", drawn(2, 4), 3, per_token=False, stage_flops=0)
    report = heads.build("linear", drawn(2, 4), 3, per_token=False, stage_flops=0, budget=None)[2]
    assert report.share == math.inf and "none that can be counted" in str(report)


def test_a_users_head_is_taken_or_refused_never_shrunk() -> None:
    x = drawn(4, 6)

    def wide(features: Tensor, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(features.shape[1], 50), nn.Linear(50, outputs))

    cost = 2 * 4 * (6 * 50 + 50 * CLASSES)
    head, loss, report = heads.build(wide, x, CLASSES, per_token=False, stage_flops=10 * cost)
    assert report == heads.HeadReport("wide", None, cost, 10 * cost) and loss is cross_entropy
    assert head(x).dtype == torch.float64
    with pytest.raises(HeadTooLarge, match="'wide' of this stage"):
        heads.build(wide, x, CLASSES, per_token=False, stage_flops=10 * cost - 1)
    assert "of its stage's" in str(report) and "10 %" in str(report)
