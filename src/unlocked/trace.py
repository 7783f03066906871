"""A run's recorded steps as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

The file is JSON in the Trace Event Format; its times are microseconds since the first act. Of each thing it has:

    a process        a rank, "rank r"; its number in the file is r + 1, as 0 means the idle task of a system
    a thread         a worker, "replica i stage j"; exchanges that went on beside its acts are on threads of their own
    a slice          an act, "F 12": its kind and micro-batch; the rest is in its arguments
    a slice "taken"  the end of an R that had to wait: there its message was there, and there its arrow ends
    an arrow         a message, from its S to its R
    a counter        bytes a rank has sent on a channel so far, payload and wire

A viewer binds an arrow to the slice around its end, so no act may be empty: each is made at least `TINY` long, and an R
ends after its S began, which clocks of several processes may have told otherwise. How far an end was moved for that at
most is in the file ("largest_shift_us").
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .errors import BadCheckpoint, InvalidChoice, UnlockedError
from .report.recording import FILE, Recording, read_recording
from .run_files import write_text
from .simulation.retiming import retimed
from .timeline import Act, Timeline

TINY = 200  # nanoseconds
FIRST_THREAD = 1_000_000  # threads are numbered from here: a thread with its process's number would be its main one

# kind: its words, a colour of chrome://tracing (Perfetto takes its own, by the name)
LOOKS = {
    "F": ("forward", "thread_state_runnable"),
    "B": ("backward", "rail_response"),
    "L": ("head", "thread_state_iowait"),
    "U": ("update", "generic_work"),
    "S": ("send", "black"),
    "R": ("receive", "grey"),
    "M": ("exchange", "detailed_memory_dump"),
}

HOW = {
    True: "Acts as they were timed, on one clock.",
    False: "Not measured: one process did the acts one after the other; they are re-timed here for one device per worker "
    "and free links.",
}

SIMULATED = "Acts as they were timed by the clock of a simulated cluster."

Event = dict[str, Any]
Lane = tuple[int, int, int]  # replica, stage, and 0 for the worker's own thread; more for exchanges beside it


class Placed(NamedTuple):
    """An act as it is in the trace: its thread, its start and end in nanoseconds since the first act."""

    act: Act
    lane: Lane
    start: int
    end: int


def write_trace(folder: Path, to: Path | None = None) -> Path:
    """Write the trace of the run in `folder` to `to`, or to RUN/trace.json; returns the path. An older file is replaced.

    Raises BadCheckpoint (no recorded steps), BadData (a damaged recording), InvalidChoice (`to` is a folder),
    UnlockedError (the file cannot be written).
    """
    folder, to = Path(folder), Path(to) if to is not None else Path(folder) / "trace.json"
    if to.is_dir():
        raise InvalidChoice(f"{to} is a folder; give the name of a file for the trace.")
    recording = read_recording(folder)
    if recording is None:
        raise BadCheckpoint(
            f"There are no recorded steps in {folder / FILE}; give the folder of a run that was trained for at least one "
            "step, with this version."
        )
    try:
        write_text(to, json.dumps(trace(recording, str(folder)), separators=(",", ":")) + "\n")
    except OSError as error:
        raise UnlockedError(f"The trace cannot be written to {to} ({error}); give another file.") from error
    return to


def trace(recording: Recording, run: str = "") -> dict[str, Any]:
    """The whole file, as JSON values."""
    acts = recording.acts if recording.measured else retimed(recording.acts)
    lanes = _lanes(acts, recording)
    placed, shift = _place(acts, lanes)
    where = {
        lane: {"pid": recording.ranks[lane[:2]] + 1, "tid": FIRST_THREAD + order} for order, lane in enumerate(lanes)
    }
    events = [*_slices(placed, where), *_arrows(acts, placed, where), *_counters(placed, recording)]
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))  # around before inside: arrows find their slice
    return {
        "traceEvents": [*_names(recording, where), *events],
        "displayTimeUnit": "ms",
        "otherData": {
            "run": run,
            "measured": recording.measured,
            "how": SIMULATED if recording.simulated else HOW[recording.measured],
            "processes": recording.processes,
            "first_update": recording.first,
            "last_update": recording.last,
            "largest_shift_us": shift / 1000,
        },
    }


# ---- where the acts are ----------------------------------------------------------------------------------------------


def _lanes(acts: Timeline, recording: Recording) -> dict[Lane, list[Act]]:
    """The acts of each thread, in their order; of a worker an exchange beside other acts goes to the first free thread."""
    lanes: dict[Lane, list[Act]] = {}
    for worker in sorted(recording.ranks):
        mine = acts.of(*worker)
        beside = [act for act in mine if act.kind in "MU" and any(_overlap(act, other) for other in mine)]
        moved = {id(act) for act in beside}
        rows = [[act for act in mine if id(act) not in moved]]
        for act in sorted(beside, key=lambda act: act.start):
            free = next((row for row in rows[1:] if row[-1].end <= act.start), None)
            if free is None:
                rows.append([act])
            else:
                free.append(act)
        lanes |= {(*worker, k): row for k, row in enumerate(rows)}
    return lanes


def _overlap(one: Act, other: Act) -> bool:
    return one is not other and max(one.start, other.start) < min(one.end, other.end)


def _place(acts: Timeline, lanes: dict[Lane, list[Act]]) -> tuple[dict[int, Placed], int]:
    """Each act (by its `id`) placed, none empty, none overlapping in its lane; and how far an end moved at most.

    A lane's acts are placed in their order; an R waits for its S to be placed.
    """
    origin = min((act.start for act in acts), default=0.0)
    source = {id(taken): id(sent) for sent, taken in acts.messages()}
    free = dict.fromkeys(lanes, 0)
    left = {lane: deque(row) for lane, row in lanes.items()}
    placed: dict[int, Placed] = {}
    shift, stuck = 0, False
    while any(left.values()):
        before = len(placed)
        for lane, row in left.items():
            while row and (stuck or source.get(id(row[0])) is None or source[id(row[0])] in placed):
                stuck = False
                act = row.popleft()
                start, end = _nanoseconds(act.start - origin), _nanoseconds(act.end - origin)
                begin = max(free[lane], start)
                free[lane] = max(begin + TINY, end)
                sent = placed.get(source.get(id(act), 0))
                if sent is not None:
                    free[lane] = max(free[lane], sent.start + 2 * TINY)
                placed[id(act)] = Placed(act, lane, begin, free[lane])
                shift = max(shift, free[lane] - end)
        stuck = len(placed) == before  # a record in which everyone waits makes no sense; place one act all the same
    return placed, shift


def _nanoseconds(seconds: float) -> int:
    return round(1e9 * seconds)


# ---- events ----------------------------------------------------------------------------------------------------------


def _names(recording: Recording, where: dict[Lane, dict[str, int]]) -> Iterator[Event]:
    """Names and the order of processes and threads."""
    for rank in sorted(set(recording.ranks.values())):
        process = {"pid": rank + 1}
        yield _metadata("process_name", process, name=f"rank {rank}")
        yield _metadata("process_sort_index", process, sort_index=rank)
        if not recording.measured:
            yield _metadata("process_labels", process, labels="re-timed, not measured")
    for order, ((replica, stage, beside), thread) in enumerate(where.items()):
        name = f"replica {replica} stage {stage}" + (f", exchanges {beside}" if beside else "")
        yield _metadata("thread_name", thread, name=name)
        yield _metadata("thread_sort_index", thread, sort_index=order)


def _metadata(what: str, where: dict[str, int], **arguments: Any) -> Event:
    return {"ph": "M", "name": what, **where, "ts": 0, "args": arguments}


def _slices(placed: dict[int, Placed], where: dict[Lane, dict[str, int]]) -> Iterator[Event]:
    """A slice for each act, and one more at the end of an R that waited."""
    for act, lane, start, end in placed.values():
        words, colour = LOOKS[act.kind]
        event = {"ph": "X", "cat": words, "cname": colour, **where[lane], "args": _arguments(act)}
        name = f"{act.kind} {act.micro_batch}"
        yield {**event, "name": name, "ts": start / 1000, "dur": (end - start) / 1000}
        if act.kind == "R" and end - start > 2 * TINY:
            yield {**event, "name": "taken", "ts": (end - TINY) / 1000, "dur": TINY / 1000}


def _arguments(act: Act) -> dict[str, Any]:
    arguments: dict[str, Any] = {"micro-batch": act.micro_batch, "version": act.version}
    if act.kind in "SRM":
        arguments |= {"channel": act.channel, "bytes": act.bytes}
    if act.kind in "SM":
        arguments["wire"] = act.wire
    if act.peer is not None:
        arguments["peer"] = f"replica {act.peer[0]} stage {act.peer[1]}"
    return arguments


def _arrows(acts: Timeline, placed: dict[int, Placed], where: dict[Lane, dict[str, int]]) -> Iterator[Event]:
    """From the first moment of an S to the last of its R."""
    for number, (sent, taken) in enumerate(acts.messages(), start=1):
        arrow = {"cat": "message", "name": sent.channel or "message", "id": number}
        begin, end = placed[id(sent)], placed[id(taken)]
        if end.end < begin.start + 2 * TINY:  # of a record in which everyone waits; see _place
            continue
        yield {"ph": "s", **arrow, **where[begin.lane], "ts": (begin.start + TINY // 2) / 1000}
        # bp e: bound to the slice around it, not to the next one
        yield {"ph": "f", "bp": "e", **arrow, **where[end.lane], "ts": (end.end - TINY // 2) / 1000}


def _counters(placed: dict[int, Placed], recording: Recording) -> Iterator[Event]:
    """What each rank has sent on each channel, from nothing at the beginning."""
    sent: dict[tuple[int, str], Counter[str]] = {}
    for act, lane, _, end in sorted(placed.values(), key=lambda one: one.end):
        if act.kind in "SM":
            key = (recording.ranks[lane[:2]], act.channel)
            if key not in sent:
                sent[key] = Counter()
                yield _counter(*key, 0, sent[key])
            sent[key].update(payload=act.bytes, wire=act.wire)
            yield _counter(*key, end, sent[key])


def _counter(rank: int, channel: str, when: int, total: Counter[str]) -> Event:
    values = {"payload": total["payload"], "wire": total["wire"]}
    return {"ph": "C", "name": f"bytes sent, {channel}", "pid": rank + 1, "ts": when / 1000, "args": values}
