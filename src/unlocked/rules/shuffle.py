"""WASH's draw: which scalars are permuted among the replicas, and how (F Eq. 6.3, 6.6, Algorithm 2).

    θ̂_n^i = θ_{π_i(n)}^i with probability p, else θ_n^i          π_i uniform over the permutations of {1..N}, one per scalar

Everything is drawn from one seed, so replicas agree on indices and permutations without sending them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["decreasing", "constant", "increasing"]


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
    k is Binomial(count, p), then k distinct indices are drawn uniformly: the same law as count coin flips, in O(k).
    """
    chance = torch.tensor(p, dtype=torch.float64)
    k = int(torch.binomial(torch.tensor(float(count), dtype=torch.float64), chance, generator=generator))
    indices = _distinct(count, k, generator)
    owners = torch.rand(replicas, k, dtype=torch.float64, generator=generator).argsort(dim=0)
    return indices, owners


def _distinct(count: int, k: int, generator: torch.Generator) -> Tensor:
    """k distinct numbers below `count`, every set equally likely, ascending."""
    if 3 * k > count:
        return torch.randperm(count, generator=generator)[:k].sort().values
    chosen = torch.randint(count, (k,), generator=generator).unique()
    while len(chosen) < k:  # draw again in place of the doubles, one by one in effect: sets stay uniform
        more = torch.randint(count, (k - len(chosen),), generator=generator)
        chosen = torch.cat([chosen, more]).unique()
    return chosen
