"""Timelines as text: time to the right in ticks, a line for each lane.

             0     1     2     3
    stage 0  0F0@0 .     .     0B0@0|
    stage 1  .     1F0@0 1B0@0|.

`2F1@3` is stage 2, forward, micro-batch 1, with weights that were updated 3 times; kinds are those of timeline.py. A row of `-`
is the same act going on, `.` is idle, `|` an update that takes no time, at the end of the tick before it. Stages and
micro-batches count from 0, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from ..errors import InvalidChoice
from ..timeline import BUSY, Act, Timeline
from ..worker import Place
from .lanes import Lane, lanes

SHOWN = BUSY + "M"  # what gets cells; S and R are handing over and waiting
TICKS = 2000  # no table has more


def text_table(
    timeline: Timeline,
    tick: float | None = None,
    *,
    devices: Mapping[Place, int] | None = None,
    width: int | None = None,
) -> str:
    """The table; `tick` in seconds. It is cut into pieces below each other that are at most `width` letters wide.

    Without a tick: the longest one whose multiples all acts begin and end at. With one that is not: a cell shows what fills
    most of its tick. Raises InvalidChoice if there is no such tick, or more than 2000 of the given one.
    """
    length = common_tick(timeline) if tick is None else tick
    if length is None:
        raise InvalidChoice("The acts begin and end at no multiples of one tick; give the length of a tick.")
    if not length > 0.0 or timeline.span() / length > TICKS:
        raise InvalidChoice(
            f"A tick of {length:g} s is too short for a timeline of {timeline.span():g} s; give one of at least "
            f"{timeline.span() / TICKS:g} s."
        )
    origin = min((act.start for act in timeline), default=0.0)
    count = max(1, math.ceil(timeline.span() / length - 1e-6))
    rows = [(lane.name, *_cells(lane, origin, length, count)) for lane in lanes(timeline, devices)]
    return "\n\n".join(_pieces(rows, count, width))


def common_tick(timeline: Timeline) -> float | None:
    """The longest tick, in seconds, whose multiples all computing begins and ends at; None if it is less than 1/400 of all."""
    origin = min((act.start for act in timeline), default=0.0)
    times = {time - origin for act in timeline if act.kind in SHOWN for time in (act.start, act.end)}
    span = timeline.span()
    tick = Fraction(0)  # the greatest common divisor so far
    for time in times:
        near = Fraction(time).limit_denominator(1000)
        if abs(near - Fraction(time)) > 1e-9 * span:
            return None
        tick = Fraction(math.gcd(tick.numerator * near.denominator, near.numerator * tick.denominator)) / (
            tick.denominator * near.denominator
        )
        if 0 < 400 * tick < span:
            return None
    return float(tick) or 1.0


def _cells(lane: Lane, origin: float, tick: float, count: int) -> tuple[list[str], set[int]]:
    """The lane's cells, and the ticks at whose end there is an update that takes no time."""
    ticks = [(act, (act.start - origin) / tick, (act.end - origin) / tick) for act in lane.acts]
    computing = _filling([row for row in ticks if row[0].kind in BUSY], count)
    meeting = _filling([row for row in ticks if row[0].kind == "M"], count)
    cells: list[str] = []
    before: Act | None = None
    for one, other in zip(computing, meeting):
        act = one if one is not None else other  # computing goes on in front of an exchange
        cells.append("." if act is None else "-" if act is before else name_of(act))
        before = act
    marks = {max(0, round(end) - 1) for act, start, end in ticks if act.kind == "U" and start == end}
    return cells, marks


def _filling(ticks: list[tuple[Act, float, float]], count: int) -> list[Act | None]:
    """For each tick the act that fills most of it; None where that is nothing."""
    shares: list[list[tuple[float, Act]]] = [[] for _ in range(count)]
    for act, start, end in ticks:
        for k in range(math.floor(start), min(count, math.ceil(end))):
            shares[k].append((min(end, k + 1) - max(start, k), act))
    found: list[Act | None] = []
    for row in shares:
        share = max((share for share, _ in row), default=0.0)
        full = share > 1e-6 and share >= 1.0 - sum(share for share, _ in row) - 1e-9
        found.append(next(act for one, act in row if one == share) if full else None)
    return found


def name_of(act: Act) -> str:
    """`2F1@3`."""
    return f"{act.stage}{act.kind}{act.micro_batch}@{act.version}"


def _pieces(rows: list[tuple[str, list[str], set[int]]], count: int, width: int | None) -> list[str]:
    names = max(len(name) for name, _, _ in rows) if rows else 0
    cell = max((len(text) for _, cells, _ in rows for text in cells), default=1)
    cell = max(cell, len(str(count - 1)))
    each = count if width is None else max(1, (width - names - 2) // (cell + 1))
    pieces = []
    for first in range(0, count, each):
        shown = range(first, min(count, first + each))
        lines = [" " * (names + 2) + "".join(f"{k:<{cell + 1}}" for k in shown)]
        for name, cells, marks in rows:
            texts = (
                ("-" * cell if cells[k] == "-" else f"{cells[k]:<{cell}}") + ("|" if k in marks else " ") for k in shown
            )
            lines.append(f"{name:<{names}}  {''.join(texts)}")
        pieces.append("\n".join(line.rstrip() for line in lines))
    return pieces
