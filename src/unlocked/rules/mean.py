"""Sums and means over replicas in the one order that all worlds use, so that the numbers are the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def ordered_sum(rows: Sequence[Tensor]) -> Tensor:
    """Sum of two or more tensors of one shape, from the first upwards."""
    total = rows[0] + rows[1]
    for x in rows[2:]:
        total += x
    return total


def ordered_mean(rows: Sequence[Tensor]) -> Tensor:
    """Mean of two or more tensors of one shape: their ordered sum, then divided."""
    return ordered_sum(rows).div_(len(rows))
