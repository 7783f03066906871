"""Who computes when: a step as its dependencies allow it with one device per worker, or some steps as they were timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from ..simulation.retiming import retimed
from ..timeline import Act, Timeline
from .drawing import INK, Look, Sheet, heading
from .recording import Recording
from .words import bytes_text, several

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

LANES = 32  # more workers than these are not drawn
ACTS = 2000  # a window with more of them is made shorter
STEPS = 3  # in a window
WIDTH, LEFT, RIGHT = 1000, 62, 14
LANE, MEASURED_LANE = 19, 26  # heights; measured lanes have more in them

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
# kind: (inside, edge, words) of the time it takes, where it was measured
WAITS = {
    "R": ("#FFFFFF", "#B4BDCA", "waiting for a message"),
    "M": ("#FBEAF8", "#D79BCE", "exchange among the replicas, waiting included"),
    "S": ("#B4BDCA", "#8A93A3", "handing a message over"),
}


@dataclass(frozen=True)
class Step:
    """What one method's lanes show; times are seconds since their left end.

    `milliseconds`: from end to end; `idle`: mean share of it in which a worker does nothing, waiting included.
    """

    name: str
    acts: Timeline
    milliseconds: float
    idle: float
    workers: list[tuple[int, int]]
    messages: list[tuple[Act, Act]]
    meetings: list[list[Act]]
    aside: str  # what else there is to say
    measured: bool = False


def step_of(name: str, timeline: Timeline) -> Step:
    """Re-time a recorded step for one device per worker and free links."""
    parallel = retimed(timeline)
    idle = parallel.idle_share()
    lost = len(timeline) - len(parallel)  # what waits for a message that was not recorded
    aside = f"{lost} acts could not be placed, as messages they wait for are not in step.json" if lost else ""
    joins = (parallel.messages(), parallel.meetings())
    return Step(name, parallel, 1e3 * parallel.span(), idle, parallel.workers(), *joins, aside)


def measured_of(name: str, recording: Recording) -> Step:
    """The window of a recording that is drawn, as it was timed."""
    begin, end, count = window(recording)
    inside = recording.acts.between(begin, end)
    idle = fmean(recording.acts.idle_shares(begin, end).values())
    messages = [pair for pair in recording.acts.messages() if pair[0].start >= begin and pair[1].end <= end]
    meetings = [acts for acts in recording.acts.meetings() if all(begin <= act.end <= end for act in acts)]
    steps = f"about {several(count, 'step')} of {recording.updates}"
    return Step(
        name,
        Timeline(_moved(act, begin) for act in inside),
        1e3 * (end - begin),
        idle,
        sorted(recording.ranks),
        [(_moved(sent, begin), _moved(taken, begin)) for sent, taken in messages],
        [[_moved(act, begin) for act in acts] for acts in meetings],
        f"{steps}, {several(recording.processes, 'process')}",
        measured=True,
    )


def window(recording: Recording) -> tuple[float, float, int]:
    """Begin and end of some steps in the middle of a recording, in seconds of its clock, and how many steps they are.

    The first steps of a recording fill the pipeline and the last ones drain it, so the middle shows what is usual.
    """
    acts = recording.acts
    marks = [*acts.step_starts(), max(act.end for act in acts)]
    for count in range(min(STEPS, len(marks) - 1), 0, -1):
        first = (len(marks) - 1 - count) // 2
        begin, end = marks[first], marks[first + count]
        if count == 1 or len(acts.between(begin, end)) <= ACTS:
            return begin, end, count
    return min(act.start for act in acts), marks[-1], recording.updates


def _moved(act: Act, origin: float) -> Act:
    return act._replace(start=act.start - origin, end=act.end - origin)


def gantt(sheet: Sheet, steps: list[Step], looks: dict[str, Look]) -> str:
    """The lanes of all methods below each other on one common time axis."""
    limit = max(step.milliseconds for step in steps) or 1.0
    blocks = "".join(
        heading(step.name, looks[step.name], _aside(step)) + _lanes(sheet, step, limit, step is steps[-1])
        for step in steps
    )
    return f'{_legend(steps[0].measured)}<div class="scroll"><div class="gantt">{blocks}</div></div>'


def _aside(step: Step) -> str:
    workers = len(step.workers)
    text = f"{step.milliseconds:.3g} ms, idle {100 * step.idle:.0f} % of {several(workers, 'worker')}"
    if workers > LANES:
        text += f"; the first {LANES} are drawn"
    return text + (f"; {step.aside}" if step.aside else "")


def _legend(measured: bool) -> str:
    items = []
    for kind, (colour, ink, words) in LOOKS.items():
        shape = f'<span class="swatch" style="background:{colour};color:{ink}">{kind}</span>'
        if kind in "SR":
            shape = f'<span class="swatch mark">{"▲" if kind == "S" else "▼"}</span><b>{kind}</b>'
        if not (measured and kind == "M"):
            items.append(f"<li>{shape} {words}</li>")
    for colour, edge, words in WAITS.values() if measured else ():
        shape = f'<span class="swatch" style="background:{colour};border:1px solid {edge}">&nbsp;</span>'
        items.append(f"<li>{shape} {words}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _lanes(sheet: Sheet, step: Step, limit: float, last: bool) -> str:
    workers = step.workers[:LANES]
    lane = {worker: float(k) for k, worker in enumerate(workers)}
    height = MEASURED_LANE if step.measured else LANE
    axes = sheet.axes(WIDTH, height * len(workers) + (42 if last else 24), (LEFT, 36 if last else 18, RIGHT, 6))
    axes.set_xlim(0, 1.01 * limit)
    axes.set_ylim(len(workers) - 0.4, -0.6)
    axes.set_yticks(range(len(workers)), [f"{replica}·{stage}" for replica, stage in workers])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(("ms" if step.measured else "ms since the step began") if last else "")
    axes.set_ylabel("replica·stage")
    for worker, y in lane.items():
        axes.axhspan(y - 0.4, y + 0.4, color="#F4F6F9" if worker[0] % 2 == 0 else "#ECEFF4", zorder=0)
    for act in step.acts:
        if (act.replica, act.stage) in lane:
            _draw(sheet, axes, act, lane[(act.replica, act.stage)], limit, step)
    _joins(axes, step, lane)
    what = "Measured steps" if step.measured else "One step"
    return sheet.svg(axes, f"{what} of {step.name}: {_aside(step)}")


def _draw(sheet: Sheet, axes: Axes, act: Act, y: float, limit: float, step: Step) -> None:
    colour, ink, words = LOOKS[act.kind]
    artist: Artist
    start, width = 1e3 * act.start, 1e3 * (act.end - act.start)
    if act.kind in WAITS and step.measured and width > 0:
        artist = _wait(axes, act.kind, start, width, y, step.milliseconds)
    elif act.kind in "SR":
        artist = _mark(axes, act.kind, start + width, y)
    elif act.kind == "M":
        (artist,) = axes.plot([start + width], [y], "D", color=colour, markersize=4.5, zorder=6)
    else:
        artist = box(axes, start, width, y, 0.4, (colour, "white"))
        if width / limit * (WIDTH - LEFT - RIGHT) > 11:
            middle = start + width / 2
            axes.text(middle, y, act.kind, color=ink, ha="center", va="center", fontsize=9, zorder=4)
    sheet.hover(artist, _hover(act, words, start, width))


def box(
    axes: Axes, start: float, width: float, y: float, half: float, colours: tuple[str, str], zorder: float = 3
) -> Artist:
    """A box in a lane; `half` of its height, colours of its (inside, edge)."""
    from matplotlib.patches import Rectangle

    inside, edge = colours
    patch = Rectangle(
        (start, y - half), width, 2 * half, facecolor=inside, edgecolor=edge, linewidth=0.5, zorder=zorder
    )
    return axes.add_patch(patch)


def _mark(axes: Axes, kind: str, when: float, y: float) -> Artist:
    marker, shift = ("^", -0.22) if kind == "S" else ("v", 0.22)
    (artist,) = axes.plot([when], [y + shift], marker, color=LOOKS[kind][0], markersize=3.2, zorder=5)
    return artist


def _wait(axes: Axes, kind: str, start: float, width: float, y: float, limit: float) -> Artist:
    """A light box as long as it took; the mark is where the message left, or where it was there, unless cut off."""
    waited = box(axes, start, width, y, 0.3, WAITS[kind][:2], zorder=2)  # computing goes on in front of an exchange
    if kind == "M":
        axes.plot([start, start + width], [y + 0.36, y + 0.36], color=LOOKS[kind][0], linewidth=1.2, zorder=5)
    elif kind == "S" and start > 0:
        _mark(axes, kind, start, y)
    elif kind == "R" and start + width < limit * (1 - 1e-9):
        _mark(axes, kind, start + width, y)
    return waited


def _hover(act: Act, words: str, start: float, width: float) -> str:
    text = f"{act.kind}: {words}; replica {act.replica}, stage {act.stage}, micro-batch {act.micro_batch}, "
    text += f"version {act.version}; at {start:.2f} ms"
    text += f", {width:.2f} ms" if width else ""
    text += f", {bytes_text(act.bytes)} on {act.channel}" if act.channel else ""
    text += f" ({bytes_text(act.wire)} on the wire)" if act.wire else ""
    return text


def _joins(axes: Axes, step: Step, lane: dict[tuple[int, int], float]) -> None:
    # what was timed may be taken before its sending has returned
    lines = [(sent.start if step.measured else sent.end, sent, taken) for sent, taken in step.messages]
    join(axes, lines, step.meetings, lane, 1e3)


def join(
    axes: Axes,
    messages: list[tuple[float, Act, Act]],
    meetings: list[list[Act]],
    lane: Mapping[tuple[int, int], float],
    scale: float,
) -> None:
    """A line from each sending (when, S, R) to its taking, and one along every meeting of replicas. `scale`: of the seconds."""
    for left, sent, taken in messages:
        here, there = (sent.replica, sent.stage), (taken.replica, taken.stage)
        if here in lane and there in lane:
            ends = [scale * left, scale * taken.end], [lane[here] - 0.22, lane[there] + 0.22]
            axes.plot(*ends, color=INK, linewidth=0.6, alpha=0.55, zorder=4.5)
    for acts in meetings:
        points = [(scale * act.end, lane[(act.replica, act.stage)]) for act in acts if (act.replica, act.stage) in lane]
        if points:
            axes.plot(*zip(*points), color=LOOKS["M"][0], linewidth=0.8, alpha=0.7, zorder=4.5)
