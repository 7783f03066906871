"""What each stage of a network has made of the data, and how far its own aim is from backpropagation's: why local learning
leaves a gap.

    probe                  held-out accuracy (R² of values) of a linear map from the stage's frozen features (linear_probe.py)
    loss, accuracy         on held-out data, read at the stage's own head
    cosine                 of the gradient it learns from to backpropagation's (local_gradients.py)
    effective rank         how many directions the features use on the training data (spectra.py)

Features of a stage are its output, one row for each label: maps (B, C, H, W) averaged over space, or over each of `pool` ×
`pool` windows; (B, T, D) averaged over T, or row by row where every position has a label. Neuron groups that stand side by
side have one probe, on their joined output. Probes, losses and ranks are in evaluation mode, gradients in training mode.

Nothing of the network changes: weights, buffers, gradients, modes, the random state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..batch import Batch
from ..chain import Chain
from ..costs import untouched
from ..errors import InvalidChoice
from ..evaluation import Score
from ..losses import classifies, logits
from .explanation import KEPT, Depth, Explanation, Reading
from .features import by_depth, per_token, to_rows
from .linear_probe import Moments, ProbeScore, chosen
from .local_gradients import cosines, teachers
from .spectra import effective_rank, eigenvalues, participation_ratio, singular_values

if TYPE_CHECKING:
    from ..credit import Credit
    from ..session import Trainer
    from ..soups.predicting import Batches

Told = Callable[[int], None]
HELD = 0.2  # of the training data, to choose λ
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
    told: Told | None = None,
) -> Explanation:
    """Probe every stage of a chain, or of a trainer's network (the mean of its replicas).

    Args:
        network: trained or not. On several processes all must call it; rank 0 gets the result, the others None.
        train, test: `Data` (taken unaugmented), a pair of tensors, a Dataset, or batches (x, y).
        credit: the rule that says whose loss a stage learns from; default: the trainer's. Of a chain alone a stage with a
            head learns from it, any other one from the network's loss.
        pool: maps are averaged over pool × pool windows (1: over all of space); smaller maps are taken pixel by pixel.
        gradient_samples: about so many training samples for the gradients, drawn at random, in batches of `batch_size`.
        told: called with the number of samples done since the last call.

    Raises InvalidChoice for options and data that do not fit.
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
    probe = _Probe(chain, credit, pool, device_of(chain), told or (lambda samples: None))
    with untouched(chain):
        torch.manual_seed(SEED)
        return probe.explain(Batches(train, batch_size), Batches(test, batch_size), gradient_samples, updates)


def _whole(trainer: Trainer, train: Any) -> Chain | None:
    """The network that the trainer's own evaluation judges, as a copy; None on other ranks than 0."""
    refreshed = trainer.replicas > 1 and trainer.batchnorm == "refresh"
    return trainer.averaged(train if refreshed else None)


class _Probe:
    """Goes through the data: training data, held-out data, some training data for the gradients."""

    def __init__(self, chain: Chain, credit: Credit | None, pool: int, device: torch.device, told: Told) -> None:
        self._chain, self._credit, self._pool, self._device, self._told = chain, credit, pool, device, told

    def explain(self, train: Batches, test: Batches, samples: int, updates: int | None) -> Explanation:
        self._chain.eval()
        moments, classes = self._moments(train)
        scores = [ProbeScore(chosen(part, held)) for part, held in moments]
        heads = self._score(test, scores)
        self._chain.train()
        learns_from, batches = teachers(self._chain, self._credit), self._weighted(train.sample(samples, SEED))
        found = cosines(self._chain, self._credit, batches, learns_from, self._told)
        readings = [
            Reading(j, *head, list(learns_from[j]), *pair)
            for j, (head, pair) in enumerate(zip(heads, found, strict=True))
        ]
        depths = [
            _depth(depth, part + held, score, [readings[j] for j in self._chain.layout.row(depth)])
            for depth, ((part, held), score) in enumerate(zip(moments, scores, strict=True))
        ]
        return Explanation(classes, scores[0].rows, self._pool, updates, depths)

    def _moments(self, train: Batches) -> tuple[list[tuple[Moments, Moments]], bool]:
        """For every depth those of the rows that are fitted to, and of those that choose λ; whether the targets are classes."""
        generator = torch.Generator().manual_seed(SEED)
        moments: list[tuple[Moments, Moments]] = []
        classes = True
        for x, y in self._moved(train):
            held = torch.rand(len(x), generator=generator) < HELD
            rows, labels, columns = self._rows(x, y)
            classes = not labels.is_floating_point()
            held = held.to(self._device).repeat_interleave(len(labels) // len(x))
            if not moments:
                moments = [_pair(h, labels, columns) for h in rows]
            for h, (part, other) in zip(rows, moments, strict=True):
                part.add(h[~held], labels[~held])
                other.add(h[held], labels[held])
        part, other = moments[0]
        if part.count < 2 or other.count < 1:
            raise InvalidChoice(
                f"{part.count + other.count} training samples are too few for a probe; give some dozens."
            )
        return moments, classes

    def _score(self, test: Batches, probes: list[ProbeScore]) -> list[tuple[float | None, float | None]]:
        """Scores the probes; (loss, accuracy) at the head of each stage, the last one's being the network's own."""
        last = len(self._chain) - 1
        scores = {j: Score() for j, stage in enumerate(self._chain) if stage.head is not None or j == last}

        def read(j: int, seen: Tensor, batch: Batch) -> None:
            if j in scores:
                stage = self._chain[j]
                output = stage.read(seen)
                scores[j].add(output, batch.y, stage.judge(output, batch), classifies(stage.loss))

        for x, y in self._moved(test):
            rows, labels, _ = self._rows(x, y, read)
            for h, score in zip(rows, probes, strict=True):
                score.add(h, labels)
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
            features.append(to_rows(row.joined, y, self._pool, depth))
            output = row.joined
        if y.is_floating_point():
            labels = y.flatten(0, 1) if per_token(output, y) else y.reshape(len(y), -1)
            return features, labels, labels.shape[1]
        columns = logits(self._chain[-1].read(output)).shape[-1]
        if int(y.max()) >= columns or int(y.min()) < 0:
            raise InvalidChoice(
                f"The data have the classes {int(y.min())} to {int(y.max())}, but the network has {columns} outputs; give the "
                "data it was trained for."
            )
        return features, y.flatten(), columns


def _pair(h: Tensor, y: Tensor, columns: int) -> tuple[Moments, Moments]:
    """Empty ones, with their origin at the mean of some rows."""
    zero = torch.zeros(columns, dtype=torch.float64, device=h.device)
    origins = (h.double().mean(0), y.double().mean(0) if y.is_floating_point() else zero)
    return Moments(origins), Moments(origins)


def _depth(depth: int, moments: Moments, score: ProbeScore, stages: list[Reading]) -> Depth:
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
    )
