"""What a training loop needs besides training: Ctrl-C between steps, the books of an epoch, the user's random state."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from .cluster.base import Crew, Wish
from .timeline import Timeline
from .worker import Worker

Losses = list[float | None]  # one per stage, None for a stage without a loss of its own


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM after a whole step; the text says what was saved and how to resume.

    `terminated`: it was SIGTERM.
    """

    terminated = False


@dataclass
class EpochBook:
    """What an epoch has come to so far. It is saved with a checkpoint, so that a resumed epoch is reported whole.

    losses: [sum, count] of each worker that had one, by "replica.stage"; notes: the same of each name that `Worker.note` was
    given. traffic: bytes sent up and down between stages and
    among replicas, those on the wire, and the number of updates. sent: bytes by channel. seconds: of this process.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    samples: int = 0
    seconds: float = 0.0
    updates: int = 0
    traffic: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    notes: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def noted(self, workers: Iterable[Worker]) -> None:
        """What the workers noted in an update."""
        for worker in workers:
            for name, value in worker.notes:
                entry = self.notes.setdefault(name, {}).setdefault(f"{worker.replica}.{worker.stage}", [0.0, 0])
                entry[0] += float(value)
                entry[1] += 1

    def sent_in(self, timeline: Timeline) -> None:
        """What an update, or the emptying of a pipeline, sent."""
        self.traffic = dict(Counter(self.traffic) + _traffic(timeline))
        self.sent = dict(Counter(self.sent) + Counter(timeline.bytes_sent()))

    def add(self, losses: dict[str, float], samples: int, seconds: float) -> None:
        """What came of an update."""
        for worker, loss in losses.items():
            entry = self.losses.setdefault(worker, [0.0, 0])
            entry[0] += loss
            entry[1] += 1
        self.samples += samples
        self.seconds += seconds

    def part(self, workers: Collection[str], chief: bool) -> EpochBook:
        """What a process goes on with after a resume: the losses of its own workers; the rest is the chief's."""
        losses, *rows = (
            {worker: entry for worker, entry in row.items() if worker in workers}
            for row in (self.losses, *self.notes.values())
        )
        notes = {name: row for name, row in zip(self.notes, rows) if row}
        return replace(self, losses=losses, notes=notes) if chief else EpochBook(losses, notes=notes)

    def mean_losses(self, stages: int) -> Losses:
        """Mean per stage, over the updates, then over the replicas."""
        return mean_losses({worker: total / count for worker, (total, count) in self.losses.items()}, stages)

    def mean_notes(self, stages: int) -> dict[str, Losses]:
        """The same of what was noted, by name."""
        return {name: EpochBook(row).mean_losses(stages) for name, row in self.notes.items()}

    def per_replica(self, replicas: int) -> dict[str, float]:
        """Bytes sent up, down and among the replicas, and on the wire, per replica; and the number of updates."""
        ways = ("up", "down", "replicas", "wire")
        return {way: self.traffic.get(way, 0) / replicas for way in ways} | {"updates": self.updates}

    @classmethod
    def merged(cls, books: Iterable[dict[str, Any]]) -> EpochBook:
        """One book from those of all processes, which each have done the same updates."""
        whole = cls()
        for book in (cls(**entries) for entries in books):
            whole.losses |= book.losses  # a worker lives on one process
            for name, row in book.notes.items():
                whole.notes[name] = whole.notes.get(name, {}) | row
            whole.samples = max(whole.samples, book.samples)
            whole.seconds = max(whole.seconds, book.seconds)
            whole.updates = max(whole.updates, book.updates)
            whole.traffic = dict(Counter(whole.traffic) + Counter(book.traffic))
            whole.sent = dict(Counter(whole.sent) + Counter(book.sent))
        return whole

    def share(self, crew: Crew) -> EpochBook:
        """The book of all processes, on every one of them."""
        return self if crew.size == 1 else self.merged(crew.share(asdict(self)))


def mean_losses(losses: dict[str, float], stages: int) -> Losses:
    """Mean per stage over the replicas, of losses by "replica.stage"."""
    rows: list[list[float]] = [[] for _ in range(stages)]
    for worker, loss in sorted(losses.items(), key=lambda pair: [int(part) for part in pair[0].split(".")]):
        rows[int(worker.split(".")[1])].append(loss)
    return [sum(row) / len(row) if row else None for row in rows]


def _traffic(timeline: Timeline) -> Counter[str]:
    sent: Counter[str] = Counter()
    for act in timeline:
        if act.kind == "M":
            sent["replicas"] += act.bytes
        elif act.kind == "S" and act.peer is not None:
            way = "replicas" if act.peer[1] == act.stage else "up" if act.peer[1] > act.stage else "down"
            sent[way] += act.bytes
        sent["wire"] += act.wire
    return sent


class Interrupt:
    """Ctrl-C and SIGTERM are noted, and acted on between two steps, by all processes; the second one acts at once."""

    def __init__(self, crew: Crew) -> None:
        self._crew, self._asked = crew, False

    def __enter__(self) -> Interrupt:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self._crew.wish("terminate" if number == signal.SIGTERM else "interrupt")

    def check(self, step: int) -> None:
        """Called before each step. Raises Interrupted if all processes are to stop here."""
        if self._crew.enter(step):
            raise interrupted(
                "Stopped after a whole step; nothing was saved, as fit had no checkpoint folder.", self._crew.stopped_by
            )


def interrupted(sentence: str, wish: Wish | None) -> Interrupted:
    """An Interrupted that knows whether it was SIGTERM."""
    stop = Interrupted(sentence)
    stop.terminated = wish == "terminate"
    return stop


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Workers seed the global generator; the user's own stream must not notice."""
    state = torch.random.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
