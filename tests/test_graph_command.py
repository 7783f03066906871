"""`unlocked graph`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from unlocked import graphs
from unlocked.cli import main

DOCUMENT = Path(__file__).parent.parent / "docs" / "graphs.md"


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """The line of JSON of a command that succeeds."""
    capsys.readouterr()
    assert main(["graph", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The sentence of a command that is refused."""
    capsys.readouterr()
    assert main(["graph", *map(str, argv)]) == 2
    return capsys.readouterr().err


def test_the_constants_and_the_exchanges(capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, "--topology", "ring", "--n", 16, "--epsilon", 0.01)
    ring = graphs.ring(16)
    assert found["name"] == "ring" and found["connected"] is True and found["optimal"] is found["picture"] is None
    values = found["constants"]
    assert (values["n"], values["edges"], values["trace"]) == (16, 16, 32)
    assert values["chi1"] == pytest.approx(graphs.chi1(ring)) and values["chi2"] == pytest.approx(15 / 32)
    assert values["foster"] == pytest.approx(15) and values["norm"] == pytest.approx(4)
    log, first = math.log(100), graphs.chi1(ring)
    assert found["exchanges"] == pytest.approx(
        {
            "synchronous": 16 * 4 * first * log,
            "accelerated synchronous": 16 * (4 * first) ** 0.5 * log,
            "randomized": 32 * first * log,
            "accelerated randomized": 32 * (first * 15 / 32) ** 0.5 * log,
        }
    )


def test_the_rates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "e.txt"
    file.write_text("0 1 3\n1 2\n")
    assert said(capsys, "--edges", file)["constants"]["trace"] == 8
    assert said(capsys, "--edges", file, "--rates", "uniform")["constants"]["trace"] == 4
    assert said(capsys, "--edges", file, "--rates", "degree")["constants"]["trace"] == pytest.approx(3)
    assert said(capsys, "--edges", file, "--rates", "metropolis")["constants"]["trace"] == pytest.approx(4 / 3)
    assert said(capsys, "--edges", file, "--rate", 2)["constants"]["trace"] == pytest.approx(6)
    before, after = (said(capsys, "--topology", "star", "--n", 5, *rate)["exchanges"] for rate in ([], ["--rate", 7]))
    assert before == pytest.approx(after)


def test_the_optimal_rates(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cvxpy")
    found = said(capsys, "--topology", "barbell", "--n", 8, "--optimal")
    best, given = found["optimal"], found["constants"]
    assert best["constants"]["trace"] == pytest.approx(given["trace"], rel=1e-6)
    assert best["value"] < 0.8 * given["accelerated"] and best["gap"] < 1e-3
    assert best["exchanges"]["accelerated randomized"] < found["exchanges"]["accelerated randomized"]
    bounded = said(capsys, "--topology", "barbell", "--n", 8, "--optimal", "--cap", 0.5)["optimal"]
    assert max(rate for *_, rate in bounded["rates"]) <= 0.5 * (1 + 1e-6)
    assert main(["graph", "--topology", "barbell", "--n", "8", "--optimal"]) == 0
    shown = capsys.readouterr().out
    assert "optimal rates" in shown and "factor" in shown and "Optimal rates: by" in shown


def test_a_graph_in_parts_says_what_is_infinite(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "e.txt"
    file.write_text("0 1\n2 3\n")
    found = said(capsys, "--edges", file)
    assert found["connected"] is False and found["constants"]["chi1"] is None and found["constants"]["lambda2"] == 0
    assert set(found["exchanges"].values()) == {None}
    assert main(["graph", "--edges", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "not connected: it has 2 parts" in shown and "∞" in shown
    assert "not connected" in refused(capsys, "--edges", file, "--optimal")


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    picture = tmp_path / "new" / f"graph.{ending}"
    assert said(capsys, "--topology", "grid(3x4)", "--plot", picture)["picture"] == str(picture)
    first = picture.read_bytes()
    assert first[1:4] == b"PNG" or b"<svg" in first
    said(capsys, "--topology", "grid(3x4)", "--plot", picture)
    assert picture.read_bytes() == first
    monkeypatch.chdir(tmp_path)
    assert main(["graph", "--topology", "ring", "--n", "1", "--plot"]) == 0
    assert "Picture: ring-1.png" in capsys.readouterr().out and Path("ring-1.png").exists()
    assert said(capsys, "--topology", "random-geometric", "--n", 120, "--plot", "many.png")["picture"] == "many.png"


def test_what_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ring = ("--topology", "ring", "--n", 5)
    assert "did you mean 'ring'" in refused(capsys, "--topology", "rng", "--n", 5)
    assert "at least 1" in refused(capsys, "--topology", "ring", "--n", 0)
    assert "give n" in refused(capsys, "--topology", "ring")
    assert "either --topology" in refused(capsys)
    assert "either --topology" in refused(capsys, *ring, "--edges", "e.txt")
    assert "No such file" in refused(capsys, "--edges", tmp_path / "none")
    assert "between 0 and 1" in refused(capsys, *ring, "--epsilon", 1)
    assert "more than 0" in refused(capsys, *ring, "--rate", 0)
    assert "--optimal as well" in refused(capsys, *ring, "--cap", 1)
    assert ".png or .svg" in refused(capsys, *ring, "--plot", "a.pdf")
    assert "one picture" in refused(capsys, *ring, "--plot", "a.png", "b.png")
    assert "at most 300" in refused(capsys, "--topology", "ring", "--n", 400, "--plot")
    assert main(["graph", "--topology", "rng", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["event"] == "error"


def test_the_guide_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"```\n\$ unlocked graph --topology ring --n 16\n(.*?)```", DOCUMENT.read_text(), re.S)
    assert block is not None
    assert main(["graph", "--topology", "ring", "--n", "16"]) == 0
    printed = capsys.readouterr().out
    assert " ".join(block[1].split()) == " ".join(printed.split())
