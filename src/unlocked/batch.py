"""One micro-batch, and when it comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InvalidChoice


class Samples(NamedTuple):
    """Which samples these are: `numbers` (B,) int64 on the CPU, of `total` there are; `data`: a fingerprint of them all."""

    numbers: Tensor
    total: int
    data: int


class Batch(NamedTuple):
    """What one replica sees at once.

    x: inputs (B, …); y: targets (B, …); number: of this micro-batch since training began; weight: its share of the
    step's samples (1 without gradient accumulation), by which its loss is multiplied; phase: which part of the training
    this is, for methods that train stages one after the other; samples: which ones, where a method asks for that.
    """

    x: Tensor
    y: Tensor
    number: int = 0
    weight: float = 1.0
    phase: int = 0
    samples: Samples | None = None


def micro_batches(
    x: Tensor, y: Tensor, count: int, first: int, phase: int, known: Samples | None = None
) -> Iterator[Batch]:
    """Split a batch into `count` parts, as equal as can be; weights are their shares of the samples."""
    samples = len(x)
    numbers = (
        [None] * count if known is None else [known._replace(numbers=n) for n in known.numbers.tensor_split(count)]
    )
    parts = zip(x.tensor_split(count), y.tensor_split(count)) if count > 1 else [(x, y)]
    for k, (x_part, y_part) in enumerate(parts):
        yield Batch(own_memory(x_part), own_memory(y_part), first + k, len(x_part) / samples, phase, numbers[k])


def own_memory(x: Tensor) -> Tensor:
    """`x`, copied if it is a part of something larger: where its memory begins may decide the last bit of a product, and
    what is kept for later should not keep the rest."""
    if not isinstance(x, Tensor) or x.is_meta or x.untyped_storage().nbytes() == x.numel() * x.element_size():
        return x
    return x.clone()


def at_least_two(x: Tensor) -> Tensor:
    """`x`, twice if it is one sample: a BatchNorm in training wants two."""
    return x if len(x) > 1 else torch.cat([x, x])


def one_per_replica(
    x: Tensor | Sequence[Tensor], y: Tensor | Sequence[Tensor], replicas: int, accumulate: int, equal: bool
) -> list[tuple[Tensor, Tensor]]:
    """One (x, y) for each replica, from lists of them or from one batch that is split evenly.

    `equal`: whether all must have one size. Raises InvalidChoice if they do not fit the replicas or `accumulate`.
    """
    if isinstance(x, Tensor) != isinstance(y, Tensor):
        raise InvalidChoice("Give x and y both as tensors, or both as lists with one tensor per replica.")
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        if len(x) % replicas or len(x) != len(y):
            raise InvalidChoice(
                f"A batch of {len(x)} inputs and {len(y)} targets cannot be split evenly among {replicas} replicas; "
                f"give a multiple of {replicas}, or lists with one batch per replica."
            )
        x, y = x.chunk(replicas), y.chunk(replicas)
    sizes = [len(part) for part in x]
    if len(x) != replicas or len(y) != replicas:
        raise InvalidChoice(
            f"{len(x)} batches and {len(y)} targets were given for {replicas} replicas; give {replicas} of each."
        )
    if equal and len(set(sizes)) > 1:
        raise InvalidChoice(f"Replicas that share one batch need equal parts of it, got sizes {sizes}.")
    if min(sizes) < accumulate:
        raise InvalidChoice(f"A batch of {min(sizes)} cannot be split into {accumulate} micro-batches.")
    return list(zip(x, y))
