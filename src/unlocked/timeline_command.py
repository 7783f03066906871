"""`unlocked timeline`: what a method does when, on a cluster that need not exist, as a table and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import commands
from .credit import Backprop, Credit
from .drawing import Colours, Lane, common_tick, lane_curves, lanes, text_table
from .live import in_bytes, in_percent
from .report.words import several
from .simulation.memory import Curve, activation_curves
from .simulation.simulating import seconds_per_update, simulate
from .timeline import Timeline
from .timeline_case import Case, case_of

LANES = 32  # more are not printed
TICKS = 120  # more are not printed
STEADY = 8  # updates over which a rate is taken
LEGEND = "2F1@3: stage 2, forward, micro-batch 1, weights after 3 updates; - goes on, . idle, | update."


@dataclass(frozen=True)
class Result:
    """What happened; `curves`: bytes of activations and messages, by lane."""

    timeline: Timeline
    rows: list[Lane]
    curves: list[Curve]

    @property
    def peaks(self) -> list[int]:
        """The most bytes each lane holds."""
        return [max((level for _, level in curve), default=0) for curve in self.curves]


def timeline(command: commands.Timeline, console: Console) -> int:
    """Simulate, print and draw as the command says; returns the exit code. Raises InvalidChoice, DoesNotFit, UnlockedError."""
    case = case_of(command)
    result = _simulated(case, command)
    tick = _tick(result.timeline) if command.tick is None else command.tick
    table = None
    if len(result.rows) <= LANES:
        width = None if command.json else console.width
        table = text_table(result.timeline, tick, devices=case.devices, width=width)
    facts = _facts(case, result, command, tick)
    if command.to is not None:
        _draw(command.to, case, result, facts, command.colours)
    if command.json:
        print(json.dumps({"event": "result", **facts, "table": table, "to": command.to and str(command.to)}))
        return 0
    _show(console, case, result, facts, table)
    if command.to is not None:
        console.print(f"Picture: {command.to}", soft_wrap=True, highlight=False, markup=False)
    return 0


# ---- what happens ----------------------------------------------------------------------------------------------------


def _simulated(case: Case, command: commands.Timeline) -> Result:
    found = _run(case, command, case.credit, command.steps)
    rows = lanes(found, case.devices)
    each = -(-case.samples // case.credit.parts)
    curves = activation_curves(found, case.costs, each, case.credit, between_replicas=False)
    return Result(found, rows, lane_curves(rows, curves))


def _run(case: Case, command: commands.Timeline, credit: Credit, steps: int) -> Timeline:
    return simulate(
        credit,
        case.consensus,
        costs=case.costs,
        replicas=command.replicas,
        steps=steps,
        samples=case.samples,
        accumulate=command.accumulate,
        hardware=case.hardware,
        chain=case.chain,
    )


def _full(case: Case, command: commands.Timeline) -> dict[str, float] | None:
    """Seconds per update of a delayed rule whose pipeline is full, and of backprop over the same stages; else None."""
    filling = case.credit.filling(command.stages, command.accumulate)
    if not filling:
        return None
    rates = []
    for credit, steps in ((case.credit, filling + 2 * STEADY), (Backprop(), 2 * STEADY)):
        rates.append(max(seconds_per_update(_run(case, command, credit, steps), STEADY, command.accumulate).values()))
    return {"seconds_per_step": rates[0], "backprop": rates[1]}


def _tick(timeline: Timeline) -> float:
    """The acts' own tick, if the table can have as many; else a round one."""
    own, span = common_tick(timeline), timeline.span()
    if own is not None and span <= TICKS * own:
        return own
    least = 2 * span / TICKS
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least)


def _facts(case: Case, result: Result, command: commands.Timeline, tick: float) -> dict[str, Any]:
    """All there is to say in numbers."""
    found = result.timeline
    counts = found.staleness_counts()
    return {
        "method": str(case.method),
        "stages": command.stages,
        "replicas": command.replicas,
        "steps": command.steps,
        "assumptions": case.assumptions,
        "tick": tick,
        "seconds": found.span(),
        "seconds_per_step": found.span() / command.steps,
        "full": _full(case, command),
        "bubble": sum(row.idle for row in result.rows) / len(result.rows),
        "staleness": {str(delay): count for delay, count in counts.items()},
        "bytes_per_step": {channel: size / command.steps for channel, size in found.bytes_sent().items()},
        "lanes": [
            {"name": row.name, "idle": row.idle, "peak_bytes": peak} for row, peak in zip(result.rows, result.peaks)
        ],
        "notes": _notes(case, result, command),
    }


def _notes(case: Case, result: Result, command: commands.Timeline) -> list[str]:
    notes = []
    phases = case.credit.phases(command.stages)
    if phases > 1:
        notes.append(f"{case.method.credit} trains in {phases} phases; this is the first of them.")
    silent = not any(act.kind == "M" or (act.peer and act.peer[1] == act.stage) for act in result.timeline)
    if command.replicas > 1 and case.made_up and silent and case.method.consensus.name != "independent":
        notes.append(
            f"{case.method.consensus} exchanged nothing, as it chooses among a network's own layers; give --model to see it."
        )
    if len(result.rows) > LANES:
        notes.append(f"{len(result.rows)} lanes are not printed as a table, at most {LANES} are.")
    return notes


# ---- how it is shown -------------------------------------------------------------------------------------------------


def _draw(to: Path, case: Case, result: Result, facts: dict[str, Any], colours: Colours) -> None:
    from .drawing.picture import draw  # brings matplotlib with it

    if case.made_up:
        time_unit, memory_unit = (1.0, "made-up units"), (float(_sample_bytes(case)), "activations held")
    else:
        time_unit = _time_unit(result.timeline.span())
        memory_unit = _memory_unit(result)
    draw(
        to,
        result.timeline,
        title=_title(case, facts),
        subtitle=case.assumptions,
        devices=case.devices,
        memory=result.curves,
        time_unit=time_unit,
        memory_unit=memory_unit,
        colours=colours,
    )


def _sample_bytes(case: Case) -> int:
    """Bytes of one made-up activation: of a stage and a micro-batch."""
    return round(case.costs[0].profile.kept.at(-(-case.samples // case.credit.parts)))


def _time_unit(span: float) -> tuple[float, str]:
    return next((unit for unit in ((1.0, "s"), (1e-3, "ms")) if span >= unit[0]), (1e-6, "µs"))


def _memory_unit(result: Result) -> tuple[float, str]:
    from .report.words import bytes_unit

    scale, name = bytes_unit(sum(result.peaks))
    return scale, f"{name} held"


def _show(console: Console, case: Case, result: Result, facts: dict[str, Any], table: str | None) -> None:
    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    time = _plain if case.made_up else _seconds
    say(_title(case, facts), "bold")
    say(case.assumptions, "dim")
    if table is not None:
        say(f"\n{table}\n")
        exact = common_tick(result.timeline) == facts["tick"]
        filling = "" if exact else " A cell shows what fills most of its tick."
        say(f"A tick is {time(facts['tick'])}.{filling} {LEGEND}", "dim")
    console.print(_lanes_table(result, _sample_bytes(case) if case.made_up else 0))
    for line in [*_lines(facts, time), *facts["notes"]]:
        say(line)


def _title(case: Case, facts: dict[str, Any]) -> str:
    return f"{case.method.credit} / {case.method.consensus}, J = {facts['stages']}, N = {facts['replicas']}"


def _plain(seconds: float) -> str:
    return f"{seconds:g}"


def _lanes_table(result: Result, each: int) -> Table:
    held = "activations held at most" if each else "held at most"
    shown = Table("", "idle", held)
    for row, peak in list(zip(result.rows, result.peaks))[:LANES]:
        shown.add_row(row.name, in_percent(row.idle), f"{peak / each:g}" if each else in_bytes(peak))
    if len(result.rows) > LANES:
        shown.add_row(f"… {len(result.rows) - LANES} more", "", "")
    return shown


def _lines(facts: dict[str, Any], time: Callable[[float], str]) -> Sequence[str]:
    delays = ", ".join(f"{delay}: {count}" for delay, count in facts["staleness"].items()) or "no updates"
    sent = ", ".join(f"{channel} {in_bytes(size)}" for channel, size in facts["bytes_per_step"].items()) or "nothing"
    full = facts["full"]
    once_full = (
        [
            f"Once the pipeline is full: {time(full['seconds_per_step'])} per step, backprop over the same stages "
            f"{time(full['backprop'])}: {full['backprop'] / full['seconds_per_step']:.3g} times as fast."
        ]
        if full and full["seconds_per_step"]
        else []
    )
    return [
        f"{several(facts['steps'], 'step')} in {time(facts['seconds'])}, {time(facts['seconds_per_step'])} per step.",
        *once_full,
        f"Bubble (mean idle share): {100 * facts['bubble']:.1f} %.",
        f"Staleness, measured (updates: gradients): {delays}.",
        f"Sent per step: {sent}.",
    ]


def _seconds(seconds: float) -> str:
    scale, name = _time_unit(seconds)
    return f"{seconds / scale:.4g} {name}"
