"""Members of a run that may die and come, where the method can do without them (gossip on a graph).

The processes that train together are a generation: they have ranks 0 … M − 1, a store prefix and links of their own. When one
is lost, or one knocks, all come to a roll call as soon as they can; who is there makes the next generation.

    number     of a process: the rank in generation 0, or the next free one for whoever joins; never used again
    gone/k     process k is dead, as the launcher or its silence says, with a sentence
    roll/t/k   process k has come to roll call t, with what it has to say
    left/t/k   it had to leave its work for that, so nobody shall wait for a message from it
    heard/t/k  it has not, but knows of a loss
    who/t      who goes on, and whether anything has changed: whoever finds everybody there, or gone, writes it; the first one
               counts, for all alike

All of it lies in the store, which belongs to no worker, so it does not matter who dies when.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

from ..errors import LostProcess
from .rendezvous import Seat

_PAUSE = 0.02  # seconds between two looks at the store


class Succession(NamedTuple):
    """Who goes on.

    seat: of this process in the next generation, which has the `numbers` as members: first the `survivors` of this one (their
    former ranks, in the order of the new ones), then those who `joined` (how many). said: by each survivor. lost: sentences.
    """

    seat: Seat
    numbers: list[int]
    survivors: list[int]
    joined: int
    said: list[Any]
    lost: list[str]

    def then(self, later: Succession) -> Succession:
        """This one, and then another, of its members."""
        count = len(self.survivors)
        return Succession(
            later.seat,
            later.numbers,
            [self.survivors[k] for k in later.survivors if k < count],
            sum(k >= count for k in later.survivors) + later.joined,
            self.said,
            [*self.lost, *later.lost],
        )


class Members:
    """The members of this generation, seen from one. `store`: a connection of its own, under `Seat.base`.

    lost: sentences by rank, about those this process knows to be lost to it. knocked: whether somebody wants to join.
    """

    def __init__(self, seat: Seat, store: dist.Store, numbers: list[int]) -> None:
        self.seat, self.numbers = seat, numbers
        self._store = store
        self._lock = threading.Lock()
        self.lost: dict[int, str] = {}
        self.knocked = False
        self._turn = seat.generation  # roll calls, over all generations
        self._seen = -1  # changes that were looked at
        self._listeners: list[Callable[[int, str], None]] = []

    def publish(self, run: dict[str, Any]) -> None:
        """Say that this run can be joined, and how; by one process, at its beginning."""
        self._store.compare_set("elastic/first", "", str(len(self.numbers)))
        self._store.compare_set("elastic/numbers", "", str(len(self.numbers)))
        self._store.set("elastic/run", json.dumps(run))

    def on_loss(self, listener: Callable[[int, str], None]) -> None:
        """`listener(rank, sentence)` is called, on some thread, once for each that is lost."""
        with self._lock:
            self._listeners.append(listener)
            lost = dict(self.lost)
        for rank, sentence in lost.items():
            listener(rank, sentence)

    def lose(self, rank: int, sentence: str) -> None:
        """This process hears no more from a rank: it may be dead, or on its way to the roll call."""
        with self._lock:
            if rank in self.lost:
                return
            self.lost[rank] = sentence
        for listener in list(self._listeners):
            listener(rank, sentence)

    def bury(self, rank: int, sentence: str) -> None:
        """A rank is dead for all: the roll call does not wait for it."""
        bury(self._store, self.numbers[rank], sentence)
        self.lose(rank, sentence)

    def look(self) -> None:
        """On the heartbeat's thread: who is gone, who has come to the roll call, who knocks."""
        changes = self._store.add("changes", 0)
        if changes == self._seen:
            return
        self._seen = changes
        for rank, number in enumerate(self.numbers):
            if rank == self.seat.rank or rank in self.lost:
                continue
            if self._store.check([f"gone/{number}"]):
                self.lose(rank, self._store.get(f"gone/{number}").decode())
            elif self._store.check([f"left/{self._turn}/{number}"]):
                self.lose(rank, f"Process {rank} waits for the others to make out who is left.")
        self.knocked = bool(self._waiting())

    def bury_missing(self, seats: dist.Store) -> None:
        """Those who never took their seat in this generation, whose store this is, are dead for all."""
        for rank, number in enumerate(self.numbers):
            if not seats.check([f"size/{rank}"]):
                bury(self._store, number, f"Process {rank} did not come to the others in time.")

    def bury_absent(self) -> None:
        """Those who have not come to the roll call that goes on are dead for all."""
        for rank, number in enumerate(self.numbers):
            if not self._store.check([f"roll/{self._turn}/{number}"]):
                bury(self._store, number, f"Process {rank} did not come to the others in time.")

    def roll_call(self, said: Any, *, left: bool = False, failed: Callable[[], str | None]) -> Succession:
        """Wait until everybody is here or gone; what each has to say (JSON) is told to all.

        left: this process had to leave its work for it. failed: a sentence, once the run has failed for another reason. Raises
        LostProcess: that, or the others went on without this process.
        """
        turn, me = self._turn, self.numbers[self.seat.rank]
        key = f"who/{turn}"
        self._come(turn, me, said, left)
        while not self._store.check([key]):
            if self.lost:  # maybe while it waits
                self._store.set(f"heard/{turn}/{me}", "")
            dead = {n for n in self.numbers if self._store.check([f"gone/{n}"])}
            here = [n for n in self.numbers if n not in dead and self._store.check([f"roll/{turn}/{n}"])]
            if len(here) + len(dead) == len(self.numbers):
                changed = any(self._store.check([f"{word}/{turn}/{n}"]) for word in ("left", "heard") for n in here)
                self._store.compare_set(key, "", json.dumps([here, self._waiting(), changed]))
            elif (sentence := failed()) is not None:
                raise LostProcess(sentence)
            else:
                time.sleep(_PAUSE)
        present, joining, changed = json.loads(self._store.get(key))
        if me not in present:
            raise LostProcess("The others took this process for lost and went on without it.")
        told = [json.loads(self._store.get(f"roll/{turn}/{n}")) for n in present]
        lost = [self._store.get(f"gone/{n}").decode() for n in self.numbers if n not in present]
        self._turn += 1
        self._seen = -1  # somebody may have left for the next one already
        if not joining and not changed and len(present) == len(self.numbers):
            return Succession(self.seat, self.numbers, list(range(len(present))), 0, told, [])
        numbers = [*present, *joining]
        self._admit(numbers, joining)  # by all alike: whoever had to do it might die now
        seat = self._next_seat(numbers, me)
        return Succession(seat, numbers, [self.numbers.index(n) for n in present], len(joining), told, lost)

    def _come(self, turn: int, me: int, said: Any, left: bool) -> None:
        """Be at the roll call, and let the others know."""
        if left:
            self._store.set(f"left/{turn}/{me}", "")
        if self.lost:  # before it can be counted as here
            self._store.set(f"heard/{turn}/{me}", "")
        self._store.set(f"roll/{turn}/{me}", json.dumps(said))
        self._store.add("changes", 1)

    def _next_seat(self, numbers: list[int], number: int) -> Seat:
        return self.seat._replace(rank=numbers.index(number), size=len(numbers), generation=self._turn)

    def _admit(self, numbers: list[int], joining: list[int]) -> None:
        for number in joining:
            self._store.set(f"admitted/{number}", json.dumps([self._next_seat(numbers, number), numbers]))

    def _waiting(self) -> list[int]:
        """Numbers of those who knocked and were not let in."""
        last = self._store.add("elastic/numbers", 0)
        first = int(self._store.get("elastic/first"))
        knocking = [n for n in range(first, last) if self._store.check([f"knock/{n}"])]
        return [
            n for n in knocking if not self._store.check([f"admitted/{n}"]) and not self._store.check([f"gone/{n}"])
        ]


def bury(store: dist.Store, number: int, sentence: str) -> None:
    """Write down that a process is dead; `store`: under `Seat.base`."""
    store.compare_set(f"gone/{number}", "", sentence)
    store.add("changes", 1)
