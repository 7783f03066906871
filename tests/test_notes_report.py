"""What stages noted is in the report, line by line as in the event log, and nothing is there if nothing was noted."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from unlocked.callbacks import TensorBoard
from unlocked.errors import BadData
from unlocked.report import write_report
from unlocked.report.notes import bounds, over_depth, over_epochs
from unlocked.report.study import read_study

NOTES: list[dict[str, list[float | None]]] = [
    {"positives kept": [None, 1.0, 0.9], "negatives kept": [0.8, 0.7, 0.6]},
    {"positives kept": [None, 0.8, 0.7], "negatives kept": [0.5, 0.4, 0.3], "cosine <guess>": [-0.1, None, 0.2]},
]


def run(
    folder: Path, notes: list[dict[str, Any] | None], seed: int = 0, probed: bool = False, credit: str = "dgssl"
) -> Path:
    """The files of a run of three stages that noted this after its passes."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"event": "start"}]
    for k, noted in enumerate(notes, start=1):
        scores = {"loss": 0.5, "accuracy": 0.75, "stages": [[0.9, 0.5], [None, 0.6], [0.5, 0.75]], "probed": probed}
        record = {"event": "epoch", "epoch": k, "losses": [1.0, 0.9, 0.8 / k], "elapsed": 1.0 * k, "validation": scores}
        lines.append(record | ({} if noted is None else {"notes": noted}))
    lines.append({"event": "stop", "reason": "finished"})
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"data": "noise", "model": "cnn", "stages": 3, "credit": credit, "seed": seed, "replicas": 1}
    (folder / "config.json").write_text(json.dumps(config))
    summary = {"accuracy": 0.75, "loss": 0.5, "seconds": 2.0}
    (folder / "summary.json").write_text(json.dumps(summary | ({"probed": True} if probed else {})))
    return folder


def comparison(folder: Path) -> Path:
    """Two seeds of a method that noted, one of another that did not."""
    moved = [{name: [x if x is None else x / 2 for x in row] for name, row in noted.items()} for noted in NOTES]
    run(folder / "runs" / "dgssl-seed0", list(NOTES))
    run(folder / "runs" / "dgssl-seed1", list(moved), seed=1)
    run(folder / "runs" / "backprop-seed0", [None, None], credit="backprop")
    return folder


class Page(HTMLParser):
    """The text of a page section by section, with the labels and hover titles of its figures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sections: dict[str, str] = {"": ""}
        self.anchor = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "section":
            self.anchor = dict(attrs)["id"] or ""
            self.sections[self.anchor] = ""
        self.sections[self.anchor] += f"[{dict(attrs).get('aria-label')}]" if tag == "svg" else ""

    def handle_data(self, data: str) -> None:
        self.sections[self.anchor] += data


def test_nothing_is_shown_if_nothing_was_noted(tmp_path: Path) -> None:
    for k, notes in enumerate(([None, None], [{}, {}])):
        page = Page(write_report(run(tmp_path / str(k), list(notes))))
        assert "watched" not in page.sections and "What was watched" not in "".join(page.sections.values())


def test_a_run_has_a_chart_for_each_name_and_a_line_for_each_stage(tmp_path: Path) -> None:
    page = Page(write_report(run(tmp_path / "run", list(NOTES))))
    shown = page.sections["watched"]
    for title in ("Positives kept", "Negatives kept", "Cosine <guess>"):
        assert shown.count(f"[{title}: {title.lower()}]") == 1
    assert shown.count("stage 0: ") == 2 and shown.count("stage 1: ") == 2 and shown.count("stage 2: ") == 3
    assert "stage 2: 0.3 at the end" in shown and "stage 0: 0.5 at the end" in shown
    assert list(page.sections).index("watched") == list(page.sections).index("depth") + 1


def test_a_comparison_also_has_the_last_pass_over_the_depth(tmp_path: Path) -> None:
    page = Page(write_report(comparison(tmp_path / "compare")))
    shown = page.sections["watched"]
    assert "[Negatives kept, by depth]" in shown and "[dgssl: negatives kept]" in shown and "backprop" not in shown
    assert "first seed" in shown


def test_the_lines_are_the_numbers_of_the_event_log(tmp_path: Path) -> None:
    study = read_study(comparison(tmp_path / "compare"))
    (method,) = [method for method in study.methods if method.name == "dgssl"]
    curves = over_epochs(method.runs[0], "positives kept")
    assert [(curve.name, curve.x, curve.y) for curve in curves] == [
        ("stage 1", [1.0, 2.0], [1.0, 0.8]),
        ("stage 2", [1.0, 2.0], [0.9, 0.7]),
    ]
    late = over_epochs(method.runs[0], "cosine <guess>")
    assert [(curve.name, curve.x, curve.y) for curve in late] == [("stage 0", [2.0], [-0.1]), ("stage 2", [2.0], [0.2])]
    last = over_depth("dgssl", method.runs, "negatives kept")
    assert last is not None and last.x == [0.0, 1.0, 2.0] and last.y == pytest.approx([0.375, 0.3, 0.225])
    assert last.spread[0] == pytest.approx(0.25 / 2**0.5)


def test_tensorboard_has_the_notes_stage_by_stage(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer: Any = None
    writer = TensorBoard(tmp_path)
    for k, noted in enumerate([*NOTES, None], start=1):
        record = {"step": 5 * k, "losses": [None, 0.5 * k], "samples_per_second": 1.0}
        writer.on_epoch(trainer, record | ({} if noted is None else {"notes": noted}))
    writer.on_stop(trainer, "finished")
    read = EventAccumulator(str(tmp_path)).Reload()

    def curve(tag: str) -> list[tuple[int, float]]:
        return [(event.step, pytest.approx(event.value)) for event in read.Scalars(tag)]

    tags = set(read.Tags()["scalars"])
    assert {tag for tag in tags if tag.startswith("loss/")} == {"loss/stage1"}
    assert curve("loss/stage1") == [(5, 0.5), (10, 1.0), (15, 1.5)]
    (cosine,) = {tag.rsplit("/", 1)[0] for tag in tags if "cosine" in tag}
    told = {f"notes/{name}/stage{j}" for name in NOTES[0] for j in range(3)} - {"notes/positives kept/stage0"}
    told |= {f"{cosine}/stage0", f"{cosine}/stage2"}
    assert {tag for tag in tags if tag.startswith("notes/")} == told
    assert curve("notes/negatives kept/stage1") == [(5, 0.7), (10, 0.4)]
    assert curve("notes/positives kept/stage2") == [(5, 0.9), (10, 0.7)] and curve(f"{cosine}/stage2") == [(10, 0.2)]


def test_shares_and_cosines_have_their_range() -> None:
    low, high = bounds("negatives kept") or (1, 0)
    assert low < 0 < 1 < high and (bounds("cosine to the target") or (0, 0))[0] < -1 and bounds("norm") is None


def test_damaged_notes_are_a_sentence_and_numbers_that_are_none_leave_a_gap(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="'notes'"):
        write_report(run(tmp_path / "a", [{"x": [1.0]}, [1]]))  # type: ignore[list-item]
    with pytest.raises(BadData, match="a text as 'x' where a number"):
        write_report(run(tmp_path / "b", [{"x": ["much"]}]))
    page = Page(write_report(run(tmp_path / "c", [{"x": [float("nan"), 1.0]}, {"x": [None, 2.0]}])))
    assert "stage 0" not in page.sections["watched"] and "stage 1: 2 at the end" in page.sections["watched"]


def test_the_report_says_whose_accuracy_is_a_probe_s(tmp_path: Path) -> None:
    supervised = Page(write_report(run(tmp_path / "a", [None])))
    assert "probe" not in "".join(supervised.sections.values())
    page = Page(write_report(run(tmp_path / "b", [None], probed=True)))
    assert "of a linear probe of its features" in page.sections[""]
    for section in ("results", "accuracy", "depth"):
        assert "linear probe, fitted to frozen features" in page.sections[section]
    folder = tmp_path / "compare"
    run(folder / "runs" / "dgssl-seed0", [None], probed=True)
    run(folder / "runs" / "dgl-seed0", [None], credit="dgl")
    assert "That of dgssl is of a linear probe" in Page(write_report(folder)).sections["results"]
