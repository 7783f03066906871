"""What real processes did, in numbers: how idle each worker was, and what went over each channel."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..timeline import KINDS, Act, Timeline
from .gantt import window
from .recording import Recording
from .words import bytes_text, listed, several

WORKERS = {
    "Worker": "replica·stage",
    "Process": "its rank",
    "Computing, %": "forwards, backwards and heads",
    "Updating, %": "updates of the weights",
    "Idle, %": "neither computing nor updating",
    "waiting for messages, %": "part of idle",
    "exchanges, %": "part of idle: among the replicas, waiting for the others included, as far as nothing was computed",
    "sending, %": "part of idle: until a message was handed over",
}
CHANNELS = {
    "Channel": "",
    "Messages": "sends and exchanges, per update and replica",
    "Payload": "bytes of tensors, per update and replica",
    "Wire": "bytes that left a process, headers included, per update and replica",
    "Wire / payload": "0 where all stays inside a process",
}


def where(recordings: Iterable[Recording], machine: Any) -> str:
    """On what was measured: `4 processes on Some CPU, 2 cores`."""
    counts = sorted({recording.processes for recording in recordings})
    processes = several(counts[0], "process") if len(counts) == 1 else f"{listed([str(n) for n in counts])} processes"
    if not isinstance(machine, dict):
        return f"{processes} (the machine was not recorded)"
    cores = machine.get("cores")
    parts = [str(machine[key]) for key in ("cpu", "device") if machine.get(key) and machine[key] != "cpu"]
    parts += [several(cores, "core")] if isinstance(cores, int) else []
    return f"{processes} on {', '.join(parts)}" if parts else processes


def shared_cores(recordings: Iterable[Recording], machine: Any) -> str:
    """A warning if there were more processes than cores, else nothing."""
    cores = machine.get("cores") if isinstance(machine, dict) else None
    most = max(recording.processes for recording in recordings)
    if not isinstance(cores, int) or most <= cores:
        return ""
    return f" There were more processes than cores ({most} on {cores}), so some of the time is waiting for a core."


def workers(found: list[tuple[str, Recording]]) -> str:
    """The table of idle shares; all shares are of the time that is drawn."""
    rows = [[*([name] if len(found) > 1 else []), *row] for name, recording in found for row in _worker_rows(recording)]
    return facts(WORKERS, rows, method=len(found) > 1)


def _worker_rows(recording: Recording) -> list[list[str]]:
    begin, end, _ = window(recording)
    inside, idle = recording.acts.between(begin, end), recording.acts.idle_shares(begin, end)
    rows = []
    for (replica, stage), rank in sorted(recording.ranks.items()):
        worker = (replica, stage)
        share = _shares(inside, worker, end - begin)
        numbers = [share["F"] + share["B"] + share["L"], share["U"], idle.get(worker, 1.0)]
        numbers += [share["R"], share["M"], share["S"]]
        rows.append([f"{replica}·{stage}", str(rank), *(f"{100 * number:.1f}" for number in numbers)])
    return rows


def _shares(acts: Timeline, worker: tuple[int, int], span: float) -> dict[str, float]:
    """Share of `span` by kind of act; of exchanges, of which several may wait at once, only what sticks out of other acts."""
    mine = acts.of(*worker)
    seconds = {kind: sum(act.end - act.start for act in mine if act.kind == kind) for kind in KINDS if kind != "M"}
    seconds["M"] = _covered(mine) - _covered([act for act in mine if act.kind != "M"])
    return {kind: value / span if span > 0 else 0.0 for kind, value in seconds.items()}


def _covered(acts: list[Act]) -> float:
    """Seconds in which at least one of the acts went on."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted((act.start, act.end) for act in acts):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def channels(found: list[tuple[str, Recording]]) -> str:
    """The table of what each channel carried."""
    rows = [
        [*([name] if len(found) > 1 else []), *row] for name, recording in found for row in _channel_rows(recording)
    ]
    return facts(CHANNELS, rows, method=len(found) > 1)


def _channel_rows(recording: Recording) -> list[list[str]]:
    acts, per = recording.acts, recording.updates * recording.replicas
    payload, wire = acts.bytes_sent(), acts.wire_sent()
    messages = Counter(act.channel for act in acts if act.kind in "SM")
    rows = []
    for channel, count in sorted(messages.items()):
        sent, left = payload.get(channel, 0), wire.get(channel, 0)
        ratio = f"{left / sent:.4f}" if sent else "–"
        rows.append([channel, f"{count / per:.3g}", bytes_text(sent / per), bytes_text(left / per), ratio])
    return rows


def facts(columns: dict[str, str], rows: list[list[str]], method: bool) -> str:
    """A table of plain cells under columns with an explanation each; `method`: rows begin with a method's name."""
    heads = {**({"Method": ""} if method else {}), **columns}
    top = "".join(f'<th scope="col" title="{html.escape(words)}">{name}</th>' for name, words in heads.items())
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>{"".join(f"<td>{html.escape(x)}</td>" for x in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="scroll"><table class="facts"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
