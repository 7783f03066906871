"""Averages over directed links: push-sum (Kempe, Dobra & Gehrke 2003), as SGP has it (Assran et al. 2019, Algorithm 1).

    send      p x_i and p w_i to every out-neighbour, p = 1/(1 + their number);   x_i ← p x_i,  w_i ← p w_i
    receive   x_i ← x_i + what came,  w_i ← w_i + what came
    z_i = x_i / w_i                                    what is trained

x_i numerators and w_i > 0 weight of replica i, w_i = 1 at first; z_i → Σ x / Σ w, the mean, even where x_i does not: a replica
that gets more than it sends has x_i and w_i too large alike. Σ x and Σ w are conserved, what is under way included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rows = list[Tensor]


def kept_share(targets: int) -> float:
    """p: what a replica keeps, and what each of so many out-neighbours gets."""
    return 1.0 / (1.0 + targets)


@torch.no_grad()
def moved(x: Sequence[Tensor], weight: float, z: Sequence[Tensor]) -> Rows:
    """x + (z' − z), z = x/w: the numerators after training has made z' of z. They move by the displacement itself, not by w
    times it (Algorithm 1, line 4)."""
    return [row + (new - row / weight) for row, new in zip(x, z)]


@torch.no_grad()
def debiased(x: Sequence[Tensor], weight: float) -> Rows:
    """z = x/w."""
    return [row / weight for row in x]
