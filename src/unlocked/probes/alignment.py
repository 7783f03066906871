"""How far the gradient that a stage is updated with is from backpropagation's, while it trains (F Eq. 4.6).

    cosine = ⟨Δ^j, g^j⟩ / (‖Δ^j‖ ‖g^j‖),      ratio = ‖Δ^j‖ / ‖g^j‖

    Δ^j    what stage j's update got: accumulated, mitigated, averaged over the replicas if the consensus rule does that;
           not clipped
    g^j    Σ_m w_m ∇_{θ^j} ℓ(x_m, y_m; θ_t), of the network's own loss over the micro-batches m of that very update (weights
           w_m), at the weights θ_t that all stages had when the step of the update began

Both over the weights that the network's loss depends on: the stage's body, and a head of the last stage; other heads are
left out. A micro-batch has the random numbers of its forward (the same dropout masks), BatchNorm its own batch's statistics.

Limits: backpropagation has cosine 1 and ratio 1, and so has every rule whose weights stand still, up to its shrinking. A step
is one turn of all stages; a late gradient was read at older weights than θ_t, and that is what is measured.

Not seen: updates made while a pipeline is emptied (they belong to no step), and those with a micro-batch that came before
somebody looked on. Cost: the inputs of the micro-batches in flight at all times; at a step that is looked at a copy of the
network and of its gradients, and one forward and backward of the whole network for every micro-batch of every set that some
stage was updated with (up to J sets under a delayed rule).
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..chain import Chain, Stage
from ..consensus.base import Weights
from ..errors import InvalidChoice
from ..flight import Flight
from ..loop import random_state_kept
from ..worker import Place, Worker
from .watching import leave, watch

if TYPE_CHECKING:
    from ..session import Trainer

Gradient = list[Tensor | None]
Numbers = tuple[int, ...]  # of micro-batches


def cosine(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> float | None:
    """Of two gradients of the same weights, in float64 (None: zeros). None if one of them is zero."""
    sizes = norm(one) * norm(other)
    return _product(one, other) / sizes if sizes else None


def norm(gradient: Sequence[Tensor | None]) -> float:
    """Euclidean, of all its tensors together, in float64."""
    return _product(gradient, gradient) ** 0.5


def _product(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> float:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return sum(float((a.detach().double() * b.detach().double()).sum()) for a, b in pairs)


class Alignment:
    """Looks at every `every`-th step of a trainer, until `close`; `records` as `GradientCosine` has them (callbacks.py).

    Raises InvalidChoice if not all stages of all replicas live in this process, in memory.
    """

    def __init__(self, trainer: Trainer, every: int, records: list[dict[str, Any]]) -> None:
        if trainer.consensus.free:
            raise InvalidChoice("Replicas that run freely have no steps of all to look at; take pairing='clocks'.")
        if trainer.credit.free:
            raise InvalidChoice("Stages at their own rates have no steps of all to look at; take rates='equal'.")
        if trainer.residence is not None:
            raise InvalidChoice(
                "Backpropagation through all stages needs all of them in memory, but this trainer keeps one (resident=…); look "
                "at the same training without that."
            )
        if len(trainer.workers) != trainer.replicas * trainer.stages:
            raise InvalidChoice(
                f"Backpropagation through all stages needs all of them here; this process has {len(trainer.workers)} of "
                f"{trainer.replicas * trainer.stages} workers. Look at the same training in one process (world in-process)."
            )
        self._trainer, self._every, self.records = trainer, every, records
        self._batches: dict[int, dict[int, Batch]] = defaultdict(dict)  # by replica and number
        self._done: dict[Place, dict[int, None]] = defaultdict(dict)  # backwards since the stage's update, in order
        self._used: dict[Place, tuple[Numbers, Gradient]] = {}
        self._before: list[Chain] | None = None
        self._emptied = False
        self._weights = {weights.worker.place: weights for weights in trainer.weights}
        watch(
            trainer.workers, self._around, lambda replica, batch: self._batches[replica].update({batch.number: batch})
        )
        self.arm()

    def close(self) -> None:
        """Look no more."""
        leave(self._trainer.workers, self._around)
        self._before = None

    def arm(self) -> None:
        """The next thing that happens is a step: keep the weights as they are now, if it is to be looked at."""
        wanted = (self._trainer.steps + 1) % self._every == 0
        self._used.clear()
        self._before = copy.deepcopy(self._trainer.chains) if wanted else None

    def after_step(self) -> None:
        """A step has ended."""
        if self._before is not None:
            self.records += self._compared(self._before)
        self._forget()
        self.arm()

    # ---- while it trains -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _around(self, worker: Worker, kind: str, arguments: tuple[Any, ...]) -> Iterator[None]:
        self._notice_emptying()
        if kind == "B":
            self._done[worker.place][worker.micro_batch] = None
        if kind == "U" and (numbers := self._done.pop(worker.place, None)):
            self._updated(worker.place, tuple(numbers))
        yield

    def _notice_emptying(self) -> None:
        """What an emptied pipeline did is no step's, and the next step begins with the weights it left."""
        emptying = self._trainer.world.crossing != self._trainer.credit.crossing
        if self._emptied and not emptying:
            self.arm()
        self._emptied = emptying

    def _updated(self, place: Place, numbers: Numbers) -> None:
        if self._before is None or place in self._used:
            return
        gradients = [x.grad for x in self._weights[place].parameters]
        self._used[place] = numbers, [None if x is None else x.detach().clone() for x in gradients]

    def _forget(self) -> None:
        """Keep only the micro-batches that an update is still to come of."""
        for place, weights in self._weights.items():
            if place.stage == 0:
                flight = weights.flight
                queue = flight.queue if isinstance(flight, Flight) else ()
                ahead = {entry.number for entry in queue}.union(
                    *(done for there, done in self._done.items() if there.replica == place.replica)
                )
                known = self._batches[place.replica]
                self._batches[place.replica] = {number: known[number] for number in ahead if number in known}

    # ---- afterwards ------------------------------------------------------------------------------------------------

    def _compared(self, before: list[Chain]) -> list[dict[str, Any]]:
        step, found = self._trainer.steps, []
        exact: dict[Numbers, list[list[Gradient]]] = {}
        for place, (numbers, used) in sorted(self._used.items()):
            if not all(number in self._batches[place.replica] for number in numbers):
                continue
            if numbers not in exact:
                exact[numbers] = self._exact(before, numbers)
            goal = self._goal(place, exact[numbers])
            used = [x for x, counts in zip(used, _counted(before[place.replica], place.stage)) if counts]
            size = norm(goal)
            record = {"cosine": cosine(used, goal), "ratio": norm(used) / size if size else None}
            found.append({"step": step, "replica": place.replica, "stage": place.stage, **record})
        return found

    def _goal(self, place: Place, exact: list[list[Gradient]]) -> Gradient:
        """Of one replica, or the mean of all where gradients are averaged."""
        if type(self._weights[place]).reduce is Weights.reduce:
            return exact[place.replica][place.stage]
        rows = zip(*(replica[place.stage] for replica in exact), strict=True)
        return [
            None if row[0] is None else torch.stack([x.double() for x in row if x is not None]).mean(0) for row in rows
        ]

    def _exact(self, before: list[Chain], numbers: Numbers) -> list[list[Gradient]]:
        """Backpropagation's gradients, [replica][stage]; the trainer and its random state stay as they are."""
        with random_state_kept(self._trainer.device):
            return [self._of_replica(replica, chain, numbers) for replica, chain in enumerate(before)]

    def _of_replica(self, replica: int, chain: Chain, numbers: Numbers) -> list[Gradient]:
        for mine, theirs in zip(chain.modules(), self._trainer.chains[replica].modules(), strict=True):
            mine.training = theirs.training
        for x in chain.parameters():
            x.grad = None
        for number in numbers:
            if number in self._batches[replica]:
                self._backward(replica, chain, self._batches[replica][number])
        return [
            [x.grad for x, counts in zip(_trained(stage), _counted(chain, j)) if counts]
            for j, stage in enumerate(chain)
        ]

    def _backward(self, replica: int, chain: Chain, batch: Batch) -> None:
        workers = [worker for worker in self._trainer.workers if worker.replica == replica]

        def computed(j: int, x: Tensor) -> Tensor:
            workers[j].at(batch.number)
            return workers[j].compute(chain[j].body, (x,))

        with contextlib.ExitStack() as stack:
            for worker in workers:
                stack.enter_context(_back_to(worker))
            *_, (_, _, h) = chain.walk(batch.x, computed)
            loss = workers[-1].compute(_loss, (chain[-1], h, batch))
            workers[-1].compute(torch.autograd.backward, (loss,))


@contextlib.contextmanager
def _back_to(worker: Worker) -> Iterator[None]:
    """A worker is afterwards at the micro-batch where it was."""
    number = worker.micro_batch
    try:
        yield
    finally:
        worker.at(number)


def _loss(stage: Stage, h: Tensor, batch: Batch) -> Tensor:
    return stage.judge(stage.read(h), batch) * batch.weight


def _trained(stage: Stage) -> list[nn.Parameter]:
    return [x for x in stage.parameters() if x.requires_grad]


def _counted(chain: Chain, j: int) -> list[bool]:
    """For each trained weight of stage j, whether the network's loss depends on it."""
    last = j == len(chain) - 1
    inside = {id(x) for x in chain[j].body.parameters()}
    return [last or id(x) in inside for x in _trained(chain[j])]
