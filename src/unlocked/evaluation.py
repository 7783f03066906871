"""What a population is worth: single networks, their mean, their ensemble.

Evaluation, too, is what workers do: a batch goes up the stages, each scores its own head, replicas are averaged and their
outputs gathered by the verbs of worker.py. So no process ever needs the whole network, and every world gives the same numbers.
All functions here are called by every process of a run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .batch import Batch
from .batchnorm import reestimating
from .chain import Chain, Stage
from .consensus.base import Weights
from .loop import random_state_kept
from .losses import classifies, logits
from .modes import modes_kept
from .rules.ensemble import layerwise as mixture
from .worker import Link, Place, Worker

if TYPE_CHECKING:
    from .credit.base import Credit
    from .session import Trainer

Batches = Iterable[tuple[Tensor, Tensor]]
Stages = dict[Place, Stage]  # of the workers here


@dataclass(frozen=True)
class Evaluation:
    """Scores on a data set. Accuracies are shares in [0, 1], None where the target is no class.

    loss, accuracy: of the network itself (one replica) or of the averaged network (several). A loss is None only where
    there is nothing to compute it on (pair_evaluation.py).
    stages: (loss, accuracy) read at each stage's head, None where there is none; the last entry is the network's own.
    members: accuracy of each replica. ensemble: accuracy of their mean prediction. Empty/None for one replica.
    layerwise: accuracy of all heads of the network together (rules/ensemble.py); None if no stage below the last has one.
    probed: whether accuracies are those of linear probes on frozen features: of networks that learn without labels.
    """

    loss: float | None
    accuracy: float | None
    stages: list[tuple[float | None, float | None] | None]
    members: list[float | None]
    ensemble: float | None
    layerwise: float | None = None
    probed: bool = False

    def to_json(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return asdict(self)


class Score:
    """Sums of losses and hits over batches, kept on the device. samples: how many."""

    def __init__(self) -> None:
        self._loss: Tensor | float = 0.0
        self._hits: Tensor | float = 0.0
        self._targets = 0
        self.samples = 0
        self._classes = True

    def add(self, output: Any, y: Tensor, loss: Tensor | None, classes: bool = True) -> None:
        """One batch: the head's output (or logits), its targets and the mean loss. `classes`: are they scores?"""
        self.samples += len(y)
        if loss is not None:
            self._loss = self._loss + loss.detach() * len(y)
        self._classes = self._classes and classes and not y.is_floating_point()
        if self._classes:
            self._targets += y.numel()
            self._hits = self._hits + (logits(output).argmax(-1) == y).sum()

    @property
    def loss(self) -> float:
        """Mean loss."""
        return float(self._loss) / self.samples

    @property
    def accuracy(self) -> float | None:
        """Share of targets hit, or None if they are not classes."""
        return float(self._hits) / self._targets if self._classes else None


# ---- programs --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _without_graph(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    return function(x)


async def go_through(
    worker: Worker, stage: Stage, batch: Batch, credit: Credit, visit: Callable[[Tensor], None]
) -> None:
    """A batch goes through the stage to the next one; `visit` sees what the stage's head reads, the output mostly."""
    x = await worker.own_below.recv("evaluation", batch)
    worker.at(batch.number)
    h = worker.seeded(_without_graph, (stage, x))
    await worker.own_above.send("evaluation", h)
    worker.seeded(_without_graph, (visit, await credit.seen_by_head(worker, stage, h)))


async def _average(worker: Worker, weights: Weights, into: Stages) -> None:
    """A copy of the stage whose floating-point parameters and buffers are the means over the replicas."""
    copy = into[worker.place] = await weights.judged()
    tensors = [x.detach() for x in [*copy.parameters(), *copy.buffers()] if x.is_floating_point()]
    for x, mean in zip(tensors, await worker.replicas.mean("averaging", tensors)):
        x.copy_(mean)


async def _collect(worker: Worker, stage: Stage, into: Sequence[Chain]) -> None:
    """Every stage sends its tensors to the first one of replica 0, which puts them into the chains, one for each replica."""
    worker.at_hand()
    tensors = [x.detach() for x in [*stage.parameters(), *stage.buffers()]]
    if worker.place != Place(0, 0):
        for x in tensors:
            await Link(worker, Place(0, 0)).send("collecting", x)
        return
    for place, target in ((Place(n, j), target) for n, chain in enumerate(into) for j, target in enumerate(chain)):
        for k, x in enumerate([*target.parameters(), *target.buffers()]):
            own = place == worker.place
            x.detach().copy_(tensors[k] if own else await Link(worker, place).recv("collecting", x))


async def _together(worker: Worker, output: Tensor, y: Tensor, score: Score, classes: bool) -> None:
    """Score the mean of the replicas' predicted probabilities."""
    rows = await worker.replicas.gather("ensemble", torch.softmax(output, dim=-1))
    score.add(sum(rows), y, None, classes)


# ---- what the session offers -----------------------------------------------------------------------------------------


def run_all(trainer: Trainer, program: Callable[[Worker, Weights], Coroutine[Any, Any, None] | None]) -> None:
    """Run a program per worker here (None: it has no part in it)."""
    programs = [(weights.worker, program(weights.worker, weights)) for weights in trainer.weights]
    with random_state_kept(trainer.device):
        trainer.world.run([(worker, one) for worker, one in programs if one is not None], charged=False)


def judged_network(trainer: Trainer, copies: bool) -> Stages:
    """The stages, of the workers here, of the network that is judged: replica 0's own, or copies with the mean of all."""
    if trainer.networks == 1:
        whole = [weights for weights in trainer.weights if weights.worker.replica == 0]
        return {weights.worker.place: _copy(weights) if copies else weights.stage for weights in whole}
    stages: Stages = {}
    run_all(trainer, lambda worker, weights: _average(worker, weights, stages))
    return {place: stage for place, stage in stages.items() if place.replica == 0}


def _copy(weights: Weights) -> Stage:
    weights.worker.at_hand()
    return weights.plain_copy()


def sweep(trainer: Trainer, stages: Stages, batch: Batch, visit: Callable[[Place, Tensor], None]) -> None:
    """One batch through these stages."""

    def program(worker: Worker, weights: Weights) -> Coroutine[Any, Any, None] | None:
        place = worker.place
        if place not in stages:
            return None
        return go_through(worker, stages[place], batch, trainer.credit, lambda seen: visit(place, seen))

    run_all(trainer, program)


def refresh_batchnorm(trainer: Trainer, stages: Stages, batches: Batches) -> None:
    """Estimate the BatchNorm statistics of the stages and their heads anew: plain means over the given batches."""
    with reestimating(*stages.values()):
        for number, (x, y) in enumerate(batches):
            sweep(trainer, stages, Batch(x, y, number), lambda place, seen: _ignore(stages[place].read(seen)))


def _ignore(value: object) -> None:
    """The head ran for its statistics only."""


def averaged(trainer: Trainer, refresh: Batches | None) -> Chain | None:
    """The averaged network as a new chain on rank 0, None elsewhere; `refresh`: batches for its BatchNorm statistics."""
    stages = judged_network(trainer, copies=refresh is not None)
    if refresh is not None:
        refresh_batchnorm(trainer, stages, refresh)
    found = _collected(trainer, stages, 1)
    return found[0] if found else None


def members(trainer: Trainer) -> list[Chain] | None:
    """Each of the trainer's networks as a new chain, in the order of the replicas, on rank 0; None elsewhere."""
    whole = [weights for weights in trainer.weights if weights.worker.replica < trainer.networks]
    return _collected(trainer, {weights.worker.place: _copy(weights) for weights in whole}, trainer.networks)


def _collected(trainer: Trainer, stages: Stages, count: int) -> list[Chain] | None:
    """The stages of replicas 0 … count − 1 as so many new chains on rank 0, None elsewhere."""
    into = [trainer.template.blank(trainer.device) for _ in range(count if trainer.crew.chief else 0)]
    run_all(
        trainer,
        lambda worker, weights: _collect(worker, stages[worker.place], into) if worker.place in stages else None,
    )
    return into or None


def ensemble(trainer: Trainer, x: Tensor) -> Tensor | None:
    """Mean over the replicas of their predicted probabilities for `x`, softmax over the last dimension; on rank 0 only."""
    found: list[Tensor] = []

    async def program(worker: Worker, weights: Weights) -> None:
        outputs: list[Tensor] = []
        await go_through(worker, weights.stage, Batch(x, x), trainer.credit, outputs.append)
        if worker.last:
            mine = torch.softmax(logits(outputs[0]), dim=-1)
            rows = [mine] if trainer.networks == 1 else await worker.replicas.gather("ensemble", mine)
            if worker.replica == 0:
                await Link(worker, Place(0, 0)).send("predicted", torch.stack(rows).mean(0))
        if worker.place == Place(0, 0):
            found.append(await Link(worker, Place(0, worker.stages - 1)).recv("predicted"))

    with modes_kept(*(weights.stage for weights in trainer.weights)):
        for weights in trainer.weights:
            weights.stage.eval()
        one = trainer.networks == 1
        run_all(trainer, lambda worker, weights: None if one and worker.replica else program(worker, weights))
    return found[0] if found else None


def evaluate(trainer: Trainer, batches: Batches, depth: int, refresh: Batches | None) -> Evaluation:
    """Score the network (at every head, and at stage `depth` as the network's own output) and, if several, the replicas."""
    network = judged_network(trainer, copies=refresh is not None)
    if refresh is not None:
        refresh_batchnorm(trainer, network, refresh)
    population = [weights for weights in trainer.weights if trainer.networks > 1]
    stages = {
        place: Score()
        for place, stage in network.items()
        if stage.head is not None or place.stage == trainer.stages - 1
    }
    readers = [weights.worker for weights in population if weights.worker.stage == depth]
    members, together = {worker.place: Score() for worker in readers}, {worker.place: Score() for worker in readers}
    whole = [*network.values(), *(weights.stage for weights in population)]

    voters = _voters(trainer, depth)
    said: dict[Place, Tensor] = {}
    layerwise = Score()

    def score(place: Place, seen: Tensor) -> None:
        if place in stages:
            output = network[place].read(seen)
            stages[place].add(output, y, network[place].judge(output, Batch(x, y)), classifies(network[place].loss))
            if place.stage in voters and y.dim() == 1:
                said[place] = torch.softmax(logits(output), dim=-1)

    async def member(worker: Worker, weights: Weights) -> None:
        outputs: list[Tensor] = []
        await go_through(worker, weights.stage, Batch(x, y), trainer.credit, outputs.append)
        if worker.stage == depth:
            output, classes = _read(weights.stage, outputs[0]), classifies(weights.stage.loss)
            members[worker.place].add(output, y, None, classes)
            await _together(worker, output, y, together[worker.place], classes)

    with modes_kept(*whole), torch.no_grad():
        for stage in whole:
            stage.eval()
        for x, y in batches:
            sweep(trainer, network, Batch(x, y), score)
            if voters and y.dim() == 1 and not y.is_floating_point():
                voting = functools.partial(_vote, trainer=trainer, voters=voters, said=said, y=y, score=layerwise)
                run_all(trainer, voting)
            if population:
                run_all(trainer, member)
    return _merge(trainer, depth, stages, members, together, layerwise)


def _voters(trainer: Trainer, depth: int) -> list[int]:
    """The stages whose heads make up the layerwise ensemble; none where the network's own output is all there is."""
    heads = [j for j, stage in enumerate(trainer.template) if stage.head is not None and classifies(stage.loss)]
    return [*heads, trainer.stages - 1] if heads and depth == trainer.stages - 1 else []


def _vote(
    worker: Worker,
    weights: Weights,
    trainer: Trainer,
    voters: list[int],
    said: dict[Place, Tensor],
    y: Tensor,
    score: Score,
) -> Coroutine[Any, Any, None] | None:
    """The last stage of replica 0 scores what all heads say together."""
    if worker.replica or worker.stage not in voters:
        return None

    async def program() -> None:
        mine = said.pop(worker.place)
        if not worker.last:
            await Link(worker, Place(0, trainer.stages - 1)).send("layerwise", mine)
            return
        rows: dict[int, list[Tensor]] = {}
        for j in voters:
            row = mine if j == worker.stage else await Link(worker, Place(0, j)).recv("layerwise")
            if row.shape == mine.shape:
                rows.setdefault(trainer.template.layout.depth(j), []).append(row)
        score.add(mixture(rows), y, None)

    return program()


def _read(stage: Stage, h: Tensor) -> Tensor:
    return logits(stage.read(h))


def _merge(
    trainer: Trainer,
    depth: int,
    stages: dict[Place, Score],
    members: dict[Place, Score],
    together: dict[Place, Score],
    layerwise: Score,
) -> Evaluation:
    """The scores of all processes, on every one of them."""
    mine = {
        "stages": [[place.stage, score.loss, score.accuracy] for place, score in stages.items()],
        "members": [[place.replica, score.accuracy] for place, score in members.items()],
        "ensemble": [score.accuracy for place, score in together.items() if place.replica == 0],
        "layerwise": [layerwise.accuracy] if layerwise.samples else [],
    }
    found = trainer.crew.share(mine)
    scored: dict[int, tuple[float, float | None]] = {
        j: (loss, accuracy) for part in found for j, loss, accuracy in part["stages"]
    }
    voted = [accuracy for part in found for accuracy in part["ensemble"]]
    return Evaluation(
        *scored[depth],
        [scored.get(j) for j in range(trainer.stages)],
        [
            accuracy
            for _, accuracy in sorted((pair for part in found for pair in part["members"]), key=lambda pair: pair[0])
        ],
        voted[0] if voted else None,
        next((accuracy for part in found for accuracy in part["layerwise"]), None),
    )
