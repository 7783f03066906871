"""Who computes when: one step of a method as its dependencies allow it, with one device per worker."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..timeline import Act, Timeline
from .drawing import INK, Look, Sheet, heading
from .words import bytes_text

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

LANES = 32  # more workers than these are not drawn
WIDTH, LEFT, RIGHT, LANE = 1000, 62, 14, 19

# kind: (colour, colour of its letter, words)
LOOKS = {
    "F": ("#9CC9E8", "#12344D", "forward of a stage"),
    "B": ("#1F5A96", "#FFFFFF", "backward of a stage"),
    "L": ("#F2A541", "#3B2500", "a head: its forward and backward"),
    "U": ("#5F6B7A", "#FFFFFF", "update of the weights"),
    "S": ("#444444", "", "a message is sent"),
    "R": ("#444444", "", "a message is taken"),
    "M": ("#B5179E", "#FFFFFF", "exchange among the replicas"),
}


@dataclass(frozen=True)
class Step:
    """One step of a method, re-timed. `milliseconds`: its length; `idle`: share of worker time in which nothing is done."""

    name: str
    acts: Timeline
    milliseconds: float
    idle: float
    lost: int  # acts that could not be placed, as the message they wait for was not recorded


def step_of(name: str, timeline: Timeline) -> Step:
    """Re-time a recorded step for one device per worker and free links."""
    parallel = timeline.parallel()
    idle = min(1.0, max(0.0, parallel.idle_share()))
    return Step(name, parallel, 1e3 * parallel.span(), idle, len(timeline) - len(parallel))


def gantt(sheet: Sheet, steps: list[Step], looks: dict[str, Look]) -> str:
    """The steps below each other on one common time axis."""
    limit = max(step.milliseconds for step in steps) or 1.0
    blocks = "".join(
        heading(step.name, looks[step.name], _aside(step)) + _lanes(sheet, step, limit, step is steps[-1])
        for step in steps
    )
    return f'{_legend()}<div class="scroll"><div class="gantt">{blocks}</div></div>'


def _aside(step: Step) -> str:
    workers = len(step.acts.workers())
    text = f"{step.milliseconds:.3g} ms, idle {100 * step.idle:.0f} % of {workers} worker{'s' * (workers != 1)}"
    if workers > LANES:
        text += f"; the first {LANES} are drawn"
    if step.lost:
        text += f"; {step.lost} acts could not be placed, as messages they wait for are not in step.json"
    return text


def _legend() -> str:
    items = []
    for kind, (colour, ink, words) in LOOKS.items():
        shape = f'<span class="swatch" style="background:{colour};color:{ink}">{kind}</span>'
        if kind in "SR":
            shape = f'<span class="swatch mark">{"▲" if kind == "S" else "▼"}</span><b>{kind}</b>'
        items.append(f"<li>{shape} {words}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _lanes(sheet: Sheet, step: Step, limit: float, last: bool) -> str:
    workers = step.acts.workers()[:LANES]
    lane = {worker: float(k) for k, worker in enumerate(workers)}
    axes = sheet.axes(WIDTH, LANE * len(workers) + (42 if last else 24), (LEFT, 36 if last else 18, RIGHT, 6))
    axes.set_xlim(0, 1.01 * limit)
    axes.set_ylim(len(workers) - 0.4, -0.6)
    axes.set_yticks(range(len(workers)), [f"{replica}·{stage}" for replica, stage in workers])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("ms since the step began" if last else "")
    axes.set_ylabel("replica·stage")
    for worker, y in lane.items():
        axes.axhspan(y - 0.4, y + 0.4, color="#F4F6F9" if worker[0] % 2 == 0 else "#ECEFF4", zorder=0)
    for act in step.acts:
        if (act.replica, act.stage) in lane:
            _draw(sheet, axes, act, lane[(act.replica, act.stage)], limit)
    _messages(axes, step.acts, lane)
    return sheet.svg(axes, f"One step of {step.name}: {_aside(step)}")


def _draw(sheet: Sheet, axes: Axes, act: Act, y: float, limit: float) -> None:
    from matplotlib.patches import Rectangle

    colour, ink, words = LOOKS[act.kind]
    artist: Artist
    start, width = 1e3 * act.start, 1e3 * (act.end - act.start)
    if act.kind in "SR":
        marker, shift = ("^", -0.22) if act.kind == "S" else ("v", 0.22)
        (artist,) = axes.plot([start], [y + shift], marker, color=colour, markersize=3.2, zorder=5)
    elif act.kind == "M":
        (artist,) = axes.plot([start], [y], "D", color=colour, markersize=4.5, zorder=6)
    else:
        artist = Rectangle((start, y - 0.4), width, 0.8, facecolor=colour, edgecolor="white", linewidth=0.5, zorder=3)
        axes.add_patch(artist)
        if width / limit * (WIDTH - LEFT - RIGHT) > 11:
            middle = start + width / 2
            axes.text(middle, y, act.kind, color=ink, ha="center", va="center", fontsize=9, zorder=4)
    sheet.hover(artist, _hover(act, words, start, width))


def _hover(act: Act, words: str, start: float, width: float) -> str:
    text = f"{act.kind}: {words}; replica {act.replica}, stage {act.stage}, micro-batch {act.micro_batch}, "
    text += f"version {act.version}; at {start:.2f} ms"
    text += f", {width:.2f} ms" if width else ""
    text += f", {bytes_text(act.bytes)} on {act.channel}" if act.channel else ""
    return text


def _messages(axes: Axes, acts: Timeline, lane: dict[tuple[int, int], float]) -> None:
    """A line from each sending to its taking, and one along every meeting of replicas."""
    sent: dict[tuple, list[float]] = {}
    meetings: dict[tuple, list[tuple[float, float]]] = {}
    turns: Counter[tuple] = Counter()
    lines = []
    for act in sorted(acts, key=lambda act: act.kind != "S"):
        here = (act.replica, act.stage)
        if act.kind == "S":
            sent.setdefault((here, act.peer, act.channel), []).append(1e3 * act.end)
        elif act.kind == "R" and act.peer in lane and here in lane:
            begin = sent[(act.peer, here, act.channel)].pop(0)
            lines.append([(begin, lane[act.peer] - 0.22), (1e3 * act.end, lane[here] + 0.22)])
        elif act.kind == "M" and here in lane:
            turns[(here, act.channel)] += 1
            meeting = (act.stage, act.channel, turns[(here, act.channel)])
            meetings.setdefault(meeting, []).append((1e3 * act.end, lane[here]))
    for line in lines:
        axes.plot(*zip(*line), color=INK, linewidth=0.6, alpha=0.55, zorder=4.5)
    for points in meetings.values():
        axes.plot(*zip(*points), color=LOOKS["M"][0], linewidth=0.8, alpha=0.7, zorder=4.5)
