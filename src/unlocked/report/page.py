"""The page: its sections, in one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TypeVar

from ..errors import UnlockedError
from ..simulation.options import in_words
from ..timeline import Timeline
from . import alignment, curves, gantt, measured, memory, notes, representation, settings, table, traffic
from .curves import Axis, Curve, apart, chart
from .drawing import RC, Look, Sheet, looks
from .footprint import Footprint
from .recording import Recording
from .study import Method, Run, Study, read_study
from .words import listed, probed_words, summary, title

T = TypeVar("T")

Section = tuple[str, str, str]  # anchor, heading, body

MESSAGES = {
    "bytes_up": "Up: activations",
    "bytes_down": "Down: gradients",
    "bytes_replicas": "Between replicas",
}


def write_report(folder: str | Path) -> Path:
    """Write `folder`/report.html from the files of a run or of a comparison; returns its path.

    The file is self-contained: figures are inline SVG, nothing is loaded. What the folder lacks is said in words.
    Raises BadData (neither a run nor a comparison, or damaged files), UnlockedError (the file cannot be written).
    """
    study = read_study(Path(folder))
    path = Path(folder) / "report.html"
    try:
        path.write_text(_page(study), encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise UnlockedError(f"The report cannot be written to {path} ({error}); make the folder writable.") from error
    return path


def _page(study: Study) -> str:
    import matplotlib

    with matplotlib.rc_context(RC):
        sections = _sections(study)
    links = "".join(f'<a href="#{anchor}">{html.escape(heading)}</a>' for anchor, heading, _ in sections)
    body = "".join(
        f'<section id="{anchor}"><h2>{html.escape(heading)}</h2>{content}</section>'
        for anchor, heading, content in sections
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in study.notes)
    head = html.escape(title(study))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{head}</title><style>{_asset('report.css')}</style></head><body><main>"
        f'<header><h1>{head}</h1><p class="summary">{html.escape(summary(study))}</p>'
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + f"<nav>{links}</nav></header>{body}</main><script>{_asset('report.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _sections(study: Study) -> list[Section]:
    sheet, all_looks = Sheet(), looks([method.name for method in study.methods])
    sections = [
        ("results", "Results", table.table(study, all_looks)),
        ("accuracy", "Accuracy", _accuracy(sheet, study, all_looks)),
        ("depth", "Losses and accuracy with depth", _depth(sheet, study, all_looks)),
        ("watched", "What was watched", notes.notes(sheet, study.methods, all_looks, study.comparison)),
        (
            "representation",
            "What each stage has made of the data",
            representation.representation(sheet, study.methods, all_looks),
        ),
        ("alignment", "Gradients beside backpropagation's", alignment.alignment(sheet, study.methods, all_looks)),
        ("step", _steps_heading(study), _steps(sheet, study, all_looks)),
        ("memory", "Memory", _memory(sheet, study.methods, all_looks) + _live(sheet, study, all_looks)),
        ("bytes", "Bytes between workers", _traffic(sheet, study.methods, all_looks) + _channels(study.methods)),
        ("settings", "Settings and how to repeat this", settings.settings(study)),
    ]
    return [section for section in sections if section[2]]


def caption(text: str) -> str:
    """How to read a figure."""
    return f'<p class="caption">{html.escape(text)}</p>'


def _absent(methods: Sequence[Method], shown: Sequence[str], what: str) -> str:
    """Say which methods a figure leaves out."""
    names = [method.name for method in methods if method.name not in shown]
    if not names:
        return ""
    return f'<p class="missing">{html.escape(f"Not shown, as {what}: {listed(names)}.")}</p>'


def _charts(sheet: Sheet, all_looks: dict[str, Look], items: Sequence[tuple[str, list[Curve], Axis]]) -> str:
    drawn = "".join(chart(sheet, found, all_looks, axis, heading) for heading, found, axis in items if found)
    return f'<div class="panels">{drawn}</div>'


def _accuracy(sheet: Sheet, study: Study, all_looks: dict[str, Look]) -> str:
    methods = study.methods
    by_epoch, by_seconds = curves.accuracy(methods, False), curves.accuracy(methods, True)
    names = [curve.name for curve in by_epoch]
    if not by_epoch:
        losses = curves.validation_loss(methods)
        if not losses:
            return '<p class="missing">There was no validation, so there is no accuracy to show.</p>'
        axis = Axis("passes over the data", "held-out loss", whole=True)
        text = "Held-out loss after each pass; there are no labels of classes, so there is no accuracy."
        return _charts(sheet, all_looks, [("Loss after each pass over the data", losses, axis)]) + caption(text)
    where = "this machine, all workers in one process"
    if _simulated(study):
        where = "the simulated cluster"
    elif _recordings(methods):
        where = "this machine, the workers in processes of their own"
    text = (
        "Share of held-out samples classified correctly, of the replicas' averaged network if there are several. The "
        f"first chart shows what a pass over the data buys, the second what a second of training buys on {where}, "
        "validation not counted."
    )
    if any(any(curve.spread) for curve in by_epoch):
        text += " Lines are means over the seeds, bands ± one standard deviation."
    text += probed_words(methods)
    if any(name.startswith("greedy") for name in names):
        text += " Greedy learning trains one stage after the other, so it makes more passes."
    seconds = "simulated seconds of training" if _simulated(study) else "seconds of training"
    items = [
        ("Accuracy over passes", by_epoch, Axis("passes over the data", "accuracy, %", whole=True)),
        (f"Accuracy over {seconds}", by_seconds, Axis(seconds, "accuracy, %")),
    ]
    missing = _absent(methods, names, "no accuracy was recorded")
    return _charts(sheet, all_looks, items) + caption(text) + missing


def _depth(sheet: Sheet, study: Study, all_looks: dict[str, Look]) -> str:
    losses, scores = curves.losses_by_depth(study.methods), curves.accuracy_by_depth(study.methods)
    if not losses and not scores:
        return '<p class="missing">No losses were recorded.</p>'
    items = [
        ("Training loss at each head", losses, Axis("stage", "training loss", log=apart(losses), whole=True)),
        ("Held-out accuracy at each head", scores, Axis("stage", "accuracy, %", whole=True)),
    ]
    text = (
        "What each stage's own head had reached at the end, from the first stage (0) to the last. A falling loss means "
        "that depth helps. A method without heads has one point only, its last stage; losses of different kinds of "
        "heads (predsim mixes two) compare within a method, not between methods."
    )
    text += probed_words(study.methods)
    courses = _courses(sheet, study)
    return _charts(sheet, all_looks, items) + caption(text) + courses


def _courses(sheet: Sheet, study: Study) -> str:
    """The losses of every stage over the passes; folded away in a comparison, where it is the first run of each."""
    runs = [(method.name, method.runs[0]) for method in study.methods if method.runs and method.runs[0].epochs]
    charts = "".join(_course(sheet, name if study.comparison else "", run) for name, run in runs)
    if not charts:
        return ""
    text = "Mean training loss of every stage that has one, pass by pass; darker lines are deeper stages."
    if not study.comparison:
        return f'<div class="panels">{charts}</div>{caption(text)}'
    body = f'<div class="panels small">{charts}</div>{caption(text)}'
    return f"<details><summary>Losses of every stage over the passes (first seed)</summary>{body}</details>"


def _course(sheet: Sheet, name: str, run: Run) -> str:
    found = curves.losses_by_epoch(run)
    if not found:
        return ""
    axis = Axis("passes over the data", "training loss", apart(found), True)
    return curves.stages_chart(sheet, found, axis, name or "Training loss of every stage", small=bool(name))


def _recordings(methods: list[Method]) -> list[tuple[str, Recording]]:
    """For each method that ran on real processes, or on a simulated cluster, the first of its recordings."""
    return _first(methods, lambda run: run.recording if run.recording and run.recording.measured else None)


def _steps_heading(study: Study) -> str:
    found = _recordings(study.methods)
    if not found:
        return "One step, worker by worker"
    names = {name for name, _ in found}
    rest = any(name not in names for name, _ in _first(study.methods, lambda run: run.timeline))
    return "Steps, worker by worker" if rest else "Steps as measured, worker by worker"


def _steps(sheet: Sheet, study: Study, all_looks: dict[str, Look]) -> str:
    recorded = _recordings(study.methods)
    names = {name for name, _ in recorded}
    found = [pair for pair in _first(study.methods, lambda run: run.timeline) if pair[0] not in names]
    if not found and not recorded:
        return '<p class="missing">No step was recorded (no step.json), so there is no timeline to show.</p>'
    drawn = _measured(sheet, recorded, study, all_looks) if recorded else ""
    drawn += _retimed(sheet, found, all_looks, apart=bool(recorded)) if found else ""
    shown = [name for name, _ in [*recorded, *found]]
    return drawn + _absent(study.methods, shown, "no step was recorded")


def _measured(sheet: Sheet, found: list[tuple[str, Recording]], study: Study, all_looks: dict[str, Look]) -> str:
    recordings = [recording for _, recording in found]
    machine = _machine(study)
    steps = [gantt.measured_of(name, recording) for name, recording in found]
    simulated = all(recording.simulated for recording in recordings)
    heading = html.escape(_cluster(study) if simulated else f"Measured on {measured.where(recordings, machine)}")
    text = (
        "Some steps from the middle of those recorded, one lane for each worker, as they were timed on one clock. Light "
        "boxes are waiting. Thin lines join a message's sending to its taking."
    )
    text += "" if simulated else measured.shared_cores(recordings, machine)
    shares = (
        "Shares of the time drawn above. Idle is all but computing and updating: waiting, sending, and what no act tells "
        "of, such as loading data."
    )
    return (
        f"<h3>{heading}</h3>{gantt.gantt(sheet, steps, all_looks)}{caption(text)}"
        f"<h3>What each worker did with its time</h3>{measured.workers(found)}{caption(shares)}"
    )


def _simulated(study: Study) -> bool:
    """Whether seconds are those of a simulated cluster."""
    return any(recording.simulated for _, recording in _recordings(study.methods))


def _cluster(study: Study) -> str:
    """The simulated cluster in words."""
    runs = [run.config for method in study.methods for run in method.runs]
    known = [config["cluster"] for config in [*runs, study.config] if isinstance(config.get("cluster"), dict)]
    words = in_words(known[0] if known else {})
    return words[0].upper() + words[1:]


def _machine(study: Study) -> object:
    """What the measured runs were made on, as the first of them says, else the study."""
    runs = [run for method in study.methods for run in method.runs if run.recording and run.recording.measured]
    known = [run.config["machine"] for run in runs if run.config.get("machine")]
    return known[0] if known else study.config.get("machine")


def _retimed(sheet: Sheet, found: list[tuple[str, Timeline]], all_looks: dict[str, Look], apart: bool) -> str:
    steps = [gantt.step_of(name, timeline) for name, timeline in found]
    text = (
        "The last step, one lane for each worker: what the method's dependencies allow with one device per worker and "
        "free links. Durations are medians of up to 21 steps in one process; the order is exact. Gaps are waiting: a long "
        "staircase down and back up is backpropagation's lock, lanes that go on at once have none. Thin lines join a "
        "message's sending to its taking."
    )
    heading = "<h3>Not measured: one step as its dependencies allow it</h3>" if apart else ""
    return heading + gantt.gantt(sheet, steps, all_looks) + caption(text)


def _memory(sheet: Sheet, methods: list[Method], all_looks: dict[str, Look]) -> str:
    found = _first(methods, lambda run: run.curve or None)
    if not found:
        return '<p class="missing">No activation memory was recorded (no step.json).</p>'
    workers = "all workers in one process one after the other"
    if recorded := [pair for pair in _recordings(methods) if not pair[1].simulated]:
        workers = "of the workers of rank 0" + (
            f" ({workers} where it was not measured)" if len(recorded) < len(found) else ""
        )
    text = (
        "Bytes of tensors kept for the backward passes during the first step, after each tensor saved or freed, "
        f"{workers}; parameters are not counted. The dot marks the peak, which is the memory the step needs; the axes are "
        "the same in height, not in length."
    )
    drawn = f"<h3>Kept for backward</h3>{memory.memory(sheet, found, all_looks)}"
    return drawn + caption(text) + _absent(methods, [name for name, _ in found], "no memory curve was recorded")


def _live(sheet: Sheet, study: Study, all_looks: dict[str, Look]) -> str:
    methods = study.methods
    found = _first(methods, lambda run: run.footprint)
    if not found:
        return '<p class="missing">Live memory was not recorded (no memory.json).</p>'
    tables = (
        f"<h3>Memory stage by stage, predicted and measured</h3>{memory.stages(found)}{caption(_compared_words(found))}"
    )
    if study.comparison:
        tables = f"<details><summary>Stage by stage (first seed)</summary>{tables}</details>"
    drawn = [(name, footprint) for name, footprint in found if len(footprint.curve) > 1]
    curves = memory.live(sheet, drawn, all_looks) if drawn else ""
    missing = _absent(methods, [name for name, _ in found], "no memory was recorded")
    return f"<h3>All live memory</h3>{curves}{caption(_live_words(found))}{memory.peaks(found)}{tables}{missing}"


def _live_words(found: list[tuple[str, Footprint]]) -> str:
    steps = sorted({footprint.steps[0] for _, footprint in found if footprint.steps})
    several = any(footprint.processes > 1 for _, footprint in found)
    text = (
        f"Bytes of all tensors alive during update {listed([str(step) for step in steps])}"
        f"{', of the process that had most' if several else ''}: those that were there before it, and every one that an "
        "operation made, until it was freed. What kernels take for themselves while they run is not seen."
    )
    if any(footprint.allocator for _, footprint in found):
        text += " On an accelerator it is what the allocator handed out; only its peak is known, not its course."
    if any(len(footprint.steps) > 1 for _, footprint in found):
        text += " Of a method that trains stage after stage it is the phase that took most."
    return text


def _compared_words(found: list[tuple[str, Footprint]]) -> str:
    text = (
        "Predicted is from the network's shapes alone, given which forwards and backwards the method does in which order; "
        "measured is the most over the replicas (and phases). Kept for backward is counted without parameters and buffers. "
        "Optimizers keep a few numbers more than predicted (counts of steps)."
    )
    if any(not stage.predicted["saved"] for _, footprint in found for stage in footprint.stages):
        text += " – where nothing was predicted."
    return text


def _traffic(sheet: Sheet, methods: list[Method], all_looks: dict[str, Look]) -> str:
    drawn, gone = [], []
    for key, heading in MESSAGES.items():
        if any(method.numbers[key] is not None for method in methods):
            drawn.append(traffic.traffic(sheet, methods, key, heading, all_looks))
        else:
            gone.append(heading.lower())
    if not drawn:
        return '<p class="missing">No bytes were recorded (no summary of any run).</p>'
    text = (
        "Mean bytes sent per update and replica. Up: what stages pass to the next one. Down: what comes back to the "
        "stage below. Between replicas: means of gradients, or shuffled weights. 0 means that nothing is ever sent."
    )
    shown = [method.name for method in methods if any(method.numbers[key] is not None for key in MESSAGES)]
    missing = f'<p class="missing">Not recorded: {html.escape(listed(gone))}.</p>' if gone else ""
    return f'<div class="panels three">{"".join(drawn)}</div>{caption(text)}{missing}' + _absent(
        methods, shown, "no bytes were recorded"
    )


def _channels(methods: list[Method]) -> str:
    """What went over each channel, for the methods that ran on real processes."""
    found = _recordings(methods)
    if not found:
        return ""
    text = (
        "Of the recorded steps, per update and replica, all workers together. Payload is the tensors; wire is what left a "
        "process for them, headers included, and 0 where sender and taker share a process."
    )
    return f"<h3>Channel by channel</h3>{measured.channels(found)}{caption(text)}"


def _first(methods: list[Method], what: Callable[[Run], T | None]) -> list[tuple[str, T]]:
    """For each method the first of its runs that has it."""
    found = []
    for method in methods:
        values = [value for run in method.runs if (value := what(run)) is not None]
        found += [(method.name, values[0])] if values else []
    return found
