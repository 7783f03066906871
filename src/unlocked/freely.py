"""An epoch of replicas that run freely: each takes its next batch from a pool when it is ready for it (`Consensus.free`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from .data import Domains
from .data.order import steps
from .errors import InvalidChoice
from .handing_over import roll_call
from .loop import Interrupt, mean_losses
from .worker import Worker

if TYPE_CHECKING:
    from .fitting import Plan
    from .session import Trainer


class Freely:
    """What is left of an epoch. The batches are those of the shared order, number g being batch ⌊g/N⌋ of replica g mod N; who
    gets it is another matter. On several processes all of them do the same."""

    def __init__(self, trainer: Trainer, plan: Plan, interrupt: Interrupt) -> None:
        self._trainer, self._plan, self._interrupt = trainer, plan, interrupt
        if isinstance(plan.train, Domains):
            raise InvalidChoice("Replicas that run freely take batches of one data set; give one, or pairing='clocks'.")
        self._size = trainer.dealt
        self._rounds = steps(len(plan.train), plan.batch_size, self._size)

    def run(self, elastic: bool) -> None:
        """To the end of the epoch, or to where all processes stop. `elastic`: members may be lost and come. Raises Interrupted,
        MembersChanged."""
        self._interrupt.check(self._trainer.steps)
        while True:
            self._window(elastic)
            self._interrupt.check(self._trainer.steps)
            if self._trainer.batch_in_epoch >= self._rounds:
                return  # else somebody had entered this step before all knew that they are to stop

    def _window(self, elastic: bool) -> None:
        """To the end of the epoch, or of the round at which somebody stops the pool."""
        trainer = self._trainer
        self._begun, self._first = trainer.batch_in_epoch, trainer.steps
        self._pool = trainer.crew.pool(self._begun * self._size, self._rounds * self._size, self._size)
        begin = trainer.world.clock()
        trainer.update_freely(self._take, self._batch, self._stepped)
        seconds = trainer.world.clock() - begin
        rounds = self._pool.taken // self._size - self._begun
        trainer.batch_in_epoch, trainer.steps = self._begun + rounds, self._first + rounds
        for weights in trainer.weights:
            weights.round = trainer.steps
        trainer.elapsed += seconds
        trainer.book.samples += rounds * self._size * self._plan.batch_size
        trainer.book.seconds += seconds
        trainer.book.updates += rounds
        if elastic:
            roll_call(trainer, Path(str(self._plan.checkpoint)))
        trainer.settle()

    def _take(self) -> int | None:
        trainer = self._trainer
        if trainer.crew.stopping or trainer.crew.changing:
            self._pool.stop()
        return self._pool.take()

    def _batch(self, number: int) -> tuple[int, Tensor, Tensor]:
        trainer, plan = self._trainer, self._plan
        x, y = next(
            plan.train.batches(
                plan.batch_size,
                epoch=trainer.epoch % plan.epochs,
                seed=trainer.seed,
                start=number,
                device=trainer.device,
            )
        )
        return self._first + number // self._size - self._begun, x, y

    def _stepped(self, worker: Worker, losses: dict[str, float], samples: int, began: int) -> None:
        trainer = self._trainer
        trainer.book.add(losses, 0, 0.0)
        if not worker.last:
            return
        record = {"event": "step", "step": began + 1, "epoch": trainer.epoch, "phase": trainer.phase}
        samples = self._plan.samples(samples)
        record |= {"losses": mean_losses(losses, trainer.stages), "samples": samples, "seconds": 0.0}
        for callback in self._plan.callbacks:
            callback.on_step(trainer, record)
