"""The loss of pairs of views of held-out images, at a stage's projector head.

Two views of each image, drawn as in training from a seed that never changes; in evaluation mode. As many are judged together
as in an update of training, for a contrastive loss depends on the number of its negatives; held-out images that fill no such
batch have no part in the loss. Views go through the network in smaller parts: only projections are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .batch import Batch
from .data import Data
from .evaluation import Score
from .probes.features import by_depth
from .rng import seed_of

if TYPE_CHECKING:
    from .chain import Chain, Stage
    from .credit import Credit
    from .session import Trainer

SEED = 0
VIEWS = 512  # that go through the network together

Oracle = Callable[[Tensor], Tensor]  # views (n, …) to another network's projections (n, E)


def pair_batches(train: Data, test: Data, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out views (2B, …) and their images' labels (2B,), always the same, drawn as in `train`; none if it has no views,
    or of one image."""
    if train.views == 1 or len(test) < 2:  # one image has no other one to be told from
        return iter(())
    alike = dataclasses.replace(test, augment=train.augment)
    seed, size = seed_of(SEED, "held-out views"), min(batch_size, len(test))
    return alike.batches(size, epoch=0, seed=seed, train=True, device=device)


def pair_batch_size(trainer: Trainer) -> int:
    """Images that training judges together, of all replicas if they have one loss; before there were any, 64 of each."""
    together = trainer.weights[0].one_gradient and getattr(trainer.credit, "replicas", "together") == "together"
    return (trainer.batch_size or 64) * (trainer.replicas if together else 1)


@torch.no_grad()
def pair_losses(
    chain: Chain,
    credit: Credit | None,
    train: Any,
    test: Any,
    batch_size: int,
    device: torch.device,
    told: Callable[[int], None],
) -> list[float | None]:
    """Of a chain as a whole, in the mode it is in: what `evaluate_pairs` finds at every head. None of data that are no `Data`.

    `told`: called with the number of images done since the last call.
    """
    oracle = oracle_of(credit)
    scores = {j: PairScore(stage, oracle) for j, stage in enumerate(chain) if has_pair_loss(stage, oracle)}
    known = isinstance(train, Data) and isinstance(test, Data)
    for x, y in pair_batches(train, test, batch_size, device) if known else ():
        for part in parts_of(Batch(x, y)):
            for row in by_depth(chain, part.x, credit):
                for j, seen in zip(row.stages, row.seen, strict=True):
                    if j in scores:
                        scores[j].read(seen)
        for score in scores.values():
            score.judge(Batch(x, y))
        told(len(x) // 2)
    return [scores[j].loss if j in scores else None for j in range(len(chain))]


class PairScore:
    """The mean loss of a stage over batches of views. It reads a batch part by part, and judges its projections together."""

    def __init__(self, stage: Stage, oracle: Oracle | None) -> None:
        self._stage, self._oracle, self._read, self._score = stage, oracle, list[Tensor](), Score()

    def read(self, seen: Tensor) -> None:
        """A part of a batch; `seen`: what the stage's head reads."""
        self._read.append(self._stage.read(seen))

    def judge(self, batch: Batch) -> None:
        """The batch is read."""
        z = torch.cat(self._read)
        if reads_oracle(self._stage):
            assert self._oracle is not None
            asked = torch.cat([self._oracle(part.x) for part in parts_of(batch)])
            loss = self._stage.loss.judge(z, batch.y, asked).loss  # type: ignore[attr-defined]
        else:
            loss = self._stage.judge(z, batch)
        self._score.add(z, batch.y, loss, classes=False)
        self._read.clear()

    @property
    def loss(self) -> float | None:
        """None if there was no batch."""
        return self._score.loss if self._score.samples else None


def parts_of(batch: Batch) -> list[Batch]:
    """The batch in parts that fit in memory as any evaluation does; views of an image stay together."""
    return [Batch(x, y, k) for k, (x, y) in enumerate(zip(batch.x.split(VIEWS), batch.y.split(VIEWS), strict=True))]


def has_pair_loss(stage: Stage, oracle: Oracle | None) -> bool:
    """Whether the stage has a loss of pairs, and what that needs."""
    known = getattr(stage.loss, "known", True)
    return known and stage.head is not None and (oracle is not None or not reads_oracle(stage))


def reads_oracle(stage: Stage) -> bool:
    """Whether its loss looks at the projections of another network."""
    return bool(getattr(stage.loss, "reads_oracle", False))


def oracle_of(credit: Credit | None) -> Oracle | None:
    """What gives an oracle's projections of views, under rules that have one."""
    return getattr(credit, "oracle_rows", None)
