"""Rounds of micro-batches with an exchange beside each: what ACCO, DPU and weight prediction have in common.

    a round's exchange      how many samples        everybody's count
                            reduce-scatter          of the sums of gradients: part r to replica r
                            clip                    with `clip`: one number, by the norm of the whole mean gradient
                            optimizer               on the own part, with the sum divided by the number of samples of all
                            gather                  the new values from everybody

It goes on beside the round's micro-batches (worlds/beside.py) and is waited for at the round's end. Every stage has its own
exchanges, and `clip` is of each stage's own gradient, as everywhere here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..batch import Batch
from ..chain import Chain
from ..errors import UnlockedError
from ..flat import bounds, by_dtype, flat, put
from ..rules.accumulation import Sum, clip_factor, schedule_steps, summed
from ..work import work
from ..worker import Beside, Worker
from .base import Store, Weights
from .sharded_update import Shard

if TYPE_CHECKING:
    from .accumulating_rule import AccumulatingRule


class Accumulating(Weights, ABC):
    """Weights whose step consists of rounds of micro-batches; beside each goes an exchange, begun with the round.

    rounds: how many. A subclass says what goes on beside a round (`begin`), and what is done when both are over (`between`
    after a round that is not the last, `update` after the last one).

    kept: the sum of gradients taken to the next step. whole: what a round that is not the last has made of it, for the next
    round's exchange. seen: samples that went into the weights so far. left_out: samples of this
    replica that it did not manage, so far.
    """

    keeps_optimizer: ClassVar[bool] = True
    rounds: ClassVar[int] = 1
    channel: ClassVar[str]

    def __init__(self, worker: Worker, chain: Chain, store: Store, rule: AccumulatingRule) -> None:
        mitigation, store.mitigation = store.mitigation, None  # it works on the shard
        super().__init__(worker, chain, store)
        store.mitigation = mitigation
        given, self._per_step = rule.contributions, rule.samples_per_schedule_step
        self._contribution = given[worker.replica] if isinstance(given, tuple) else None
        self._managed = given == "managed"
        self._sizes = [len(part) for part in torch.arange(store.accumulate).tensor_split(self.rounds)]
        size = worker.replicas.size
        real = store.optimizer is not None  # not under shapes only
        together = self._clipped_together()
        self.part = (
            Shard(self.parameters, together, store.optimizer, mitigation, worker.replica, size) if real else None
        )
        self._norms = len(together)
        self.mitigating = None if self.part is None else self.part.mitigating
        self.kept: Sum | None = None
        self.whole: Sum | None = None
        self.seen = self.left_out = self._scheduled = 0
        self._arrived: Any = None
        self._torn = False
        self._parts_of_batch = 1
        self._ended = -1  # the last step that was done
        self._clear()

    def _clear(self) -> None:
        self.whole = None
        self._round = self._of_step = self._of_round = self._done = self._number = 0
        self._began = False
        self._beside: Beside | None = None

    # ---- which micro-batches ---------------------------------------------------------------------------------------

    def taken(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Those that fall to this replica's contribution; of "managed" rounds those that it had time for."""
        for batch in batches:
            k = batch.number % self.store.accumulate
            if k == 0:
                self._of_step = self._of_round = self._done = 0
            if self._wanted(batch.number // self.store.accumulate, k):
                samples = batch.x.shape[0]
                self._number, self._of_step = batch.number, round(samples / batch.weight)
                self._of_round += samples
                yield batch

    def _wanted(self, step: int, k: int) -> bool:
        if step == self._ended:
            return False
        number = next(n for n in range(self.rounds) if k < sum(self._sizes[: n + 1]))
        if self._managed:
            return number == self._round
        return k - sum(self._sizes[:number]) < self._share(number)

    def _share(self, number: int) -> int:
        """Micro-batches of this replica in a round, if it manages all."""
        size = self._sizes[number]
        return size if self._contribution is None else min(self._contribution, size)

    def _over(self) -> bool:
        """Whether the round is over with the micro-batch that has just been done."""
        last = sum(self._sizes[: self._round]) + self._share(self._round) - 1
        beside = self._beside
        return self._number % self.store.accumulate == last or (self._managed and beside is not None and beside.done)

    # ---- the rounds ------------------------------------------------------------------------------------------------

    async def read(self) -> None:
        """The first forward of a step begins its first round."""
        if not self._began:
            self._refuse_torn()
            self._began = True
            if self.part is not None:
                self.part.follow()
            await self.prepare()
            self._beside = self.begin()

    def _refuse_torn(self) -> None:
        if self._torn:
            raise UnlockedError(
                "A step failed while its update was on the way, so the replicas' optimizers are torn; go on from the last "
                "checkpoint (Trainer.resume)."
            )

    async def prepare(self) -> None:
        """Before the first round."""

    @abstractmethod
    def begin(self) -> Beside | None:
        """What goes on beside the round that begins now, if anything."""

    def start(self, words: str, gradients: Sum) -> Beside:
        """Begin an exchange; its result is `exchange`'s."""
        return self.worker.beside(words, lambda worker: self.exchange(worker, gradients))

    async def write(self) -> None:
        """A micro-batch's gradient is there; after the last of a round go on to the next one, or update."""
        self.pending += 1
        if not self._over():
            return
        self._parts_of_batch = (self.worker.micro_batch + 1) // (self._number + 1)
        self.worker.at(self.last_of_step)
        self._done += self._of_round
        if self._round < self.rounds - 1:
            arrived = None if self._beside is None else await self._beside
            self.whole = await self.worker.run("U", self.between, arrived)
            self._round, self._of_round = self._round + 1, 0
            self._beside = self.begin()
            return
        self.pending = self.store.accumulate - 1  # whatever was left out
        await super().write()

    @property
    def last_of_step(self) -> int:
        """The micro-batch under which exchanges and updates of the step are recorded: its last one."""
        step = self._number // self.store.accumulate
        return (step + 1) * self.store.accumulate * self._parts_of_batch - 1

    async def reduce(self) -> None:
        """Wait for what goes on beside the last round."""
        self._arrived = None if self._beside is None else await self._beside

    @work(gives=lambda self, arrived: Sum([], 0))
    def between(self, arrived: Any) -> Sum:
        """After a round that is not the last; `arrived` is the result of what went on beside it. Returns `whole`."""
        raise NotImplementedError  # not abstract: where there is one round, nothing is between rounds

    @work()
    def update(self) -> None:
        """Put the committed weights in place."""
        self.finish(self._arrived)

    async def mix(self) -> None:
        """Nothing is left to exchange; let the next step begin anew."""
        if self.part is None:
            self.kept = Sum([], 0)  # where there are no tensors
        if self._done != self._of_step:
            self.left_out += self._of_step - self._done
            losses = self.worker.losses  # their mean over what was done
            losses[:] = [loss * (self._of_step / self._done) for loss in losses]
        self._arrived, self._torn = None, False
        self._ended = self._number // self.store.accumulate
        self._clear()

    @abstractmethod
    def finish(self, arrived: Any) -> None:
        """After the last round: `arrived` is the result of what went on beside it."""

    def collect(self) -> Sum:
        """The sum of the gradients of this round, taken from the parameters."""
        found = summed([x.grad for x in self.parameters], self._of_step, self._of_round)
        self._drop_gradients()
        return found

    # ---- the exchange ----------------------------------------------------------------------------------------------

    async def exchange(self, worker: Worker, gradients: Sum) -> Any:
        """Beside a round: reduce-scatter, optimizer, gather."""
        worker.micro_batch = self.last_of_step
        replicas, channel = worker.replicas, self.channel
        counts = await replicas.gather(channel, torch.tensor([gradients.samples]))
        samples = sum(int(count) for count in counts)
        rows = await worker.run("U", self._flat, gradients)
        parts = [await replicas.reduce_scatter(channel, row) for row in rows]
        squares = await worker.run("U", self._take, parts, samples, gradients)
        factors = [1.0] * self._norms
        if self.store.clip is not None:
            everybodys = await replicas.gather(channel, torch.tensor(squares, dtype=torch.float64))
            factors = [clip_factor(of_all, self.store.clip) for of_all in zip(*(one.tolist() for one in everybodys))]
        made = await worker.run("U", self._make, factors, samples)
        return [[torch.cat(await replicas.gather(channel, row)) for row in weights] for weights in made]

    def _rows(self, gradients: Sum) -> list[Tensor]:
        """As many values as there are, where there are no tensors."""
        return [
            torch.empty(sum(self.parameters[k].numel() for k in positions), dtype=self.parameters[positions[0]].dtype,
                        device="meta")
            for positions in by_dtype(self.parameters)
        ]  # fmt: skip

    @work(gives=_rows)
    def _flat(self, gradients: Sum) -> list[Tensor]:
        """The sums in a row, one for each dtype."""
        return flat([torch.zeros_like(x) if g is None else g for g, x in zip(gradients.gradients, self.parameters)])

    @work(gives=lambda self, parts, samples, gradients: [0.0] * self._norms)
    def _take(self, parts: list[Tensor], samples: int, gradients: Sum) -> list[float]:
        assert self.part is not None
        return self.part.take(parts, samples, [g is not None for g in gradients.gradients])

    def _own_rows(self) -> list[list[Tensor]]:
        rank, size = self.worker.replica, self.worker.replicas.size
        rows = []
        for row in self._rows(Sum([], 0)):
            begin, end = bounds(len(row), size)[rank : rank + 2]
            rows.append(row[begin:end])
        return [rows]

    @work("update", gives=lambda self, factors, samples: self._own_rows())
    def _make(self, factors: list[float], samples: int) -> list[list[Tensor]]:
        assert self.part is not None
        if self.store.clip is not None:
            self.part.clip(factors)
        made = self.make(samples)
        self.part.drop_gradients()
        return made

    @abstractmethod
    def make(self, samples: int) -> list[list[Tensor]]:
        """The new weights' own parts (a row per dtype each), from the gradients taken into the shard."""

    def commit(self, samples: int) -> list[Tensor]:
        """The optimizer's step for good, and the schedule's."""
        assert self.part is not None
        self._torn = True  # until the new weights are in place everywhere
        made = self.part.step()
        self.seen += samples
        store = self.store
        if store.scheduler is not None and store.clock == "step":
            due = self._scheduled + 1 if self._per_step is None else schedule_steps(self.seen, self._per_step)
            while self._scheduled < due:
                store.scheduler.step()
                self._scheduled += 1
        return made

    @torch.no_grad()
    def put(self, rows: Sequence[Tensor]) -> None:
        """Values, a row per dtype, into the parameters."""
        put(rows, self.parameters)

    @torch.no_grad()
    def swap(self, rows: Sequence[Tensor]) -> None:
        """Values into the parameters, and those of the parameters into the rows."""
        before = flat(self.parameters)
        put(rows, self.parameters)
        for row, values in zip(rows, before):
            row.copy_(values)

    # ---- keeping ---------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        super().forget()
        self._clear()

    def optimizer_state(self) -> list[Tensor]:
        states = () if self.part is None else self.part.state.values()
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def carried(self) -> dict[str, Any]:
        self._refuse_torn()
        assert self.part is not None
        return {
            "gradients": None if self.kept is None else list(self.kept.gradients),
            "samples": 0 if self.kept is None else self.kept.samples,
            "seen": self.seen,
            "scheduled": self._scheduled,
            "left_out": self.left_out,
            "shard": self.part.carried(),
        }

    def load_carried(self, state: Mapping[str, Any]) -> None:
        assert self.part is not None
        self.kept = None if state["gradients"] is None else Sum(list(state["gradients"]), state["samples"])
        self.seen, self._scheduled, self.left_out = state["seen"], state["scheduled"], state["left_out"]
        self.part.load(state["shard"])
