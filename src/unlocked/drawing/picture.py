"""Timelines as pictures: a Gantt chart and, below it on the same axis of time, the activations that are held."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidChoice, UnlockedError, choose
from ..report.drawing import COLOURS, INK, RC
from ..report.gantt import LOOKS, box, join
from ..simulation.memory import Curve
from ..timeline import Act, Timeline
from ..worker import Place
from .lanes import Colours, Lane, lanes
from .text import name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LANES = 32
ACTS = 6000
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 960, 112, 118, 46, 40  # points
LETTER = 5.0  # points that a letter of the labels takes

Unit = tuple[float, str]


def refuse_unreadable(timeline: Timeline, found: Sequence[Lane]) -> None:
    """Raises InvalidChoice for more than 32 lanes or 6000 acts."""
    count = sum(act.kind in LOOKS and act.kind not in "SR" for act in timeline)
    if len(found) > LANES:
        raise InvalidChoice(
            f"{len(found)} lanes cannot be read in one picture, at most {LANES}; take fewer stages or replicas."
        )
    if count > ACTS:
        raise InvalidChoice(f"{count} acts cannot be read in one picture, at most {ACTS}; take fewer steps.")


def draw(
    path: Path,
    timeline: Timeline,
    *,
    title: str,
    subtitle: str = "",
    devices: Mapping[Place, int] | None = None,
    memory: Sequence[Curve] = (),
    time_unit: Unit = (1.0, "s"),
    memory_unit: Unit = (1.0, "bytes"),
    colours: Colours = "micro-batch",
) -> None:
    """Write the picture to `path`, as its ending says: .svg or .png.

    Args:
        devices: the device of every worker, for a lane each; without: a lane for every worker. memory: a curve of bytes for
            every lane, or nothing. units: how many seconds or bytes they are, and their name. colours: of boxes, by micro-batch
            (a forward light, a backward dark) or by kind.

    The same timeline gives the same file. Raises InvalidChoice (more than 32 lanes or 6000 acts, another ending), UnlockedError
    (the file cannot be written).
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    choose("colours", colours, ("micro-batch", "kind"))
    if path.suffix not in (".svg", ".png"):
        raise InvalidChoice(f"{path} is no picture that can be written; let its name end in .svg or .png.")
    rows = lanes(timeline, devices)
    refuse_unreadable(timeline, rows)
    lane_height = 24 if len(rows) <= 12 else 17
    gantt_height = lane_height * max(1, len(rows))
    below = 130 if memory else 0
    height = TOP + gantt_height + below + BOTTOM
    with rc_context(RC):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        figure.patch.set_facecolor("white")
        figure.text(LEFT / WIDTH, 1 - 16 / height, title, fontsize=12, fontweight="bold", color=INK)
        figure.text(LEFT / WIDTH, 1 - 32 / height, subtitle, fontsize=9, color="#566071")
        upper = _axes(figure, height, BOTTOM + below, gantt_height)
        chart = _Chart(upper, rows, timeline, time_unit, colours)
        chart.draw()
        last = upper
        if memory:
            last = _axes(figure, height, BOTTOM, below - 26)
            _memory(last, [_since(chart.origin, curve) for curve in memory], chart.end, time_unit, memory_unit)
            upper.tick_params(axis="x", labelbottom=False)
        last.set_xlabel(f"time ({time_unit[1]})")
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        try:
            figure.savefig(path, dpi=144, metadata=metadata)
        except OSError as error:
            raise UnlockedError(f"The picture cannot be written to {path} ({error}); give another file.") from error


def _axes(figure: Figure, height: float, bottom: float, own: float) -> Axes:
    return figure.add_axes((LEFT / WIDTH, bottom / height, (WIDTH - LEFT - RIGHT) / WIDTH, own / height))


class _Chart:
    """The lanes."""

    def __init__(self, axes: Axes, rows: list[Lane], timeline: Timeline, unit: Unit, colours: Colours) -> None:
        self.axes, self.rows, self.timeline, self.colours = axes, rows, timeline, colours
        self.scale = 1.0 / unit[0]
        self.origin = min((act.start for act in timeline), default=0.0)
        self.end = self.scale * timeline.span() or 1.0
        self.points = (WIDTH - LEFT - RIGHT) / self.end  # of one unit of time
        self.several = any(len(row.places) > 1 for row in rows)
        passes = [act for act in timeline if act.kind in "FB" and act.end > act.start]
        common = max(map(self._style, passes), default=0)
        self.style = common if common < 3 else 0  # all alike, unless some have no room

    def draw(self) -> None:
        axes = self.axes
        axes.set_xlim(0, self.end)
        axes.set_ylim(len(self.rows) - 0.5, -0.5)
        axes.set_yticks(range(len(self.rows)), [row.name for row in self.rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.margins(0)
        size = 9 if len(self.rows) <= 12 else 7
        axes.tick_params(labelsize=size)
        for y, row in enumerate(self.rows):
            axes.axhspan(y - 0.42, y + 0.42, color="#F4F6F9" if row.places[0].replica % 2 == 0 else "#E9EDF3", zorder=0)
            axes.text(
                self.end * 1.008,
                y,
                f"idle {100 * row.idle:.0f} %",
                va="center",
                fontsize=size,
                color="#566071",
                clip_on=False,
            )
            for act in row.acts:
                self._act(act, y)
        self._messages()

    def _act(self, act: Act, y: float) -> None:
        start, width = self.scale * (act.start - self.origin), self.scale * (act.end - act.start)
        if act.kind in "SR":
            return
        if width <= 0.0:
            if act.kind == "U":
                self.axes.plot(
                    [start, start], [y - 0.46, y + 0.46], color="black", linewidth=2.2, zorder=6, clip_on=False
                )
            return
        inside, ink = self._colours(act)
        if act.kind == "M":  # computing goes on in front of an exchange; several may wait at once, so it has no name
            box(self.axes, start, width, y, 0.32, ("#FBEAF8", LOOKS["M"][0]), zorder=2)
            return
        box(self.axes, start, width, y, 0.4, (inside, "white"))
        self._label(act, start + width / 2, width, y, ink)

    def _colours(self, act: Act) -> tuple[str, str]:
        """Of the box and of its text."""
        if act.kind == "U":
            return "#111111", "#FFFFFF"
        if self.colours == "kind":
            return LOOKS[act.kind][:2]
        own = COLOURS[act.micro_batch % len(COLOURS)]
        if act.kind == "F":
            return _light(own), INK
        return own, "#FFFFFF"

    def _label(self, act: Act, x: float, width: float, y: float, ink: str) -> None:
        text = self._texts(act)[max(self.style, self._style(act))]
        size = 8 if len(self.rows) <= 12 else 7
        self.axes.text(x, y, text, color=ink, ha="center", va="center", fontsize=size, zorder=4, clip_on=True)

    def _texts(self, act: Act) -> list[str]:
        """What may be written into a box, the most telling first."""
        short = f"{act.kind}{act.micro_batch}"
        return [name_of(act), f"{act.stage}{short}" if self.several else short, short, act.kind, ""]

    def _style(self, act: Act) -> int:
        """Which of its texts fits."""
        room = self.scale * (act.end - act.start) * self.points - 4
        return next(k for k, text in enumerate(self._texts(act)) if not text or LETTER * len(text) <= room)

    def _messages(self) -> None:
        """Lines only where messages take time and are few: else they tell nothing, or hide the rest."""
        if self.several or len(self.rows) > 12:
            return
        lane = {tuple(row.places[0]): float(y) for y, row in enumerate(self.rows)}
        moved = Timeline(
            act._replace(start=act.start - self.origin, end=act.end - self.origin) for act in self.timeline
        )
        messages = [(sent.end, sent, taken) for sent, taken in moved.messages() if taken.end > sent.end]
        if len(messages) <= 400:
            join(self.axes, messages, [acts for acts in moved.meetings() if len(acts) > 1], lane, self.scale)  # type: ignore[arg-type]


def _light(colour: str) -> str:
    """A tint of a colour, for forwards."""
    return "#" + "".join(f"{round(255 - 0.42 * (255 - int(colour[k : k + 2], 16))):02X}" for k in (1, 3, 5))


def _memory(axes: Axes, curves: Sequence[Curve], end: float, time_unit: Unit, memory_unit: Unit) -> None:
    """What the lanes hold, on top of each other: the outline is what all hold together."""
    from matplotlib import colormaps

    times = sorted({0.0, end, *(when / time_unit[0] for curve in curves for when, _ in curve)})
    below = [0.0] * len(times)
    for k, curve in enumerate(curves):
        levels = _levels(curve, times, time_unit[0])
        above = [low + level / memory_unit[0] for low, level in zip(below, levels)]
        shade = colormaps["Blues"](0.3 + 0.6 * (k + 1) / len(curves))
        axes.fill_between(times, below, above, step="post", color=shade, linewidth=0, zorder=2)
        if len(curves) <= 12:
            axes.step(times, above, where="post", color="white", linewidth=0.6, zorder=3)
        below = above
    axes.step(times, below, where="post", color=INK, linewidth=1.2, zorder=4)
    top = max(below, default=0.0)
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1.08 * top or 1.0)
    axes.set_ylabel(memory_unit[1], fontsize=9)
    axes.tick_params(labelsize=9)
    axes.text(
        end * 1.008, top, f"all together,\npeak {_short(top)}", va="top", fontsize=9, color="#566071", clip_on=False
    )


def _since(origin: float, curve: Curve) -> Curve:
    return [(when - origin, level) for when, level in curve]


def _levels(curve: Curve, times: list[float], unit: float) -> list[int]:
    """The curve's value from each time on."""
    levels, position, level = [], 0, 0
    for time in times:
        while position < len(curve) and curve[position][0] / unit <= time:
            level = curve[position][1]
            position += 1
        levels.append(level)
    return levels


def _short(value: float) -> str:
    return f"{value:.0f}" if value == math.floor(value) and value < 1e4 else f"{value:.3g}"
