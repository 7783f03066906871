"""Training without labels: images that have none train as those that have, and a probe is fitted to labelled ones elsewhere."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import unlocked as ul
from unlocked.cli import main
from unlocked.config import Options, resolve
from unlocked.data import Data, as_data, from_tensors, load
from unlocked.data.split import stratified_order
from unlocked.errors import BadData, InvalidChoice
from unlocked.labelled import as_trained
from unlocked.loop import Interrupted
from unlocked.method_names import parse_method
from unlocked.pairs import FalseNegatives
from unlocked.probes import explain
from unlocked.rng import generator
from unlocked.run_files import read_events
from unlocked.running import Stopper, run

import methods as m


def images(count: int, seed: int, bright: int = 60, **options: Any) -> Data:
    """Images (2, 6, 6) of 3 classes, which are where they are bright."""
    x = torch.randint(0, 150, (count, 2, 6, 6), generator=torch.Generator().manual_seed(seed))
    y = torch.arange(count) % 3
    for k, label in enumerate(y.tolist()):
        x[k, label % 2, 2 * label : 2 * label + 2] += bright
    return from_tensors(x.to(torch.uint8), y, **options)


TRAIN = images(48, 0, augment="views+crop-flip")
FREE = from_tensors(TRAIN.x, augment="views+crop-flip", name="free")
OTHER, TEST = images(40, 1, bright=90, name="other"), images(21, 2, bright=90)  # with statistics of their own


def trainer(credit: ul.credit.Credit | None = None, **options: Any) -> ul.Trainer:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(6, 9, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    chain = ul.Chain([ul.Stage(first), ul.Stage(second)], like=torch.zeros(2, 2, 6, 6))
    return ul.Trainer(chain, credit=credit or ul.credit.DGSSL(dimension=4), optimizer=m.momentum, **options)


def classifier() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 3))


def supervised(credit: ul.credit.Credit | None = None, **options: Any) -> ul.Trainer:
    chain = ul.cut(classifier(), 2, like=torch.zeros(2, 2, 6, 6))
    return ul.Trainer(chain, credit=credit or ul.credit.Backprop(), optimizer=m.momentum, **options)


def fitted(train: Any = FREE, **options: Any) -> ul.Trainer:
    made = trainer(**options)
    made.fit(train, 1, batch_size=12)
    return made


# ---- data without labels ------------------------------------------------------------------------------------------------


def test_samples_without_labels_are_data() -> None:
    x = torch.randn(5, 2)
    alone: list[Any] = [
        x,
        x.numpy(),
        (x, None),
        torch.utils.data.TensorDataset(x),
        list(x),
        [(row.numpy(),) for row in x],
    ]
    for source in [*alone, (x, torch.full((5,), -1)), [(row, -1) for row in x]]:
        data = as_data(source)
        assert torch.equal(data.x, x) and data.y is not None and torch.equal(data.y, torch.full((5,), -1))
        assert not data.labelled and data.classes == 1
    assert from_tensors(x, classes=7).classes == 7 and from_tensors(TEST.x, like=TRAIN).classes == 3
    assert TRAIN.labelled and from_tensors(x, x).labelled and not HALF.labelled
    for mixed in ([(x[0], 0), x[1]], [x[0], (x[1], 0)]):
        with pytest.raises(BadData, match=r"sample 1 have the shapes.*sample 0"):
            as_data(mixed)


def test_a_text_has_its_bytes_for_targets(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc" * 200)
    train, _ = load(f"text:{tmp_path / 'a.txt'}", context=8)
    assert train.y is None and train.labelled


def picture(file: Path | None, value: int, size: int = 4) -> bytes:
    """A grey picture of this value, as PNG."""
    content = io.BytesIO()
    Image.fromarray(np.full((size, size), value, np.uint8)).save(content, "png")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.getvalue())
    return content.getvalue()


def values(*sets: Data) -> list[list[int]]:
    """What the pictures of each set show."""
    return [one.x[:, 0, 0, 0].tolist() for one in sets]


def together(*sets: Data) -> list[int]:
    return sorted(value for row in values(*sets) for value in row)


def test_all_images_below_a_folder_are_read_without_labels(tmp_path: Path) -> None:
    for k in range(20):
        picture(tmp_path / ("deep/er" * (k % 3) or ".") / f"{k:02}.png", k)
    picture(tmp_path / ".hidden" / "99.png", 99)
    (tmp_path / "notes.txt").write_text("not an image")
    train, test = load(f"folder:{tmp_path}?labels=none", augment="views+flip")
    assert (len(train), len(test)) == (16, 4) and together(train, test) == list(range(20))
    assert not train.labelled and not test.labelled and train.classes == 1 and test.mean is train.mean
    some, _ = load(f"folder:{tmp_path}?labels=none", subset=6, seed=3)
    order = torch.randperm(16, generator=generator("stratified", "subset", 3))
    assert values(some) == [[values(train)[0][k] for k in order[:6].tolist()]]
    for k in range(3):
        picture(tmp_path / "train" / "x" / f"{k}.png", 50 + k)
        picture(tmp_path / "val" / f"{k}.png", 60 + k)
    assert values(*load(f"folder:{tmp_path}?labels=none")) == [[50, 51, 52], [60, 61, 62]]


def test_a_stratified_order_of_one_class_is_a_plain_shuffle() -> None:
    order = torch.randperm(30, generator=generator("stratified", "x", 1))
    assert torch.equal(stratified_order(torch.full((30,), -1), "x", 1), order)


def test_parquet_without_labels_needs_neither_their_column_nor_test_files(tmp_path: Path) -> None:
    def write(name: str, numbers: list[int], **more: Any) -> None:
        pq.write_table(pa.table({"img": [picture(None, k) for k in numbers], **more}), tmp_path / name)

    spec = f"parquet:{tmp_path}?label=none"
    write("train.parquet", list(range(10)), label=[None, 1] * 5)
    train, test = load(spec)
    assert len(train) == 8 and together(train, test) == list(range(10)) and not train.labelled
    write("test.parquet", [20, 21])
    assert values(*load(spec)) == [list(range(10)), [20, 21]]
    write("unlabeled-0.parquet", [30, 31, 32])
    assert values(*load(spec)) == [[30, 31, 32], [20, 21]]
    with pytest.raises(BadData, match="without labels: label=none"):
        pq.write_table(pa.table({"img": [b""]}), tmp_path / "train.parquet")
        load(f"parquet:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("folder:{}?labels=all", "no options but labels=none, and labels=all"),
        ("folder:{}?labels=none", "no image below the folder"),
        ("parquet:{}?label=none", "No training files"),
    ],
)
def test_what_cannot_be_read_without_labels_is_refused(spec: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=words):
        load(spec.format(tmp_path))


# ---- training without labels --------------------------------------------------------------------------------------------


def test_images_without_labels_train_as_the_same_images_with_labels_bit_for_bit() -> None:
    labelled, free = trainer(), trainer()
    records = [made.fit(data, 2, batch_size=12) for made, data in ((labelled, TRAIN), (free, FREE))]
    assert [record["losses"] for record in records[0]] == [record["losses"] for record in records[1]]
    m.assert_same(m.state(labelled), m.state(free))
    ours, theirs = free.evaluate(TEST), labelled.evaluate(TEST)
    assert (ours.loss, ours.accuracy) == (theirs.loss, None) and theirs.accuracy is not None


HALF = ul.data.Domains([TRAIN, from_tensors(TRAIN.x, augment=TRAIN.augment, classes=3)])


@pytest.mark.parametrize("data", [FREE, FREE.x, HALF], ids=["data", "tensor", "domains"])
def test_rules_that_need_labels_refuse_data_without_before_the_first_step(data: Any) -> None:
    by_labels = trainer(ul.credit.DGSSL(dimension=4, loss=FalseNegatives(by="labels")), replicas=2)
    local = supervised(ul.credit.DGL(head="linear", budget=None), replicas=2)
    for made in (local, by_labels):
        before = m.state(made)
        with pytest.raises(InvalidChoice, match=f"{made.credit.name} learns from labels"):
            made.fit(data, 1, batch_size=12)
        assert made.steps == 0
        m.assert_same(m.state(made), before)


def test_held_out_data_without_labels_are_refused_where_a_classifier_is_scored() -> None:
    made = supervised()
    free = dataclasses.replace(FREE, augment=None)
    acts = (lambda: made.fit(TRAIN, 1, validate=free), lambda: made.evaluate(free), lambda: explain(made, TRAIN, free))
    for act in acts:
        with pytest.raises(BadData, match="'free' has no labels"):
            act()
    assert made.steps == 0
    with pytest.raises(InvalidChoice, match="no labels"):
        ul.soups.evaluate_population([classifier()], free)


# ---- a probe fitted to other data ---------------------------------------------------------------------------------------


def test_a_probe_on_the_training_data_is_the_probe() -> None:
    made = fitted(TRAIN, consensus=ul.consensus.WASH(0.05), replicas=2)
    plain = made.evaluate(TEST)  # normalised in its own way, as ever
    test = dataclasses.replace(TEST, mean=TRAIN.mean, std=TRAIN.std)
    assert made.evaluate(test, probe_on=TRAIN) == made.evaluate(test) == made.evaluate(test, train=TRAIN)
    assert made.evaluate(TEST, probe_on=TRAIN) == made.evaluate(test) != plain
    again = trainer()
    (record,) = again.fit(TRAIN, 1, batch_size=12, validate=test, probe_on=TRAIN)
    (same,) = trainer().fit(TRAIN, 1, batch_size=12, validate=test)
    assert record["validation"] == same["validation"]


def as_free(data: Data) -> Data:
    return dataclasses.replace(data, mean=FREE.mean, std=FREE.std)


def test_the_probe_is_fitted_to_labelled_images_as_the_network_knows_images() -> None:
    made, other = trainer(), trainer()
    (record,) = made.fit(FREE, 1, batch_size=12, validate=TEST, probe_on=OTHER)
    (without,) = other.fit(FREE, 1, batch_size=12, validate=TEST)
    m.assert_same(m.state(made), m.state(other))  # a probe trains nothing
    scores = made.evaluate(TEST)
    assert record["validation"] == scores.to_json() and scores.accuracy > 1 / 3
    by_hand = other.evaluate(as_free(TEST), train=dataclasses.replace(as_free(OTHER), augment=FREE.augment))
    assert scores == by_hand == other.evaluate(TEST, probe_on=OTHER)
    assert without["validation"]["accuracy"] is None
    found = explain(other, FREE, TEST, probe_on=OTHER)
    assert [depth.probe for depth in found.depths] == [accuracy for _, accuracy in scores.stages]
    losses = [one.loss for depth in found.depths for one in depth.stages]
    assert losses == pytest.approx([loss for loss, _ in scores.stages])
    assert made.evaluate(TEST, train=FREE).accuracy is None  # `train` alone is what it always was
    made.fit(FREE, 1, batch_size=12)
    assert made.evaluate(TEST).accuracy is None  # another fit, without


def test_bytes_take_the_training_datas_statistics_and_numbers_stay() -> None:
    taken = as_trained(FREE, OTHER)
    assert taken.mean is FREE.mean and taken.std is FREE.std and taken.x is OTHER.x
    numbers = from_tensors(OTHER.x.float(), OTHER.y)
    assert as_trained(FREE, numbers) is numbers and as_trained(None, numbers) is numbers
    first, second = FREE, from_tensors(OTHER.x, augment=FREE.augment)
    assert as_trained(ul.data.Domains([first, second]), OTHER).mean is first.mean


LABELLED: dict[str, tuple[Callable[[], Any], str]] = {
    "shape": (lambda: from_tensors(OTHER.x[:, :1], OTHER.y), r"shape \(2, 6, 6\) \('free'\).*shape \(1, 6, 6\)"),
    "no labels": (lambda: OTHER.x, "has no labels"),
    "values": (lambda: (OTHER.x, torch.randn(40)), "are no classes"),
}


@pytest.mark.parametrize("case", LABELLED)
def test_labelled_data_that_do_not_fit_are_refused_before_the_first_step(case: str) -> None:
    make, words = LABELLED[case]
    made = trainer()
    for options in ({"probe_on": make(), "validate": TEST}, {"probe_on": OTHER, "validate": make()}):
        with pytest.raises(BadData, match=words):
            made.fit(FREE, 1, batch_size=12, **options)
    assert made.steps == 0
    with pytest.raises(BadData, match=words):
        made.evaluate(TEST, train=FREE, probe_on=make())


def test_bytes_are_refused_where_it_is_not_known_how_to_normalise_them() -> None:
    made = trainer()
    with pytest.raises(BadData, match=r"not known before fit.*train="):
        made.evaluate(TEST, probe_on=OTHER)
    assert made.evaluate(TEST, train=FREE, probe_on=OTHER).accuracy is not None
    with pytest.raises(BadData, match=r"'other' holds bytes.*numbers of type torch.float32"):
        made.fit(from_tensors(FREE.x.float(), augment=FREE.augment), 1, validate=TEST, probe_on=OTHER)


def test_rules_that_learn_from_labels_have_no_such_probe() -> None:
    made, words = supervised(), "leave out probe_on"
    with pytest.raises(InvalidChoice, match=words):
        made.fit(TRAIN, 1, probe_on=OTHER)
    with pytest.raises(InvalidChoice, match=words):
        made.evaluate(TEST, probe_on=OTHER)
    with pytest.raises(InvalidChoice, match=words):
        explain(made, TRAIN, TEST, probe_on=OTHER)
    with pytest.raises(InvalidChoice, match=f"dgl .*{words}"):
        resolve(Options(probe_on="digits"), parse_method("dgl"), seed=0, threads=1)


# ---- the command line ---------------------------------------------------------------------------------------------------


def folders(root: Path) -> dict[str, str]:
    """48 images without labels, and 30 and 20 with: classes are bright or dark."""
    numbers = torch.Generator().manual_seed(0)
    for k in range(98):
        label = "ab"[k % 2]
        place = f"free/{k % 3}" if k < 48 else f"labelled/{'train' if k < 78 else 'test'}/{label}"
        picture(root / place / f"{k:02}.png", int(torch.randint(90, (), generator=numbers)) + 100 * (k % 2))
    return {"data": f"folder:{root}/free?labels=none", "probe_on": f"folder:{root}/labelled"}


TINY: dict[str, Any] = {"model": "mlp", "width": 8, "stages": 2, "epochs": 2, "batch_size": 12, "device": "cpu"}


def weights(folder: Path) -> dict[str, Tensor]:
    newest = folder / "checkpoint" / (folder / "checkpoint" / "LATEST").read_text()
    return {f"{file.name} {name}": x for file in newest.glob("*.safetensors") for name, x in load_file(file).items()}


def test_a_run_without_labels_resumed_and_probed_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str, code: int = 0) -> Any:
        assert main([*words, "--json"]) == code
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    specs = folders(tmp_path)
    config = resolve(
        Options(**TINY, **specs, augment="views+flip"), parse_method("dgssl(projector=0c2f,dimension=4)"), 0, threads=1
    )
    whole = run(config, tmp_path / "whole")
    counts = iter(range(4, 0, -1))  # stops in the second of two epochs of 3 updates
    with pytest.raises(Interrupted):
        run(config, tmp_path / "parts", callbacks=[Stopper(lambda: next(counts) == 1)])
    parts = said("train", "--resume", str(tmp_path / "parts"), "--tensorboard", "off")
    assert [parts[name] for name in ("accuracy", "loss", "updates")] == [
        whole[name] for name in ("accuracy", "loss", "updates")
    ]
    assert parts["accuracy"] is not None
    m.assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert read_events(tmp_path / "whole")[-2]["validation"]["accuracy"] == whole["accuracy"]
    run_folder = str(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["probe_on"] == specs["probe_on"]
    for words in ((), ("--data", specs["probe_on"])):
        (found,) = said("probe", run_folder, *words)["runs"]
        assert found["depths"][-1]["probe"] == whole["accuracy"]
        assert found["depths"][-1]["stages"][0]["loss"] == pytest.approx(whole["loss"])
    said("report", run_folder)
    assert f"frozen features of {specs['probe_on']}" in (tmp_path / "whole" / "report.html").read_text()
    assert main(["train", "--resume", run_folder, "--probe-on", "digits"]) == 2
    assert "leave out --probe-on" in capsys.readouterr().err


def test_the_command_line_refuses_in_a_sentence_and_leaves_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = folders(tmp_path)
    for k in range(10):
        picture(tmp_path / "small" / "ab"[k % 2] / f"{k}.png", k, size=2)
    free, labelled = ["--data", specs["data"]], ["--data", specs["probe_on"]]
    common = ["--model", "mlp", "--width", "8", "--stages", "2", "--augment", "views+flip"]
    where = ["--run", str(tmp_path / "run"), "--tensorboard", "off", "--credit"]
    rule = "simclr(dimension=4)"
    cases = [
        (["train", *where, "dgl", *free], "dgl learns from labels here"),
        (["train", *where, "dgl", *labelled, "--probe-on", "digits"], "leave out probe_on"),
        (["train", *where, rule, *free, "--probe-on", f"folder:{tmp_path}/small"], "shape (1, 2, 2)"),
        (["train", *where, rule, *labelled, "--probe-on", specs["data"]], "has no labels"),
        (["train", *where, rule, *free, "--probe"], "no accuracy can be had of it; give labelled data"),
        (["compare", "--methods", rule, "dgl", *free, "--out", str(tmp_path / "out")], "dgl learns from labels here"),
        (["compare", "--methods", rule, *free, "--probe", "--out", str(tmp_path / "out")], "give labelled data"),
    ]
    for words, sentence in cases:
        assert main([*words, *common]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists() and not (tmp_path / "out").exists()
