"""One micro-batch, and when it comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """What one replica sees at once.

    x: inputs (B, …); y: targets (B, …); number: of this micro-batch since training began; weight: its share of the
    step's samples (1 without gradient accumulation), by which its loss is multiplied; phase: which part of the training
    this is, for methods that train stages one after the other.
    """

    x: Tensor
    y: Tensor
    number: int = 0
    weight: float = 1.0
    phase: int = 0


def micro_batches(x: Tensor, y: Tensor, count: int, first: int, phase: int) -> Iterator[Batch]:
    """Split a batch into `count` parts, as equal as can be; weights are their shares of the samples."""
    samples = len(x)
    parts = zip(x.tensor_split(count), y.tensor_split(count)) if count > 1 else [(x, y)]
    for k, (x_part, y_part) in enumerate(parts):
        yield Batch(x_part, y_part, first + k, len(x_part) / samples, phase)
