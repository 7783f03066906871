"""Gossip between whoever is free: replicas compute as fast as they can, and no one arranges who meets whom.

After each gradient of replica i, Poisson(Λ_ii/2) exchanges are due to it; for each it asks neighbour j, drawn with λ_ij/Λ_ii,
so that an edge is used λ_ij times per gradient, from either end. All of it goes on beside the gradients:

    ask      i → j     if j is free it accepts; if it has asked i at the same time, both take that for a yes; else it refuses,
                       and i asks another neighbour
    rows     i ↔ j     both send x as it is then, mixed before, and take the difference in (rules/gossip.py)
    over     i → all   i has made its last gradient of the window; it still answers until all others are over

Moments are on one clock for all, in gradients of a usual replica: the exchange is at the moment of the answer, and what is
taken in later has flowed since. So Σ x and Σ x̃ are conserved once all have flowed to a common moment (`settle`).

Where the network is too slow for the exchanges that are due, η is lowered with the share of them that the last window had:
with the η of exchanges that there are not, x and x̃ can run apart on long rings (docs/results/gossip_training.md).

Which exchanges take place depends on who is faster: on the simulated clock alike every time, on processes not.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...chain import Chain
from ...errors import LostPeer
from ...flat import flat, put
from ...rng import generator
from ...worker import Beside, Worker
from ..base import Store, unused_optimizer
from .weights import Gossiped

if TYPE_CHECKING:
    from ..gossip import Gossip

Word = Literal["ask", "accept", "refuse", "over"]
_WORDS: tuple[Word, ...] = ("ask", "accept", "refuse", "over")
Program = Callable[[Worker], Coroutine[Any, Any, None]]
_WARM = 2  # gradients before one is measured


class Available(Gossiped):
    """Exchanges with whoever is free.

    gone: neighbours that are lost.
    """

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: Gossip, seed: int) -> None:
        super().__init__(worker, chain, store, rule, seed)
        self._lock = threading.Lock()  # x and x̃ belong to two threads
        self._unit: float | None = None  # seconds of a gradient of a usual replica
        self._seconds: float | None = None  # of this replica's, a moving mean
        self._windows = self._due = self._stepped = 0
        self.gone: set[int] = set()
        self._partner: int | None = None  # whom it has asked, or exchanges with
        self._asked: float | None = None  # when it asked
        self._ended: set[int] = set()  # neighbours that are over
        self._refused: set[int] = set()
        self._over = False
        self._besides: list[Beside] = []
        self._met, self._last = 0, 0.0
        self._begun = False
        self._awake = self._ending = False  # whether `_turns` has a message to take, and whether it takes no other
        self._draws = 0
        self._counted = 0  # exchanges of earlier windows
        self._nominal_eta, self._delivered = (
            self.copies.eta,
            1.0,
        )  # η, and the share of the exchanges due that there were
        self._scheduled: int | None = None  # rounds that the schedule has followed, or stood still before its first

    # ---- the window ------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Begin to listen to the neighbours."""
        worker = self.worker
        if not self._begun:
            self.copies.begin(self.averaged, 0.0)
            self._begun = True
        self._origin = worker.say_first(f"gossip/{worker.stage}/{self._windows}", worker.now)
        self._opened, self._met = self.round, sum(self.exchanges.values())
        self._over, self._partner, self._asked = False, None, None
        self._ended, self._refused = set(), set()
        self._awake = self._ending = False
        self._statistics = [x.clone() for x in self._moved_by_forwards]
        neighbours = [j for j in self.exchanges if j not in self.gone]
        programs: dict[str, Program] = {f"replica {j}": functools.partial(self._hear, j) for j in neighbours}
        programs["those whose turn it is"] = self._turns
        self._besides = [worker.beside(f"gossip with {words}", program) for words, program in programs.items()]
        self._last, self._stepped = worker.now, 0

    async def close(self) -> None:
        """Wait until the neighbours are over, too."""
        self._over = True
        await self._wake(self.worker)
        for beside in self._besides:
            await beside
        self._besides = []

    def _time(self) -> float:
        """The moment, in gradients of a usual replica since the window began; 0 until it is known how long one takes."""
        return 0.0 if self._unit is None else max(0.0, (self.worker.now - self._origin) / self._unit)

    # ---- gradients, on the main thread -----------------------------------------------------------------------------

    async def read(self) -> None:
        """Nothing to begin: exchanges go on all the time."""

    async def step(self) -> None:
        await self.worker.run("U", self.update)
        self._measure()
        due = self._draw_due()
        with self._lock:
            self._due += due
        await self._wake(self.worker)

    def update(self) -> None:
        self._schedule_until(self.round - 1)  # the rate of the round that the batch belongs to
        super().update()

    def _draw_due(self) -> int:
        half = 0.5 * float(self.graph.strengths[self.worker.replica])
        place = (self.worker.stage, self.worker.replica, self.worker.version)
        return int(torch.poisson(torch.tensor(half), generator(self.seed, "exchanges due", *place)))

    @torch.no_grad()
    def _displace(self, before: list[Tensor], time: float) -> None:
        after = flat(self.averaged)
        with self._lock:
            self.copies.displace(before, after, self._time())
            put(self.copies.x, self.averaged)
            met = sum(self.exchanges.values())
        self._statistics = [x.clone() for x in self._moved_by_forwards]
        self.stale += met - self._met
        self._met = met

    def _measure(self) -> None:
        """How long gradients take; the first replica that knows it says so for all, until they agree (`settle`)."""
        now = self.worker.now
        seconds, self._last = now - self._last, now
        self._stepped += 1
        if self._stepped <= _WARM:
            return
        self._seconds = seconds if self._seconds is None else 0.5 * (self._seconds + seconds)
        if self._unit is None:
            self._unit = self.worker.say_first(f"gossip/{self.worker.stage}/unit", max(self._seconds, 1e-9))

    def _step_schedule(self) -> None:
        """The schedule follows what all replicas have done together (`update`, `end_window`), not this one's own updates."""

    def _schedule_until(self, rounds: int) -> None:
        if self.store.scheduler is None or self.store.clock != "step":
            return
        if self._scheduled is None:  # rounds of another rule, or of another stage's training, are not this schedule's
            self._scheduled = self._opened
        with unused_optimizer():
            while self._scheduled < rounds:
                self.store.scheduler.step()
                self._scheduled += 1

    # ---- beside them -----------------------------------------------------------------------------------------------

    async def _wake(self, here: Worker) -> None:
        """Let `_turns` see whether there is something to do; one message is enough, and none may be left over."""
        with self._lock:
            if self._awake or self._ending:
                return
            self._awake = True
        await here.own.send("gossip/turns", torch.zeros(0))

    async def _woken(self, here: Worker) -> None:
        await here.own.recv("gossip/turns")
        with self._lock:
            self._awake = False

    async def _say(self, here: Worker, neighbour: int, word: Word, time: float = 0.0) -> None:
        message = torch.tensor([_WORDS.index(word), time], dtype=torch.float64)
        await here.replicas.peer(neighbour).send("gossip/words", message)

    async def _turns(self, here: Worker) -> None:
        """Ask for the exchanges that are due, one at a time; say when it is over."""
        while True:
            await self._woken(here)
            if self._partner is not None:
                continue
            if self._over:
                break
            await self._ask(here)
        with self._lock:
            self._ending = True
        if self._awake:
            await self._woken(here)
        for neighbour in self.exchanges:
            if neighbour not in self.gone:
                await self._say(here, neighbour, "over")

    async def _ask(self, here: Worker) -> None:
        if self._due <= 0:
            return
        free = [j for j in self.exchanges if not {j} & (self.gone | self._ended | self._refused)]
        if not free:
            self._refused.clear()  # asked again at the next occasion
            return
        neighbour = self._draw(free)
        self._partner, self._asked = neighbour, self._time()
        await self._say(here, neighbour, "ask", self._asked)

    def _draw(self, free: list[int]) -> int:
        rates = torch.tensor([self.graph.rate(self.worker.replica, j) for j in free], dtype=torch.float64)
        self._draws += 1
        source = generator(self.seed, "whom to ask", self.worker.stage, self.worker.replica, self._draws)
        return free[int(torch.multinomial(rates, 1, generator=source))]

    async def _hear(self, neighbour: int, here: Worker) -> None:
        """What a neighbour says, until it is over."""
        link = here.replicas.peer(neighbour)
        try:
            while neighbour not in self._ended or self._partner == neighbour:
                number, time = (await link.recv("gossip/words")).tolist()
                await self._answer(here, neighbour, _WORDS[int(number)], time)
        except LostPeer:
            self.gone.add(neighbour)
            await self._free(here, neighbour)

    async def _answer(self, here: Worker, neighbour: int, word: Word, time: float) -> None:
        if word == "over":
            self._ended.add(neighbour)
        elif word == "refuse":
            self._refused.add(neighbour)
            await self._free(here, neighbour)
        elif word == "accept":
            await self._exchange_with(here, neighbour, time, mine=True)
        elif self._partner is None:
            self._partner, now = neighbour, max(time, self._time())
            await self._say(here, neighbour, "accept", now)
            await self._exchange_with(here, neighbour, now, mine=False)
        elif self._partner == neighbour and self._asked is not None:  # both have asked
            await self._exchange_with(here, neighbour, max(time, self._asked), mine=self.worker.replica < neighbour)
        else:
            await self._say(here, neighbour, "refuse")

    async def _exchange_with(self, here: Worker, neighbour: int, time: float, mine: bool) -> None:
        """`mine`: it was this replica's to ask for."""
        link, self._asked = here.replicas.peer(neighbour), None
        with self._lock:
            rows = self.copies.sent(max(time, self._time()))
        for row in rows:
            await link.send("gossip/rows", row)
        theirs = [await link.recv("gossip/rows", row) for row in rows]
        with self._lock:
            self.copies.flow(self._time())
            self.copies.meet(rows, theirs, time)
            self.exchanges[neighbour] += 1
            self._due -= mine
        self._refused.clear()
        await self._free(here, neighbour)

    async def _free(self, here: Worker, neighbour: int) -> None:
        """Done with a neighbour."""
        if self._partner == neighbour:
            self._partner = self._asked = None
        await self._wake(here)

    # ---- between two windows ---------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """All flow to a common moment, and agree how long a gradient takes; the weights are then what is trained."""
        met = sum(self.exchanges.values()) - self._counted
        mine = torch.tensor([self.moment, self._seconds or 0.0, met], dtype=torch.float64)
        rows = torch.stack(await self.worker.replicas.gather("gossip/times", mine))
        known = rows[:, 1][rows[:, 1] > 0]
        passed = float(rows[:, 0].max())
        self.end_window(passed)
        self._counted += met
        self._mix_as_delivered(passed, float(rows[:, 2].sum()))
        if len(known):
            self._unit = float(known.mean())

    def _mix_as_delivered(self, passed: float, met: float) -> None:
        """η belongs to the exchanges that there are: where the network delivers a share of those due, so much of η."""
        due = passed * float(self.graph.strengths.sum())
        if due > 0.0:
            self._delivered = min(1.0, met / due)
            self.copies.eta = self._nominal_eta * self._delivered

    @property
    def moment(self) -> float:
        """Where this worker is in its window; 0 between two."""
        return self._time() if self._begun else 0.0

    def end_window(self, time: float) -> None:
        """Flow to a moment; the weights are then what is trained."""
        if self._begun:
            self.copies.flow(time)
            put(self.copies.x, self.averaged)
            if self._stepped:
                self._schedule_until(self.round)
            self.copies.time, self._windows, self._begun = 0.0, self._windows + 1, False

    def renumber(self, former: Sequence[int]) -> None:
        """The replicas that were these go on, in this order."""
        self.exchanges = {former.index(j): count for j, count in self.exchanges.items() if j in former}
        self._counted = sum(self.exchanges.values())

    async def realign(self) -> None:
        """Replicas that run freely count their own updates: there is nothing to align."""

    def forget(self) -> None:
        super().forget()
        self._besides, self._begun = [], False

    def carried(self) -> dict[str, Any]:
        own = {
            "windows": self._windows,
            "due": self._due,
            "draws": self._draws,
            "unit": self._unit,
            "delivered": self._delivered,
        }
        return super().carried() | own | {"seconds": self._seconds, "scheduled": self._scheduled}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        super().load_carried(state)
        self._windows, self._due, self._draws = (int(state.get(key, 0)) for key in ("windows", "due", "draws"))
        self._scheduled = state.get("scheduled")
        self._delivered = float(state.get("delivered", 1.0))
        self.copies.eta, self._counted = self._nominal_eta * self._delivered, sum(self.exchanges.values())
        self._unit, self._seconds = state.get("unit"), state.get("seconds")
        self._met = sum(self.exchanges.values())
