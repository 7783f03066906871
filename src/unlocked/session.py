"""The Trainer: one chain, one credit rule, one consensus rule, N replicas, in one world."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import consensus as consensus_rules
from . import credit as credit_rules
from .batch import Batch, Samples, micro_batches, one_per_replica
from .callbacks import Callback
from .chain import Chain, Stage
from .consensus.base import BatchNormPolicy, Clock, OptimizerFactory, ScheduleFactory, Store, Weights
from .consensus.base import Consensus as ConsensusRule
from .credit.base import Credit as CreditRule
from .credit.base import check_groups, refuse_non_finite
from .credit.lending import check_loans
from .data import Data, Domains, as_data
from .delays import check_delays
from .errors import InvalidChoice, LostPeer, LostProcess, UnlockedError, choose
from .evaluation import Evaluation, averaged, ensemble, evaluate, members
from .fitting import Fitting, Plan
from .given_updates import GivenUpdates
from .labelled import check_scoring
from .loop import EpochBook, Losses, mean_losses, random_state_kept
from .merging import digest, fingerprint, fingerprint_of_updates
from .mitigation import Mitigation
from .own_rates import check_own_rates
from .pair_evaluation import evaluate_pairs
from .pool import Turns
from .population import (
    Drawing,
    Initial,
    Regulariser,
    apply,
    check_initial,
    check_unmixed,
    checked,
    classes_for,
    in_words,
)
from .residency.one_stage import OneStage, check_resident, residence_of
from .rng import generator, seed_of
from .saving import load_state, save_state
from .timeline import Timeline
from .trainer_checks import check_arguments, check_world, device_of
from .worker import Worker
from .worlds import Distributed, InProcess, Simulated, World

_KEPT = 6  # updates whose acts are kept of a window in which replicas run freely


class Trainer:
    """Trains a chain by a credit rule, its replicas by a consensus rule, in a world.

    Args:
        chain: the network. It becomes replica 0 and is trained in place; heads are attached to it where the rule needs them.
        credit: where a stage's gradient comes from (`ul.credit`).
        consensus: what happens to it among the replicas (`ul.consensus`).
        replicas: N ≥ 1.
        optimizer: list of parameters → torch.optim optimizer; called once per stage and replica.
        schedule: optimizer → torch learning-rate scheduler, or None. Stepped after every update, or with
            schedule_every="epoch" after every epoch the stage was trained in.
        world: where the workers live. Default: all in this process.
        seed: of everything random here: heads, data order, augmentation, dropout, shuffles.
        clip: largest gradient norm per stage, or None.
        accumulate: micro-batches per update; a batch given to `step` is split into that many.
        precision: "float32" (the parameters' own type) or "bf16" (autocast).
        batchnorm: statistics of replicas: "local" (each keeps its own; the averaged network gets their mean), "average"
            (averaged after every update), "refresh" (as local, but the averaged network's are estimated anew from data).
        mitigation: what is done about gradients of weights that have been updated since (`ul.mitigation`), or None.
        regularisers: one per replica, for the batches it trains on (`ul.population.draw`), or None.
        initial: first weights of replicas 1 … N − 1: the "same" as replica 0's, "different" (drawn anew, by the same law), or a
            function: replica → chain, model or state dict. See population/initial.py.
        device: where to train; default: where the chain is.
        resident: keep one stage in memory at a time (`ul.OneStage`), or None: all of them.

    Attributes: `chains` (one per replica), `timeline` (of the latest step), `steps`, `epoch`, `phase`, `heads` (what heads
    were built and what they cost), `bytes_sent` (by channel, since the start), `activation_peak` (bytes kept for backward
    in the first steps of `fit`), `memory` (what all tensors took then; see probes/step.py),
    `stack` (the replicas as one computation, if they compute so; credit/stacking.py).

    In a world of several processes every process makes the same trainer and calls the same methods. The stages that live
    elsewhere are emptied (device "meta"), `timeline` and `step`'s losses are of the workers here, `bytes_sent` of all of them
    as of the last epoch; `averaged` and `ensemble` give their result on rank 0 and None elsewhere.

    Raises UnlockedError kinds: an argument that is not allowed, heads over their budget, processes that were told different
    things.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        optimizer: OptimizerFactory,
        credit: CreditRule | None = None,
        consensus: ConsensusRule | None = None,
        replicas: int = 1,
        schedule: ScheduleFactory | None = None,
        schedule_every: Clock = "step",
        world: World | None = None,
        seed: int = 0,
        clip: float | None = None,
        accumulate: int = 1,
        precision: Literal["float32", "bf16"] = "float32",
        batchnorm: BatchNormPolicy = "local",
        mitigation: Mitigation | None = None,
        regularisers: Sequence[Regulariser] | None = None,
        initial: Initial = "same",
        device: str | torch.device | None = None,
        resident: OneStage | None = None,
    ) -> None:
        check_arguments(chain, replicas, accumulate, clip)
        choose("precision", precision, ("float32", "bf16"))
        choose("batchnorm policy", batchnorm, ("local", "average", "refresh"))
        choose("schedule_every", schedule_every, ("step", "epoch"))
        self.credit = credit if credit is not None else credit_rules.Backprop()
        self.consensus = consensus if consensus is not None else consensus_rules.Independent()
        self.replicas, self.seed = replicas, seed
        self.regularisers, self.initial = checked(regularisers, replicas), in_words(initial)
        check_initial(initial, self.consensus, replicas)
        check_unmixed(self.credit.self_supervised, self.regularisers)
        self.networks = self.consensus.networks(replicas)
        self.clip, self.accumulate, self.precision = clip, accumulate, precision
        self.batchnorm, self.schedule_every, self.mitigation = batchnorm, schedule_every, mitigation
        self.world: World = world if world is not None else InProcess()
        self.crew = self.world.crew
        self.device = torch.device(device) if device is not None else device_of(chain)
        self.residence = residence_of(chain, resident, self.device)
        if self.residence is None:
            chain.to(self.device)
            if chain.like is not None:
                chain.like = chain.like.to(self.device)
        if not any(part.training for part in chain.modules() if not list(part.children())):
            chain.train()  # a model that comes in evaluation mode as a whole; parts frozen by hand stay as they are
        self._classes = classes_for(self.regularisers, chain)
        drawing = Drawing(initial, self.credit, seed, by_hand=[stage.head is not None for stage in chain])
        check_groups(chain, self.credit, self.consensus)
        self.heads = self.credit.prepare(chain, seed)
        self.stages = len(chain)
        self.credit.check(self.consensus)
        check_world(self.world, self.credit, self.consensus, replicas * self.stages)
        check_delays(self.credit, self.consensus, self.precision, mitigation)
        check_own_rates(self)
        self.consensus.check(self.credit, accumulate)
        check_loans(chain, self.consensus)
        if resident is not None:
            check_resident(chain, self.credit, self.consensus, replicas, mitigation, self.world)
        self.world.crossing = self.crossing
        if isinstance(self.world, Simulated):
            self.world.credit = self.credit
        self.sizes = self.consensus.sizes(replicas, self.stages)
        self.workers: list[Worker] = self.world.mesh(
            replicas if self.sizes == [replicas] * self.stages else self.sizes,
            self.stages,
            seed,
            self._context(),
            self.device,
            chain,
        )
        for worker in self.workers:
            worker.arrange(chain.layout)
        if self.crew.size > 1:
            self.crew.agree(fingerprint(self, chain), "the trainer")
        self.template = chain.blank("meta")
        self.chains = self.consensus.copies(chain, replicas)
        self._draw_initial(drawing)
        self._empty_what_is_elsewhere()
        self.stack = self.credit.stack(self.chains, self.consensus, self.world)
        self.weights = [self._make_weights(worker, optimizer, schedule) for worker in self.workers]
        if self.stack is not None:
            self.stack.bind(self.weights)
        if self.crew.size > 1:
            self.crew.agree(fingerprint_of_updates(self.weights[0].store), "the trainer")
        self.timeline = Timeline()
        self.recent: deque[Timeline] = deque(maxlen=21)
        self.measured: dict[str, Any] | None = None
        self.steps = self.epoch = self.phase = self.batch_in_epoch = 0
        self.elapsed = 0.0
        self.book = EpochBook()
        self.dealt = (
            replicas  # batches of a round, where replicas run freely: N at first, though members may be lost or come
        )
        self.epochs_per_phase: int | None = None
        self.batch_size: int | None = None
        self.oracle: str | None = None  # a digest of the weights of that which the rule asks, if it does
        self.sent_before: Counter[str] = Counter()
        self.activation_peak: int | None = None
        self.activation_curve: list[int] = []
        self.memory: list[dict[str, Any]] = []
        self.training_data: Any = None
        self.probe_on: Data | None = None
        # of the next update's batches, by replica, where the rule asks for them
        self.samples: Mapping[int, Samples] = {}
        self._running = False
        self._settled = self._aligned = True  # see `settle`, and `Weights.realign`
        self.last_checkpoint: Path | None = None

    @property
    def crossing(self) -> frozenset[str]:
        """Channels whose messages may be under way between two steps."""
        return self.credit.crossing | self.consensus.crossing

    @property
    def bytes_sent(self) -> Counter[str]:
        """Payload bytes by channel since the start."""
        return self.sent_before + Counter(self.book.sent)

    def _draw_initial(self, drawing: Drawing) -> None:
        """Of the replicas here; what a user's function gives must be alike on all processes, so it is asked for all."""
        given = self.initial == "given"
        drawing.draw(self.chains, range(self.replicas) if given else sorted({w.replica for w in self.workers}))
        if given and self.crew.size > 1:
            self.crew.agree({"what initial gives": [digest(chain) for chain in self.chains]}, "the trainer")

    def _empty_what_is_elsewhere(self) -> None:
        here = {worker.place for worker in self.workers}
        for replica, chain in enumerate(self.chains):
            for j, stage in enumerate(chain):
                if (replica, j) not in here:
                    stage.to("meta")

    def _context(self) -> Callable[[], contextlib.AbstractContextManager[Any]] | None:
        if self.precision == "float32":
            return None
        return functools.partial(torch.autocast, self.device.type, dtype=torch.bfloat16)

    def _make_weights(self, worker: Worker, optimizer: OptimizerFactory, schedule: ScheduleFactory | None) -> Weights:
        chain = self.chains[worker.replica]
        if self.residence is not None:
            self.residence.take(worker.stage, chain[worker.stage])
            worker.present = functools.partial(self.residence.ensure, worker.stage)
        self.consensus.distribute(worker, chain[worker.stage])
        trained = [parameter for parameter in chain[worker.stage].parameters() if parameter.requires_grad]
        if not trained:
            raise InvalidChoice(
                f"Stage {worker.stage} has nothing to train: no parameters, or all of them frozen; "
                "join it with the stage below or above."
            )
        made = optimizer(trained)
        scheduler = schedule(made) if schedule is not None else None
        for part in (made, scheduler):
            if isinstance(part, (torch.optim.LBFGS, torch.optim.lr_scheduler.ReduceLROnPlateau)):
                raise InvalidChoice(
                    f"{type(part).__name__} wants to be called with a loss, which stages that learn side by side do not "
                    "share; give an optimizer and a schedule that step by themselves."
                )
        if self.residence is not None:
            self.residence.updated_by(worker.stage, made)
        # a mitigated gradient is complete after its backward, one of a stack is dealt to the replicas then
        overlap = self.credit.one_backward and self.mitigation is None and self.stack is None
        store = Store(
            made,
            scheduler,
            self.schedule_every,
            self.accumulate,
            self.clip,
            self.batchnorm,
            overlap,
            self.mitigation,
            returns=not self.credit.local,
            replicas=self.replicas,
            delayed=bool(self.credit.crossing),
            shares_data=self.consensus.shares_data,
        )
        return self.consensus.weights(worker, chain, store, self.seed)

    # ---- one step --------------------------------------------------------------------------------------------------

    def step(self, x: Tensor | Sequence[Tensor], y: Tensor | Sequence[Tensor]) -> Losses:
        """One update from one batch per replica (lists of N tensors), or from one batch split evenly among the N.

        Returns the loss of each stage, mean over the replicas; None for a stage without a loss of its own.
        Raises InvalidChoice (batches that do not fit the replicas), NonFiniteLoss (naming the stage).
        """
        if self.consensus.free:
            raise InvalidChoice(
                f"Under {self.consensus!r} replicas take their batches themselves, so there is no step of all; call fit, or "
                "take pairing='clocks'."
            )
        if self.credit.free:
            raise InvalidChoice(
                f"Under {self.credit!r} stages go on at their own rates, so there is no step of all; call fit, or take "
                "rates='equal'."
            )
        shares = one_per_replica(x, y, self.replicas, self.accumulate, equal=self.consensus.shares_data)
        if self.credit.crossing:  # what is in flight must not change if the caller fills the same tensor again
            shares = [(x.clone(), y) for x, y in shares]
        return mean_losses(self.update(dict(enumerate(shares))), self.stages)

    def update(self, shares: Mapping[int, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """One update from the batches of the replicas that have a worker here; the losses by "replica.stage"."""
        self._train_mode()
        first = self.steps * self.accumulate
        batches = {
            replica: list(
                micro_batches(
                    *self.regularised(replica, x, y, self.steps),
                    self.accumulate,
                    first,
                    self.phase,
                    self.samples.get(replica),
                )
            )
            for replica, (x, y) in shares.items()
        }
        for worker in self.workers:
            worker.forget_reports()
        self._begin_updates()
        self.timeline = self._run(
            [self._program(w, k, self.consensus.batches(w, batches)) for k, w in enumerate(self.workers)]
        )
        self._aligned = True
        self.book.noted(self.workers)
        self.steps += 1
        if isinstance(self.world, InProcess):  # elsewhere that would make workers wait for each other
            self.settle()
        self.book.updates += 1
        self.book.sent_in(self.timeline)
        self.recent.append(self.timeline)
        return self._losses()

    def update_freely(
        self,
        take: Callable[[], int | None],
        batch: Callable[[int], tuple[int, Tensor, Tensor]],
        stepped: Callable[[Worker, dict[str, float], int, int], None],
    ) -> None:
        """Updates of replicas that run freely (`Consensus.free`), until `take()` gives no more numbers of batches.

        batch: the batch of a number, with the round it belongs to (from 0). stepped: told each worker's updates: the losses by
        "replica.stage", the samples and the round.
        """
        self._train_mode()
        for worker in self.workers:
            worker.forget_reports()
        for weights in self.weights:
            weights.round = self.steps
        self._begin_updates()
        turns = [Turns(worker, take) for worker in self.workers]
        made = {worker.replica: GivenUpdates(self, worker.replica, batch) for worker in self.workers}
        programs = [(w, self._freely(k, turns[k], made[w.replica], stepped)) for k, w in enumerate(self.workers)]
        if isinstance(self.world, Distributed):
            self.world.free_running = True
        try:
            self.timeline = self._run(programs)
        finally:
            if isinstance(self.world, Distributed):
                self.world.free_running = False
        self._aligned = True
        self.book.sent_in(self.timeline)
        self.recent.append(self.timeline.ending(_KEPT / max(1, *(turn.count for turn in turns))))

    async def _freely(
        self, k: int, turns: Turns, given: GivenUpdates, stepped: Callable[[Worker, dict[str, float], int, int], None]
    ) -> None:
        worker, (stage, weights) = self.workers[k], self._stage(k)
        await weights.open()
        while (number := await turns.next()) is not None:
            began, batches = given.update(turns.count - 1, number)
            weights.round = max(weights.round, began + 1)
            await self.credit.run(worker, stage, weights.taken(batches), weights)
            losses, samples = self._losses_of(worker), sum(len(batch.x) for batch in batches)
            self.book.noted([worker])
            worker.forget_reports()
            stepped(worker, losses, samples, began)
        await weights.close()

    def update_at_own_rates(self, windows: Mapping[int, Any], updates: int) -> None:
        """What is left of an epoch of stages that run freely (`Credit.free`); windows: what it is to each replica
        (own_rates.py), updates: about how many there are."""
        self._train_mode()
        for worker in self.workers:
            worker.forget_reports()
        self._begin_updates()
        self.timeline = self._run(
            [(w, self.credit.run_freely(w, *self._stage(k), windows[w.replica])) for k, w in enumerate(self.workers)]
        )
        self._aligned = True
        self.book.sent_in(self.timeline)
        self.recent.append(self.timeline.ending(_KEPT / max(1, updates)))

    def _begin_updates(self) -> None:
        """What is about to run may leave messages under way, or fail in the middle."""
        self._align()
        self._settled = not (self.consensus.crossing or self.consensus.free)
        self._aligned = not (self.consensus.crossing or self.consensus.counts_updates)

    def regularised(self, replica: int, x: Tensor, y: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """A replica's batch on the device, as its regulariser makes it: a function of (seed, replica, step)."""
        x, y = x.to(self.device), y.to(self.device)
        if self.regularisers is None:
            return x, y
        source = generator(self.seed, "regulariser", replica, step)
        return apply(self.regularisers[replica], x, y, self._classes, source)

    def drain(self) -> Timeline:
        """Give all micro-batches in flight their backward, so that every stage has made all its updates; what was done.

        Only rules with delayed gradients have any. `fit` does it at the end of every epoch (or of training, as the rule
        says); after steps by hand it is yours to call. The pipeline then fills anew, which is part of the training like
        any other step.
        """
        if not self.credit.crossing:
            return Timeline()
        self._train_mode()
        self._begin_updates()
        programs = [(w, self.credit.empty(w, *self._stage(k))) for k, w in enumerate(self.workers)]
        emptied = self._run(programs, crossing=self.consensus.crossing)  # no gradient may be left over
        self._aligned = True
        if isinstance(self.world, InProcess):
            self.settle()
        self.book.sent_in(emptied)
        return emptied

    def bring_together(self) -> None:
        """Let replicas that another rule has trained begin alike, where the rule wants that: at their mean."""
        if self.networks > 1:
            self._run([(weights.worker, weights.begin_alike()) for weights in self.weights], charged=False)

    def begin_epoch(self) -> None:
        """Let the rules know which epoch it is: `self.epoch`."""
        for weights in self.weights:
            weights.epoch = self.epoch

    def end_epoch(self) -> None:
        """Count an epoch; rules that do something at its end do it now. `fit` calls it; after steps by hand it is yours to."""
        self.begin_epoch()
        if self.consensus.by_epochs:
            self.settle()
            ended = self._run([(weights.worker, weights.end_of_epoch()) for weights in self.weights])
            self.book.sent_in(ended)
        self.epoch, self.batch_in_epoch = self.epoch + 1, 0
        self.begin_epoch()

    def collect(self) -> None:
        """Take the messages that are under way into the state of the workers, so that it can be saved."""
        if self.credit.crossing:
            programs = [(worker, self.credit.collect(worker, self.weights[k])) for k, worker in enumerate(self.workers)]
            self._run(programs, charged=False)
        self.settle()

    def settle(self) -> None:
        """Bring the newest weights into place on every worker, under rules whose replicas are ahead of each other.

        In process every step ends with it. In the other worlds it is done before weights are saved, evaluated or averaged,
        and yours to call before you look at the chains; all processes must do so.
        """
        self._align()
        if not self._settled:
            self._settled = True
            settled = self._run([(weights.worker, weights.settle()) for weights in self.weights], charged=False)
            self.book.sent_in(settled)

    def _align(self) -> None:
        """After a step that failed: let all replicas go on from the same weights."""
        if not self._aligned:
            self._settled = self._aligned = True
            self._run([(weights.worker, weights.realign()) for weights in self.weights], charged=False)

    def _run(
        self, programs: list[tuple[Worker, Any]], charged: bool = True, crossing: frozenset[str] | None = None
    ) -> Timeline:
        if self._running:
            raise UnlockedError(
                "The replicas are running freely, so nothing else can be run or looked at now (this was asked for inside "
                "on_step?); evaluate, save or settle in on_epoch, or take pairing='clocks'."
            )
        self.world.crossing = self.crossing if crossing is None else crossing
        self._running = True
        try:
            with random_state_kept(self.device):
                return self.world.run(programs, charged)
        except LostProcess as lost:
            raise self.located(lost) from lost
        except LostPeer:
            raise
        except BaseException:
            for weights in self.weights:
                weights.forget()
            raise
        finally:
            self._running = False

    def located(self, lost: LostProcess) -> LostProcess:
        """The sentence, and from where to go on."""
        if lost.located:
            return lost
        known = (
            "Nothing was saved yet."
            if self.last_checkpoint is None
            else f"The last checkpoint is {self.last_checkpoint}."
        )
        located = LostProcess(f"{lost} {known}")
        located.located = True
        return located

    def _program(self, worker: Worker, k: int, batches: list[Batch]) -> tuple[Worker, Any]:
        stage, weights = self._stage(k)
        return worker, self.credit.run(worker, stage, weights.taken(batches), weights)

    def _stage(self, k: int) -> tuple[Stage, Weights]:
        """What the k-th worker here works on."""
        worker = self.workers[k]
        return self.chains[worker.replica][worker.stage], self.weights[k]

    def _losses(self) -> dict[str, float]:
        losses: dict[str, float] = {}
        for worker in self.workers:
            losses |= self._losses_of(worker)
        return losses

    def _losses_of(self, worker: Worker) -> dict[str, float]:
        if not worker.losses:
            return {}
        value = float(sum(worker.losses[1:], worker.losses[0]))
        refuse_non_finite(worker, value, updated=True)
        return {f"{worker.replica}.{worker.stage}": value}

    def _train_mode(self) -> None:
        for chain in self.chains:
            if not chain.training:
                chain.train()

    # ---- many steps ------------------------------------------------------------------------------------------------

    def fit(
        self,
        train: Any,
        epochs: int,
        *,
        validate: Any = None,
        validate_every: int = 1,
        batch_size: int = 64,
        callbacks: Sequence[Callback] = (),
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 1,
        probe_on: Any = None,
    ) -> list[dict[str, Any]]:
        """Train until `epochs` epochs are complete, those before a resume included (per stage, for greedy learning).

        Args:
            train, validate: `Data` (ul.data.load), a pair of tensors, or a map-style Dataset of (x, y); to train on, also
                `ul.data.Domains`, a set for each replica. Rules that learn from views need no labels to train on: x alone.
            validate_every: epochs between two validations; the last epoch of every phase is always followed by one.
            batch_size: samples per replica and update.
            callbacks: see callbacks.py.
            checkpoint: folder to save to every `checkpoint_every` epochs and on Ctrl-C.
            probe_on: of a rule that learns without labels: labelled data, as `validate`, that the probe is fitted to instead of
                `train`. Both are normalised as `train` is (labelled.py).

        Returns one record per epoch: epoch, phase, step, losses (mean per stage), seconds, elapsed (training only),
        samples_per_second, bytes (by channel, this epoch), activation_peak, live_peak, learning_rates, validation.
        Raises Interrupted after Ctrl-C (the step is finished first; a second Ctrl-C stops at once).
        """
        self.training_data = train if isinstance(train, Domains) else as_data(train)
        if isinstance(train, Domains):
            train.check(self.replicas)
        held_out = None if validate is None else as_data(validate)
        self.probe_on = None if probe_on is None else as_data(probe_on)
        check_scoring(self.credit, self.training_data, self.probe_on, held_out)
        plan = Plan(
            self.training_data, held_out, epochs, validate_every, batch_size, callbacks, checkpoint, checkpoint_every
        )
        return Fitting(self, plan).run()

    def observed(self) -> dict[str, Any] | None:
        """What the consensus rule tells about its replicas: how far they are from their mean, say. None: nothing.

        On several processes all must call it, and all get it.
        """
        if not self.consensus.observes or self.networks == 1:
            return None
        self.settle()
        rows: list[dict[str, Any]] = []

        async def observe(weights: Weights) -> None:
            rows.append(await weights.observed())

        self._run([(weights.worker, observe(weights)) for weights in self.weights], charged=False)
        return self.consensus.told([row for part in self.crew.share(rows) for row in part])

    def learning_rates(self) -> list[float]:
        """The current learning rate of each stage (of its first replica, first group)."""
        mine = {
            weights.worker.stage: float(weights.store.optimizer.param_groups[0]["lr"])
            for weights in reversed(self.weights)
        }
        found = [{int(j): rate for j, rate in rates} for rates in self.crew.share(list(mine.items()))]
        return [next(rates[j] for rates in found if j in rates) for j in range(self.stages)]

    # ---- the result ------------------------------------------------------------------------------------------------

    def averaged(self, refresh: Any = None) -> Chain:
        """A new chain with the mean of the replicas' parameters (and BatchNorm statistics).

        `refresh`: data to estimate the statistics from instead; with the policy "refresh" the training data of `fit`.
        On several processes all must call it; the chain is on rank 0, the others get None.
        """
        self.settle()
        return averaged(self, self._refreshing(refresh))  # type: ignore[return-value]  # None elsewhere, as documented

    def members(self) -> list[Chain] | None:
        """New chains with the weights of each network that is trained: one per replica, a single one where all train the same.

        What `ul.soups` takes. On several processes all must call it; the list is on rank 0, the others get None.
        """
        self.settle()
        return members(self)

    def _refreshing(self, given: Any = None) -> Iterator[tuple[Tensor, Tensor]] | None:
        """The batches to estimate BatchNorm statistics from, if they are to be estimated."""
        data = given if given is not None else self.training_data if self.batchnorm == "refresh" else None
        if data is None:
            return None
        when: dict[str, Any] = {"epoch": 0, "seed": seed_of(self.seed, "refresh"), "device": self.device}
        size = self.batch_size or 64
        batches = data.mixed(size, **when) if isinstance(data, Domains) else as_data(data).batches(size, **when)
        return (batch for batch, _ in zip(batches, range(50)))

    def ensemble(self, x: Tensor) -> Tensor:
        """Mean of the replicas' predicted probabilities for `x`. On several processes: on rank 0, the others get None."""
        self.settle()
        return ensemble(self, x.to(self.device))  # type: ignore[return-value]

    def evaluate(self, data: Any, batch_size: int = 512, train: Any = None, probe_on: Any = None) -> Evaluation:
        """Scores on `data`: of the network (averaged over the replicas), at every head, of each replica, of the ensemble.

        A network that learned without labels is read by linear probes (pair_evaluation.py), fitted to `probe_on`: labelled
        data, or None: `train`. That is what it was trained on; if it is not given, both are those of `fit`. Other networks
        need neither. Raises BadData, InvalidChoice (labelled.py).
        """
        self.settle()
        probe_on = self.probe_on if probe_on is None and train is None else probe_on
        labelled = None if probe_on is None else as_data(probe_on)
        held_out, depth = as_data(data), self.credit.readout(self.phase, self.stages)
        refresh = self._refreshing() if self.replicas > 1 else None
        if self.credit.self_supervised:
            known = self.training_data if train is None else train
            known = known if known is None or isinstance(known, Domains) else as_data(known)
            check_scoring(self.credit, known, labelled, held_out)
            if getattr(known, "views", 1) == 2 and not all(getattr(s.loss, "known", True) for s in self.template):
                self.credit.meet(self, known)  # some losses depend on the training data
            return evaluate_pairs(self, known, held_out, batch_size, depth, refresh, labelled)
        check_scoring(self.credit, None, labelled, held_out)
        batches = held_out.batches(batch_size, epoch=0, seed=self.seed, train=False, device=self.device)
        return evaluate(self, batches, depth, refresh)

    # ---- keeping ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint into the folder `path` (see checkpoint.py); returns the folder of this checkpoint."""
        self.last_checkpoint = save_state(self, path)
        return self.last_checkpoint

    @classmethod
    def resume(
        cls,
        path: str | Path,
        chain: Chain | None = None,
        *,
        optimizer: OptimizerFactory | None = None,
        schedule: ScheduleFactory | None = None,
        credit: CreditRule | None = None,
        consensus: ConsensusRule | None = None,
        mitigation: Mitigation | None = None,
        world: World | None = None,
        device: str | torch.device | None = None,
        stages: int | None = None,
        resident: OneStage | None = None,
    ) -> Trainer:
        """The trainer as it was saved: going on equals never having stopped, bit for bit.

        What the checkpoint describes need not be given: a model of `ul.models` cut by `ul.cut`, optimizers and simple
        schedules of torch, the library's own rules. For the rest give the same objects as at first, above all `chain`.
        The world may be another one, on another number of processes. `stages`: go on with another number of stages, under
        rules without heads; gradients are the same up to rounding then. `resident` as at first. Raises BadCheckpoint.
        """
        given: Mapping[str, Any] = {
            "chain": chain,
            "optimizer": optimizer,
            "schedule": schedule,
            "credit": credit,
            "consensus": consensus,
            "mitigation": mitigation,
            "world": world,
            "device": device,
            "stages": stages,
            "resident": resident,
        }
        return load_state(cls, path, given)
