"""An epoch of stages at their own rates (`Credit.free`): no steps of all, one run of the world's programs for the whole of it.

The first stage of a replica reads the replica's batches in their order; the others go on with what is in their buffers
(credit/at_own_rate.py). After Ctrl-C the first stages read no more, and all end what they have begun; what they were at is
saved, and the epoch goes on from there.

What an epoch's record has under "buffers", one row for each worker:

    replica, stage
    updates       made in this epoch
    forwarded     micro-batches only passed on, for stages above that had not made their updates yet
    waited        seconds with nothing usable in the buffer
    received      micro-batches that came
    overwritten   of those that left, how many nobody had used
    left          number of uses → entries that left after so many
    kept          entries here at the end
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .batch import own_memory
from .consensus import Independent
from .data.order import steps
from .errors import InvalidChoice
from .loop import Interrupt, mean_losses
from .rng import generator
from .rules.turns import drawn, staircase, ticks
from .worker import Worker
from .worlds import InProcess

if TYPE_CHECKING:
    from .fitting import Plan
    from .session import Trainer


def check_own_rates(trainer: Trainer) -> None:
    """Raises InvalidChoice for what does not go with stages at their own rates."""
    credit, consensus = trainer.credit, trainer.consensus
    if not credit.free:
        return
    rates = getattr(credit, "rates", "own")
    if rates == "own" and isinstance(trainer.world, InProcess):
        raise InvalidChoice(
            f"{credit.name} lets stages run as fast as they are, which means nothing in one process without a clock; take "
            "--world simulated or distributed, rates='equal', or a number for each stage, as in rates=(1,0.5,1)."
        )
    if rates != "own" and not isinstance(trainer.world, InProcess):
        raise InvalidChoice(
            f"rates={rates!r} draws whose turn it is in one process; on the simulated clock give devices' speeds (--speeds "
            "1,0.5,1) and rates='own', on processes rates='own'."
        )
    if not isinstance(consensus, Independent):
        raise InvalidChoice(
            f"Stages at their own rates make different numbers of updates at a time, so the replicas cannot meet under "
            f"{consensus.name}; take independent, or {credit.name} with rates='equal'."
        )
    if trainer.accumulate > 1 or (trainer.replicas > 1 and trainer.batchnorm == "average"):
        raise InvalidChoice(
            "Stages at their own rates make an update of every micro-batch, each for itself: give accumulate=1 and another "
            "batchnorm policy than 'average', or rates='equal'."
        )


class OwnRates:
    """What is left of an epoch. On several processes all of them do the same."""

    def __init__(self, trainer: Trainer, plan: Plan, interrupt: Interrupt) -> None:
        self._trainer, self._plan, self._interrupt = trainer, plan, interrupt
        self._total = steps(len(plan.train), plan.batch_size)

    def run(self) -> None:
        """To the end of the epoch, or to where all processes stop. Raises Interrupted."""
        while not self._window():
            self._interrupt.check(self._trainer.steps)

    def _window(self) -> bool:
        """To the end of the epoch (True), or to where somebody wishes to stop."""
        trainer = self._trainer
        world, begun = trainer.world, trainer.batch_in_epoch
        for weights in trainer.weights:
            memory = trainer.credit.buffered(weights)
            if not memory.turns:  # the epoch was begun under another rule
                memory.made = begun
        begin = world.clock()
        trainer.update_at_own_rates({w.replica: _Window(self, w.replica) for w in trainer.workers}, self._total)
        seconds = world.clock() - begin
        made = {(w.worker.replica, w.worker.stage): trainer.credit.buffered(w).made for w in trainer.weights}
        everywhere = [row for part in trainer.crew.share([[*place, n] for place, n in made.items()]) for row in part]
        read = max(n for _, stage, n in everywhere if stage == 0)
        trainer.batch_in_epoch, trainer.steps = read, trainer.steps + read - begun
        trainer.elapsed += seconds
        trainer.book.seconds += seconds
        trainer.book.updates += read - begun
        samples = self._plan.batch_size * sum(n for _, stage, n in everywhere if stage == 0)
        trainer.book.samples = samples
        all_alike = getattr(trainer.credit, "ends", "") == "updates"
        return all(n >= self._total for _, stage, n in everywhere if all_alike or stage == 0)

    # ---- what a replica's window asks ---------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Batches of a replica in an epoch."""
        return self._total

    @property
    def stopping(self) -> bool:
        """Whether somebody wishes to stop."""
        return self._trainer.crew.stopping

    def stream(self, replica: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A replica's batches from this one on, regularised and on the device."""
        trainer, plan = self._trainer, self._plan
        rows = plan.train.batches(
            plan.batch_size,
            epoch=trainer.epoch % plan.epochs,
            seed=trainer.seed,
            replica=replica,
            start=start,
            device=trainer.device,
        )
        first = trainer.steps - trainer.batch_in_epoch
        for k, (x, y) in enumerate(rows, start):
            x, y = trainer.regularised(replica, x, y, first + k)
            yield own_memory(x), own_memory(y)

    def turns(self, replica: int, stage: int) -> Iterator[int] | None:
        """The ticks of a stage, where they are drawn."""
        trainer = self._trainer
        rates: Any = getattr(trainer.credit, "rates", "own")
        if isinstance(rates, str):
            return None
        first = [] if trainer.steps else staircase(trainer.stages)
        source = generator(trainer.seed, "turns", replica, trainer.epoch, trainer.batch_in_epoch)
        return ticks(stage, chain(first, drawn(rates, source)))

    def stepped(self, worker: Worker, samples: int) -> None:
        """A stage has made an update."""
        trainer = self._trainer
        losses = trainer._losses_of(worker)
        trainer.book.noted([worker])
        worker.forget_reports()
        trainer.book.add(losses, 0, 0.0)
        if not worker.last:
            return
        record = {"event": "step", "step": worker.version, "epoch": trainer.epoch, "phase": trainer.phase}
        samples = self._plan.samples(samples)
        record |= {"losses": mean_losses(losses, trainer.stages), "samples": samples, "seconds": 0.0}
        for callback in self._plan.callbacks:
            callback.on_step(trainer, record)


class _Window:
    """The epoch, for one replica; see credit/at_own_rate.py."""

    def __init__(self, epoch: OwnRates, replica: int) -> None:
        self._epoch, self._replica = epoch, replica
        self.total = epoch.total
        self._stream: Iterator[tuple[Tensor, Tensor]] = iter(())

    def batch(self, k: int) -> tuple[Tensor, Tensor]:
        found = next(self._stream, None)
        if found is None:
            self._stream = self._epoch.stream(self._replica, k % self.total)
            found = next(self._stream)
        return found

    @property
    def stopping(self) -> bool:
        return self._epoch.stopping

    def turns(self, stage: int) -> Iterator[int] | None:
        return self._epoch.turns(self._replica, stage)

    def stepped(self, worker: Worker, samples: int) -> None:
        self._epoch.stepped(worker, samples)


def buffers_of_epoch(trainer: Trainer) -> list[dict[str, Any]] | None:
    """What the stages tell about their buffers after an epoch, of all processes; None under rules without any."""
    if not trainer.credit.buffers:
        return None
    rows = [
        {"replica": w.worker.replica, "stage": w.worker.stage, **trainer.credit.buffered(w).end_epoch()}
        for w in trainer.weights
    ]
    return sorted(
        (row for part in trainer.crew.share(rows) for row in part), key=lambda row: (row["replica"], row["stage"])
    )
