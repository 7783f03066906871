"""The loop of `Trainer.fit`: epochs, validation, callbacks, checkpoints, Ctrl-C."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .batch import Samples
from .callbacks import Callback
from .consensus.base import unused_optimizer
from .errors import InvalidChoice, LostProcess, MembersChanged
from .feature_cache import check_cached, fingerprint, keeps_features, numbered, remove_features
from .freely import Freely
from .handing_over import after_loss, become_elastic, is_elastic
from .loop import EpochBook, Interrupt, Interrupted, interrupted, mean_losses
from .merging import measured_steps
from .own_rates import OwnRates, buffers_of_epoch
from .probes.step import Metering, live_peak, merged
from .worlds import Distributed

if TYPE_CHECKING:
    from .session import Trainer


class Plan(NamedTuple):
    """What `fit` was asked for; see there."""

    train: Any
    validate: Any
    epochs: int
    validate_every: int
    batch_size: int
    callbacks: Sequence[Callback]
    checkpoint: str | Path | None
    checkpoint_every: int

    def samples(self, rows: int) -> int:
        """How many samples these rows of training batches are: half as many, if there are two views of each image."""
        return rows // getattr(self.train, "views", 1)


class Fitting:
    """Trains a trainer as planned. On several processes all of them do the same."""

    def __init__(self, trainer: Trainer, plan: Plan) -> None:
        self._trainer, self._plan = trainer, plan
        self._metering = Metering(trainer)  # of this phase, of this process
        self._elastic = is_elastic(trainer, plan.checkpoint)
        self._settle()
        self._open: dict[str, Any] = {}  # what an epoch was before it was ended, until its record is written
        self._total = plan.epochs * trainer.credit.phases(trainer.stages)

    def _settle(self) -> None:
        """A run that goes on must go on as it was begun."""
        trainer, plan = self._trainer, self._plan
        if trainer.batch_in_epoch and trainer.batch_size not in (None, plan.batch_size):
            raise InvalidChoice(
                f"This run stopped inside an epoch of batches of {trainer.batch_size}; go on with batch_size="
                f"{trainer.batch_size}, not {plan.batch_size}."
            )
        if plan.batch_size < trainer.accumulate:
            raise InvalidChoice(
                f"A batch of {plan.batch_size} cannot be split into {trainer.accumulate} micro-batches; give larger batches or "
                "a smaller accumulate."
            )
        phases = trainer.credit.phases(trainer.stages)
        if phases > 1 and trainer.epoch and trainer.epochs_per_phase not in (None, plan.epochs):
            raise InvalidChoice(
                f"{trainer.credit.name} trains each stage for {trainer.epochs_per_phase} epochs in this run, not "
                f"{plan.epochs}."
            )
        if keeps_features(trainer.credit):
            check_cached(trainer, plan.train)
            self._data = fingerprint(trainer, plan.train)
        trainer.epochs_per_phase, trainer.batch_size = plan.epochs, plan.batch_size

    def run(self) -> list[dict[str, Any]]:
        """To the end of the last epoch; the records of the epochs. Raises Interrupted, LostProcess, whatever a step raises."""
        trainer, plan = self._trainer, self._plan
        reason = "failed"
        for callback in plan.callbacks:
            callback.on_start(trainer, self._total)
        try:
            trainer.credit.meet(trainer, plan.train)
            if self._elastic:
                become_elastic(trainer, Path(str(plan.checkpoint)))
            with Interrupt(trainer.crew) as interrupt:
                records = self._epochs_without_the_lost(interrupt)
            reason = "finished"
            remove_features(trainer.weights)
        except MembersChanged as change:
            reason = "interrupted"
            assert isinstance(trainer.world, Distributed)
            trainer.world.crew.pass_wishes_on(change.cluster)
            raise
        except Interrupted as stop:
            reason = "interrupted"
            if plan.checkpoint is None:
                raise
            raise self._saved() from stop
        except LostProcess as lost:
            raise trainer.located(lost) from lost
        except BaseException as error:
            trainer.crew.fail(error)
            raise
        finally:
            for callback in plan.callbacks:
                callback.on_stop(trainer, reason)
        return records

    def _epochs_without_the_lost(self, interrupt: Interrupt) -> list[dict[str, Any]]:
        """Where members may be lost, the others hand over what they have to the next generation of them."""
        try:
            return self._epochs(interrupt)
        except LostProcess as lost:
            if self._elastic:
                for name, value in self._open.items():
                    setattr(self._trainer, name, value)
                after_loss(self._trainer, Path(str(self._plan.checkpoint)), lost)
            raise

    def _saved(self) -> Interrupted:
        trainer, folder = self._trainer, self._plan.checkpoint
        assert folder is not None
        trainer.save(folder)
        return interrupted(
            f"Stopped after {trainer.steps} updates (epoch {trainer.epoch}). Saved to {folder}; "
            f"go on with Trainer.resume({str(folder)!r}).",
            trainer.crew.stopped_by,
        )

    def _epochs(self, interrupt: Interrupt) -> list[dict[str, Any]]:
        trainer, plan = self._trainer, self._plan
        records = []
        while trainer.epoch < self._total:
            interrupt.check(trainer.steps)
            due = (trainer.epoch + 1) % plan.epochs % plan.validate_every == 0
            records.append(self._epoch(due, interrupt))
            if plan.checkpoint is not None and (
                trainer.epoch % plan.checkpoint_every == 0 or trainer.epoch == self._total
            ):
                trainer.save(plan.checkpoint)
        return records

    def _epoch(self, validated: bool, interrupt: Interrupt) -> dict[str, Any]:
        trainer, plan = self._trainer, self._plan
        trainer.phase = trainer.epoch // plan.epochs
        trainer.begin_epoch()
        if trainer.batch_in_epoch == 0:
            trainer.sent_before, trainer.book = trainer.bytes_sent, EpochBook()
        if trainer.consensus.free:
            Freely(trainer, plan, interrupt).run(self._elastic)
        elif trainer.credit.free:
            OwnRates(trainer, plan, interrupt).run()
        else:
            for shares in self._streams():
                interrupt.check(trainer.steps)  # before a step, not after: an epoch whose last step is done is ended
                self._step(shares)
        self._drain()
        trainer.settle()
        self._open = {name: getattr(trainer, name) for name in ("epoch", "batch_in_epoch", "sent_before", "book")}
        self._end_epoch()
        self._step_schedules()
        record = self._close_books()
        scored = plan.validate is not None and validated
        record["validation"] = trainer.evaluate(plan.validate).to_json() if scored else None
        for callback in plan.callbacks:
            callback.on_epoch(trainer, record)
        self._open = {}
        return record

    def _streams(self) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        """The batches of the replicas that have a worker here, step by step."""
        trainer, plan = self._trainer, self._plan
        rule, count = trainer.consensus, trainer.replicas
        here = sorted({replica for worker in trainer.workers for replica in rule.feeds(worker, count)})
        streams = [
            plan.train.batches(
                plan.batch_size,
                epoch=trainer.epoch % plan.epochs,
                seed=trainer.seed,
                replica=replica,
                shards=trainer.replicas if trainer.consensus.shares_data else 1,
                start=trainer.batch_in_epoch,
                device=trainer.device,
            )
            for replica in here
        ]
        numbers = self._numbers(here) if keeps_features(trainer.credit) else itertools.repeat({})
        for shares, trainer.samples in zip(zip(*streams), numbers):
            yield dict(zip(here, shares))

    def _numbers(self, here: list[int]) -> Iterator[dict[int, Samples]]:
        """Which samples those batches hold."""
        trainer, data = self._trainer, self._plan.train
        streams = [
            numbered(
                data,
                self._plan.batch_size,
                epoch=trainer.epoch % self._plan.epochs,
                seed=trainer.seed,
                replica=replica,
                shards=trainer.replicas if trainer.consensus.shares_data else 1,
                start=trainer.batch_in_epoch,
            )
            for replica in here
        ]
        return ({k: Samples(n, len(data), self._data) for k, n in zip(here, rows)} for rows in zip(*streams))

    def _step(self, shares: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        trainer = self._trainer
        begin = trainer.world.clock()
        losses = self._metered_step(shares) if self._to_be_metered() else trainer.update(shares)
        seconds = trainer.world.clock() - begin
        samples = self._plan.samples(trainer.replicas * len(next(iter(shares.values()))[0]))
        trainer.batch_in_epoch += 1
        trainer.elapsed += seconds
        trainer.book.add(losses, samples, seconds)
        record = {"event": "step", "step": trainer.steps, "epoch": trainer.epoch, "phase": trainer.phase}
        record |= {"losses": mean_losses(losses, trainer.stages), "samples": samples, "seconds": seconds}
        for callback in self._plan.callbacks:
            callback.on_step(trainer, record)

    def _end_epoch(self) -> None:
        """Count it, with what the consensus rule does at its end."""
        trainer = self._trainer
        begin = trainer.world.clock()
        trainer.end_epoch()
        seconds = trainer.world.clock() - begin
        trainer.elapsed += seconds
        trainer.book.seconds += seconds

    def _drain(self) -> None:
        """Empty the pipeline of a delayed rule, if it wants that at the end of this epoch."""
        trainer = self._trainer
        if not trainer.credit.drains(last=trainer.epoch + 1 == self._total):
            return
        begin = trainer.world.clock()
        trainer.drain()
        seconds = trainer.world.clock() - begin
        trainer.elapsed += seconds
        trainer.book.seconds += seconds

    def _to_be_metered(self) -> bool:
        """The first updates of a phase are, until one is worth keeping."""
        known = any(record["phase"] == self._trainer.phase for record in self._trainer.memory)
        return not known and len(self._metering.records) < self._metering.wanted

    def _metered_step(self, shares: Mapping[int, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """A step under the meters of memory; its values are the same."""
        trainer, saved = self._trainer, self._metering.saved
        losses = self._metering.update(shares)
        if saved.peak > (trainer.activation_peak or 0):
            trainer.activation_peak, trainer.activation_curve = saved.peak, saved.curve
        return losses

    def _share_memory(self) -> None:
        """What the meters said last, of all processes, which have all metered the same updates; once that is worth keeping."""
        trainer, records = self._trainer, self._metering.records
        last_of_phase = trainer.epoch % self._plan.epochs == 0
        # a pipeline that was emptied will be as full again at the end of the next epoch, not fuller
        emptied = len(records) >= 2 and trainer.credit.drains(last=last_of_phase)
        if len(records) >= self._metering.wanted or (records and (last_of_phase or emptied)):
            trainer.memory = [*trainer.memory, *merged(trainer.crew.share(records[-1:]))]
            self._metering = Metering(trainer)

    def _step_schedules(self) -> None:
        trainer = self._trainer
        if trainer.schedule_every != "epoch":
            return
        one_by_one = trainer.credit.phases(trainer.stages) > 1
        for weights in trainer.weights:
            # greedy learning: the schedule of a stage counts only epochs in which that stage was trained
            trained = not one_by_one or weights.worker.stage == trainer.phase
            if weights.store.scheduler is not None and trained:
                with unused_optimizer():
                    weights.store.scheduler.step()

    def _close_books(self) -> dict[str, Any]:
        """The record of the epoch, of all processes."""
        trainer = self._trainer
        trainer.measured = measured_steps(trainer)
        self._share_memory()
        trainer.activation_peak = max(trainer.crew.share(trainer.activation_peak), key=lambda peak: peak or 0)
        trainer.book = book = trainer.book.share(trainer.crew)
        record = {
            "event": "epoch",
            "epoch": trainer.epoch,
            "phase": trainer.phase,
            "step": trainer.steps,
            "losses": book.mean_losses(trainer.stages),
            "seconds": book.seconds,
            "elapsed": trainer.elapsed,
            "samples": book.samples,
            "samples_per_second": book.samples / book.seconds if book.seconds else 0.0,
            "bytes": book.sent,
            "traffic": book.per_replica(trainer.replicas),
            "activation_peak": trainer.activation_peak,
            "live_peak": live_peak(trainer.memory),
            "learning_rates": trainer.learning_rates(),
        }
        if (told := trainer.observed()) is not None:
            record["replicas"] = told
        if (buffers := buffers_of_epoch(trainer)) is not None:
            record["buffers"] = buffers
        if book.notes:
            record["notes"] = book.mean_notes(trainer.stages)
        trainer.sent_before, trainer.book = trainer.bytes_sent, EpochBook()
        return record
