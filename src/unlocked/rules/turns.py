"""Whose turn it is, where stages of different speed share one process: the experiment of asynchronous DGL (FACTS 1.2).

    staircase   0;  0 1;  0 1 2;  …;  0 1 … J−1      so that every stage has something to work on
    then        the stage of each tick is drawn: j with probability r_j / Σ r

r_j > 0 rate of stage j. With r_k = 1 − noise for one slow stage and 1 for the others, the slow-down of stage k is
1 / (1 − noise).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Generator

_ROW = 1024  # draws at a time


def staircase(stages: int) -> list[int]:
    """The stage of each of the first J (J + 1) / 2 ticks."""
    return [stage for step in range(stages) for stage in range(step + 1)]


def drawn(rates: Sequence[float], source: Generator) -> Iterator[int]:
    """The stage of each tick, without end."""
    weights = torch.tensor(rates, dtype=torch.float64)
    while True:
        yield from torch.multinomial(weights, _ROW, replacement=True, generator=source).tolist()


def ticks(stage: int, turns: Iterator[int]) -> Iterator[int]:
    """The ticks, counted from 0, at which it is this stage's turn."""
    return (tick for tick, whose in enumerate(turns) if whose == stage)
