"""What a network is worth that learned from pairs of views: it has no classifier, so a linear probe reads it.

    stage j:  (loss^j, probe^j)
    loss^j    of the stage's projector head, over two views of held-out images, drawn as in training; in evaluation mode
    probe^j   accuracy on held-out images, not augmented, of a linear map from the stage's pooled output, fitted in closed
              form to at most PROBED training images, not augmented (probes/linear_probe.py, probes/features.py); or to
              labelled images of another set, if there are some (labelled.py)

held_out_pairs.py says which views, and how many are judged together.

None, where a number cannot be had: every one before there were training data; the loss of a stage without a head, or where
training had no views; the probe where labels are no classes, or are missing (negative).

Each worker sums up its own stage's rows, so no process ever needs the whole network, or keeps features. Of a population
`members` are the probes of each replica's own network, fitted to it; there is no ensemble, for no probe gives probabilities.
All functions here are called by every process of a run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .batch import Batch
from .data import Data, Domains
from .evaluation import (
    Batches,
    Evaluation,
    Stages,
    go_through,
    judged_network,
    refresh_batchnorm,
    run_all,
    sweep,
)
from .held_out_pairs import PairScore, has_pair_loss, oracle_of, pair_batch_size, pair_batches, parts_of
from .labelled import as_trained
from .modes import modes_kept
from .probes.features import to_rows
from .probes.linear_probe import ProbeScore, TrainingRows, held_out
from .rng import seed_of
from .worker import Place

if TYPE_CHECKING:
    from .session import Trainer

PROBED = 10_000  # rows of features, at most, that a probe is fitted to
SEED = 0

Visit = Callable[[Place, Tensor], None]


def evaluate_pairs(
    trainer: Trainer,
    train: Data | Domains | None,
    test: Data,
    batch_size: int,
    depth: int,
    refresh: Batches | None,
    probe_on: Data | None = None,
) -> Evaluation:
    """Score the network on `test`: every stage's pair loss and probe, stage `depth`'s as the network's own. `train`: what it
    was trained on; `refresh`: batches to estimate BatchNorm statistics from; `probe_on`: labelled images for the probe, None:
    those of `train`."""
    fitted_to = train
    if probe_on is not None:
        fitted_to, test = as_trained(train, probe_on), as_trained(train, test)
    network = judged_network(trainer, copies=refresh is not None)
    if refresh is not None:
        refresh_batchnorm(trainer, network, refresh)
    several = trainer.networks > 1
    population = {w.worker.place: w.stage for w in trainer.weights if several}
    whole = [*network.values(), *population.values()]
    with modes_kept(*whole), torch.no_grad():
        for stage in whole:
            stage.eval()
        losses = _pair_losses(trainer, network, train, test)
        probes, members = _probes(trainer, network, population, fitted_to, test, batch_size, depth)
    return _merge(trainer, depth, losses, probes, members)


def classes_of(*sets: Data) -> int | None:
    """Number of classes, None if some labels are no classes or are missing."""
    labels = [one.y for one in sets if one.y is not None]
    if any(y.is_floating_point() for y in labels) or not all(one.labelled for one in sets):
        return None
    return max(one.classes for one in sets)


def _pair_losses(
    trainer: Trainer, network: Stages, train: Data | Domains | None, test: Data
) -> dict[Place, float | None]:
    oracle = oracle_of(trainer.credit)
    scores = {place: PairScore(stage, oracle) for place, stage in network.items() if has_pair_loss(stage, oracle)}
    first = train.sets[0] if isinstance(train, Domains) else train

    def read(place: Place, seen: Tensor) -> None:
        if place in scores:
            scores[place].read(seen)

    for x, y in iter(()) if first is None else pair_batches(first, test, pair_batch_size(trainer), trainer.device):
        for part in parts_of(Batch(x, y)):
            sweep(trainer, network, part, read)
        for score in scores.values():
            score.judge(Batch(x, y))
    return {place: score.loss for place, score in scores.items()}


def _probes(
    trainer: Trainer,
    network: Stages,
    population: Stages,
    train: Data | Domains | None,
    test: Data,
    batch_size: int,
    depth: int,
) -> tuple[dict[Place, float | None], dict[Place, float | None]]:
    """The probe's score at every stage of the network here, and at stage `depth` of every member here."""
    sets = train.sets if isinstance(train, Domains) else [] if train is None else [train]
    columns = classes_of(*sets, test) if sets else None
    ends = [place for place in population if place.stage == depth]
    if columns is None:
        return dict.fromkeys(network), dict.fromkeys(ends)
    rows, ours = {p: TrainingRows(columns) for p in network}, {p: TrainingRows(columns) for p in ends}
    generator = torch.Generator().manual_seed(SEED)
    for x, y in _as_they_are(sets, batch_size, trainer.device):
        held = held_out(len(x), generator)

        def learn(place: Place, h: Tensor, into: dict[Place, TrainingRows], y: Tensor = y, held: Tensor = held) -> None:
            if place in into:
                into[place].add(to_rows(h, y, 1, place.stage), y.flatten(), held)

        visits = (functools.partial(learn, into=into) for into in (rows, ours))
        _go_through_both(trainer, network, population, Batch(x, y), *visits)
    scores = {place: ProbeScore(row.probe()) for place, row in rows.items()}
    theirs = {place: ProbeScore(row.probe()) for place, row in ours.items()}
    for x, y in test.batches(batch_size, epoch=0, seed=SEED, train=False, device=trainer.device):

        def score(place: Place, h: Tensor, into: dict[Place, ProbeScore], y: Tensor = y) -> None:
            if place in into:
                into[place].add(to_rows(h, y, 1, place.stage), y.flatten())

        visits = (functools.partial(score, into=into) for into in (scores, theirs))
        _go_through_both(trainer, network, population, Batch(x, y), *visits)
    return {p: one.value for p, one in scores.items()}, {p: one.value for p, one in theirs.items()}


def _go_through_both(
    trainer: Trainer, network: Stages, population: Stages, batch: Batch, visit: Visit, visit_member: Visit
) -> None:
    """A batch goes through the network, and through each member."""
    sweep(trainer, network, batch, visit)
    if trainer.networks > 1:
        run_all(
            trainer,
            lambda worker, weights: go_through(
                worker, population[worker.place], batch, trainer.credit, functools.partial(visit_member, worker.place)
            ),
        )


def _as_they_are(sets: list[Data], batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of training samples, not augmented: PROBED rows in all, from every set alike, or all there are."""
    for one in sets:
        labels = one.samples(torch.zeros(1, dtype=torch.int64))[1].numel()  # of one sample
        count = max(1, PROBED // len(sets) // labels)
        index = torch.arange(len(one))
        if count < len(one):
            chosen = torch.randperm(len(one), generator=torch.Generator().manual_seed(seed_of(SEED, "probed")))
            index = chosen[:count].sort().values
        for some in index.split(batch_size):
            x, y = one.samples(some)
            yield x.to(device), y.to(device)


def _merge(
    trainer: Trainer,
    depth: int,
    losses: dict[Place, float | None],
    probes: dict[Place, float | None],
    members: dict[Place, float | None],
) -> Evaluation:
    """The scores of all processes, on every one of them."""
    mine = {
        "stages": [[place.stage, losses.get(place), accuracy] for place, accuracy in probes.items()],
        "members": [[place.replica, accuracy] for place, accuracy in members.items()],
    }
    found = trainer.crew.share(mine)
    stages: list[Any] = [None] * trainer.stages
    for j, loss, accuracy in (row for part in found for row in part["stages"]):
        stages[j] = (loss, accuracy)
    rows = sorted((row for part in found for row in part["members"]), key=lambda row: row[0])
    loss, accuracy = stages[depth]
    return Evaluation(loss, accuracy, stages, [score for _, score in rows], ensemble=None, probed=True)
