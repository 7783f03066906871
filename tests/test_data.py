"""Batches are a pure function of (seed, epoch, replica, number); reading loses nothing; bad input is refused."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from unlocked.data import Data, as_data, digits, from_tensors, load
from unlocked.data import augment as augmentation
from unlocked.data.dataset import statistics
from unlocked.data.order import Moment, permutation
from unlocked.data.split import stratified_order
from unlocked.errors import BadData, InvalidChoice

EVERYTHING = "crop-flip+cutout:3"
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda bs: st.tuples(st.integers(bs[0] * bs[1], 40), st.just(bs[0]), st.just(bs[1]))
)


def images(count: int, channels: int = 3, side: int = 8, augment: str | None = EVERYTHING) -> Data:
    """Random images, each labelled with its own number."""
    numbers = torch.Generator().manual_seed(count)
    x = torch.randint(256, (count, channels, side, side), dtype=torch.uint8, generator=numbers)
    return from_tensors(x, torch.arange(count), augment=augment)


def labels(data: Data) -> Tensor:
    assert data.y is not None
    return data.y


def text(length: int, context: int) -> Data:
    numbers = torch.Generator().manual_seed(length)
    return Data(torch.randint(256, (length,), dtype=torch.uint8, generator=numbers), None, 256, "text", (context,))


def same(left: Sequence[Sequence[Tensor]], right: Sequence[Sequence[Tensor]]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for p, q in zip(left, right) for a, b in zip(p, q))


# ---- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [images(23), text(200, 7)], ids=["images", "text"])
@pytest.mark.parametrize("train", [True, False])
def test_batches_depend_on_the_arguments_only_and_start_skips(data: Data, train: bool) -> None:
    state = torch.get_rng_state()
    whole = list(data.batches(4, epoch=2, seed=5, replica=1, shards=2, train=train))
    torch.manual_seed(99)
    for start in range(len(whole) + 1):
        rest = data.batches(4, epoch=2, seed=5, replica=1, shards=2, train=train, start=start)
        assert same(list(rest), whole[start:])
    torch.set_rng_state(state)


@settings(deadline=None, max_examples=30)
@given(SIZES, st.integers(0, 3), st.booleans())
def test_the_shards_together_are_one_large_batch_augmentation_included(
    sizes: tuple[int, int, int], epoch: int, words: bool
) -> None:
    count, batch, shards = sizes
    data = text(count * 5 + 3, 5) if words else images(count)
    one = list(data.batches(batch * shards, epoch=epoch, seed=1))
    parts = [list(data.batches(batch, epoch=epoch, seed=1, replica=r, shards=shards)) for r in range(shards)]
    joined = [tuple(torch.cat(pieces) for pieces in zip(*together)) for together in zip(*parts)]
    assert {len(part) for part in parts} == {data.steps(batch, shards)} == {count // (batch * shards)}
    assert same(joined, one)


@settings(deadline=None, max_examples=30)
@given(SIZES)
def test_an_epoch_shows_each_sample_at_most_once_and_evaluation_shows_all_in_order(sizes: tuple[int, int, int]) -> None:
    count, batch, shards = sizes
    data = images(count, augment=None)
    seen = torch.cat(
        [y for r in range(shards) for _, y in data.batches(batch, epoch=0, seed=3, replica=r, shards=shards)]
    )
    assert len(seen) == len(seen.unique()) == data.steps(batch, shards) * batch * shards
    assert torch.equal(
        torch.cat([y for _, y in data.batches(batch, epoch=0, seed=3, train=False)]), torch.arange(count)
    )
    parts = [data.batches(batch, epoch=0, seed=3, replica=r, shards=shards, train=False) for r in range(shards)]
    assert torch.equal(torch.cat([y for part in parts for _, y in part]).sort().values, torch.arange(count))


def test_replicas_epochs_and_seeds_differ_but_sharded_replicas_share_the_order() -> None:
    data = images(64)

    def order(epoch: int = 0, seed: int = 0, replica: int = 0, shards: int = 1) -> tuple[int, ...]:
        batches = data.batches(8, epoch=epoch, seed=seed, replica=replica, shards=shards)
        return tuple(torch.cat([y for _, y in batches]).tolist())

    assert len({order(), order(replica=1), order(epoch=1), order(seed=1), tuple(range(64))}) == 5
    assert sorted(order(shards=2) + order(shards=2, replica=1)) == list(range(64))


# ---- augmentation --------------------------------------------------------------------------------------------------


def slowly(image: np.ndarray, drawn: list[int], size: int, data: Data) -> np.ndarray:
    """One image, pixel by pixel: zero padding and window, mirror, normalisation, hole."""
    assert data.mean is not None and data.std is not None
    top, left, flip, row, column = drawn
    channels, height, width = image.shape
    pad_h, pad_w = max(1, height // 8), max(1, width // 8)
    out = np.zeros(image.shape, dtype=np.float32)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                a, b = i + top - pad_h, (width - 1 - j if flip else j) + left - pad_w
                pixel = float(image[c, a, b]) if 0 <= a < height and 0 <= b < width else 0.0
                hole = 0 <= i - row + size // 2 < size and 0 <= j - column + size // 2 < size
                out[c, i, j] = 0 if hole else (pixel - float(data.mean[c])) / float(data.std[c])
    return out


@pytest.mark.parametrize("size", [3, 4])
def test_augmentation_is_the_slow_loop_over_samples_and_pixels(size: int) -> None:
    x = torch.randint(256, (12, 2, 16, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = from_tensors(x, torch.arange(12), augment=f"crop+flip+cutout:{size}")
    operations, moment = augmentation.parse(data.augment), Moment(4, 7, 0)
    drawn = torch.cat(augmentation.draw(operations, 12, data.input_shape, moment), dim=1)
    order = permutation(12, moment)
    for b, (batch, numbers) in enumerate(data.batches(5, epoch=7, seed=4)):
        for i in range(5):
            position = 5 * b + i
            assert numbers[i] == order[position]
            expected = slowly(x[order[position]].numpy(), drawn[position].tolist(), size, data)
            np.testing.assert_allclose(batch[i].numpy(), expected, rtol=1e-6, atol=1e-6)


def test_draws_take_every_value_about_equally_often_and_operations_draw_independently() -> None:
    crop, flip, cutout = augmentation.draw(augmentation.parse("crop+flip+cutout:2"), 9000, (1, 16, 8), Moment(0, 0, 0))
    for values, least, most in ((crop[:, 0], 0, 4), (crop[:, 1], 0, 2), (flip, 0, 1), (cutout[:, 0], 0, 15)):
        counts = values.flatten().bincount(minlength=most + 1).double()
        assert len(counts) == most - least + 1
        assert (counts * len(counts) / 9000 - 1).abs().max() < 0.2
    assert torch.equal(augmentation.draw(augmentation.parse("crop"), 9000, (1, 16, 8), Moment(0, 0, 0))[0], crop)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(0, 9), st.integers(0, 5))
def test_cutout_makes_a_hole_of_k_by_k_pixels_clipped_at_the_borders(size: int, row: int, column: int) -> None:
    ones = torch.ones(1, 2, 10, 6)
    holes = (augmentation.Cutout(size).apply(ones, torch.tensor([[row, column]])) == 0).sum().item()
    high, wide = (
        len(set(range(c - size // 2, c - size // 2 + size)) & set(range(n))) for c, n in ((row, 10), (column, 6))
    )
    assert holes == 2 * high * wide


def test_augmentation_works_on_training_only_and_leaves_the_data_as_it_was() -> None:
    data = images(16)
    before = data.x.clone()
    (plain, y), (changed, _) = (
        next(data.batches(16, epoch=0, seed=0, train=False)),
        next(data.batches(16, epoch=0, seed=0)),
    )
    assert torch.equal(plain, data.samples(y)[0]) and not torch.equal(changed, plain)
    assert torch.equal(data.x, before)


# ---- normalisation and tensors -------------------------------------------------------------------------------------


def test_statistics_are_the_float64_formula_and_the_test_set_shares_them() -> None:
    train, values = images(50, augment=None), images(50).x.double()
    assert train.mean is not None and train.std is not None
    torch.testing.assert_close(train.mean, values.mean((0, 2, 3)).float())
    torch.testing.assert_close(train.std, values.std((0, 2, 3), correction=0).float())
    x = torch.cat([x for x, _ in train.batches(7, epoch=0, seed=0, train=False)])
    torch.testing.assert_close(
        x.double(), (values - train.mean.view(3, 1, 1)) / train.std.view(3, 1, 1), check_dtype=False
    )
    other = from_tensors(train.x // 2, train.y, like=train)
    assert other.mean is train.mean and other.std is train.std
    assert statistics(torch.full((4, 1, 2, 2), 7, dtype=torch.uint8))[1].item() == 1


def test_floats_and_token_ids_pass_unchanged_and_classes_are_counted() -> None:
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3)
    data = from_tensors(x, y)
    given_x, given_y = next(data.batches(6, epoch=0, seed=0, train=False))
    assert torch.equal(given_x, x) and torch.equal(given_y, y) and data.classes == 3 and data.mean is None
    tokens = from_tensors(np.arange(8, dtype=np.int32).reshape(4, 2), torch.tensor([0, 4, 1, 1], dtype=torch.int16))
    assert tokens.x.dtype == tokens.samples(torch.arange(2))[1].dtype == torch.int64 and tokens.classes == 5
    assert from_tensors(x, y[:, 0]).classes == 1 and from_tensors(x, torch.zeros(6).long(), classes=9).classes == 9


def test_as_data_takes_data_pairs_and_map_style_datasets() -> None:
    x, y = torch.randn(5, 2), torch.tensor([0, 1, 2, 1, 0])
    for source in ((x, y), torch.utils.data.TensorDataset(x, y), [(a.numpy(), int(b)) for a, b in zip(x, y)]):
        data = as_data(source)
        assert torch.equal(data.x, x) and torch.equal(labels(data), y) and data.classes == 3
        assert as_data(data) is data


# ---- text ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 90), st.integers(1, 9), st.integers(0, 5))
def test_text_windows_tile_the_text_and_targets_are_the_next_bytes(length: int, context: int, epoch: int) -> None:
    length = max(length, context + 1)
    data = Data(torch.arange(length, dtype=torch.uint8), None, 256, "count", (context,))
    for train in (True, False):
        x, y = next(data.batches(len(data), epoch=epoch, seed=0, train=train))
        assert x.shape == (len(data), context) and x.dtype == y.dtype == torch.int64 and torch.equal(y, x + 1)
        tiles = x.flatten().sort().values
        assert torch.equal(tiles, torch.arange(len(tiles)) + tiles[0])
        assert train or (tiles[0] == 0 and torch.equal(x.flatten(), tiles))
    assert len(data) == (length - 1) // context


def test_text_file_is_cut_90_to_10_and_the_training_offset_takes_every_phase(tmp_path: Path) -> None:
    content = bytes(range(248)) * 2  # 248 = 31 · 8, so a byte modulo 8 is its place modulo 8
    (tmp_path / "a.txt").write_bytes(content)
    train, test = load(f"text:{tmp_path / 'a.txt'}", context=8)
    assert bytes(train.x.tolist()) == content[:440] and bytes(test.x.tolist()) == content[446:]
    assert (train.classes, train.input_shape, train.y, len(train)) == (256, (8,), None, 54)
    phases = [next(train.batches(54, epoch=epoch, seed=0))[0][:, 0] % 8 for epoch in range(80)]
    assert {int(phase[0]) for phase in phases} == set(range(8)) and all(len(phase.unique()) == 1 for phase in phases)
    assert len(load(f"text:{tmp_path / 'a.txt'}", context=8, subset=5)[0]) == 5


# ---- reading -------------------------------------------------------------------------------------------------------


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def pictures(count: int, *shape: int) -> list[np.ndarray]:
    return list(np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8))


def write(file: Path, cells: list, targets: list, image: str = "img", label: str = "label") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image: cells, label: targets}), file)


def write_pair(root: Path, cells: list, targets: list, **names: str) -> str:
    write(root / "train.parquet", cells, targets, **names)
    write(root / "test.parquet", cells, targets, **names)
    return f"parquet:{root}"


def test_parquet_round_trip_of_shards_of_structs_and_of_bytes(tmp_path: Path) -> None:
    colour, grey = pictures(5, 6, 7, 3), pictures(2, 6, 7)
    structs = [{"bytes": encoded(p), "path": None} for p in colour]
    write(tmp_path / "data" / "train-00000-of-00002.parquet", structs[:3], [2, 0, 1], "image", "fine_label")
    write(tmp_path / "data" / "train-00001-of-00002.parquet", structs[3:], [1, 1], "image", "fine_label")
    write(tmp_path / "data" / "validation-0.parquet", [encoded(p) for p in grey], [0, 2], "image", "fine_label")
    train, test = load(f"parquet:{tmp_path}?label=fine_label")
    assert torch.equal(train.x, torch.from_numpy(np.stack(colour)).permute(0, 3, 1, 2))
    assert torch.equal(test.x, torch.from_numpy(np.stack(grey))[:, None].expand(-1, 3, -1, -1))  # grey among colours
    assert labels(train).tolist() == [2, 0, 1, 1, 1] and labels(test).tolist() == [0, 2]
    assert (train.classes, test.classes, train.input_shape) == (3, 3, (3, 6, 7)) and test.mean is train.mean


def test_many_images_keep_their_order_and_grey_stays_grey(tmp_path: Path) -> None:
    cells = [encoded(np.full((2, 2), i % 256, dtype=np.uint8)) for i in range(600)]  # more than two decoding tasks
    train, _ = load(write_pair(tmp_path, cells, [i % 3 for i in range(600)]))
    assert train.input_shape == (1, 2, 2) and torch.equal(train.x[:, 0, 1, 1].long(), torch.arange(600) % 256)


@pytest.mark.parametrize("given_split", [True, False])
def test_folder_round_trip(tmp_path: Path, given_split: bool) -> None:
    shots = pictures(20, 4, 4, 3)
    for i, pixels in enumerate(shots):
        part = ("train" if i < 16 else "test") if given_split else "."
        file = tmp_path / part / f"class{i % 2}" / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(pixels))
        (file.parent / "notes.txt").write_text("no image")
    train, test = load(f"folder:{tmp_path}")
    assert len(train) == 16 and len(test) == 4 and train.classes == 2
    assert labels(train).bincount().tolist() == [8, 8] and labels(test).bincount().tolist() == [2, 2]
    truth = {pixels.transpose(2, 0, 1).tobytes(): i % 2 for i, pixels in enumerate(shots)}
    found = [(x.numpy().tobytes(), int(y)) for data in (train, test) for x, y in zip(data.x, labels(data))]
    assert dict(found) == truth
    if given_split:
        assert {key for key, _ in found[16:]} == {p.transpose(2, 0, 1).tobytes() for p in shots[16:]}


def test_size_resizes_images_of_unequal_size(tmp_path: Path) -> None:
    cells = [encoded(np.full((side, 3, 3), 40 + side, dtype=np.uint8)) for side in (4, 9)]
    train, _ = load(write_pair(tmp_path, cells, [0, 1]), size=5)
    assert train.input_shape == (3, 5, 5) and train.x[0].unique().item() == 44 and train.x[1].unique().item() == 49
    assert load("digits", size=16)[0].input_shape == (1, 16, 16)


def test_digits_split_is_fixed_and_subsets_are_nested_and_stratified() -> None:
    train, test = load("digits")
    assert (len(train), len(test), train.classes, train.input_shape) == (1438, 359, 10, (1, 8, 8))
    assert train.x.long().sum() + test.x.long().sum() == 561718  # each of the 1797 images once: scikit-learn's sum
    again, _ = load("digits", seed=1)
    assert torch.equal(again.x, train.x)
    small, large = load("digits", subset=50, seed=1)[0], load("digits", subset=100, seed=1)[0]
    truth = {(x.numpy().tobytes(), int(y)) for x, y in zip(train.x, labels(train))}
    assert all((x.numpy().tobytes(), int(y)) in truth for x, y in zip(large.x, labels(large)))
    assert torch.equal(large.x[:50], small.x) and not torch.equal(load("digits", subset=50, seed=2)[0].x, small.x)
    assert large.classes == 10 and (labels(large).bincount(minlength=10) - 10).abs().max() <= 1


def test_digits_come_from_a_file_as_scikit_learn_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from_file = digits.read("", {}, None)
    monkeypatch.setattr(digits, "find_spec", lambda name: None)  # a release that keeps its file elsewhere
    by_scikit_learn = digits.read("", {}, None)
    for a, b in zip(from_file[:4], by_scikit_learn[:4]):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_every_beginning_of_a_stratified_order_is_balanced() -> None:
    y = torch.arange(70) % 7
    order = stratified_order(y, 3)
    assert torch.equal(order.sort().values, torch.arange(70))
    for length in range(1, 71):
        counts = y[order[:length]].bincount(minlength=7)
        assert counts.max() - counts.min() <= 1


# ---- refusals ------------------------------------------------------------------------------------------------------

PNG = encoded(pictures(1, 4, 4)[0])
WIDE = encoded(pictures(1, 4, 5)[0])
DEEP = encoded(np.zeros((4, 4), dtype=np.uint16))


def folder(root: Path, *files: str) -> str:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            (root / name).write_bytes(PNG)
    for name in (name for name in files if name.endswith("/")):
        (root / name).mkdir(exist_ok=True)
    return f"folder:{root}"


def only_training(root: Path) -> str:
    write(root / "train.parquet", [PNG], [0])
    return f"parquet:{root}"


def truncated(root: Path) -> str:
    spec = write_pair(root, [PNG] * 4, [0, 1, 0, 1])
    (root / "train.parquet").write_bytes((root / "train.parquet").read_bytes()[:-20])
    return spec


def other_test(root: Path, targets: list) -> str:
    write(root / "train.parquet", [PNG] * 2, [0, 1])
    write(root / "test.parquet", [PNG] * 2, targets)
    return f"parquet:{root}"


def file(root: Path, content: bytes) -> str:
    (root / "a.txt").write_bytes(content)
    return f"text:{root / 'a.txt'}"


REFUSED: dict[str, tuple[Callable[[Path], str], str]] = {
    "scheme": (lambda root: "parket:x", "did you mean 'parquet'.*digits, parquet:DIR"),
    "no place": (lambda root: "folder:", "lacks its place"),
    "digits of": (lambda root: "digits:8", "takes nothing"),
    "no directory": (lambda root: f"parquet:{root}/none", "does not exist"),
    "no files": (lambda root: f"parquet:{root}", "No training files.*train.*nothing"),
    "no test": (only_training, "No test files.*train.parquet"),
    "option": (lambda root: write_pair(root, [PNG], [0]) + "?labl=x", "did you mean 'label'"),
    "options": (lambda root: write_pair(root, [PNG], [0]) + "?label", "cannot be read"),
    "columns": (
        lambda root: write_pair(root, [PNG], [0], image="pic", label="y"),
        "columns pic, y; needed.*img or image.*label",
    ),
    "image type": (lambda root: write_pair(root, [[1, 2]], [0]), "type list.*bytes"),
    "no bytes": (lambda root: write_pair(root, [{"bytes": PNG}, {"bytes": None}], [0, 0]), "Row 1 .*no image bytes"),
    "no rows": (lambda root: write_pair(root, pa.array([], pa.binary()), pa.array([], pa.int64())), "no rows"),
    "truncated": (truncated, "train.parquet.*cannot be read as parquet"),
    "broken image": (
        lambda root: write_pair(root, [PNG, PNG[:50]], [0, 0]),
        "row 1 of .*train.parquet cannot be decoded",
    ),
    "bomb": (
        lambda root: write_pair(root, [PNG, b"P5 60000 60000 255 "], [0, 0]),
        "row 1 of .*cannot be decoded.*bomb",
    ),
    "deep image": (lambda root: write_pair(root, [PNG, DEEP], [0, 0]), "row 1 of .*more than 8 bits"),
    "unequal": (lambda root: write_pair(root, [PNG, WIDE], [0, 0]), "4×4 pixels in row 0.*4×5 in row 1.*size="),
    "float labels": (lambda root: write_pair(root, [PNG], [0.5]), "type double.*whole numbers"),
    "negative label": (lambda root: write_pair(root, [PNG] * 2, [0, -1]), "row 1 .*is -1"),
    "huge label": (lambda root: write_pair(root, [PNG] * 2, [0, 1 << 40]), "row 1 .*is 1099511627776"),
    "missing label": (lambda root: write_pair(root, [PNG] * 2, [None, 1]), "row 0 .*is missing"),
    "unseen": (lambda root: other_test(root, [0, 7]), "labels 7, which its training set lacks"),
    "no folder": (lambda root: f"folder:{root}/none", "no folder"),
    "folder options": (lambda root: folder(root, "a/1.png") + "?label=x", "takes no options"),
    "no classes": (lambda root: folder(root, "1.png"), "no class folders"),
    "empty class": (lambda root: folder(root, "a/1.png", "b/"), "class folder '.*b' holds no images"),
    "no test folder": (lambda root: folder(root, "train/a/1.png"), "train/ but no test/"),
    "unseen class": (lambda root: folder(root, "train/a/1.png", "test/b/1.png"), "class 'b' .*not in training"),
    "too few": (lambda root: folder(root, "a/1.png"), "too few"),
    "no text": (lambda root: f"text:{root}/none", "does not exist"),
    "text folder": (lambda root: f"text:{root}", "is a directory"),
    "short text": (lambda root: file(root, b"x" * 1280), "leaves 128 bytes for test.*needs 129.*smaller context"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_sources_are_refused_in_a_sentence(case: str, tmp_path: Path) -> None:
    make, words = REFUSED[case]
    with pytest.raises(BadData, match=words):
        load(make(tmp_path))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_damaged_parquet_file_is_refused_or_read_never_a_bare_traceback(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    root = tmp_path_factory.mktemp("damaged")
    spec = write_pair(root, [PNG] * 3, [0, 1, 0])
    damaged = bytearray((root / "train.parquet").read_bytes())
    damaged[place % len(damaged)] = value
    (root / "train.parquet").write_bytes(damaged)
    with contextlib.suppress(BadData):
        load(spec)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"subset": 0}, "give 1 to 1438"),
        ({"subset": 1439}, "give 1 to 1438"),
        ({"size": 0}, "at least 1 pixel"),
        ({"augment": "cutout"}, "cutout:8"),
        ({"augment": "cutout:x"}, "cutout:8"),
        ({"augment": "flip+flip"}, "names flip 2 times"),
        ({"augment": "cutout:9"}, "8×8 pixels.*smaller"),
        ({"augment": "flop"}, "did you mean 'flip'"),
    ],
)
def test_bad_arguments_of_load_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(InvalidChoice if "mean" in words else BadData, match=words):
        load("digits", **arguments)


@pytest.mark.parametrize(
    "arguments, words", [({"size": 8}, "neither size"), ({"context": 0}, "at least 1"), ({"subset": 10}, "give 1 to 9")]
)
def test_bad_arguments_for_a_text_are_refused(arguments: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=words):
        load(file(tmp_path, b"x" * 100), **{"context": 9, **arguments})


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"batch_size": 11}, "11 on each of 1 .*needs 11 samples.*has 10"),
        ({"batch_size": 4, "shards": 3}, "needs 12 samples"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1, "shards": 0}, "shards is 0"),
        ({"batch_size": 1, "replica": -1}, "replica is -1"),
        ({"batch_size": 1, "shards": 2, "replica": 2}, "numbered 0 to 1"),
        ({"batch_size": 4, "start": 3}, "batches 0 to 1"),
        ({"batch_size": 4, "start": -1}, "batches 0 to 1"),
    ],
)
def test_impossible_batches_are_refused_before_the_first(arguments: dict, words: str) -> None:
    with pytest.raises(BadData, match=words):
        images(10).batches(epoch=0, seed=0, **arguments)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: from_tensors(torch.zeros(3, 2), torch.zeros(4)), "3 samples and 4 targets"),
        (lambda: from_tensors(torch.zeros(0, 2), torch.zeros(0)), "0 samples"),
        (lambda: from_tensors(torch.tensor([[torch.nan]]), torch.zeros(1)), "samples .*not finite"),
        (lambda: from_tensors(torch.zeros(1, 1), torch.tensor([torch.inf])), "targets .*not finite"),
        (lambda: from_tensors(torch.zeros(2, 1).bool(), torch.zeros(2)), "type torch.bool"),
        (lambda: from_tensors(torch.zeros(2, 1), torch.tensor([0, -1])), "contain -1"),
        (lambda: from_tensors(torch.zeros(2, 1), torch.tensor([0, 3]), classes=3), "contain 3, but with 3 classes"),
        (lambda: from_tensors(torch.zeros(2, 1), torch.zeros(2), augment="flip"), "needs images"),
        (lambda: from_tensors(torch.zeros(2, 1), torch.zeros(2), like=images(2)), "make them equal"),
        (lambda: as_data(3), "made from a int"),
        (lambda: as_data([]), "empty"),
        (lambda: as_data([{"x": 1}]), "Sample 0 .*is a dict.*pair"),
        (lambda: as_data([(torch.zeros(2), 0), (torch.zeros(3), 0)]), "sample 1 have the shapes"),
        (lambda: as_data([(Image.new("L", (2, 2)), 0)]), "Sample 0 .*holds a Image.*numpy"),
    ],
)
def test_bad_tensors_are_refused(make: Callable[[], Data], words: str) -> None:
    with pytest.raises(BadData, match=words):
        make()
