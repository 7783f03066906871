"""Signs of life. A thread of every process says "alive" in the store and reads what the others say.

It works beside the training, so a process that computes for minutes is alive, and one that is stopped, swapped out or cut off
is not. What it learns, in at most about a second: that a process is silent, that somebody reported a failure, that somebody
wishes to stop; and within a few seconds that all wait for each other and no message is under way: a deadlock.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from .agreement import Agreement
from .base import Wish
from .elastic import Members

BEAT = 0.5  # seconds between two signs of life
_DEAD_AFTER = 3.0  # seconds of silence of one to whom a connection broke
_DEADLOCK_AFTER = 6  # beats in which nothing at all happened


@dataclass
class Vitals:
    """What a process says of itself.

    waiting: whether its main thread waits, in `words` for what. activity: counts what it has done. sent, got: messages to and
    from other processes by channel. full: channels of which no more is taken in before the program takes what is there.
    """

    waiting: bool = False
    activity: int = 0
    sent: dict[str, int] = field(default_factory=dict)
    got: dict[str, int] = field(default_factory=dict)
    full: dict[str, bool] = field(default_factory=dict)
    words: Callable[[], str] = str


class Heartbeat:
    """The thread. `store`: a connection of its own, as a connection serves one caller at a time.

    members: the table of who is who, for sentences. stuck_after: seconds of silence after which a process counts as stuck.
    on_failure: called once, on the thread, with a sentence.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        members: Sequence[dict[str, Any]],
        agreement: Agreement,
        vitals: Vitals,
        stuck_after: float,
        on_failure: Callable[[str], None],
    ) -> None:
        self._store, self._rank, self._members, self._agreement = store, rank, members, agreement
        self._vitals, self.stuck_after, self._on_failure = vitals, stuck_after, on_failure
        self._count = self._still = 0
        self._heard: list[tuple[dict[str, Any], float]] = []
        self._wish: Wish | None = None
        self._proposed = self._settled = False
        self._suspects: list[str] = []
        self.elastic: Members | None = None  # where the others can do without one that is lost
        self._broken: dict[int, tuple[str, float]] = {}  # to whom a connection broke, how, and when
        self._wake, self._end = threading.Event(), False
        self._say()
        self._thread = threading.Thread(target=self._live, name="unlocked heartbeat", daemon=True)

    def start(self) -> None:
        """Begin. All processes must have said their first word (the constructor does)."""
        now = time.monotonic()
        self._heard = [({}, now) for _ in self._members]
        self._thread.start()

    def wish(self, kind: Wish) -> None:
        """Note a wish to stop; nothing here may wait for a lock, as a signal handler calls it."""
        self._wish = kind

    def suspect(self, rank: int, sentence: str) -> None:
        """A connection broke. Whoever knows better why (the launcher, the process itself) has half a second to say so."""
        if self.elastic is not None:
            self._broken.setdefault(rank, (sentence, time.monotonic()))
            self.elastic.lose(rank, sentence)
            return
        self._suspects.append(sentence)
        self._wake.set()

    def stop(self) -> None:
        """Say goodbye and end the thread."""
        self._end = True
        self._wake.set()
        self._thread.join(5.0)

    def _live(self) -> None:
        try:
            while not self._end:
                self._beat()
                self._wake.wait(BEAT)
                self._wake.clear()
            self._say(bye=True)
        except RuntimeError:  # torch's DistNetworkError: the store's host is gone
            if not self._end:
                self._on_failure("The rendezvous store does not answer any more; the launcher is gone, or the network.")

    def _beat(self) -> None:
        self._say()
        if self.elastic is not None:
            self.elastic.look()
        sentence = self._reported() or self._listen() or self._suspected()
        if sentence is not None:
            self._end = True
            self._on_failure(sentence)
            return
        self._look_for_wishes()

    def _say(self, bye: bool = False) -> None:
        self._count += 1
        vitals = self._vitals
        words = vitals.words() if vitals.waiting else ""
        state = [vitals.waiting, vitals.activity, dict(vitals.sent), dict(vitals.got), dict(vitals.full)]
        self._store.set(
            f"beat/{self._rank}", json.dumps({"n": self._count, "state": state, "words": words, "bye": bye})
        )

    def _reported(self) -> str | None:
        if not self._store.check(["failure"]):
            return None
        return str(json.loads(self._store.get("failure"))["sentence"])

    def _listen(self) -> str | None:
        """The sentence about a process that has been silent for too long, or about a deadlock."""
        now = time.monotonic()
        before = [beat.get("state") for beat, _ in self._heard]
        beats = self._store.multi_get([f"beat/{rank}" for rank in range(len(self._members))])
        for rank, beat in enumerate(map(json.loads, beats)):
            said, when = self._heard[rank]
            if beat["n"] != said.get("n") or beat["bye"]:
                self._heard[rank] = (beat, now)
            elif self.elastic is not None:
                self._bury(self.elastic, rank, now - when)
            elif rank != self._rank and now - when > self.stuck_after:
                sentence = f"has given no sign of life for {now - when:.0f} s; it is stuck, suspended, or cut off."
                return report(self._store, rank, f"{name_of(self._members, rank)} {sentence}")
        return self._deadlock(before)

    def _is_lost(self, rank: int) -> bool:
        return self.elastic is not None and rank in self.elastic.lost

    def _bury(self, members: Members, rank: int, silent: float) -> None:
        """A rank that has been silent for so many seconds is dead for all; sooner if a connection to it broke."""
        how, _ = self._broken.get(rank, (None, 0.0))
        if silent > self.stuck_after:
            how = f"{name_of(self._members, rank)} has given no sign of life for {silent:.0f} s."
        elif how is None or silent < _DEAD_AFTER:
            return
        if rank != self._rank:
            members.bury(rank, how)

    def _deadlock(self, before: list[Any]) -> str | None:
        """All wait, nothing that could help is under way, and nothing has changed for some beats: nobody will ever go on."""
        states = [beat["state"] for beat, _ in self._heard if beat]
        awake = all(time.monotonic() - when < 3 * BEAT for _, when in self._heard)  # else one is dead or suspended
        still = awake and states == before and all(state[0] for state in states)
        self._still = self._still + 1 if still and not _under_way(states) else 0
        if self._still < _DEADLOCK_AFTER or (self.elastic is not None and self.elastic.lost):
            return None
        waits = "; ".join(f"on process {rank} {beat['words']}" for rank, (beat, _) in enumerate(self._heard))
        return report(self._store, self._rank, f"No worker can go on: {waits}.")

    def _suspected(self) -> str | None:
        """The first suspicion, once nobody has had a better word within half a second."""
        if not self._suspects:
            return None
        for _ in range(5):
            time.sleep(0.1)
            if (better := self._reported()) is not None:
                return better
        return report(self._store, self._rank, self._suspects[0])

    def _look_for_wishes(self) -> None:
        wish = self._wish
        if wish is not None and not self._store.check(["stop/wish"]):
            self._store.compare_set("stop/wish", "", wish)
        if not self._proposed and self._store.check(["stop/wish"]):
            kind: Wish = "terminate" if self._store.get("stop/wish") == b"terminate" else "interrupt"
            self._store.set(f"stop/entered/{self._rank}", str(self._agreement.propose(kind)))
            self._proposed = True
        if self._proposed and not self._settled:
            keys = [f"stop/entered/{rank}" for rank in range(len(self._members)) if not self._is_lost(rank)]
            if self._store.check(keys):
                self._agreement.settle(max(int(step) for step in self._store.multi_get(keys)))
                self._settled = True
            else:
                self._wake.set()  # look again at once, all others are about to answer
                time.sleep(0.02)


def _under_way(states: Sequence[Any]) -> bool:
    """Whether a message has been sent that has not arrived, on a channel that somebody may be waiting for."""
    sent, got, full = (
        {channel: count for state in states for channel, count in state[part].items()} for part in (2, 3, 4)
    )
    return any(count > got.get(channel, 0) and not full.get(channel) for channel, count in sent.items())


def report(store: dist.Store, rank: int, sentence: str) -> str:
    """Tell all others what went wrong, unless somebody has already; returns what they are told."""
    told = store.compare_set("failure", "", json.dumps({"rank": rank, "sentence": sentence}))
    return str(json.loads(told)["sentence"])


def name_of(members: Sequence[dict[str, Any]], rank: int) -> str:
    """For sentences: `Process 2 (pid 4711 on lab3: replica 0 stage 1)`."""
    member = members[rank]
    return f"Process {rank} (pid {member['pid']} on {member['name']}{member.get('workers', '')})"
