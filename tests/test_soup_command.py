"""`unlocked soup`: from files and run folders to the table, the picture, a file, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unlocked import Trainer, models, soups
from unlocked.cli import main
from unlocked.config import Options, resolve
from unlocked.data import load
from unlocked.exporting import write_weights
from unlocked.method_names import parse_method
from unlocked.running import run

pytestmark = pytest.mark.xdist_group("soup")  # the runs are made once
SMALL = Options(subset=200, width=8, batch_size=25, epochs=2, stages=2, device="cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three replicas, and its members as files."""
    folder = tmp_path_factory.mktemp("soup")
    config = resolve(SMALL, parse_method("backprop/wash(p=0.05)@3"), seed=0, threads=1)
    run(config, folder / "run")
    for member in range(3):
        to = folder / f"m{member}.safetensors"
        assert main(["export", str(folder / "run"), "--member", str(member), "--to", str(to)]) == 0
    return folder


def files(home: Path) -> list[str]:
    return [str(home / f"m{member}.safetensors") for member in range(3)]


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """The line of JSON of a command that succeeds."""
    capsys.readouterr()
    assert main(["soup", *map(str, argv), "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The sentence of a command that is refused."""
    capsys.readouterr()
    assert main(["soup", *map(str, argv)]) == 2
    return capsys.readouterr().err


def test_files_and_the_run_folder_give_the_same_scores(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--greedy", "--refresh", "--repair", "--data", "digits", "--subset", "200"]
    by_files = said(capsys, *files(home), *options)
    by_folder = said(capsys, home / "run", *options)
    assert by_files["event"] == "result" and by_files["names"] == [f"m{k}.safetensors" for k in range(3)]
    assert by_folder["names"] == ["run:0", "run:1", "run:2"]
    for part in ("members", "ensemble", "averaged", "refreshed", "repaired", "greedy", "greedy_members", "distances"):
        assert by_files[part] == by_folder[part] is not None, part
    assert said(capsys, home / "run", "--greedy")["members"] == by_folder["members"]  # the run's own data
    trainer = Trainer.resume(home / "run" / "checkpoint")
    whole = trainer.evaluate(load("digits", subset=200)[1])
    assert whole.members == pytest.approx([one["accuracy"] for one in by_files["members"]])
    assert (whole.accuracy, whole.ensemble) == pytest.approx(
        (by_files["averaged"]["accuracy"], by_files["ensemble"]["accuracy"])
    )
    assert any("20 samples of the training data" in note for note in by_files["notes"])


def test_what_is_not_asked_for_is_not_made(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, *files(home))
    assert found["greedy"] is found["refreshed"] is found["repaired"] is found["heatmap"] is found["to"] is None
    assert found["members"][0]["cost"]["seconds"] is None
    assert said(capsys, files(home)[0], "--measure")["members"][0]["cost"]["seconds"] > 0
    assert said(capsys, files(home)[0], "--validation-share", "0.5")["members"][0]["temperature"] != pytest.approx(
        found["members"][0]["temperature"], rel=1e-9
    )


@pytest.mark.parametrize("take", ["averaged", "refreshed", "repaired", "greedy"])
def test_the_file_written_can_be_given_in_turn(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, take: str
) -> None:
    to = tmp_path / "out.safetensors"
    first = said(capsys, *files(home), "--to", to, "--take", take)
    assert first["to"] == str(to)
    again = said(capsys, to)
    assert again["members"][0]["accuracy"] == first[take]["accuracy"]
    assert again["members"][0]["loss"] == pytest.approx(first[take]["loss"])
    with safe_open(to, "pt") as file:
        about = file.metadata()
    assert about["soup"] == take and set(json.loads(about["members"])) <= set(first["names"])
    model = models.from_recipe(json.loads(about["recipe"]))
    model.load_state_dict(load_file(to))
    if take == "averaged":
        members = []
        for file_name in files(home):
            members.append(models.from_recipe(json.loads(about["recipe"])))
            members[-1].load_state_dict(load_file(file_name))
        for name, x in soups.averaged(members).state_dict().items():
            assert torch.equal(x, load_file(to)[name])
    assert "--overwrite" in refused(capsys, *files(home), "--to", to)
    assert said(capsys, *files(home), "--to", to, "--overwrite")["to"] == str(to)


def test_the_table_and_the_picture(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    argv = ["soup", *files(home), "--greedy", "--refresh", "--heatmap", str(picture), "--steps", "1", "--device", "cpu"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    for part in ("m0.safetensors", "ensemble", "averaged, refreshed BatchNorm", "greedy soup", "Distance to consensus"):
        assert part in shown
    assert re.search(r"ensemble +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.e+-]+ +3 ", shown)
    assert f"Heat map: {picture}" in shown and picture.read_bytes()[1:4] == b"PNG"


def test_files_without_a_recipe_need_the_network(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(files(home)[0]), bare)
    assert "give --model" in refused(capsys, bare)
    found = said(capsys, bare, files(home)[1], "--model", "cnn", "--width", "8")
    assert found["members"] == said(capsys, *files(home)[:2])["members"]
    assert "does not hold the weights of cnn(width=16" in refused(capsys, bare, "--model", "cnn", "--width", "16")
    assert "Unknown model" in refused(capsys, bare, "--model", "cmm")


def test_what_cannot_be_done_is_refused_in_a_sentence(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other, plain = tmp_path / "other.safetensors", tmp_path / "plain.safetensors"
    network = models.build("cnn", input_shape=(1, 8, 8), classes=10, width=4)
    write_weights(other, network.state_dict(), network.recipe, {})
    network = models.build("mlp", input_shape=(1, 8, 8), classes=10)
    write_weights(plain, network.state_dict(), network.recipe, {})
    one, learnt = files(home)[0], tmp_path / "encoder.safetensors"
    features = models.encoder(models.build("cnn", input_shape=(1, 8, 8), classes=10, width=8))
    write_weights(learnt, features.state_dict(), features.recipe, {})
    assert "has no classifier" in refused(capsys, learnt, learnt)
    assert "but encoder.safetensors an encoder, cnn(width=8" in refused(capsys, one, learnt)
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 40)
    assert "members must be of one network" in refused(capsys, one, other)
    assert "cnn(width=8" in refused(capsys, one, other) and "cnn(width=4" in refused(capsys, one, other)
    assert "the data it was trained for" in refused(capsys, one, "--data", f"text:{text}")
    assert "There is no" in refused(capsys, tmp_path / "nothing.safetensors")
    assert "cannot be read as safetensors" in refused(capsys, text)
    assert "is this" in (sentence := refused(capsys, tmp_path)) or "folder of a run" in sentence
    assert "3 to 5 members" in refused(capsys, one, "--heatmap", tmp_path / "x.png")
    assert ".png or .svg" in refused(capsys, *files(home), "--heatmap", tmp_path / "x.pdf")
    assert "no BatchNorm" in refused(capsys, plain, "--take", "refreshed", "--to", tmp_path / "x.safetensors")
    assert "--to" in refused(capsys, one, "--take", "repaired")
    assert "validation share" in refused(capsys, one, "--validation-share", "1.5")
    assert "at least 1" in refused(capsys, one, "--batch-size", "0")
    assert "no members" in refused(capsys)
