"""What a report is about: a study of methods, each with its runs, read from a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..errors import BadData
from ..timeline import Timeline
from .footprint import Footprint, read_footprint
from .recording import Recording, read_recording
from .records import Record, read_json, read_lines, read_timeline

ROW_NUMBERS = ("samples_per_second", "activation_peak", "bytes_up", "bytes_down", "bytes_replicas", "seconds")


@dataclass(frozen=True)
class Epoch:
    """One pass over the data. Accuracies are shares; `stages` are those read at each head, None where there is none.

    probed: whether they are those of linear probes; notes: what stages noted, by name, for each stage.
    """

    epoch: int
    losses: list[float | None]
    elapsed: float | None
    loss: float | None
    accuracy: float | None
    stages: list[float | None]
    probed: bool = False
    notes: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training run as its files tell it. `trouble` is a sentence if it did not end well, else empty."""

    folder: Path
    name: str
    seed: int
    config: dict[str, Any]
    epochs: list[Epoch]
    timeline: Timeline | None
    curve: list[float]
    recording: Recording | None
    summary: Record | None
    trouble: str = ""
    footprint: Footprint | None = None


@dataclass(frozen=True)
class Method:
    """A row of the table with the runs behind it; numbers are means over the runs, None where not known."""

    name: str
    runs: list[Run]
    count: int
    accuracy: float | None
    spread: float | None
    ensemble: float | None
    numbers: dict[str, float | None]
    failed: str = ""
    layerwise: float | None = None

    @property
    def probed(self) -> bool:
        """Whether its accuracy is that of a linear probe, for it learned without labels."""
        return any(epoch.probed for run in self.runs for epoch in run.epochs)


@dataclass(frozen=True)
class Study:
    """All a report shows. `notes` are sentences about what is missing."""

    folder: Path
    comparison: bool
    config: dict[str, Any]
    methods: list[Method]
    notes: list[str] = field(default_factory=list)


def read_study(folder: Path) -> Study:
    """The study in a folder of a run or of a comparison. Raises BadData if it is neither, or damaged."""
    if not folder.is_dir():
        raise BadData(f"{folder} is not a folder; give the folder of a run or of a comparison.")
    if (folder / "runs").is_dir() or (folder / "table.json").exists():
        return _read_comparison(folder)
    if (folder / "events.jsonl").exists() or (folder / "summary.json").exists():
        return _read_single(folder)
    raise BadData(
        f"{folder} is neither a run (no events.jsonl) nor a comparison (no table.json, no runs folder); "
        "give the folder that a training run or a comparison has written."
    )


# ---- a run -------------------------------------------------------------------------------------------------------------


def _read_single(folder: Path) -> Study:
    run = _read_run(folder)
    notes = [run.trouble] if run.trouble else []
    if not run.config:
        notes.append("config.json is missing, so the settings of this run are not known.")
    return Study(folder, False, run.config, [_method_of_runs(run.name, [run])], notes)


def _read_run(folder: Path) -> Run:
    config = Record(read_json(folder / "config.json") or {}, str(folder / "config.json"))
    summary, step = read_json(folder / "summary.json"), read_json(folder / "step.json")
    records, cut_off = read_lines(folder / "events.jsonl")
    timeline, curve = None, []
    if step is not None:
        record = Record(step, str(folder / "step.json"))
        timeline = read_timeline(record.rows("timeline"), record.where)
        curve = [value or 0.0 for value in record.numbers("activation_curve")]
    return Run(
        folder,
        method_name(config) or folder.name,
        config.whole("seed", 0),
        config.value,
        _epochs(records),
        timeline if timeline else None,
        curve,
        read_recording(folder),
        None if summary is None else Record(summary, str(folder / "summary.json")),
        _trouble(folder.name, records, cut_off),
        read_footprint(folder),
    )


def _epochs(records: list[Record]) -> list[Epoch]:
    """The epochs in order; what a resumed run did again replaces what was there."""
    epochs: list[Epoch] = []
    for record in records:
        if record.text("event") == "epoch":
            epoch = _epoch(record, len(epochs) + 1)
            epochs = [known for known in epochs if known.epoch < epoch.epoch] + [epoch]
    return epochs


def _epoch(record: Record, count: int) -> Epoch:
    scores = record.part("validation")
    noted = record.part("notes")
    heads = [] if scores is None else scores.rows("stages")
    stages = [Record({"score": head}, record.where).numbers("score")[1:] for head in heads]
    return Epoch(
        record.whole("epoch", count),
        record.numbers("losses"),
        record.number("elapsed"),
        scores.number("loss") if scores else None,
        scores.number("accuracy") if scores else None,
        [head[0] if head else None for head in stages],
        scores is not None and scores.value.get("probed") is True,
        {} if noted is None else {name: noted.numbers(name) for name in noted.value},
    )


def _trouble(name: str, records: list[Record], cut_off: bool) -> str:
    events = [record.text("event") for record in records]
    if not events:
        return f"{name} has no events: it has not begun, or events.jsonl is missing."
    if cut_off or events[-1] != "stop":
        return f"{name} has no end: it is still running, or was killed."
    reason = records[-1].text("reason", "unknown")
    return "" if reason == "finished" else f"{name} did not finish: its log ends with “{reason}”."


def method_name(config: Record) -> str:
    """The method as a user writes it: credit/consensus@replicas, empty if the configuration names none."""
    credit, consensus, replicas = config.text("credit"), config.text("consensus"), config.whole("replicas", 1)
    if replicas == 1:
        return credit
    return f"{credit}/{consensus}@{replicas}" if credit else ""


# ---- a comparison ------------------------------------------------------------------------------------------------------


def _read_comparison(folder: Path) -> Study:
    config = Record(read_json(folder / "config.json") or {}, str(folder / "config.json"))
    table = read_json(folder / "table.json")
    rows = Record({"table": table}, str(folder / "table.json")).rows("table")
    folders = sorted(path for path in (folder / "runs").glob("*") if path.is_dir())
    groups: dict[str, list[Run]] = {}
    for path in folders:
        groups.setdefault(re.sub(r"-seed-?\d+$", "", path.name), []).append(_read_run(path))
    methods = []
    for row in rows:
        record = Record(row, str(folder / "table.json"))
        methods.append(_method_of_row(record, _runs_of(record.text("method"), groups)))
    methods += [_method_of_runs(runs[0].name, runs) for runs in groups.values()]
    if not methods:
        raise BadData(f"{folder} is a comparison without a run: no table.json rows and nothing in runs; run it first.")
    return Study(folder, True, config.value, methods, _comparison_notes(config, table, methods))


def _runs_of(name: str, groups: dict[str, list[Run]]) -> list[Run]:
    """Take the runs of a method out of `groups`: those whose folder, or whose configuration, spells its name."""
    for slug, runs in groups.items():
        if _words(name) in (_words(slug), _words(runs[0].name)):
            return sorted(groups.pop(slug), key=lambda run: run.seed)
    return []


def _words(name: str) -> list[str]:
    return re.findall(r"[\w.]+", name.replace("@", " x"))


def _comparison_notes(config: Record, table: Any, methods: list[Method]) -> list[str]:
    notes = []
    if table is None:
        notes.append(
            "table.json is missing: the comparison has not ended. The table is made from the runs that are there."
        )
    if not config.value:
        notes.append("config.json is missing, so the settings shared by all methods are not known.")
    named = [_words(method.name) for method in methods]
    absent = [str(name) for name in config.rows("methods") if _words(str(name)) not in named]
    if absent:
        notes.append(f"Nothing was recorded of: {', '.join(absent)}.")
    notes += [f"{method.name} failed: {method.failed}" for method in methods if method.failed]
    return notes + [run.trouble for method in methods for run in method.runs if run.trouble]


def _method_of_row(row: Record, runs: list[Run]) -> Method:
    return Method(
        row.text("method", "unnamed"),
        runs,
        row.whole("runs", len(runs)),
        row.number("accuracy_mean"),
        row.number("accuracy_std"),
        _mean_of(runs, "ensemble"),
        {key: row.number(key) for key in ROW_NUMBERS},
        row.text("failed"),
        _mean_of(runs, "layerwise"),
    )


def _method_of_runs(name: str, runs: list[Run]) -> Method:
    """A row from the summaries; accuracy and peak of a run without a summary are those of its last epoch."""
    accuracies = [value for run in runs if (value := _accuracy(run)) is not None]
    numbers = {key: _mean_of(runs, key) for key in ROW_NUMBERS}
    curves = [max(run.curve) for run in runs if run.curve]
    if numbers["activation_peak"] is None and curves:
        numbers["activation_peak"] = fmean(curves)
    return Method(
        name,
        runs,
        len(runs),
        fmean(accuracies) if accuracies else None,
        stdev(accuracies) if len(accuracies) > 1 else None,
        _mean_of(runs, "ensemble"),
        numbers,
        layerwise=_mean_of(runs, "layerwise"),
    )


def _accuracy(run: Run) -> float | None:
    if run.summary is not None:
        return run.summary.number("accuracy")
    return run.epochs[-1].accuracy if run.epochs else None


def _mean_of(runs: list[Run], key: str) -> float | None:
    values = [value for run in runs if run.summary is not None and (value := run.summary.number(key)) is not None]
    return fmean(values) if values else None
