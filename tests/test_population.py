"""Populations whose members differ: regularisers by their formulas, first weights by their law, the same in every world."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import unlocked as ul
from unlocked.cli import main
from unlocked.config import Options, RunConfig, resolve
from unlocked.errors import CannotJoin, InvalidChoice
from unlocked.losses import WrongTarget, cross_entropy
from unlocked.method_names import parse_method
from unlocked.population import CIFAR, IMAGENET, Regulariser, apply, draw
from unlocked.population.applying import smoothed
from unlocked.population.erasing import AREA, RATIO, boxes, erase
from unlocked.population.mixing import box, cutmix, mixup
from unlocked.rng import generator
from unlocked.worlds import Distributed

from methods import assert_same, batch, data, mlp, momentum, state, trainer
from processes import Failed, run_processes

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(2, 14), st.integers(2, 14))
ALPHAS = st.sampled_from([0.05, 0.2, 0.5, 1.0, 4.0])
SEEDS = st.integers(0, 2**31)
MIXED = [Regulariser(mixup=1.0), Regulariser(mixup=0.5, label_smoothing=0.1)]


def images(shape=(6, 3, 8, 8), seed=0, classes=5, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=source, dtype=dtype)
    return x, torch.randint(classes, shape[:1], generator=source)


def onehot(y, classes=5):
    return F.one_hot(y, classes).double()


# ---- drawing ----------------------------------------------------------------------------------------------------------


@given(st.sampled_from([("cifar", CIFAR), ("imagenet", IMAGENET)]), SEEDS, st.integers(1, 12))
@settings(deadline=None, max_examples=25)
def test_values_are_drawn_from_the_thesis_lists_and_members_do_not_depend_on_their_number(named, seed, n):
    name, lists = named
    drawn = draw(n, seed, name)
    assert all(getattr(one, field) in lists[field] for one in drawn for field in lists)
    assert draw(n + 3, seed, name)[:n] == drawn == draw(n, seed, dict(lists))


def test_the_lists_are_the_thesis():
    assert {name: set(values) for name, values in CIFAR.items()} == {
        "mixup": {0, 0.5, 1},
        "label_smoothing": {0, 0.05, 0.1},
        "cutmix": {0, 0.5, 1},
        "random_erasing": {0, 0.15, 0.35},
    }
    assert {name: set(values) for name, values in IMAGENET.items()} == {
        "mixup": {0, 0.2},
        "label_smoothing": {0, 0.1},
        "cutmix": {0, 1},
        "random_erasing": {0, 0.35},
    }


def test_draws_are_uniform_independent_and_differ_between_members():
    drawn = draw(900, 1)
    assert len(set(drawn)) == 81
    for field, values in CIFAR.items():
        counts = Counter(getattr(one, field) for one in drawn)
        assert all(240 < counts[value] < 360 for value in values)  # 300 ± 4 deviations
    pairs = Counter((one.mixup, one.cutmix) for one in drawn)
    assert all(60 < count < 140 for count in pairs.values())
    assert draw(4, 1) != draw(4, 2)
    assert draw(3, 0, {"mixup": [0.3]}) == (Regulariser(mixup=0.3),) * 3


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Regulariser(mixup=-1.0), r"mixup=-1.0\) is not possible: it is the α"),
        (lambda: Regulariser(cutmix=float("nan")), "give a number"),
        (lambda: Regulariser(cutmix=float("inf")), "give a number"),
        (lambda: Regulariser(mixup=True), "give a number"),
        (lambda: Regulariser(label_smoothing=1.0), "at least 0 and below 1"),
        (lambda: Regulariser(random_erasing=1.5), "a probability from 0 to 1"),
        (lambda: draw(0, 0), "n=0 members"),
        (lambda: draw(2, 0, "cifra"), "did you mean 'cifar'"),
        (lambda: draw(2, 0, {"mixupp": [0.1]}), "did you mean 'mixup'"),
        (lambda: draw(2, 0, {"mixup": []}), "is empty"),
        (lambda: draw(2, 0, {"label_smoothing": [2.0] + [0.0] * 9}), "below 1"),
    ],
)
def test_impossible_regularisers_are_refused(make, words):
    with pytest.raises(InvalidChoice, match=words):
        make()


# ---- one batch --------------------------------------------------------------------------------------------------------


def test_all_zeros_is_nothing():
    x, y = images()
    source = generator(0)
    before = source.get_state()
    again, labels = apply(Regulariser(), x, y, 5, source)
    assert again is x and labels is y and torch.equal(source.get_state(), before)
    tokens = torch.randint(7, (2, 4))
    assert apply(Regulariser(), tokens, tokens, None, source)[0] is tokens
    regression = torch.randn(6, 2)
    assert apply(Regulariser(), x, regression, None, source)[1] is regression


@given(SHAPES, ALPHAS, SEEDS)
@settings(deadline=None, max_examples=40)
def test_mixup_is_its_formula_with_one_share_and_one_permutation_of_the_batch(shape, alpha, seed):
    x = images(shape, seed % 100)[0]
    count, before = len(x), x.clone()
    mixed, soft = mixup(
        x, torch.eye(count, dtype=torch.float64), alpha, generator(seed)
    )  # targets that say who is in it
    assert torch.equal(x, before)
    others = soft - soft.diag().diag()
    partner = [int(row.argmax()) if row.max() > 0 else k for k, row in enumerate(others)]
    shares = {float(soft[k, k]) for k in range(count) if partner[k] != k}
    assert len(shares) <= 1
    share = shares.pop() if shares else 1.0
    for k in range(count):
        other = partner[k]
        torch.testing.assert_close(mixed[k], share * x[k] + (1 - share) * x[other], rtol=0, atol=1e-12)
        own = 1.0 if other == k else share
        assert soft[k, k] == own and abs(soft[k].sum() - 1) < 1e-12
    if 0 < share < 1:
        assert sorted(partner) == list(range(count))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_are_beta_distributed(alpha):
    x, y = torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    shares = []
    for seed in range(1500):
        mixed, _ = mixup(x, y, alpha, generator("beta", seed))
        if mixed[0] + mixed[1] == 1 and not torch.equal(mixed, x):  # they were partners
            shares.append(1 - float(mixed[0]))
    shares = torch.tensor(shares)
    assert len(shares) > 600
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 4 * math.sqrt(variance / len(shares))
    assert abs(shares.var() / variance - 1) < 0.2


@given(SHAPES, ALPHAS, SEEDS)
@settings(deadline=None, max_examples=40)
def test_cutmix_takes_one_box_from_one_partner_and_weighs_targets_by_its_pixels(shape, alpha, seed):
    count = shape[0]
    x = (
        torch.arange(count, dtype=torch.float64)[:, None, None, None].expand(shape).contiguous()
    )  # every pixel says whose it is
    before = x.clone()
    y = torch.eye(count, dtype=torch.float64)
    mixed, soft = cutmix(x, y, alpha, generator(seed))
    assert torch.equal(x, before)
    moved = mixed != x
    for k in range(count):
        assert (moved[k] == moved[k, :1]).all()  # alike in all channels
        there = mixed[k][moved[k]]
        if len(there):
            assert (there == there[0]).all()
            kept = 1 - moved[k, 0].double().mean()
            expected = kept * y[k] + (1 - kept) * y[int(there[0])]
            torch.testing.assert_close(soft[k], expected, rtol=0, atol=1e-12)
            rows, columns = moved[k, 0].any(1), moved[k, 0].any(0)
            assert moved[k, 0].sum() == rows.sum() * columns.sum()  # a rectangle
            assert (moved[k, 0] == moved.any(0)[0]).all()  # the same one for all
        else:
            assert torch.equal(soft[k], y[k])
    torch.testing.assert_close(soft.sum(1), torch.ones(count, dtype=torch.float64))


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), SEEDS)
@settings(deadline=None, max_examples=80)
def test_the_box_lies_in_the_image_and_is_no_larger_than_the_other_share(height, width, share, seed):
    top, bottom, left, right = box(height, width, share, generator(seed))
    assert 0 <= top <= bottom <= height and 0 <= left <= right <= width
    side = math.sqrt(1 - share)
    assert bottom - top <= side * height + 0.5 and right - left <= side * width + 0.5


def test_a_box_in_the_middle_has_the_area_of_the_other_share():
    drawn = torch.tensor([box(100, 60, 0.75, generator("box", k)) for k in range(200)])
    top, bottom, left, right = drawn[(drawn[:, 0] > 0) & (drawn[:, 1] < 100) & (drawn[:, 2] > 0) & (drawn[:, 3] < 60)].T
    assert len(top) > 30 and (bottom - top == 50).all() and (right - left == 30).all()
    assert top.max() - top.min() > 35 and left.max() - left.min() > 20


def test_with_both_one_of_them_is_drawn_for_a_batch():
    x = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    y = torch.tensor([0, 1])
    kinds = Counter()
    for seed in range(400):
        mixed, soft = apply(Regulariser(mixup=1.0, cutmix=1.0), x, y, 2, generator("both", seed))
        if torch.equal(mixed, x):
            continue
        kinds["cutmix" if set(mixed.unique().tolist()) == {0.0, 1.0} else "mixup"] += 1
        torch.testing.assert_close(soft[0, 1], mixed[0].mean(), rtol=0, atol=1e-6)  # the share of the other, either way
    assert min(kinds.values()) / sum(kinds.values()) > 0.38


@pytest.mark.parametrize("name, mixing", [("mixup", mixup), ("cutmix", cutmix)])
def test_the_order_is_erasing_smoothing_mixing(name, mixing):
    x, y = images()
    for seed in range(3):
        alone = apply(Regulariser(**{name: 2.0}), x, y, 5, generator(seed))
        by_hand = mixing(x, onehot(y), 2.0, generator(seed))
        assert torch.equal(alone[0], by_hand[0]) and torch.equal(alone[1], by_hand[1])
        source = generator(seed)
        erased, smooth = erase(x, 0.5, source), smoothed(y, 5, 0.1, torch.float64)
        by_hand = mixing(erased, smooth, 2.0, source)
        made = apply(Regulariser(label_smoothing=0.1, random_erasing=0.5, **{name: 2.0}), x, y, 5, generator(seed))
        assert torch.equal(made[0], by_hand[0]) and torch.equal(made[1], by_hand[1])
        assert not torch.equal(made[0], x)


# ---- erasing ----------------------------------------------------------------------------------------------------------


@given(SHAPES, SEEDS)
@settings(deadline=None, max_examples=30)
def test_erasing_at_its_ends(shape, seed):
    x = images(shape)[0].abs() + 1
    assert torch.equal(erase(x, 0.0, generator(seed)), x)
    erased = erase(x, 1.0, generator(seed))
    inside = erased == 0
    assert torch.equal(erased[~inside], x[~inside])
    assert (inside == inside[:, :1]).all()  # alike in all channels


@pytest.mark.parametrize("height, width", [(32, 32), (40, 24)])
def test_erased_boxes_have_the_papers_areas_and_ratios_and_lie_anywhere(height, width):
    x = torch.ones(6000, 1, height, width)
    inside = erase(x, 1.0, generator("erased"))[:, 0] == 0
    rows, columns = inside.any(2).sum(1).double(), inside.any(1).sum(1).double()
    assert torch.equal(inside.sum((1, 2)), (rows * columns).long())  # one rectangle each
    area, ratio = rows * columns / (height * width), rows / columns
    assert (rows >= 1).all() and (rows <= height).all() and (columns <= width).all()
    half = 0.5 * (rows + columns) / (height * width) + 1e-3  # rounding of the sides
    assert (area >= AREA[0] - half).all() and (area <= AREA[1] + half).all()
    off = 0.5 / rows + 0.5 / columns  # the same, relative, to first order
    assert (ratio >= RATIO[0] * (1 - 1.2 * off)).all() and (ratio <= RATIO[1] * (1 + 1.5 * off)).all()
    assert abs(area.mean() - sum(AREA) / 2) < 0.01
    assert area.min() < 0.03 and area.max() > 0.31 and ratio.log().min() < -1 and ratio.log().max() > 1
    assert abs(ratio.log().mean()) < 0.1
    touches = [inside[:, 0].any(1), inside[:, -1].any(1), inside[:, :, 0].any(1), inside[:, :, -1].any(1)]
    assert all(bool(edge.any()) for edge in touches)
    assert len(torch.unique(inside, dim=0)) > 5000  # every image its own


def test_the_share_of_erased_images_is_the_probability():
    x = torch.ones(5000, 1, 16, 16)
    erased = (erase(x, 0.35, generator(1)) == 0).flatten(1).any(1).double().mean()
    assert abs(erased - 0.35) < 0.03


def test_a_box_that_does_not_fit_is_drawn_anew_and_one_that_never_fits_is_none():
    drawn = torch.full((2, 22), 0.999)  # the largest area and ratio: 1.04 of the height
    drawn[1, 7], drawn[1, 17] = 0.0, 0.5  # the sixth try fits
    mask = boxes(drawn, 32, 32)
    assert not mask[0].any()
    side = round(math.sqrt(AREA[0] * 32 * 32))
    assert int(mask[1].sum()) == side * side and mask[1, -1, -1]  # as far down and right as it can lie


def test_erasing_alone_keeps_hard_targets():
    x, y = images()
    erased, labels = apply(Regulariser(random_erasing=1.0), x, y, None, generator(0))
    assert labels is y and (erased == 0).any() and not (x == 0).any()


# ---- targets ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(1, 9), st.floats(0, 0.99), st.booleans(), SEEDS)
@settings(deadline=None, max_examples=40)
def test_smoothing_is_pytorchs_label_smoothing(count, classes, smoothing, tokens, seed):
    source = torch.Generator().manual_seed(seed)
    shape = (count, 3) if tokens else (count,)
    logits = torch.randn(*shape, classes, generator=source, dtype=torch.float64)
    y = torch.randint(classes, shape, generator=source)
    soft = smoothed(y, classes, smoothing, torch.float64)
    torch.testing.assert_close(soft.sum(-1), torch.ones(shape, dtype=torch.float64))
    expected = F.cross_entropy(logits.flatten(0, -2), y.flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(logits, soft), expected, rtol=1e-12, atol=1e-12)
    hard = cross_entropy(logits, y)
    assert torch.equal(hard, F.cross_entropy(logits.flatten(0, -2), y.flatten()))  # as it always was
    torch.testing.assert_close(cross_entropy(logits, smoothed(y, classes, 0.0, torch.float64)), hard)


def test_soft_targets_are_the_sum_over_classes_and_take_any_float_type():
    logits, soft = torch.randn(4, 5), torch.rand(4, 5, dtype=torch.float64).softmax(1)
    by_hand = -sum(soft[b, k] * logits[b].double().log_softmax(0)[k] for b in range(4) for k in range(5)) / 4
    torch.testing.assert_close(cross_entropy(logits, soft), by_hand)
    low = cross_entropy(logits.bfloat16(), soft.float())
    assert low.dtype == torch.float32 and abs(low - by_hand) < 0.05


def test_targets_that_do_not_fit_are_refused():
    with pytest.raises(WrongTarget, match=r"probabilities of the logits' shape \(4, 5\).*torch.float32.*y.long"):
        cross_entropy(torch.randn(4, 5), torch.rand(4))
    with pytest.raises(WrongTarget, match="probabilities"):
        cross_entropy(torch.randn(4, 5), torch.rand(4, 6))
    with pytest.raises(WrongTarget, match="type int64"):
        cross_entropy(torch.randn(5), torch.rand(5))
    with pytest.raises(WrongTarget, match="PredSim compares the classes"):
        ul.losses.PredSim()((torch.randn(4, 5), torch.randn(4, 6)), torch.rand(4, 5))


@pytest.mark.parametrize(
    "regulariser, x, y, error, words",
    [
        (Regulariser(mixup=1.0), torch.zeros(2, 4).long(), torch.zeros(2, 4).long(), InvalidChoice, "for tokens only"),
        (Regulariser(mixup=1.0), torch.zeros(2, 4), torch.zeros(2, 4).long(), WrongTarget, "one class per token"),
        (Regulariser(mixup=1.0), torch.zeros(2, 4), torch.zeros(2, 1), WrongTarget, "for regression leave them out"),
        (Regulariser(label_smoothing=0.1), torch.zeros(2, 4), torch.zeros(2), WrongTarget, "for regression"),
        (Regulariser(random_erasing=0.1), torch.zeros(2, 1, 4, 4), torch.zeros(2), WrongTarget, "for regression"),
        (Regulariser(cutmix=1.0), torch.zeros(2, 4), torch.zeros(2).long(), InvalidChoice, "cutmix needs .* images"),
        (
            Regulariser(random_erasing=1.0),
            torch.zeros(2, 4),
            torch.zeros(2).long(),
            InvalidChoice,
            "random_erasing needs",
        ),
        (
            Regulariser(random_erasing=1.0),
            torch.zeros(2, 1, 4, 4).byte(),
            torch.zeros(2).long(),
            InvalidChoice,
            "normalised images",
        ),
        (Regulariser(mixup=1.0), torch.zeros(2, 4), torch.tensor([0, 5]), WrongTarget, "label 5, .* has 5 outputs"),
        (Regulariser(mixup=1.0), torch.zeros(2, 4), torch.tensor([0, -1]), WrongTarget, "label -1"),
    ],
)
def test_data_that_do_not_suit_a_regulariser_are_refused(regulariser, x, y, error, words):
    with pytest.raises(error, match=words):
        apply(regulariser, x, y, 5, generator(0))


def test_tokens_may_be_smoothed():
    tokens = torch.randint(7, (2, 4))
    x, soft = apply(Regulariser(label_smoothing=0.1), tokens, tokens, 7, generator(0))
    assert x is tokens and soft.shape == (2, 4, 7) and soft.dtype == torch.get_default_dtype()


# ---- a trainer's ------------------------------------------------------------------------------------------------------


def population(regularisers=MIXED, credit=None, **options):
    options = {"replicas": 2, "seed": 3} | options
    return trainer(credit or ul.credit.Backprop(), regularisers=regularisers, **options)


def test_the_homogeneous_setting_is_what_it_was_before():
    sessions = [trainer(ul.credit.Backprop(), replicas=2, seed=3), population(None), population([Regulariser()] * 2)]
    for session in sessions:
        session.fit(data(), 2, batch_size=12)
    for session in sessions[1:]:
        assert_same(state(session), state(sessions[0]))


def test_each_replica_sees_its_own_regulariser_of_every_step():
    """By hand: a trainer of each member alone, given what `apply` makes of its batches."""
    session = population([Regulariser(mixup=1.0), Regulariser(label_smoothing=0.2)], accumulate=2)
    hand = population(None, accumulate=2)
    for step in range(4):
        x, y = batch(24, seed=step)
        shares = list(zip(x.chunk(2), y.chunk(2)))
        made = [
            apply(session.regularisers[n], *share, 3, generator(3, "regulariser", n, step))
            for n, share in enumerate(shares)
        ]
        session.step(x, y)
        hand.update(dict(enumerate(made)))
    assert_same(state(session), state(hand))
    assert made[0][1].shape == (12, 3) and not torch.equal(made[0][0], shares[0][0])


def test_two_members_and_two_steps_draw_differently():
    x, y = batch(12)
    made = [
        apply(MIXED[0], x, y, 3, generator(3, "regulariser", replica, step))[0] for replica in (0, 1) for step in (0, 1)
    ]
    assert all(not torch.equal(made[i], made[j]) for i in range(4) for j in range(i))
    session = population([MIXED[0]] * 2)
    session.step([x, x], [y, y])
    first, second = session.chains
    assert not torch.equal(first[0].body[0].weight, second[0].body[0].weight)


def test_members_have_orders_of_their_own():
    one, two = (torch.cat([x for x, _ in data().batches(12, epoch=0, seed=3, replica=n)]) for n in (0, 1))
    assert not torch.equal(one, two) and torch.equal(one.sort(0).values, two.sort(0).values)


def test_evaluation_and_shared_batches_are_as_ever():
    session = population(consensus=ul.consensus.AllReduce())
    session.fit(data(), 1, batch_size=12)
    assert session.evaluate(data(24, 1)).accuracy is not None
    first, second = session.chains
    assert all(torch.equal(x, second.state_dict()[name]) for name, x in first.state_dict().items())


def test_regularised_members_learn():
    session = population([Regulariser(mixup=0.5), Regulariser(label_smoothing=0.1)])
    session.fit(data(120), 15, batch_size=12)
    assert min(session.evaluate(data(120)).members) > 0.8


CREDITS = {
    "dgl": lambda: ul.credit.DGL(head="linear", budget=None),
    "interlocking": lambda: ul.credit.Interlocking(1, head="linear", budget=None),
    "gpipe": lambda: ul.credit.GPipe(2),
    "pipedream": lambda: ul.credit.PipeDream(drain="end"),
    "cdp-pipeline": lambda: ul.credit.CDPPipeline(drain="end"),
    "delayed-gradients": lambda: ul.credit.DelayedGradients(drain="end"),
    "features-replay": lambda: ul.credit.FeaturesReplay(drain="end"),
    "greedy": lambda: ul.credit.Greedy(head="linear", budget=None),
}


@pytest.mark.parametrize("name", CREDITS)
def test_a_resumed_run_goes_on_bit_for_bit(name, tmp_path):
    """Delayed rules with micro-batches in flight, and in the middle of an epoch, too."""
    whole, stopped = (population(credit=CREDITS[name](), model=mlp(dropout=0.2)) for _ in range(2))
    for k in range(6):
        whole.step(*batch(24, seed=k))
    for k in range(3):
        stopped.step(*batch(24, seed=k))
    stopped.save(tmp_path)
    resumed = ul.Trainer.resume(tmp_path, ul.cut(mlp(dropout=0.2), 3, like=batch()[0]))
    assert resumed.regularisers == tuple(MIXED)
    for k in range(3, 6):
        resumed.step(*batch(24, seed=k))
    for session in (whole, resumed):
        session.drain()
    assert_same(state(resumed), state(whole))


def test_checkpoints_of_earlier_versions_have_no_regularisers(tmp_path):
    session = population(None)
    session.step(*batch())
    file = session.save(tmp_path) / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest.pop("regularisers") is None and manifest.pop("initial") == "same"
    file.write_text(json.dumps(manifest))
    resumed = ul.Trainer.resume(tmp_path, ul.cut(mlp(), 3, like=batch()[0]))
    assert resumed.regularisers is None and resumed.initial == "same"
    assert_same(state(resumed), state(session))


def test_a_trainer_refuses_what_it_cannot_use():
    with pytest.raises(InvalidChoice, match="1 regularisers were given for 2 replicas"):
        population([Regulariser()])
    with pytest.raises(InvalidChoice, match="must be a row of"):
        population(Regulariser())
    with pytest.raises(InvalidChoice, match="must be a row of"):
        population([0.5, 0.5])
    with pytest.raises(InvalidChoice, match="cutmix needs"):  # before the first step
        population([Regulariser(), Regulariser(cutmix=1.0)])
    chain = ul.Chain([ul.Stage(nn.Linear(5, 4)), ul.Stage(nn.Linear(4, 3))])
    with pytest.raises(InvalidChoice, match="this chain has no example batch"):
        ul.Trainer(chain, optimizer=momentum, regularisers=[Regulariser(mixup=1.0)])
    with pytest.raises(WrongTarget, match="PredSim compares the classes"):
        population(credit=ul.credit.PredSim(budget=None)).step(*batch())


# ---- first weights ----------------------------------------------------------------------------------------------------


SIZES = {
    "cnn": {"width": 8, "depth": 3},
    "resnet18": {"width": 0.125},
    "revresnet18": {"width": 0.125},
    "gpt": {"width": 32, "layers": 2},
    "vit": {"width": 32, "layers": 2},
}


def zoo(model="cnn", stages=3, credit=None, **options):
    x = torch.randint(20, (2, 12)) if model == "gpt" else torch.randn(2, 3, 8, 8)
    torch.manual_seed(0)
    classes = 20 if model == "gpt" else 10
    made = ul.models.build(model, input_shape=tuple(x.shape[1:]), classes=classes, **SIZES[model])
    chain = ul.cut(made, stages, like=x)
    return ul.Trainer(
        chain, credit=credit, optimizer=momentum, **{"replicas": 3, "seed": 5, "initial": "different"} | options
    )


def same_size(one, other):
    """Whether two tensors may be draws of one law, by their root mean squares."""
    a, b = (float(x.detach().double().square().mean().sqrt()) for x in (one, other))
    return a == b == 0 or abs(math.log(a / b)) < 6 / math.sqrt(one.numel())


@pytest.mark.parametrize("model", ["resnet18", "gpt", "vit", "revresnet18"])
def test_members_of_a_library_model_are_drawn_as_if_built_again(model):
    session = zoo(model)
    torch.manual_seed(0)
    again = session.chains[0].recipe["model"]
    first = ul.models.from_recipe(again).state_dict()
    mine = session.chains[0].state_dict()
    assert all(torch.equal(mine[name], x) for name, x in first.items())  # replica 0 keeps the user's
    members = [chain.state_dict() for chain in session.chains]
    for name, x in first.items():
        if x.is_floating_point() and x.numel() > 1:
            random = x.std() > 0
            for member, earlier in ((1, 0), (2, 0), (2, 1)):
                assert same_size(members[member][name], x), name
                assert torch.equal(members[member][name], members[earlier][name]) != bool(random), name
    assert_same(state(zoo(model)), state(session))  # a function of the seed
    other = zoo(model, seed=6).chains[1].state_dict()
    assert any(not torch.equal(x, other[name]) for name, x in members[1].items())


def test_other_models_are_drawn_by_reset_parameters():
    torch.manual_seed(9)
    before = torch.get_rng_state()
    session = trainer(ul.credit.Backprop(), model=mlp(norm=True), replicas=3, initial="different", seed=1)
    torch.manual_seed(0), torch.set_rng_state(before)
    one, two, three = (chain.state_dict() for chain in session.chains)
    assert all(torch.equal(x, one[name]) for name, x in ul.cut(mlp(norm=True), 3, like=batch()[0]).state_dict().items())
    for name, x in one.items():
        if x.is_floating_point():
            assert same_size(two[name], x) or x.numel() < 30
            assert torch.equal(two[name], x) == torch.equal(two[name], three[name]) == (x.std() == 0)


def test_the_users_random_stream_and_the_frozen_are_left_alone():
    model = mlp(norm=True)
    model[0].weight.requires_grad_(False)
    for x in model[1].parameters():
        x.requires_grad_(False)
    model[1].running_mean.fill_(0.25)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    session = trainer(ul.credit.Backprop(), model=model, replicas=2, initial="different")
    assert torch.equal(torch.rand(3), expected)
    one, two = (chain.state_dict() for chain in session.chains)
    for name in ("0.weight", "1.weight", "1.running_mean"):
        assert torch.equal(one[name], two[name])
    assert not torch.equal(one["0.bias"], two["0.bias"]) and not torch.equal(one["3.weight"], two["3.weight"])


def test_heads_are_drawn_anew_by_their_own_law():
    session = zoo(credit=ul.credit.PredSim(budget=None))
    for j in (0, 1):
        heads = [chain[j].head for chain in session.chains]
        for name, x in heads[0].named_parameters():
            assert same_size(dict(heads[1].named_parameters())[name], x), name
        assert not heads[1].decoder.weight.any()  # which reset_parameters would not do
        assert not torch.equal(heads[0].similar.weight, heads[1].similar.weight)
        assert not torch.equal(heads[2].similar.weight, heads[1].similar.weight)
        assert session.chains[1][j].loss == session.chains[0][j].loss
    session.step(torch.randn(12, 3, 8, 8), torch.randint(10, (12,)))
    by_hand = ul.cut(mlp(), 2, like=batch()[0])
    by_hand[0].head = nn.Linear(7, 3).double()
    session = ul.Trainer(by_hand, credit=ul.credit.DGL(), optimizer=momentum, replicas=2, initial="different")
    assert not torch.equal(session.chains[0][0].head.weight, session.chains[1][0].head.weight)


class Bare(nn.Module):
    """Weights, and no way to draw them again."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(7, dtype=torch.float64))

    def forward(self, x):
        return x * self.scale


def test_what_cannot_be_drawn_by_the_same_law_is_refused():
    model = nn.Sequential(nn.Linear(5, 7).double(), Bare(), nn.Linear(7, 3).double())
    with pytest.raises(InvalidChoice, match=r"Bare \(stage 0, 1_1\) does not have; .*initial=lambda n"):
        trainer(ul.credit.Backprop(), stages=2, model=model, replicas=2, initial="different")
    own = mlp()
    nn.init.normal_(own[2].weight, std=0.9)
    with pytest.raises(InvalidChoice, match=r"reset_parameters\(\) draws .*an initialisation of its own"):
        trainer(ul.credit.Backprop(), model=own, replicas=2, initial="different")
    own = mlp(norm=True)
    nn.init.zeros_(own[1].weight)  # as residual networks do
    with pytest.raises(InvalidChoice, match="initialisation of its own"):
        trainer(ul.credit.Backprop(), model=own, replicas=2, initial="different")


def test_a_function_gives_chains_models_or_states():
    def model(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 7), Bare(), nn.Linear(7, 3)).double()

    chain = ul.cut(model(0), 2, like=batch()[0])
    asked = []

    def initial(n):
        asked.append(n)
        made = model(100 + n)
        return [None, made, made.state_dict(), ul.cut(made, 2, like=batch()[0])][n]

    session = ul.Trainer(chain, optimizer=momentum, replicas=4, initial=initial)
    assert asked == [1, 2, 3] and session.initial == "given"
    for n, member in enumerate(session.chains):
        expected = model(100 + n if n else 0).state_dict()
        assert all(torch.equal(x, expected[name]) for name, x in member.state_dict().items())
    with pytest.raises(InvalidChoice, match=r"initial\(1\) gave a int"):
        ul.Trainer(chain, optimizer=momentum, replicas=2, initial=lambda n: n)


def test_random_numbers_of_such_a_function_are_seeded_for_each_member():
    def model():
        return nn.Sequential(nn.Linear(5, 7), Bare(), nn.Linear(7, 3)).double()

    chain = ul.cut(model(), 2, like=batch()[0])
    one, two = (
        ul.Trainer(chain, optimizer=momentum, replicas=3, initial=lambda n: model(), seed=1).chains for _ in range(2)
    )
    for n in (1, 2):
        assert all(torch.equal(x, two[n].state_dict()[name]) for name, x in one[n].state_dict().items())
    assert len({member[0].body[0].weight[0, 0].item() for member in one}) == 3


@pytest.mark.parametrize("rule", ul.consensus.ALL)
def test_rules_whose_replicas_must_begin_equal_refuse(rule):
    needs = {"all-reduce", "wash", "cdp", "acco", "dpu", "wp", "torch-ddp", "torch-fully-shard", "torch-zero1"}
    if rule.name in needs:
        assert rule.needs_equal_start
        with pytest.raises(InvalidChoice, match=f"Under {rule.name} all replicas must begin with the same weights"):
            resolve(Options(initial="different"), parse_method(f"backprop/{rule.name}@2"), 0, 1)
    if rule is ul.consensus.Independent:
        assert not rule.needs_equal_start
    with pytest.raises(InvalidChoice, match="did you mean 'different'"):
        trainer(ul.credit.Backprop(), initial="differnt")


def test_wash_refuses_different_weights_and_one_replica_has_nobody_to_differ_from():
    with pytest.raises(InvalidChoice, match="Under wash all replicas"):
        trainer(ul.credit.Backprop(), ul.consensus.WASH(), replicas=2, initial="different")
    alone = trainer(ul.credit.Backprop(), ul.consensus.WASH(), initial="different")
    assert_same(state(alone), state(trainer(ul.credit.Backprop())))


def test_a_resume_draws_no_weights(tmp_path):
    options = {"regularisers": draw(3, 4, {"mixup": (0.5, 1.0), "cutmix": (1.0,), "random_erasing": (0.3,)})}
    whole, stopped = zoo(**options), zoo(**options)
    batches = [(torch.randn(12, 3, 8, 8), torch.randint(10, (12,))) for _ in range(4)]
    for k, (x, y) in enumerate(batches):
        whole.step(x, y)
        if k < 2:
            stopped.step(x, y)
    stopped.save(tmp_path)
    resumed = ul.Trainer.resume(tmp_path)
    assert resumed.initial == "different" and resumed.regularisers == whole.regularisers
    for x, y in batches[2:]:
        resumed.step(x, y)
    assert_same(state(resumed), state(whole))
    again = ul.Trainer.resume(resumed.save(tmp_path), consensus=ul.consensus.WASH(0.1))  # its weights are there
    again.step(*batches[0])


# ---- the same on two processes -----------------------------------------------------------------------------------------


def varied(world=None, **options):
    return population(
        credit=ul.credit.DGL(head="linear", budget=None),
        model=mlp(2, norm=True, dropout=0.2, dtype=torch.float32),
        stages=2,
        initial="different",
        world=world,
        **options,
    )


SMALL = data(48, dtype=torch.float32)


def here(session):
    return {
        (weights.worker.replica, weights.worker.stage, name): x.detach().clone()
        for weights in session.weights
        for name, x in nn.Module.state_dict(weights.stage).items()
    }


def on_processes(cluster, links):
    torch.manual_seed(100 + cluster.rank)
    with Distributed(cluster, links=links) as world:
        session = varied(world)
        session.fit(SMALL, 2, batch_size=12)
        return here(session), sorted({w.replica for w in session.workers})


@pytest.mark.parametrize("processes", [2, 4])
def test_members_on_processes_of_their_own_are_those_of_one_process(processes):
    torch.set_num_threads(1)  # as on the processes: it decides last bits
    session = varied()
    session.fit(SMALL, 2, batch_size=12)
    merged = {}
    for found, _ in run_processes(on_processes, processes, "auto"):
        merged |= found
    expected = here(session)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], x) for name, x in expected.items())


def told_differently(cluster, what):
    with Distributed(cluster) as world:
        if what == "regularisers":
            varied(world, regularisers=[Regulariser(mixup=0.1 * (1 + cluster.rank))] * 2)
        else:
            torch.manual_seed(cluster.rank)
            states = [mlp(2, norm=True, dropout=0.2, dtype=torch.float32).state_dict() for _ in range(2)]
            states[1]["0.weight"] = torch.full((7, 5), float(cluster.rank))
            population(
                None,
                model=mlp(2, norm=True, dropout=0.2, dtype=torch.float32),
                stages=2,
                world=world,
                initial=lambda n: states[n],
            )


@pytest.mark.parametrize("what, words", [("regularisers", "regularisers"), ("initial", "what initial gives")])
def test_processes_that_were_told_different_things_do_not_begin(what, words):
    with pytest.raises(Failed, match=f"{CannotJoin.__name__}.*{words}"):
        run_processes(told_differently, 2, what)


# ---- the command line --------------------------------------------------------------------------------------------------

TINY = ["--subset", "100", "--width", "8", "--batch-size", "25", "--threads", "1", "--device", "cpu", "--epochs", "1"]


def test_a_run_writes_what_was_drawn_and_goes_on_with_it(tmp_path):
    command = [
        "train",
        "--credit",
        "backprop",
        "--replicas",
        "2",
        "--population",
        "heterogeneous",
        "--initial",
        "different",
    ]
    assert main([*command, *TINY, "--seed", "4", "--run", str(tmp_path / "run"), "--json"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["population"], config["initial"]) == ("heterogeneous", "different")
    assert [Regulariser(**one) for one in config["regularisers"]] == list(draw(2, 4))
    resumed = ul.Trainer.resume(tmp_path / "run" / "checkpoint")
    assert resumed.regularisers == draw(2, 4) and resumed.initial == "different"
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "random_erasing" in (tmp_path / "run" / "report.html").read_text()


def test_configurations_of_earlier_versions_are_homogeneous():
    config = resolve(Options(width=8), parse_method("backprop@2"), 0, 1)
    entries = config.to_json()
    assert entries.pop("population") == "homogeneous" and entries.pop("initial") == "same"
    assert RunConfig.from_json(entries) == config
