"""In which order samples come: pure functions of (seed, epoch, replica), so a run resumes with integers.

An epoch is a sequence of *positions* 0 … n−1; the permutation says which sample stands at which position. Everything
drawn at random (order, augmentation, text offset) belongs to a position, never to a batch, so it does not depend on how
the positions are cut into batches and shards. Batch b of replica r of N, B samples each, holds the positions

    (b·N + r)·B  …  (b·N + r + 1)·B − 1        (N = shards)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BadData
from ..rng import generator


class Moment(NamedTuple):
    """What all randomness of one epoch depends on; `stream` is the replica, or 0 when the replicas share one order."""

    seed: int
    epoch: int
    stream: int

    def numbers(self, purpose: str) -> torch.Generator:
        """The generator of this epoch for one purpose ('order', 'crop', …)."""
        return generator("data", purpose, self.seed, self.epoch, self.stream)


def permutation(count: int, moment: Moment) -> Tensor:
    """(count,) int64: the sample at each position of the epoch."""
    return torch.randperm(count, generator=moment.numbers("order"))


def steps(count: int, batch_size: int, shards: int = 1) -> int:
    """Whole batches of each replica in a training epoch; at least one, or BadData."""
    _at_least("batch_size", batch_size, 1)
    _at_least("shards", shards, 1)
    if batch_size * shards > count:
        raise BadData(
            f"A training batch of {batch_size} on each of {shards} shard(s) needs {batch_size * shards} samples, but "
            f"the data set has {count}; use a smaller batch size or more data."
        )
    return count // (batch_size * shards)


def begins(count: int, batch_size: int, replica: int, shards: int, train: bool) -> range:
    """First position of each of the replica's batches.

    In training the incomplete last batch is dropped, so every replica has equally many. In evaluation nothing is: the
    last batch may be short, and a replica may have one batch fewer than another. BadData for impossible numbers.
    """
    _at_least("batch_size", batch_size, 1)
    _at_least("shards", shards, 1)
    _at_least("replica", replica, 0)
    if shards > 1 and replica >= shards:
        raise BadData(f"There is no replica {replica} among {shards} shards; replicas are numbered 0 to {shards - 1}.")
    end = steps(count, batch_size, shards) * shards * batch_size if train else count
    first = replica * batch_size if shards > 1 else 0
    return range(first, end, shards * batch_size)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise BadData(f"{name} is {value}, but it must be at least {least}.")
