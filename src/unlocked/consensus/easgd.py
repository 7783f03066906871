"""EASGD: elastic averaging (Zhang, Choromanska & LeCun, 2015, Algorithm 1, Eq. 2-3).

    θ_n ← OPT_n(θ_n, ∇f_n(θ_n))
    d_n ← ρ (θ_n − c);   θ_n ← θ_n − d_n;   c ← c + Σ_n d_n         every H updates

    c the centre, which is the result; ρ = β/N with β = 0.9 unless given. H: `period`. Σ_n θ_n + c is conserved by an exchange.

Synchronous: all replicas at once, each with a copy of the centre, by one mean: Σ_n d_n = ρ N (θ̄ − c). `overlap` as in PAPA: the
difference is that of τ updates before.

Asynchronous: the centre lives with replica 0. Another replica sends its weights every H updates of its own, and goes on;
replica 0 answers with d_n when it has made an update, one replica after the other; d_n is taken off when it has come. Nobody
waits.
A replica whose answer is not there yet sends nothing new. Which exchange comes first depends on who is faster, so processes
give other numbers than one process, where every request is answered within the step.

Limits: ρ = 0 is independent training; ρ = 1/N puts the centre at the replicas' mean; PAPA is EASGD with the mean as centre.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..chain import Chain, Stage
from ..errors import InvalidChoice
from ..flat import flat, put
from ..rules.averaging import elastic
from ..work import work
from ..worker import Worker
from .averaging.exchange import Sends
from .averaging.rule import Averaging
from .averaging.weights import Averaged, Fragment, Rows
from .base import Properties, Store, Weights


class _Elastic(Averaged):
    """centre: a row per dtype, from the beginning of training on."""

    rule: EASGD
    sends: ClassVar[Sends] = "estimates"

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: EASGD) -> None:
        super().__init__(worker, chain, store, rule)
        self.centre: Rows | None = None
        self.rho = rule.rho_of(worker.replicas.size)

    def update(self) -> None:
        self.begin()
        super().update()

    def begin(self) -> Rows:
        """The centre begins where training does."""
        if self.centre is None:
            self.centre = flat(self.parameters)
        return self.centre

    def shared_state(self) -> Rows:
        return self.begin()

    def receive(self, fragment: Fragment, mean: Rows, begun: Rows | None) -> None:
        assert self.centre is not None
        rows, size = flat(self.parameters), self.worker.replicas.size
        for k, (theta, centre, theta_mean) in enumerate(zip(rows, self.centre, mean)):
            if begun is None:
                elastic(theta, centre, self.rho)
            else:
                theta.sub_(begun[k] - centre, alpha=self.rho)
            centre.add_(theta_mean - centre, alpha=self.rho * size)
        put(rows, self.parameters)

    async def judged(self) -> Stage:
        """A copy of the stage with the centre's weights."""
        copied = self.plain_copy()
        if self.centre is not None:
            put(self.centre, [x for x in copied.parameters() if x.requires_grad])
        return copied

    def carried(self) -> dict[str, Any]:
        return super().carried() | {"centre": self.centre}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        super().load_carried(state)
        self.centre = state["centre"]


class _Asynchronous(_Elastic):
    """Replica 0 holds the centre and answers; the others ask. asked: whether an answer is on its way.

    requests, answered: how many this replica sent, and replica 0 answered to each, since all were last answered.
    """

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: EASGD) -> None:
        super().__init__(worker, chain, store, rule)
        self._asked, self._requests = False, 0
        self._answered = [0] * worker.replicas.size
        self._holds = worker.replica == 0
        self._others = [worker.replicas.peer(n) for n in range(1, worker.replicas.size)]
        self._kinds = len({x.dtype for x in self.parameters})

    def update(self) -> None:
        if self._holds:
            self.begin()
        Averaged.update(self)

    async def mix(self) -> None:
        self._ended = False
        if self._holds:
            await self._serve()
        elif self._asked and await self._centre.arrived("easgd/answers") >= self._kinds:
            await self._take_answer()
        (fragment,) = self.fragments
        if fragment.due(self.worker.version):
            await self._exchange(fragment)

    @property
    def _centre(self) -> Any:
        return self.worker.replicas.peer(0)

    async def _exchange(self, fragment: Fragment) -> None:
        if self._holds:
            await self.worker.run("U", self._pull_own)
            self._ended = True
        elif not self._asked:
            self._asked, self._requests = True, self._requests + 1
            for row in self._rows(fragment):
                await self._centre.send("easgd/requests", row)

    async def _serve(self) -> None:
        """Answer all requests that are there, in the order of the replicas."""
        for n, other in enumerate(self._others, start=1):
            while await other.arrived("easgd/requests") >= self._kinds:
                await self._answer(n)

    async def _answer(self, n: int) -> None:
        other = self._others[n - 1]
        self._answered[n] += 1
        rows = [await other.recv("easgd/requests") for _ in range(self._kinds)]
        for row in await self.worker.run("U", self._differences_from_centre, rows):
            await other.send("easgd/answers", row)

    async def _take_answer(self) -> None:
        rows = [await self._centre.recv("easgd/answers") for _ in range(self._kinds)]
        await self.worker.run("U", self._take_off, rows)
        self._asked, self._ended = False, True

    # ---- what is computed ------------------------------------------------------------------------------------------

    @work()
    @torch.no_grad()
    def _pull_own(self) -> None:
        rows = flat(self.parameters)
        for theta, centre in zip(rows, self.centre or []):
            centre.add_(elastic(theta, centre, self.rho))
        put(rows, self.parameters)

    @work(gives=lambda self, rows: rows)
    @torch.no_grad()
    def _differences_from_centre(self, rows: Rows) -> Rows:
        self.begin()
        answers = [(row - centre).mul_(self.rho) for row, centre in zip(rows, self.centre or [])]
        for centre, answer in zip(self.centre or [], answers):
            centre.add_(answer)
        return answers

    @work()
    @torch.no_grad()
    def _take_off(self, rows: Rows) -> None:
        mine = flat(self.parameters)
        for theta, row in zip(mine, rows):
            theta.sub_(row)
        put(mine, self.parameters)

    # ---- between two steps -----------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """All requests are answered, all answers taken."""
        requests = await self.worker.replicas.gather("easgd", torch.tensor(self._requests))
        if self._holds:
            for n, count in enumerate(requests):
                for _ in range(int(count) - self._answered[n]):
                    await self._answer(n)
        elif self._asked:
            await self._take_answer()
        self._requests, self._answered = 0, [0] * self.worker.replicas.size

    async def judged(self) -> Stage:
        """Everybody is told the centre."""
        if self._holds:
            for other in self._others:
                for row in self.begin():
                    await other.send("easgd/centre", row.clone())
            return await super().judged()
        centre = [await self._centre.recv("easgd/centre") for _ in range(self._kinds)]
        copied = self.plain_copy()
        put(centre, [x for x in copied.parameters() if x.requires_grad])
        return copied

    async def realign(self) -> None:
        """Requests that a failed step left are dropped with its messages."""
        self._asked, self._requests = False, 0
        self._answered = [0] * self.worker.replicas.size
        await super().realign()

    def averages_statistics(self) -> bool:
        return False  # there is no update at which all of them meet


@dataclass(frozen=True, kw_only=True)
class EASGD(Averaging):
    """Tie the replicas to a common centre by springs.

    Args:
        rho: strength ρ of an exchange, in [0, 1]; None: 0.9/N.
        asynchronous: each replica exchanges on its own schedule, without waiting.
        period, staggered, overlap, compression: see averaging/rule.py (the last two: synchronous only).
    """

    rho: float | None = None
    asynchronous: bool = False

    name: ClassVar[str] = "easgd"
    properties: ClassVar[Properties] = Properties(
        title="EASGD (Zhang et al. 2015)",
        source="FACTS 2.3",
        barrier="all replicas, every H updates; asynchronous: none",
        bytes="2(N−1)/N Ψ_P / H; asynchronous: Ψ_P / H to and from replica 0",
        replicas="differ, tied to a centre",
        result="the centre",
    )
    shares_data: ClassVar[bool] = True
    needs_equal_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho is not None and not 0.0 <= self.rho <= 1.0:
            raise InvalidChoice(f"rho={self.rho} is not possible; give a number from 0 to 1, or None for 0.9/N.")
        if self.asynchronous and (self.overlap or self.compression != "none"):
            raise InvalidChoice(
                "easgd(asynchronous=True) overlaps by itself and sends weights as they are; leave out overlap and compression."
            )

    def rho_of(self, replicas: int) -> float:
        """ρ for N replicas."""
        return 0.9 / replicas if self.rho is None else self.rho

    @property
    def crossing(self) -> frozenset[str]:
        return frozenset(["easgd/requests", "easgd/answers"]) if self.asynchronous else super().crossing

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        size = worker.replicas.size
        if not self.asynchronous and self.rho_of(size) * (size + 1) > 2:
            raise InvalidChoice(
                f"rho={self.rho} is too strong for {size} replicas: the centre would swing further at every exchange; give at "
                f"most 2/(N+1) = {2 / (size + 1):.3g}, or None for 0.9/N."
            )
        if self.asynchronous and store.batchnorm == "average":
            raise InvalidChoice(
                "Under easgd(asynchronous=True) the replicas never meet, so batchnorm='average' has no moment to average at; "
                "give batchnorm='local' or 'refresh'."
            )
        return (_Asynchronous if self.asynchronous else _Elastic)(worker, chain, store, self)
