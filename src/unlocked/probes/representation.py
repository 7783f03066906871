"""What each stage of a network has made of the data, and how far its own aim is from backpropagation's: why local learning
leaves a gap.

    probe                  held-out accuracy (R² of values) of a linear map from the stage's frozen features (linear_probe.py)
    loss, accuracy         on held-out data, read at the stage's own head
    cosine                 of the gradient it learns from to backpropagation's (local_gradients.py)
    effective rank         how many directions the features use on the training data (spectra.py)
    knn, recipe            if asked for: held-out accuracy of a vote of neighbours (knn.py), of a trained layer (recipe.py)

Features of a stage are its output, one row for each label: maps (B, C, H, W) averaged over space, or over each of `pool` ×
`pool` windows; (B, T, D) averaged over T, or row by row where every position has a label. Neuron groups that stand side by
side have one probe, on their joined output. Probes, losses and ranks are in evaluation mode, gradients in training mode.

A network that learned from pairs of views has no classifier: its stages' losses are of held-out pairs (held_out_pairs.py), and
there is no gradient of a network's loss to compare with.

Nothing of the network changes: weights, buffers, gradients, modes, the random state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..chain import Chain
from ..costs import untouched
from ..data import Data, as_data
from ..errors import InvalidChoice
from ..evaluation import Score
from ..held_out_pairs import pair_batch_size, pair_losses
from ..labelled import as_trained, refuse_unlabelled
from ..losses import classifies, logits
from ..pairs import PairLoss
from .explanation import KEPT, Depth, Explanation, Reading
from .features import by_depth, per_token, to_rows
from .kept import Kept
from .knn import check_neighbours
from .linear_probe import Moments, ProbeScore, TrainingRows, held_out
from .local_gradients import cosines, teachers
from .recipe import Recipe
from .spectra import effective_rank, eigenvalues, participation_ratio, singular_values

if TYPE_CHECKING:
    from ..credit import Credit
    from ..session import Trainer
    from ..soups.predicting import Batches

Told = Callable[[int], None]
SEED = 0  # of all that is drawn here


def explain(
    network: Trainer | Chain,
    train: Any,
    test: Any,
    *,
    credit: Credit | None = None,
    pool: int = 1,
    gradient_samples: int = 1024,
    batch_size: int = 256,
    knn: int | None = None,
    recipe: Recipe | None = None,
    probe_on: Any = None,
    told: Told | None = None,
    recipe_told: Told | None = None,
) -> Explanation:
    """Probe every stage of a chain, or of a trainer's network (the mean of its replicas).

    Args:
        network: trained or not. On several processes all must call it; rank 0 gets the result, the others None.
        train, test: `Data` (taken unaugmented), a pair of tensors, a Dataset, or batches (x, y).
        credit: the rule that says whose loss a stage learns from; default: the trainer's. Of a chain alone a stage with a
            head learns from it, any other one from the network's loss.
        pool: maps are averaged over pool × pool windows (1: over all of space); smaller maps are taken pixel by pixel.
        gradient_samples: about so many training samples for the gradients, drawn at random, in batches of `batch_size`.
        knn: so many neighbours vote, too; None: no vote. recipe: also train a linear layer at every depth. Both keep all
            features in memory, 4 bytes for each entry of each row of each depth, and want classes.
        probe_on: of a network that learned without labels: labelled data to fit to instead of `train`, which then only says
            what views are like. They and `test` are normalised as `train` is (labelled.py); all three are `Data` then.
        told: called with the number of samples done since the last call; recipe_told: with the rows a layer was trained on.

    Raises InvalidChoice for options and data that do not fit, BadData for data without labels.
    """
    from ..soups.predicting import Batches, device_of

    for name, value in (("pool", pool), ("gradient_samples", gradient_samples), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidChoice(f"{name}={value!r} is not possible; give a whole number of at least 1.")
    chain, updates = (network, None) if isinstance(network, Chain) else (_whole(network, train), network.steps)
    if chain is None:
        return None  # type: ignore[return-value]  # not on rank 0, as documented
    if credit is None and not isinstance(network, Chain):
        credit = network.credit
    if knn is not None:
        check_neighbours(knn)
    pair_size = batch_size if isinstance(network, Chain) else pair_batch_size(network)
    options = _Options(pool, gradient_samples, pair_size, knn, recipe)
    probe = _Probe(chain, credit, options, device_of(chain), told or _ignore, recipe_told or _ignore)
    if probe_on is not None:
        if not probe.pairs:
            raise InvalidChoice(
                "The network has a classifier, so probes are fitted to its training data; leave out probe_on."
            )
        train, test = as_data(train), as_data(test)
        probe_on, test = as_trained(train, as_data(probe_on)), as_trained(train, test)
    viewed, held = Batches(train, batch_size), Batches(test, batch_size)
    fitted_to = viewed if probe_on is None else Batches(probe_on, batch_size)
    for one in (fitted_to.source, held.source):
        if isinstance(one, Data):
            refuse_unlabelled(one)
    with untouched(chain):
        torch.manual_seed(SEED)
        return probe.explain(fitted_to, held, updates, viewed.source)


class _Options(NamedTuple):
    pool: int
    samples: int  # for the gradients
    pair_size: int
    knn: int | None
    recipe: Recipe | None


def _ignore(samples: int) -> None:
    """Nobody wants to be told."""


def _whole(trainer: Trainer, train: Any) -> Chain | None:
    """The network that the trainer's own evaluation judges, as a copy; None on other ranks than 0."""
    refreshed = trainer.replicas > 1 and trainer.batchnorm == "refresh"
    return trainer.averaged(train if refreshed else None)


class _Probe:
    """Goes through the data: training data, held-out data, some training data for the gradients."""

    def __init__(
        self,
        chain: Chain,
        credit: Credit | None,
        options: _Options,
        device: torch.device,
        told: Told,
        recipe_told: Told,
    ) -> None:
        self._chain, self._credit, self._options, self._device = chain, credit, options, device
        self._told, self._recipe_told = told, recipe_told
        self.pairs = credit.self_supervised if credit is not None else isinstance(chain[-1].loss, PairLoss)
        self._kept = Kept(options.knn, options.recipe)
        self._columns = self._classes = 0  # of the probe's targets; of data whose network's outputs do not tell them

    def explain(self, train: Batches, test: Batches, updates: int | None, viewed: Any) -> Explanation:
        """viewed: training data that say what views are like, where losses are of those."""
        self._chain.eval()
        if self.pairs:
            self._classes = _classes_in(train)
        moments, classes = self._moments(train)
        scores = [ProbeScore(rows.probe()) for rows in moments]
        heads = self._score(test, scores)
        learns_from = teachers(self._chain, self._credit)
        if self.pairs:
            size = self._options.pair_size
            losses = pair_losses(self._chain, self._credit, viewed, test.source, size, self._device, self._told)
            heads = [(loss, None) for loss in losses]
            found: list[tuple[float | None, float | None]] = [(None, None)] * len(self._chain)
        else:
            self._chain.train()
            batches = self._weighted(train.sample(self._options.samples, SEED))
            found = cosines(self._chain, self._credit, batches, learns_from, self._told)
        readings = [
            Reading(j, *head, list(learns_from[j]), *pair)
            for j, (head, pair) in enumerate(zip(heads, found, strict=True))
        ]
        depths = [
            _depth(
                depth,
                rows.all,
                score,
                [readings[j] for j in self._chain.layout.row(depth)],
                *self._kept.accuracies(depth, self._columns, self._device, self._recipe_told),
            )
            for depth, (rows, score) in enumerate(zip(moments, scores, strict=True))
        ]
        pool, knn, recipe = self._options.pool, self._options.knn, self._options.recipe
        return Explanation(classes, scores[0].rows, pool, updates, depths, self.pairs, knn, recipe)

    def _moments(self, train: Batches) -> tuple[list[TrainingRows], bool]:
        """For every depth what its probe learns from; whether the targets are classes."""
        generator = torch.Generator().manual_seed(SEED)
        moments: list[TrainingRows] = []
        classes = True
        for x, y in self._moved(train):
            held = held_out(len(x), generator)
            rows, labels, columns = self._rows(x, y)
            classes = not labels.is_floating_point()
            moments = moments or [TrainingRows(columns) for _ in rows]
            for h, into in zip(rows, moments, strict=True):
                into.add(h, labels, held)
            self._kept.add(rows, labels, train=True)
        return moments, classes

    def _score(self, test: Batches, probes: list[ProbeScore]) -> list[tuple[float | None, float | None]]:
        """Scores the probes; (loss, accuracy) at the head of each stage, the last one's being the network's own."""
        last = len(self._chain) - 1
        headed = [j for j, stage in enumerate(self._chain) if stage.head is not None or j == last]
        scores = {} if self.pairs else {j: Score() for j in headed}

        def read(j: int, seen: Tensor, batch: Batch) -> None:
            if j in scores:
                stage = self._chain[j]
                output = stage.read(seen)
                scores[j].add(output, batch.y, stage.judge(output, batch), classifies(stage.loss))

        for x, y in self._moved(test):
            rows, labels, _ = self._rows(x, y, read)
            for h, score in zip(rows, probes, strict=True):
                score.add(h, labels)
            self._kept.add(rows, labels, train=False)
        return [(scores[j].loss, scores[j].accuracy) if j in scores else (None, None) for j in range(last + 1)]

    def _moved(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in batches:
            yield x.to(self._device), y.to(self._device)
            self._told(len(x))

    def _weighted(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        total = sum(len(x) for x, _ in batches)
        for number, (x, y) in enumerate(batches):
            yield Batch(x.to(self._device), y.to(self._device), number, len(x) / total)

    @torch.no_grad()
    def _rows(
        self, x: Tensor, y: Tensor, read: Callable[[int, Tensor, Batch], None] | None = None
    ) -> tuple[list[Tensor], Tensor, int]:
        """For every depth one row for each label; the labels; how many columns the probe's targets have."""
        batch, features = Batch(x, y), []
        for depth, row in enumerate(by_depth(self._chain, x, self._credit)):
            if read is not None:
                for j, seen in zip(row.stages, row.seen, strict=True):
                    read(j, seen, batch)
            features.append(to_rows(row.joined, y, self._options.pool, depth))
            output = row.joined
        if y.is_floating_point():
            labels = y.flatten(0, 1) if per_token(output, y) else y.reshape(len(y), -1)
            return features, labels, labels.shape[1]
        self._columns = columns = self._classes or logits(self._chain[-1].read(output)).shape[-1]
        if int(y.max()) >= columns or int(y.min()) < 0:
            wanted = "the training data have" if self.pairs else "the network has"
            what = "classes" if self.pairs else "outputs"
            raise InvalidChoice(
                f"The data have the classes {int(y.min())} to {int(y.max())}, but {wanted} {columns} {what}; give the data it "
                "was trained for."
            )
        return features, y.flatten(), columns


def _classes_in(batches: Batches) -> int:
    """How many classes the labels have."""
    if isinstance(batches.source, Data):
        return batches.source.classes
    return 1 + max(0 if y.is_floating_point() else int(y.max()) for _, y in batches)


def _depth(
    depth: int, moments: Moments, score: ProbeScore, stages: list[Reading], knn: float | None, recipe: float | None
) -> Depth:
    values = eigenvalues(moments.covariance)
    return Depth(
        depth,
        len(values),
        score.value,
        score.probe.ridge,
        effective_rank(values),
        participation_ratio(values),
        [float(f"{value:.4g}") for value in singular_values(values)[:KEPT].tolist()],
        stages,
        knn,
        recipe,
    )
