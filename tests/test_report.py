"""The report says what the files say, and nothing else; it never fails on what they lack. And: re-timed timelines."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unlocked as ul
from test_trace import ACTIVATION, GRADIENTS, simulate
from unlocked.errors import BadData, UnlockedError
from unlocked.report import gantt, write_report
from unlocked.report.curves import accuracy, accuracy_by_depth, losses_by_depth, over_runs
from unlocked.report.drawing import looks
from unlocked.report.gantt import measured_of, window
from unlocked.report.memory import POINTS, thin
from unlocked.report.recording import Recording, read_recording
from unlocked.report.study import read_study
from unlocked.report.words import bytes_text
from unlocked.simulation.retiming import retimed
from unlocked.timeline import BUSY, Act, Timeline

pytestmark = pytest.mark.xdist_group("report")  # the runs are made once
NASTY = '<script>alert("x")</script>&$a_1$'
VOID = {"meta", "br", "hr", "img", "input", "link"}


# ---- sample folders ----------------------------------------------------------------------------------------------------


def train(folder: Path, credit: ul.credit.Credit, name: str, replicas: int = 1, seed: int = 0) -> dict:
    """One epoch on 128 made-up images in two stages, written as the contract has it; returns the summary."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    x, y = torch.randn(128, 6), torch.randint(0, 4, (128,))
    layers = [torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)]
    chain = ul.cut(torch.nn.Sequential(*layers), 2, like=x[:32])
    rule = ul.consensus.AllReduce() if replicas > 1 else ul.consensus.Independent()
    trainer = ul.Trainer(
        chain,
        credit=credit,
        consensus=rule,
        replicas=replicas,
        seed=seed,
        optimizer=lambda weights: torch.optim.SGD(weights, lr=0.1),
    )
    log = ul.callbacks.EventLog(folder / "events.jsonl")
    (epoch,) = trainer.fit((x, y), epochs=1, validate=(x, y), batch_size=32, callbacks=[log])
    config = {"data": "noise", "model": "mlp", "stages": 2, "credit": name, "consensus": rule.name, "seed": seed}
    config |= {"replicas": replicas, "epochs": 1, "heads": [str(head) for head in trainer.heads]}
    config |= {"versions": {"torch": "2"}, "machine": {"cores": 2}, "command": f"unlocked train --credit {name}"}
    sent = {channel: value / trainer.steps / replicas for channel, value in epoch["bytes"].items()}
    up, down = sent.pop("activation", 0.0), sent.pop("gradient", 0.0)
    summary = {"accuracy": epoch["validation"]["accuracy"], "ensemble": epoch["validation"]["ensemble"]}
    summary |= {"samples_per_second": epoch["samples_per_second"], "activation_peak": trainer.activation_peak}
    summary |= {"bytes_up": up, "bytes_down": down, "bytes_replicas": sum(sent.values()), "seconds": trainer.elapsed}
    step = {"timeline": trainer.timeline.to_json(), "activation_curve": trainer.activation_curve}
    for file, content in (("config", config), ("summary", summary), ("step", step)):
        (folder / f"{file}.json").write_text(json.dumps(content))
    return summary


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    train(folder, ul.credit.DGL(head="linear", budget=None), "dgl(head=linear)")
    return folder


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "compare"
    methods = {
        "backprop": ("backprop", ul.credit.Backprop(), 1),
        "dgl(head=linear)": ("dgl-head-linear", ul.credit.DGL(head="linear", budget=None), 1),
        "backprop/all-reduce@2": ("backprop--all-reduce--x2", ul.credit.Backprop(), 2),
    }
    table = []
    for name, (slug, credit, replicas) in methods.items():
        runs = [
            train(folder / "runs" / f"{slug}-seed{seed}", credit, name.split("/")[0], replicas, seed) for seed in (0, 1)
        ]
        accuracies = [run["accuracy"] for run in runs]
        row = {"method": name, "replicas": replicas, "runs": 2, "failed": None}
        row |= {"accuracy_mean": fmean(accuracies), "accuracy_std": stdev(accuracies)}
        for key in ("samples_per_second", "activation_peak", "bytes_up", "bytes_down", "bytes_replicas", "seconds"):
            row[key] = fmean(run[key] for run in runs)
        table.append(row)
    (folder / "table.json").write_text(json.dumps(table))
    shared = {"command": "unlocked compare", "methods": list(methods), "seeds": 2, "data": "noise", "model": "mlp"}
    (folder / "config.json").write_text(json.dumps(shared))
    return folder


MACHINE = {"cpu": "Some Processor @ 2.20GHz", "cores": 2, "device": "cpu"}


def measured_run(folder: Path, rule: str, updates: int = 8) -> Path:
    """The files of a run on four real processes, as the contract has them; nothing is trained for it."""
    folder.mkdir(parents=True)
    config = {"data": "noise", "model": "mlp", "stages": 2, "credit": rule, "consensus": "all-reduce", "replicas": 2}
    config |= {"seed": 0, "epochs": 2, "versions": {"torch": "2"}, "machine": MACHINE, "command": "unlocked launch"}
    down = float(ACTIVATION) if rule == "backprop" else 0.0
    summary = {"accuracy": 0.9, "ensemble": 0.92, "samples_per_second": 2000.0, "activation_peak": 5000, "seconds": 3.0}
    summary |= {"bytes_up": float(ACTIVATION), "bytes_down": down, "bytes_replicas": 2.0 * GRADIENTS}
    scores = {"loss": 0.4, "accuracy": 0.9, "stages": [None, [0.4, 0.9]], "members": [0.9, 0.9], "ensemble": 0.92}
    losses = [None if rule == "backprop" else 0.9, 0.5]
    events: list[dict] = [{"event": "start"}]
    for k in (1, 2):
        events.append({"event": "epoch", "epoch": k, "losses": losses, "elapsed": 1.5 * k, "validation": scores})
    events.append({"event": "stop", "reason": "finished"})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    step = {"timeline": simulate(rule, 1, apart=False)["acts"], "activation_curve": [0, 3000, 5000, 2000, 0]}
    files = {"config": config, "summary": summary, "step": step, "timeline": simulate(rule, updates)}
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(run_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag == "tr":
            self.rows.append([])
        if "data-value" in values:
            self.rows[-1].append(values["data-value"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def table(self) -> dict[str, list[str]]:
        return {row[0]: row[1:] for row in self.rows if row}


def page(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


# ---- what it must hold -------------------------------------------------------------------------------------------------


def test_the_table_of_a_comparison_repeats_its_files(comparison: Path) -> None:
    table = page(comparison).table
    rows = json.loads((comparison / "table.json").read_text())
    assert list(table) == [row["method"] for row in rows]
    for row in rows:
        shown = table[row["method"]]
        keys = ("samples_per_second", "activation_peak", "bytes_up", "bytes_down", "bytes_replicas", "seconds")
        assert float(shown[0]) == row["accuracy_mean"]
        assert [float(value) for value in shown[3:9]] == [row[key] for key in keys]
        assert int(shown[9]) == 2
    ensembles = [
        json.loads((comparison / "runs" / f"backprop--all-reduce--x2-seed{k}/summary.json").read_text())["ensemble"]
        for k in (0, 1)
    ]
    assert float(table["backprop/all-reduce@2"][1]) == fmean(ensembles)
    assert table["backprop"][1] == ""


def test_the_table_of_a_run_repeats_its_summary(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    shown = page(run).table["dgl(head=linear)"]
    assert float(shown[0]) == summary["accuracy"]
    keys = ("samples_per_second", "activation_peak", "bytes_up", "bytes_down", "bytes_replicas", "seconds")
    assert shown[2] == "" and summary.get("layerwise") is None
    assert [float(value) for value in shown[3:9]] == [summary[key] for key in keys]


def test_the_runs_of_a_comparison_find_their_methods(comparison: Path) -> None:
    study = read_study(comparison)
    assert study.notes == []
    for method in study.methods:
        assert [run.seed for run in method.runs] == [0, 1]
        assert {run.name for run in method.runs} == {method.name}


def test_a_folder_s_name_is_enough_to_find_its_method(comparison: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(comparison, tmp_path / "compare"))
    for path in folder.glob("runs/*/config.json"):
        edit(path, credit="rule written by a user")
    assert [(m.name, len(m.runs)) for m in read_study(folder).methods] == [
        (m.name, len(m.runs)) for m in read_study(comparison).methods
    ]


def test_without_a_table_the_rows_come_from_the_runs(comparison: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(comparison, tmp_path / "compare"))
    before = {method.name: method for method in read_study(folder).methods}
    (folder / "table.json").unlink()
    after = {method.name: method for method in read_study(folder).methods}
    assert after.keys() == before.keys()
    for name, method in after.items():
        assert method.accuracy == pytest.approx(before[name].accuracy)
        assert method.spread == pytest.approx(before[name].spread)
        assert method.numbers == pytest.approx(before[name].numbers)
    assert "table.json is missing" in page(folder).text


def test_the_page_is_whole_and_needs_nothing_else(comparison: Path, run: Path) -> None:
    for folder in (comparison, run):
        text = write_report(folder).read_text()
        assert "http://" not in text and "https://" not in text and "@import" not in text and "xlink" not in text
        seen = Page(text)
        ids = [values["id"] for _, values in seen.tags if "id" in values]
        assert len(ids) == len(set(ids))
        assert not [tag for tag, values in seen.tags if tag in ("link", "img", "iframe") or "src" in values]
        targets = [values["href"] or "" for _, values in seen.tags if "href" in values]
        targets += re.findall(r"url\(([^)]*)\)", text)
        assert targets and {target[1:] for target in targets} <= set(ids)
        assert all(target.startswith("#") for target in targets)


def test_the_same_files_give_the_same_page(run: Path) -> None:
    assert write_report(run).read_text() == write_report(run).read_text()


def test_every_act_of_the_step_is_drawn(run: Path) -> None:
    acts = json.loads((run / "step.json").read_text())["timeline"]
    drawn = re.findall(r"<title>([FBLUSRM]): ", write_report(run).read_text())
    assert Counter(drawn) == Counter(act["kind"] for act in acts)


def test_every_method_is_named_in_every_figure(comparison: Path) -> None:
    text = write_report(comparison).read_text()
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', text, flags=re.DOTALL))
    assert {"results", "accuracy", "depth", "step", "memory", "bytes", "settings"} == sections.keys()
    for name in read_study(comparison).methods:
        for section in ("results", "accuracy", "depth", "step", "memory", "bytes"):
            assert name.name in sections[section], (name.name, section)


def test_many_methods_get_a_panel_each(comparison: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(comparison, tmp_path / "compare"))
    table = json.loads((folder / "table.json").read_text())
    for k in range(4):
        shutil.copytree(folder / "runs/backprop-seed0", folder / f"runs/other{k}-seed0")
        table.append(table[0] | {"method": f"other{k}", "runs": 1})
    (folder / "table.json").write_text(json.dumps(table))
    seen = page(folder)
    labels = [values["aria-label"] for tag, values in seen.tags if tag == "svg" and values.get("aria-label")]
    for row in table:
        assert f"Accuracy over passes: {row['method']}" in labels
    assert len(seen.table) == 7


def test_texts_are_escaped(run: Path) -> None:
    edit(run / "config.json", credit=NASTY, command=NASTY, data=NASTY, heads=[NASTY], versions={NASTY: NASTY})
    seen = page(run)
    assert sum(tag == "script" for tag, _ in seen.tags) == 1
    assert NASTY in seen.table
    assert seen.text.count(NASTY) >= 6


# ---- what may be missing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, sentence",
    [
        ("step.json", "No step was recorded (no step.json)"),
        ("summary.json", "No bytes were recorded (no summary of any run)."),
        ("config.json", "config.json is missing, so the settings of this run are not known."),
        ("events.jsonl", "run has no events"),
    ],
)
def test_a_missing_file_is_said(run: Path, file: str, sentence: str) -> None:
    (run / file).unlink()
    assert sentence in page(run).text


def test_a_run_without_validation(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(line | {"validation": None}) + "\n" for line in lines)
    (run / "events.jsonl").write_text(text)
    assert "There was no validation, so there is no accuracy to show." in page(run).text


def test_a_run_without_classes_shows_its_loss(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    scores = {"loss": 0.5, "accuracy": None, "stages": [None, [0.5, None]], "members": [], "ensemble": None}
    text = "".join(json.dumps(line | {"validation": scores}) + "\n" for line in lines)
    (run / "events.jsonl").write_text(text)
    assert "Held-out loss after each pass" in page(run).text


def test_a_killed_run_is_said_and_its_torn_line_left_out(run: Path) -> None:
    path = run / "events.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1][:20]]))
    assert "run has no end: it is still running, or was killed." in page(run).text
    assert len(read_study(run).methods[0].runs[0].epochs) == 1


def test_an_interrupted_run_is_said(run: Path) -> None:
    path = run / "events.jsonl"
    path.write_text(path.read_text().replace('"finished"', '"interrupted"'))
    assert "did not finish: its log ends with “interrupted”" in page(run).text


def test_epochs_done_again_after_a_resume_replace_the_first_ones(run: Path) -> None:
    events: list[dict[str, object]] = [{"event": "start"}]
    events += [{"event": "epoch", "epoch": epoch, "losses": [loss]} for epoch, loss in ((1, 9.0), (2, 8.0), (3, 7.0))]
    events += [{"event": "start"}, {"event": "epoch", "epoch": 2, "losses": [1.0]}, {"event": "stop"}]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    epochs = read_study(run).methods[0].runs[0].epochs
    assert [(epoch.epoch, epoch.losses) for epoch in epochs] == [(1, [9.0]), (2, [1.0])]
    (curve,) = losses_by_depth(read_study(run).methods)
    assert (curve.x, curve.y) == ([0.0], [1.0])


def test_failed_and_absent_methods_are_said(comparison: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(comparison, tmp_path / "compare"))
    table = json.loads((folder / "table.json").read_text())
    table.append({"method": "predsim", "replicas": 1, "runs": 0, "failed": "Head too large."})
    (folder / "table.json").write_text(json.dumps(table))
    edit(folder / "config.json", methods=[row["method"] for row in table] + ["greedy"])
    seen = page(folder)
    assert "predsim failed: Head too large." in seen.text
    assert "Nothing was recorded of: greedy." in seen.text
    assert "Not shown, as no step was recorded: predsim." in seen.text
    assert seen.table["predsim"][:8] == [""] * 8


@pytest.mark.parametrize("file", ["config.json", "events.jsonl", "step.json", "summary.json"])
@pytest.mark.parametrize("content", [b'{"a": \n', b"[1, 2]\n", b"\xff\xfe\n"])
def test_a_damaged_file_is_named_in_a_sentence(run: Path, file: str, content: bytes) -> None:
    (run / file).write_bytes(content)
    with pytest.raises(BadData, match=re.escape(file)) as caught:
        write_report(run)
    assert str(caught.value).endswith(".")


def test_neither_a_run_nor_a_comparison(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="neither a run"):
        write_report(tmp_path)
    with pytest.raises(BadData, match="is not a folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "runs").mkdir()
    with pytest.raises(BadData, match="without a run"):
        write_report(tmp_path)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths to all parts of a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


JUNK: st.SearchStrategy[object] = st.sampled_from(
    [None, True, -1, 10**400, float("nan"), "x", [], [[]], {}, {"a": 1}, [None, "y"]]
)


@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_any_wrong_part_gives_a_report_or_a_sentence(
    run_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("junk") / "run"))
    file = data.draw(st.sampled_from(["config.json", "summary.json", "step.json", "events.jsonl"]))
    lines = [json.loads(line) for line in (folder / file).read_text().splitlines()]
    place = data.draw(st.sampled_from(places(lines)[1:]))
    part = lines
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = data.draw(JUNK)
    (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        Page(write_report(folder).read_text())
    except UnlockedError as error:
        assert str(error).endswith(".") and file in str(error)


# ---- runs on real processes --------------------------------------------------------------------------------------------


@pytest.fixture(params=["dgl", "backprop"])
def measured(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return measured_run(tmp_path / "run", request.param)


def recording_in(folder: Path) -> Recording:
    recording = read_recording(folder)
    assert recording is not None
    return recording


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the table after a heading."""
    table = text.split(f"<h3>{heading}</h3>")[1].split("</table>")[0]
    return [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in table.split("<tr>")[2:]]


def test_the_measured_chart_says_so_and_on_what(measured: Path) -> None:
    seen = page(measured)
    assert "Steps as measured, worker by worker" in seen.text
    assert "Measured on 4 processes on Some Processor @ 2.20GHz, 2 cores" in seen.text
    assert "There were more processes than cores (4 on 2)" in seen.text
    assert "about 3 steps of 8, 4 processes" in seen.text
    assert "one process" not in seen.text and "One step" not in seen.text
    edit(measured / "config.json", machine={"cpu": "Big", "cores": 4, "device": "NVIDIA H200"})
    text = page(measured).text
    assert "Measured on 4 processes on Big, NVIDIA H200, 4 cores" in text and "than cores" not in text
    edit(measured / "config.json", machine=None)
    assert "Measured on 4 processes (the machine was not recorded)" in page(measured).text


def test_every_act_of_the_window_is_drawn_as_it_was_timed(measured: Path) -> None:
    recording = recording_in(measured)
    begin, end, count = window(recording)
    text = write_report(measured).read_text()
    drawn = re.findall(r"<title>([FBLUSRM]): .*?at (-?[\d.]+) ms, ([\d.]+) ms", text)
    inside = recording.acts.between(begin, end)
    expected = Counter(
        (act.kind, f"{1e3 * (act.start - begin):.2f}", f"{1e3 * (act.end - act.start):.2f}") for act in inside
    )
    assert Counter(drawn) == expected and count == 3
    assert {kind for kind, _, _ in drawn} >= set("FBUSRM")


def test_the_window_is_of_whole_steps_from_the_middle(measured: Path) -> None:
    recording = recording_in(measured)
    starts = recording.acts.step_starts()
    assert window(recording) == (starts[2], starts[5], 3)
    two = replace(recording, acts=Timeline(act for act in recording.acts if act.micro_batch < 2))
    assert window(two) == (starts[0], max(act.end for act in two.acts), 2)
    only_exchanges = [Act("M", 0, 0, 0, 0, 8, 1.0, 2.0, "mean"), Act("M", 0, 0, 1, 1, 8, 3.0, 4.0, "mean")]
    assert window(replace(recording, acts=Timeline(only_exchanges))) == (1.0, 4.0, 8)


def test_a_window_of_too_many_acts_is_made_shorter(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = recording_in(measured)
    per_step = len(recording.acts) // 8
    monkeypatch.setattr(gantt, "ACTS", 2 * per_step + per_step // 2)
    assert window(recording)[2] == 2
    monkeypatch.setattr(gantt, "ACTS", 1)
    assert window(recording)[2] == 1


def test_the_lines_of_the_window_are_its_messages(measured: Path) -> None:
    recording = recording_in(measured)
    step = measured_of("m", recording)
    begin, end, _ = window(recording)
    assert step.milliseconds == 1e3 * (end - begin)
    assert all(sent.start >= 0 and taken.end <= end - begin for sent, taken in step.messages)
    for sent, taken in step.messages:  # nothing of these rules is taken in another micro-batch than it was sent in
        assert (sent.micro_batch, sent.peer, sent.channel) == (
            taken.micro_batch,
            (taken.replica, taken.stage),
            taken.channel,
        )
    first = min(sent.micro_batch for sent, _ in step.messages)
    assert len(step.messages) >= 4 and first > 0
    assert all(len(acts) == 2 and len({act.micro_batch for act in acts}) == 1 for acts in step.meetings)
    assert step.meetings and all(0.0 <= act.end <= end - begin for acts in step.meetings for act in acts)


def test_the_table_of_workers_repeats_the_idle_shares(measured: Path) -> None:
    recording = recording_in(measured)
    begin, end, _ = window(recording)
    rows = rows_of(write_report(measured).read_text(), "What each worker did with its time")
    idle = recording.acts.idle_shares(begin, end)
    assert [(row[0], row[1], row[4]) for row in rows] == [
        (f"{replica}·{stage}", str(2 * replica + stage), f"{100 * idle[(replica, stage)]:.1f}")
        for replica, stage in recording.ranks
    ]
    for row in rows:
        computing, updating, idle_share, *parts = map(float, row[2:])
        assert computing + updating + idle_share == pytest.approx(100, abs=0.2)
        assert sum(parts) <= idle_share + 0.2
    mean = fmean(idle.values())
    assert f"idle {100 * mean:.0f} % of 4 workers" in page(measured).text


def test_an_exchange_beside_computing_is_no_idle_time(tmp_path: Path) -> None:
    folder = measured_run(tmp_path / "run", "dgl")
    acts = [
        Act("F", 0, 0, 0, 0, 0, 0.0, 1.0),
        Act("M", 0, 0, 0, 0, 8, 1.0, 4.0, "mean"),
        Act("B", 0, 0, 0, 0, 0, 1.0, 3.0),
    ]
    edit(folder / "timeline.json", ranks=[[0, 0, 0]], acts=Timeline(acts).to_json())
    assert rows_of(write_report(folder).read_text(), "What each worker did with its time") == [
        ["0·0", "0", "75.0", "0.0", "25.0", "0.0", "25.0", "0.0"]
    ]


def test_the_table_of_channels_repeats_the_bytes(measured: Path) -> None:
    rows = rows_of(write_report(measured).read_text(), "Channel by channel")
    payload, wire = bytes_text(ACTIVATION), bytes_text(ACTIVATION + 64)
    pair = ["1", payload, wire, f"{(ACTIVATION + 64) / ACTIVATION:.4f}"]
    mean = ["2", bytes_text(2 * GRADIENTS), bytes_text(2 * GRADIENTS + 128), f"{(GRADIENTS + 64) / GRADIENTS:.4f}"]
    backprop = "backprop" in (measured / "config.json").read_text()
    gradient = [["gradient", *pair]] if backprop else []
    assert rows == [["activation", *pair], *gradient, ["mean", *mean]]


def test_a_run_of_one_process_looks_as_without_a_recording(run: Path) -> None:
    before = write_report(run).read_text()
    (run / "timeline.json").write_text(json.dumps(simulate("dgl", apart=False)))
    assert write_report(run).read_text() == before
    assert "measured" not in Page(before).text.lower()


def test_measured_and_other_methods_are_kept_apart(tmp_path: Path) -> None:
    for rule in ("backprop", "dgl", "greedy"):
        measured_run(tmp_path / f"runs/{rule}--all-reduce--x2-seed0", rule)
    (tmp_path / "runs/greedy--all-reduce--x2-seed0/timeline.json").unlink()
    text = write_report(tmp_path).read_text()
    section = text.split('<section id="step">')[1].split("</section>")[0]
    timed, not_timed = section.split("<h3>Not measured: one step as its dependencies allow it</h3>")
    assert "Measured on 4 processes" in timed and "backprop/all-reduce@2" in timed and "greedy" not in timed
    assert "greedy/all-reduce@2" in not_timed and "backprop" not in not_timed.split("Gaps are waiting")[0]
    rows = rows_of(text, "What each worker did with its time")
    assert [row[:2] for row in rows] == [
        [f"{rule}/all-reduce@2", f"{i}·{j}"] for rule in ("backprop", "dgl") for i in (0, 1) for j in (0, 1)
    ]


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_any_wrong_part_of_a_recording_gives_a_report_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = measured_run(tmp_path_factory.mktemp("junk") / "run", "dgl", updates=2)
    content = json.loads((folder / "timeline.json").read_text())
    place = data.draw(st.sampled_from(places(content)[1:]))
    part = content
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = data.draw(JUNK)
    (folder / "timeline.json").write_text(json.dumps(content))
    try:
        Page(write_report(folder).read_text())
    except UnlockedError as error:
        assert str(error).endswith(".") and "timeline.json" in str(error)


# ---- the small parts ---------------------------------------------------------------------------------------------------


def test_bands_are_mean_and_standard_deviation_over_the_runs() -> None:
    curve = over_runs("m", [[(1.0, 2.0), (2.0, 5.0)], [(3.0, 6.0), None], [(5.0, 1.0)]])
    assert curve is not None
    assert curve.x == [3.0, 2.0] and curve.y == [3.0, 5.0]
    assert curve.spread == [stdev([2.0, 6.0, 1.0]), 0.0]
    assert over_runs("m", [[], [None]]) is None


def test_curves_are_the_numbers_of_the_event_log(run_folder: Path) -> None:
    methods = read_study(run_folder).methods
    (epoch,) = [row for row in map(json.loads, (run_folder / "events.jsonl").open()) if row["event"] == "epoch"]
    heads = [(float(j), 100 * score[1]) for j, score in enumerate(epoch["validation"]["stages"])]
    expected = [
        (accuracy(methods, False), [(1.0, 100 * epoch["validation"]["accuracy"])]),
        (accuracy(methods, True), [(epoch["elapsed"], 100 * epoch["validation"]["accuracy"])]),
        (losses_by_depth(methods), list(enumerate(epoch["losses"]))),
        (accuracy_by_depth(methods), heads),
    ]
    for (curve,), points in expected:
        assert list(zip(curve.x, curve.y)) == points


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5 * POINTS), st.randoms(use_true_random=False))
def test_thinning_keeps_the_ends_and_the_extremes(count: int, source: random.Random) -> None:
    curve = [float(source.randrange(10**6)) for _ in range(count)]
    kept = thin(curve)
    assert kept == sorted(set(kept)) and len(kept) <= 2 * POINTS + 2
    assert kept[0] == 0 and kept[-1] == len(curve) - 1
    assert {max(curve), min(curve)} <= {curve[k] for k in kept}


def test_bytes_are_written_with_three_digits() -> None:
    cases = {0: "0", 1: "1 B", 999: "999 B", 1000: "1 kB", 4_233_732: "4.23 MB", 999_600: "1 MB", 2e12: "2 TB"}
    assert {value: bytes_text(value) for value in cases} == cases
    assert bytes_text(None) == "–"


def test_no_two_methods_look_alike() -> None:
    names = [str(k) for k in range(20)]
    assert len(set(looks(names).values())) == 20


def test_matplotlib_is_imported_late_and_without_global_state(run: Path) -> None:
    code = (
        "import sys, unlocked.report as report; assert 'matplotlib' not in sys.modules; "
        f"report.write_report({str(run)!r}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- re-timed timelines ------------------------------------------------------------------------------------------------


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """What could have happened: acts in one global order, so no two workers wait for each other."""
    replicas, stages = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    workers = [(r, s) for r in range(replicas) for s in range(stages)]
    # every worker does something
    acts = [Act("F", r, s, 0, 0, 0, 0.0, draw(st.integers(0, 8)) / 64) for r, s in workers]
    flying: list[tuple[tuple[int, int], tuple[int, int], str]] = []
    for _ in range(draw(st.integers(0, 25))):
        kind = draw(st.sampled_from("FBLUSSRRM"))
        here = draw(st.sampled_from(workers))
        duration = draw(st.integers(0, 8)) / 64  # binary fractions add without rounding
        if kind == "S":
            there, channel = draw(st.sampled_from(workers)), draw(st.sampled_from("ab"))
            acts.append(Act("S", *here, 0, 0, 8, 0.0, duration, channel, there))
            flying.append((here, there, channel))
        elif kind == "R" and flying:
            here, there, channel = flying.pop(draw(st.integers(0, len(flying) - 1)))
            acts.append(Act("R", *there, 0, 0, 8, 0.0, 0.0, channel, here))
        elif kind == "M":
            acts += [Act("M", r, here[1], 0, 0, 8, 0.0, duration, "mean") for r in range(replicas)]
        elif kind in "FBLU":
            acts.append(Act(kind, *here, 0, 0, 0, 0.0, duration))
    return Timeline(acts)


def longest_path(timeline: Timeline) -> dict[tuple, list[float]]:
    """Ends of every worker's acts: a computation ends its duration after the last of what it waits for. In recorded order."""
    free: defaultdict[tuple, float] = defaultdict(float)
    ends: defaultdict[tuple, list[float]] = defaultdict(list)
    sent: defaultdict[tuple, list[float]] = defaultdict(list)
    replicas = {act.replica for act in timeline}
    for act in timeline:
        here = (act.replica, act.stage)
        begin = free[here]
        if act.kind == "R":
            begin = max(begin, sent[(act.peer, here, act.channel)].pop(0))
        if act.kind == "M" and act.replica == min(replicas):
            arrived = max(free[(r, act.stage)] for r in replicas)
            free.update({(r, act.stage): arrived for r in replicas})
            begin = arrived
        free[here] = begin + (act.end - act.start if act.kind in BUSY else 0.0)
        ends[here].append(free[here])
        if act.kind == "S":
            sent[(here, act.peer, act.channel)].append(free[here])
    return ends


@settings(deadline=None, max_examples=30)
@given(timelines())
def test_retimed_acts_end_at_the_end_of_their_longest_path(timeline: Timeline) -> None:
    parallel, ends = retimed(timeline), longest_path(timeline)
    for worker in timeline.workers():
        assert [act.end for act in parallel.of(*worker)] == ends[worker]


@settings(deadline=None, max_examples=30)
@given(timelines())
def test_retiming_keeps_acts_orders_and_durations(timeline: Timeline) -> None:
    parallel = retimed(timeline)
    assert parallel.bytes_sent() == timeline.bytes_sent()
    for worker in timeline.workers():
        before, after = timeline.of(*worker), parallel.of(*worker)
        assert [act._replace(start=0.0, end=0.0) for act in after] == [
            act._replace(start=0.0, end=0.0) for act in before
        ]
        for old, new in zip(before, after):
            assert old.kind not in BUSY or new.end - new.start == old.end - old.start
        for first, second in pairwise(after):
            assert second.start >= first.end


@settings(deadline=None, max_examples=30)
@given(timelines())
def test_no_message_is_taken_before_it_is_sent(timeline: Timeline) -> None:
    sent: defaultdict[tuple, list[float]] = defaultdict(list)
    taken: defaultdict[tuple, list[float]] = defaultdict(list)
    for act in retimed(timeline):
        if act.kind == "S":
            sent[((act.replica, act.stage), act.peer, act.channel)].append(act.end)
        if act.kind == "R":
            taken[(act.peer, (act.replica, act.stage), act.channel)].append(act.end)
    for channel, times in taken.items():
        assert all(taken_at >= sent_at for sent_at, taken_at in zip(sent[channel], times, strict=False))
        assert len(times) <= len(sent[channel])


@settings(deadline=None, max_examples=30)
@given(timelines())
def test_idle_share_is_a_share_and_no_worker_is_busier_than_the_span(timeline: Timeline) -> None:
    parallel = retimed(timeline)
    assert 0.0 <= parallel.idle_share() <= 1.0
    for worker in parallel.workers():
        assert sum(act.end - act.start for act in parallel.of(*worker)) <= parallel.span()
    if len(parallel.workers()) == 1 and parallel.span():
        assert parallel.idle_share() == 0.0


def test_exchanges_that_wait_side_by_side_count_once() -> None:
    from unlocked.report.measured import _shares

    acts = [
        Act("B", 0, 0, 0, 0, 0, 0.0, 2.0),
        Act("M", 0, 0, 0, 0, 8, 1.0, 4.0, "all-reduce"),
        Act("M", 0, 0, 0, 0, 8, 1.5, 5.0, "all-reduce"),
        Act("M", 0, 0, 0, 0, 8, 7.0, 8.0, "all-reduce"),
    ]
    shares = _shares(Timeline(acts), (0, 0), 10.0)
    assert (shares["B"], shares["M"]) == (0.2, 0.4)
