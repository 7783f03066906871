"""Consensus: what happens to a gradient among the replicas.

A consensus rule is a frozen set of parameters that makes, for each worker, a `Weights`: the store a credit rule reads before
a forward and writes when a gradient is complete. `write` is the same for all of them:

    reduce the gradient among the replicas → clip → optimizer step → learning-rate step → mix the weights among the replicas

A rule says what `reduce` and `mix` do (both may be nothing).
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..chain import Chain, Stage
from ..flat import digest, flat, put
from ..mitigation import Mitigation
from ..option_types import Typed
from ..versions import Versions
from ..worker import Worker

BatchNormPolicy = Literal["local", "average", "refresh"]
Clock = Literal["step", "epoch"]


@dataclass(frozen=True)
class Properties:
    """What a consensus rule declares. Ψ_P: bytes of the parameters; N replicas."""

    title: str
    source: str
    barrier: str  # who waits for whom
    bytes: str  # sent by a replica per update
    replicas: str  # whether they stay equal
    result: str  # what the trained network is


@dataclass
class Store:
    """A stage's weights and what updates them.

    optimizer: steps all parameters of the stage and its head. scheduler: its learning-rate schedule, stepped after every
    update (`clock="step"`) or by the session after every epoch ("epoch"). accumulate: micro-batches per update.
    clip: largest norm of the stage's gradient, or None. batchnorm: see `Weights.write`. overlap: whether a gradient is
    complete once a backward has reached its parameter (`Credit.one_backward`), so that its exchange may begin at once.
    returns: whether a stage waits for a gradient from the one above. replicas: N.
    mitigation: what is done about gradients of weights that have been updated since, or None.
    window: steps of a run of the world, all of whose micro-batches are known when it begins.
    delayed: whether an update may come in a later step than the forward it belongs to. shares_data: whether the replicas'
    batches are parts of one batch.
    """

    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    clock: Clock = "step"
    accumulate: int = 1
    clip: float | None = None
    batchnorm: BatchNormPolicy = "local"
    overlap: bool = False
    mitigation: Mitigation | None = None
    returns: bool = True
    replicas: int = 1
    window: int = 1
    delayed: bool = False
    shares_data: bool = False


class Weights:
    """One worker's weights under a consensus rule.

    `versions`: what they were before updates, for forwards still in flight. `flight`: a delayed rule's work in progress.
    """

    def __init__(self, worker: Worker, chain: Chain, store: Store) -> None:
        self.worker, self.chain, self.store = worker, chain, store
        self.stage = chain[worker.stage]
        self.parameters = [parameter for parameter in self.stage.parameters() if parameter.requires_grad]
        self.statistics = [x for x in batchnorm_statistics(self.stage) if x.is_floating_point()]
        self.versions = Versions(worker, self.stage)
        self.flight: Any = None
        self.features: Any = None  # what is known of the stage's input, where it is kept (feature_cache.py)
        self.buffer: Any = None  # micro-batches to learn from again (credit/buffering.py)
        self.stack: Any = None  # all replicas as one computation (credit/stacking.py)
        self.updates = True  # False: another worker's optimizer updates these weights
        self.shard = self.optimizer_of = (
            worker.place
        )  # under which a checkpoint holds the weights, and the optimizer's state
        self.mitigating = None if store.mitigation is None else store.mitigation.start(store.optimizer, self.versions)
        self.pending = 0  # micro-batches whose gradients are waiting for the rest of their update
        self.epoch = 0  # the epoch, from 0, that the worker is in
        self.round = 0  # where replicas run freely: rounds of a batch for each replica begun so far, by all together

    def taken(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Those of a row of micro-batches that this worker does, decided one by one as it comes to them. Here: all."""
        return batches

    async def read(self) -> None:
        """Before a forward: settle which version of the weights it sees. Here: the one in place."""

    @property
    def micro_batches(self) -> int:
        """How many this worker has in the update it is at."""
        return self.store.accumulate

    async def write(self) -> None:
        """A micro-batch's gradient is complete; after the last of `accumulate`, update.

        With the policy `batchnorm="average"` the replicas' BatchNorm statistics are averaged after each update, or whenever
        the rule says (`averages_statistics`).
        """
        self.pending += 1
        if self.pending < self.micro_batches:
            return
        self.pending = 0
        await self.reduce()
        await self.step()
        self.worker.version += 1
        await self.mix()
        if self.averages_statistics():
            await self.average_statistics()

    def averages_statistics(self) -> bool:
        """Whether BatchNorm's statistics are averaged after the update that was just made, under the policy "average"."""
        return True

    async def average_statistics(self) -> None:
        """Under the policy "average": the mean of all replicas' BatchNorm statistics."""
        if self.store.batchnorm == "average" and self.statistics:
            for mine, mean in zip(self.statistics, await self.worker.replicas.mean("batchnorm", self.statistics)):
                mine.copy_(mean)

    async def step(self) -> None:
        """The update."""
        await self.worker.run("U", self.update)

    def update(self) -> None:
        """Clip, step, clear."""
        store = self.store
        self.versions.before_update()
        if store.clip is not None:
            for row in self._clipped_together():
                nn.utils.clip_grad_norm_(row, store.clip)
        if self.mitigating is None:
            store.optimizer.step()
        else:
            self.mitigating.step()
        self._step_schedule()
        self._drop_gradients()

    def _clipped_together(self) -> list[list[nn.Parameter]]:
        """The stage's weights; apart from them those of a head that is watched only, which must change nothing else."""
        if not self.stage.watched or self.stage.head is None:
            return [self.parameters]
        head = {id(x) for x in self.stage.head.parameters()}
        return [[x for x in self.parameters if (id(x) in head) == of_head] for of_head in (False, True)]

    def _step_schedule(self) -> None:
        if self.store.scheduler is not None and self.store.clock == "step":
            self.store.scheduler.step()

    def _drop_gradients(self) -> None:
        for parameter in self.parameters:  # what optimizer.zero_grad does, without its profiling hooks
            parameter.grad = None

    def forget(self) -> None:
        """After a step that failed: drop the micro-batches and gradients it left, so that the next one starts clean."""
        self.pending = 0
        self.flight = self.features = self.worker.reading = None
        self.versions.forget()
        self._drop_gradients()

    def plain_copy(self) -> Stage:
        """A copy of the stage with ordinary tensors, to be averaged or evaluated."""
        return copy.deepcopy(self.stage)

    async def judged(self) -> Stage:
        """A copy of the stage whose mean over the replicas is the result of the training. Here: what was trained."""
        return self.plain_copy()

    async def reduce(self) -> None:
        """What happens to the gradient before the step."""

    def move(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call what only moves tensors (`@work(gives=…)`) and is no act of its own; or tell what it gives, where nothing is
        computed."""
        if self.store.optimizer is not None:
            return function(*arguments)
        gives = function.gives  # type: ignore[attr-defined]
        return None if gives is None else gives(self, *arguments)

    async def mix(self) -> None:
        """What happens to the weights after the step."""

    # ---- between two steps: rules whose replicas are ahead of each other have something to do here -------------------

    async def settle(self) -> None:
        """Bring the newest weights into place: the parameters are θ_T on every worker after T updates."""

    async def open(self) -> None:
        """Where replicas run freely: before the first of the updates that follow."""

    async def close(self) -> None:
        """Where replicas run freely: after the last of them."""

    async def observed(self) -> dict[str, Any]:
        """This worker's part of what there is to tell about the replicas after an epoch (`Consensus.observes`)."""
        return {}

    async def end_of_epoch(self) -> None:
        """After the last update of an epoch (`epoch`), where the rule asks for it (`Consensus.by_epochs`)."""

    async def begin_alike(self) -> None:
        """Replicas that differ go on under a rule that wants them equal: from the mean of their weights."""
        own = torch.tensor(int(digest(self.parameters)[:15], 16))
        if any(int(other) != int(own) for other in await self.worker.replicas.gather("alike", own)):
            put(await self.worker.replicas.mean("alike", flat(self.parameters)), self.parameters)

    async def realign(self) -> None:
        """After a step that failed: let all replicas go on alike. Here: they count updates alike."""
        counts = await self.worker.replicas.gather("realign", torch.tensor(self.worker.version))
        self.worker.version = max(int(count) for count in counts)

    one_gradient: ClassVar[bool] = (
        False  # True: an update is made of the mean of all replicas' gradients, at equal weights
    )
    keeps_optimizer: ClassVar[bool] = False  # True: the optimizer's state is in `carried`, in a form of the rule's own

    def optimizer_state(self) -> list[Tensor]:
        """The tensors that the optimizer keeps here."""
        states = self.store.optimizer.state.values()
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def begin_at(self, version: int) -> None:
        """A checkpoint's weights are in place, after so many updates."""
        self.worker.version = version

    def carried(self) -> dict[str, Any]:
        """What the rule takes from one step to the next beside weights and optimizer, for a checkpoint: nested dictionaries
        and lists of tensors, numbers, texts and None."""
        return {}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        """The inverse; the weights are in place."""


@contextlib.contextmanager
def unused_optimizer() -> Iterator[None]:
    """Around a schedule's step, where another worker may make the updates: torch warns that the optimizer has made none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        yield


class Consensus(Typed, ABC):
    """What the replicas have in common. Subclasses are frozen dataclasses: their fields are the rule's parameters."""

    name: ClassVar[str]
    properties: ClassVar[Properties]
    shares_data: ClassVar[bool] = False  # True: the replicas split an epoch; False: each goes through all of it
    needs_processes: ClassVar[bool] = False  # True: PyTorch does the communicating, so every worker needs a process
    one_at_a_time: ClassVar[bool] = False  # True: a replica has one micro-batch at a time
    fewest: ClassVar[int] = 1  # micro-batches per update it needs
    needs_equal_start: ClassVar[bool] = False  # True: all replicas must begin with the same weights
    by_epochs: ClassVar[bool] = False  # True: the rule does something at the end of every epoch
    counts_updates: ClassVar[bool] = False  # True: the replicas do something together at certain updates
    reads_layers: ClassVar[bool] = False  # True: it treats the layers of the network differently
    planned: ClassVar[bool] = True  # False: the planner tries it only if it is named
    in_a_row: ClassVar[bool] = False  # True: how many stages are below and above decides when weights come, and which
    observes: ClassVar[bool] = False  # True: the rule has something to tell about the replicas (`Weights.observed`)

    @property
    def free(self) -> bool:
        """Whether the replicas run freely: each takes its next batch when it is ready for it, and none waits for another."""
        return False

    @property
    def needs_one_process(self) -> bool:
        """Whether all replicas must live in one process."""
        return False

    def cycle(self, stages: int) -> int:
        """Updates after which what the rule does repeats."""
        return 1

    def networks(self, replicas: int) -> int:
        """How many networks are trained: fewer than replicas if these are the same modules."""
        return replicas

    def sizes(self, replicas: int, stages: int) -> list[int]:
        """How many workers each stage has."""
        return [replicas] * stages

    def batches(self, worker: Worker, given: Mapping[int, list[Batch]]) -> list[Batch]:
        """The micro-batches of a worker in a step, of those that each replica is given."""
        return given[worker.replica]

    def check(self, credit: Any, accumulate: int) -> None:
        """Raises InvalidChoice if the rule does not go with this credit rule, or so many micro-batches."""

    def told(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What the workers `observed`, in one record."""
        return {}

    def feeds(self, worker: Worker, replicas: int) -> Iterable[int]:
        """The replicas whose data a worker needs."""
        return (worker.replica,)

    @property
    def crossing(self) -> frozenset[str]:
        """Channels whose messages may be under way between two steps."""
        return frozenset()

    def copies(self, chain: Chain, replicas: int) -> list[Chain]:
        """The chains of the replicas, `chain` being the first."""
        return [chain, *(copy.deepcopy(chain) for _ in range(replicas - 1))]

    def distribute(self, worker: Worker, stage: Stage) -> None:  # most rules have nothing to do here
        """Called once per worker before its optimizer is made: a rule may change the stage's modules in place."""

    @abstractmethod
    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        """The weights of one worker. `chain` is its replica's."""


def batchnorm_statistics(module: nn.Module) -> Iterable[Tensor]:
    """Running means and variances of every BatchNorm inside, in order (and the counts of batches)."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
            yield from (x for x in (part.running_mean, part.running_var, part.num_batches_tracked) if x is not None)


OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
ScheduleFactory = Callable[[torch.optim.Optimizer], Any]
