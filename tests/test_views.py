"""Two views of every image: layout, independence, purity; and the operations that views are made of, against plain formulas."""

from __future__ import annotations

import colorsys
import dataclasses
import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import unlocked as ul
from unlocked.callbacks import Callback
from unlocked.data import Data, Domains, from_tensors, load
from unlocked.data import augment as augmentation
from unlocked.data.colour import Gray, Jitter
from unlocked.data.order import Moment
from unlocked.data.resized_crop import ResizedCrop
from unlocked.errors import BadData, InvalidChoice

EVERYTHING = "simclr+cutout:3"
OPERATIONS = ("crop", "flip", "cutout:3", "resized-crop", "jitter", "gray")
COUNT = 4000  # draws, for what is only true on average
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda bs: st.tuples(st.integers(bs[0] * bs[1], 30), st.just(bs[0]), st.just(bs[1]))
)


def pixels(count: int, channels: int = 3, height: int = 7, width: int = 9, seed: int = 0) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, height, width), dtype=torch.uint8, generator=numbers)


def images(count: int, augment: str | None = EVERYTHING, **shape: int) -> Data:
    """Random images, each labelled with its own number."""
    return from_tensors(pixels(count, **shape), torch.arange(count), augment=augment)


def raw(data: Data) -> Data:
    """The same without normalisation, so that batches are between 0 and 255."""
    return dataclasses.replace(data, mean=None, std=None)


def numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(left: Sequence[Sequence[Tensor]], right: Sequence[Sequence[Tensor]]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for p, q in zip(left, right) for a, b in zip(p, q))


def joined(parts: Sequence[Sequence[Sequence[Tensor]]]) -> list[tuple[Tensor, ...]]:
    """The replicas' batches, those of each step one after the other."""
    return [tuple(torch.cat(pieces) for pieces in zip(*together)) for together in zip(*parts)]


# ---- batches of views ------------------------------------------------------------------------------------------------


def test_rows_2k_and_2k_plus_1_are_views_of_the_same_image_with_its_label() -> None:
    data = raw(images(24, "views+flip"))
    for x, y in data.batches(5, epoch=1, seed=2):
        assert x.shape == (10, 3, 7, 9) and x.dtype == torch.float32 and torch.equal(y[::2], y[1::2])
        assert len(y.unique()) == 5
        for row, label in zip(x, y):
            image = data.x[label].float()
            assert torch.equal(row, image) or torch.equal(row, image.flip(-1))


@settings(deadline=None, max_examples=25)
@given(SIZES, st.integers(0, 3))
def test_the_replicas_batches_one_after_the_other_are_one_batch_of_pairs(sizes: tuple[int, int, int], e: int) -> None:
    count, batch, shards = sizes
    data = images(count)
    one = list(data.batches(batch * shards, epoch=e, seed=1))
    parts = [list(data.batches(batch, epoch=e, seed=1, replica=r, shards=shards)) for r in range(shards)]
    assert len(one) == data.steps(batch, shards) and all(len(x) == 2 * batch * shards for x, _ in one)
    assert same(joined(parts), one)


def test_batches_are_pure_whatever_is_asked_in_between_and_start_skips() -> None:
    data, state = images(23), torch.get_rng_state()
    whole = list(data.batches(4, epoch=2, seed=5, replica=1, shards=2))
    other = data.batches(4, epoch=3, seed=5)
    for start in range(len(whole) + 1):
        next(other)
        assert same(list(data.batches(4, epoch=2, seed=5, replica=1, shards=2, start=start)), whole[start:])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_first_view_is_the_one_without_views_and_the_second_another_of_the_same_law() -> None:
    data, single = images(20), images(20, EVERYTHING.replace("simclr", "resized-crop+flip+jitter+gray"))
    pairs, singles = (list(source.batches(6, epoch=0, seed=3)) for source in (data, single))
    assert same([(x[::2], y[::2]) for x, y in pairs], singles)
    assert all((x[::2] != x[1::2]).flatten(1).any(1).all() for x, _ in pairs)
    operations = augmentation.parse("views+resized-crop+flip+jitter+gray")
    moment = Moment(0, 0, 0)
    for operation, table in zip(operations, augmentation.draw(operations, COUNT, (3, 32, 32), moment, 2)):
        assert torch.equal(table[::2], operation.draw(COUNT, 32, 32, moment.numbers(operation.name)))
        first, second = table[::2].double(), table[1::2].double()
        error = (2 * table.double().var(0) / COUNT).sqrt()
        assert ((first.mean(0) - second.mean(0)).abs() < 5 * error).all()
        centred = [part - part.mean(0) for part in (first, second)]
        correlation = (centred[0] * centred[1]).mean(0) / table.double().var(0)
        assert (correlation.abs() < 5 / math.sqrt(COUNT)).all()


def test_every_epoch_seed_and_stream_draws_anew_also_where_the_last_draw_is_kept() -> None:
    moments = [Moment(0, 0, 0), Moment(1, 0, 0), Moment(0, 1, 0), Moment(0, 0, 1)]
    tables = [torch.cat(augmentation.drawn("simclr", 20, (3, 8, 8), moment), 1) for moment in moments]
    again = [augmentation.draw(augmentation.parse("simclr"), 20, (3, 8, 8), moment, 2) for moment in moments]
    assert all(torch.equal(table, torch.cat(plain, 1)) for table, plain in zip(tables, again))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(tables, 2))


def test_evaluation_is_plain_and_held_out_pairs_are_training_batches_of_the_test_set() -> None:
    train = images(30)
    test = from_tensors(pixels(12, seed=1), torch.arange(12), like=train)
    assert (train.views, test.views, images(4, None).views, images(4, "views + crop").views) == (2, 1, 1, 2)
    x, _ = next(train.batches(30, epoch=0, seed=0, train=False))
    assert torch.equal(x, train.samples(torch.arange(30))[0])
    pairs = dataclasses.replace(test, augment=train.augment).batches(5, epoch=0, seed=7)
    (x, y), _ = pairs
    assert x.shape == (10, 3, 7, 9) and torch.equal(y[::2], y[1::2])


@pytest.mark.parametrize("channels", [1, 3])
def test_values_stay_in_range_and_bytes_stay_as_they_were(channels: int) -> None:
    data = raw(images(64, "simclr", channels=channels))
    before = data.x.clone()
    x = torch.cat([x for x, _ in data.batches(16, epoch=0, seed=0)])
    assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 255 and torch.equal(data.x, before)


def test_digits_of_one_channel_have_views() -> None:
    train, _ = load("digits", augment="simclr")
    x, y = next(train.batches(32, epoch=0, seed=0))
    assert x.shape == (64, 1, 8, 8) and y.shape == (64,) and x.isfinite().all()


# ---- the operations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_batch_is_changed_as_its_samples_are(name: str, channels: int) -> None:
    (operation,), x = augmentation.parse(name), pixels(30, channels)
    x = x.float() if operation.normalised else x
    rows, before = operation.draw(30, 7, 9, numbers()), x.clone()
    alone = torch.cat([operation.apply(x[i : i + 1], rows[i : i + 1]).float() for i in range(30)])
    assert torch.equal(operation.apply(x, rows).float(), alone) and torch.equal(x, before)
    floats = x.float()
    operation.apply(floats, rows)
    assert torch.equal(floats, before.float()) and len(operation.apply(x[:0], rows[:0])) == 0


def near(values: Tensor, mean: float, variance: float) -> bool:
    """Whether the mean of independent draws is what it should be, up to five standard errors."""
    return bool((values.double().mean() - mean).abs() < 5 * math.sqrt(variance / len(values)))


def test_shares_factors_and_orders_are_drawn_as_often_as_they_should_be() -> None:
    for operation, share in ((augmentation.Flip(), 0.5), (Gray(), 0.2), (Jitter(), 0.8)):
        chosen = operation.draw(COUNT, 8, 8, numbers())[:, 0]
        assert set(chosen.tolist()) == {0, 1} and near(chosen, share, share * (1 - share))
    drawn = Jitter().draw(COUNT, 8, 8, numbers()).double()
    for column, (least, most) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)], start=1):
        unit = (drawn[:, column] - least) / (most - least)
        assert unit.min() > -1e-6 and unit.max() < 1 + 1e-6
        assert near(unit, 1 / 2, 1 / 12) and near(unit.square(), 1 / 3, 4 / 45)
    orders = [tuple(row) for row in drawn[:, 5:].long().tolist()]
    assert set(orders) == set(itertools.permutations(range(4)))
    expected = COUNT / 24
    assert all(abs(orders.count(order) - expected) < 5 * math.sqrt(expected) for order in set(orders))


def slow_window(height: int, width: int, source: np.random.Generator) -> tuple[float, float, float, float]:
    """Area share, log ratio, and place of the centre as shares: one window, drawn as the papers' code does."""
    for _ in range(10):
        area = source.uniform(0.08, 1) * height * width
        ratio = math.exp(source.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = source.integers(0, height - h + 1), source.integers(0, width - w + 1)
            break
    else:
        h = min(height, round(width / (3 / 4)))
        w = min(width, round(height * (4 / 3)))
        top, left = (height - h) // 2, (width - w) // 2
    return h * w / (height * width), math.log(w / h), (top + h / 2) / height, (left + w / 2) / width


@pytest.mark.parametrize("side", [(32, 32), (8, 8), (24, 40), (40, 18)])
def test_windows_are_inside_within_the_scale_and_of_the_law_of_the_slow_loop(side: tuple[int, int]) -> None:
    height, width = side
    top, left, high, wide = ResizedCrop().draw(COUNT, height, width, numbers()).double().unbind(1)
    assert min(top.min(), left.min()) >= 0 and (top + high).max() <= height and (left + wide).max() <= width
    least = (math.sqrt(0.08 * height * width * 3 / 4) - 0.5) * (math.sqrt(0.08 * height * width * 4 / 3) - 0.5)
    assert (high * wide).min() >= least and (high * wide).max() <= height * width
    fast = torch.stack([high * wide / (height * width), (wide / high).log()], 1)
    fast = torch.cat([fast, torch.stack([(top + high / 2) / height, (left + wide / 2) / width], 1)], 1)
    source = np.random.default_rng(0)
    slow = torch.tensor([slow_window(height, width, source) for _ in range(COUNT)], dtype=torch.float64)
    for power in (1, 2):
        a, b = fast**power, slow**power
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * ((a.var(0) + b.var(0)) / COUNT).sqrt()).all()


@pytest.mark.parametrize("side, window", [((4, 64), (0, 29, 4, 5)), ((64, 3), (30, 0, 4, 3))])
def test_where_no_window_fits_it_is_the_largest_in_the_middle(
    side: tuple[int, int], window: tuple[int, int, int, int]
) -> None:
    drawn = ResizedCrop().draw(300, *side, numbers())
    assert (drawn == torch.tensor(window)).all(1).double().mean() > 0.5
    assert (drawn[:, 2:] >= 1).all() and (drawn[:, :2] + drawn[:, 2:] <= torch.tensor(side)).all()


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_window_is_resized_as_by_itself_antialiased_or_not_and_by_pil(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    high, wide = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - high)), data.draw(st.integers(0, width - wide))
    x, window = pixels(2, 3, height, width), torch.tensor([[top, left, high, wide], [0, 0, height, width]])
    found = ResizedCrop().apply(x.double(), window)
    cut = x[:1, :, top : top + high, left : left + wide]
    for antialias in (False, True) if width > 1 else (False,):  # torch 2.13 repeats the first row of a single column
        expected = F.interpolate(cut.double(), (height, width), mode="bilinear", antialias=antialias)
        torch.testing.assert_close(found[:1], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], x[1].double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ResizedCrop().apply(x, window), found.float(), rtol=1e-4, atol=1e-2)
    picture = Image.fromarray(cut[0].permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(picture).astype(float) - found[0].permute(1, 2, 0).numpy()).max() <= 1.01  # two roundings


def slow_jitter(image: np.ndarray, factors: Sequence[float], order: Sequence[int]) -> np.ndarray:
    """One image (C, H, W) between 0 and 255, in float64, pixel by pixel where hue turns."""
    x = image / 255
    for which in order:
        f, luma = factors[which], x[0] if len(x) == 1 else 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]
        if which == 0:
            x = f * x
        elif which == 1:
            x = f * x + (1 - f) * luma.mean()
        elif which == 2 and len(x) == 3:
            x = f * x + (1 - f) * luma
        elif which == 3 and len(x) == 3:
            for i, j in np.ndindex(*x.shape[1:]):
                hue, saturation, value = colorsys.rgb_to_hsv(*x[:, i, j])
                x[:, i, j] = colorsys.hsv_to_rgb((hue + f) % 1, saturation, value)
        x = np.clip(x, 0, 1)
    return x * 255


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_the_formula_of_each_change_in_the_order_drawn(channels: int) -> None:
    x = torch.cat([pixels(30, channels, 5, 4), pixels(2, 1, 5, 4).expand(-1, channels, -1, -1)])
    x[0], x[1] = 0, 255
    rows = Jitter().draw(32, 5, 4, numbers(3))
    for image, row, found in zip(x, rows, Jitter().apply(x.double(), rows)):
        expected = image.double().numpy()
        if row[0]:
            expected = slow_jitter(expected, row[1:5].tolist(), [int(k) for k in row[5:]])
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
        assert row[0] or torch.equal(found, image.double())
    torch.testing.assert_close(Jitter().apply(x, rows).double(), Jitter().apply(x.double(), rows), rtol=0, atol=2e-3)
    assert 0 < rows[:, 0].sum() < 32


def test_each_change_of_colour_alone_is_its_formula() -> None:
    x, neutral = pixels(6), [1.0, 1.0, 1.0, 0.0]
    for which, factor in enumerate((1.3, 0.7, 1.4, -0.1)):
        factors = [factor if k == which else f for k, f in enumerate(neutral)]
        row = torch.tensor([[1.0, *factors, 0, 1, 2, 3]]).expand(6, -1)
        expected = np.stack([slow_jitter(image.double().numpy(), factors, [which]) for image in x])
        np.testing.assert_allclose(Jitter().apply(x.double(), row).numpy(), expected, atol=1e-4)
        assert np.abs(expected - x.numpy()).max() > 1


def test_gray_is_the_luma_in_three_channels_and_leaves_one_channel_alone() -> None:
    x = pixels(8)
    rows = torch.arange(8)[:, None] % 2
    found, luma = Gray().apply(x, rows), (x.double() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    assert torch.equal(found[::2], x[::2].float())
    torch.testing.assert_close(found[1::2].double(), luma[1::2, None].expand(-1, 3, -1, -1), rtol=0, atol=1e-3)
    assert Gray().apply(x[:, :1], rows) is not None and torch.equal(Gray().apply(x[:, :1], rows), x[:, :1])


# ---- training on views ---------------------------------------------------------------------------------------------------


class Told(Callback):
    """The samples that steps are told to have had."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    def on_step(self, trainer: ul.Trainer, record: dict[str, Any]) -> None:
        self.samples.append(record["samples"])


def trainer(credit: Any = None, consensus: Any = None, replicas: int = 1, **options: Any) -> ul.Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(189, 6), nn.ReLU(), nn.Linear(6, 4))
    chain = ul.cut(model, 2, like=torch.zeros(2, 3, 7, 9))
    sgd = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    return ul.Trainer(chain, credit=credit, consensus=consensus, replicas=replicas, optimizer=sgd, **options)


def labelled(count: int = 24, augment: str | None = "simclr") -> Data:
    return from_tensors(pixels(count), torch.arange(count) % 4, augment=augment)


def test_a_supervised_rule_trains_on_2b_labelled_rows() -> None:
    data, fitted, stepped = labelled(), trainer(), trainer()
    (record,) = fitted.fit(data, 1, batch_size=6)
    for x, y in data.batches(6, epoch=0, seed=0):
        stepped.step(x, y)
    for a, b in zip(fitted.chains[0].parameters(), stepped.chains[0].parameters()):
        assert torch.equal(a, b)
    assert record["samples"] == 24


@pytest.mark.parametrize(
    "make",
    [
        trainer,
        lambda: trainer(ul.credit.AsyncDGL(2, rates=(1, 0.5), head="linear", budget=None)),
        lambda: trainer(consensus=ul.consensus.Gossip(pairing="available"), replicas=2, world=ul.worlds.Simulated()),
    ],
    ids=["in step", "own rates", "freely"],
)
def test_samples_are_counted_as_images(make: Callable[[], ul.Trainer]) -> None:
    told, made = Told(), make()
    (record,) = made.fit(labelled(), 1, batch_size=6, callbacks=[told])
    assert set(told.samples) == {6} and record["samples"] == 24


@dataclass(frozen=True)
class Pairs(ul.credit.Backprop):
    self_supervised = True


def test_what_would_mix_views_is_refused() -> None:
    regulariser = ul.population.Regulariser
    for one in (regulariser(mixup=1.0), regulariser(cutmix=1.0), regulariser(label_smoothing=0.1)):
        with pytest.raises(InvalidChoice, match=r"two views.*homogeneous"):
            trainer(Pairs(), regularisers=[one])
        trainer(regularisers=[one])
    trainer(Pairs(), regularisers=[regulariser(random_erasing=0.5)])


def test_features_of_views_are_not_kept(tmp_path: Any) -> None:
    with pytest.raises(InvalidChoice, match=r"without augmentation.*'simclr'"):
        trainer(ul.credit.Greedy(head="linear", budget=None, cache=str(tmp_path))).fit(labelled(), 1, batch_size=6)


def test_domains_give_equally_many_views() -> None:
    assert Domains([images(8), images(8, "views+flip")]).views == 2
    with pytest.raises(BadData, match=r"2 and 1 views.*'views\+'"):
        Domains([images(8), images(8, "flip")])


# ---- sentences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ("views", "changes neither.*'views\\+crop-flip'"),
        ("views+", "changes neither"),
        ("views+none", "changes neither"),
        ("views+views+flip", "names views in the middle"),
        ("flip+views", "names views in the middle"),
        ("flip+simclr", "names simclr in the middle"),
        ("views+simclr", "names simclr in the middle"),
        ("simclr+flip", "names flip 2 times"),
        ("views+flop", "did you mean 'flip'"),
        ("simclrr", "did you mean 'simclr'"),
        ("views+…", "Unknown augmentation '…'"),
        ("flip+", "Unknown augmentation ''"),
        ("views+flip+", "Unknown augmentation ''"),
        ("", "Unknown augmentation ''"),
    ],
)
def test_bad_augmentations_are_refused(text: str, words: str) -> None:
    with pytest.raises((BadData, InvalidChoice), match=words):
        load("digits", augment=text)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: images(4, "simclr", channels=2), "1 or 3 channels.*have 2.*leave jitter out"),
        (lambda: images(4, "gray", channels=4), "have 4; leave gray out"),
        (lambda: from_tensors(torch.rand(4, 3, 5, 5), torch.arange(4), augment="simclr"), "uint8.*torch.float32"),
        (lambda: from_tensors(torch.rand(4, 5), torch.arange(4), augment="views+crop"), "needs images"),
        (lambda: Data(torch.zeros(99, dtype=torch.uint8), None, 256, "text", (8,), augment="simclr"), "needs images"),
    ],
)
def test_data_that_cannot_have_such_views_is_refused(make: Callable[[], Data], words: str) -> None:
    with pytest.raises(BadData, match=words):
        make()


def test_without_kornia_jitter_names_the_extra_and_the_rest_works(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "kornia" else find(name, *rest)
    )
    with pytest.raises(InvalidChoice, match=r"jitter.*needs kornia.*unlocked\[ssl\]"):
        load("digits", augment="simclr")
    assert load("digits", augment="views+resized-crop+flip+gray")[0].views == 2
