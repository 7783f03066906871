"""WASH's draw: which scalars are permuted among the replicas, and how (F Eq. 6.3, 6.6, Algorithm 2).

    θ̂_n^i = θ_{π_i(n)}^i with probability p, else θ_n^i          π_i uniform over the permutations of {1..N}, one per scalar

Everything is drawn from one seed, so replicas agree on indices and permutations without sending them. The draw is made on the
CPU wherever the weights are: generators of other devices give other numbers.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["decreasing", "constant", "increasing"]
_IN_A_TABLE = 6  # replicas of whose permutations there is a table: 720 columns


def layer_probability(p: float, layer: int, layers: int, schedule: Schedule) -> float:
    """Shuffling probability p_l of layer l of L (from 0): p(1 − l/(L−1)), p, or p·l/(L−1) (F Eq. 6.6, Table D.1).

    A network of one layer has p_l = p under every schedule.
    """
    if schedule == "constant" or layers == 1:
        return p
    depth = layer / (layers - 1)
    return p * (1.0 - depth) if schedule == "decreasing" else p * depth


def draw(count: int, p: float, replicas: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of `count` scalars are permuted, each with probability p, and their permutations.

    Returns `indices` (k,) int64, distinct, ascending; `owners` (N, k) int64: replica n's scalar comes from `owners[n]`.
    """
    indices = hits(count, p, generator)
    return indices, permutations(chances(len(indices), replicas, generator), replicas)


def hits(count: int, p: float, generator: torch.Generator) -> Tensor:
    """The heads among `count` tosses of a coin that shows one with probability p: indices (k,) int64, ascending.

    What is drawn is how far it is from one to the next, which is a geometric number: the same law in O(p·count).
    """
    if p <= 0.0 or p >= 1.0:
        return torch.arange(count if p >= 1.0 else 0)
    expected = p * count
    enough = int(expected + 4.0 * math.sqrt(expected)) + 4  # nearly always
    last: Tensor | int = -1
    rows: list[Tensor] = []
    while last < count:
        gaps = torch.empty(enough, dtype=torch.float64).geometric_(p, generator=generator)  # float64: exact up to 2⁵³
        rows.append(gaps.cumsum(0).add_(last))
        last = rows[-1][-1]
    found = rows[0] if len(rows) == 1 else torch.cat(rows)
    return found[found < count].long()


def chances(count: int, replicas: int, generator: torch.Generator) -> Tensor:
    """The random numbers in [0, 1) that `count` permutations are made of: (words, count) float64."""
    words = 1 if replicas <= _IN_A_TABLE else replicas - 1
    return torch.rand(words, count, dtype=torch.float64, generator=generator)


def permutations(chances: Tensor, replicas: int) -> Tensor:
    """Uniform permutations of N replicas: (N, k) int64, one in each column, made of the same column of `chances`."""
    if replicas <= _IN_A_TABLE:
        table = _all_permutations(replicas)
        return table.index_select(1, chances[0].mul(table.shape[1]).long())
    columns = torch.zeros(replicas, chances.shape[1], dtype=torch.long)
    for n in range(1, replicas):  # the n-th comes to a place among those so far, who was there goes to the end
        place = chances[n - 1 : n].mul(n + 1).long()
        columns[n] = columns.gather(0, place)[0]
        columns.scatter_(0, place, n)
    return columns


@functools.cache
def _all_permutations(replicas: int) -> Tensor:
    """(N, N!) int64."""
    return torch.tensor(list(itertools.permutations(range(replicas)))).T.contiguous()
