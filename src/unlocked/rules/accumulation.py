"""Updates from gradients that were summed while the update before was on its way (Nabli et al., 2024: ACCO; F §5.5; FACTS 2.6).

    G = Σ_n Σ_s ∇ℓ_s        sum over the samples s that replica n managed             S = Σ_n S_n   how many these are
    ACCO    estimate   θ̃_{t+1} = OPT(θ_t, G̃ / S̃)                       OPT's state is put back
            commit     θ_{t+1} = OPT(θ_t, (G̃ + G) / (S̃ + S))           G̃ was summed at θ̃_t,  G at θ_t
    DPU                θ_{t+1} = OPT(θ_t, G_{t−1} / S_{t−1})           G_{t−1} was summed at θ_{t−1}
    WP                 the same, with G_{t−1} summed at θ̂_{t−1};  θ̂_{t+1} = OPT(OPT(θ_t, g), g),  g = G_{t−1} / S_{t−1}

    t step, n = 0..N−1 replica, OPT an optimizer that works on every number by itself.

For SGD with rate η and equal halves ACCO is θ_{t+1} = θ_t − (η/2)(∇f(θ_t) + ∇f(θ̃_t)), θ̃_{t+1} = θ_t − η ∇f(θ̃_t).

Limits: if θ̃_t = θ_t ACCO is an update from one large batch. (A rate of 0 in the estimate is not enough: it gives θ̃_{t+1} = θ_t,
so that G̃ is one update late.) Every sample counts the same,
whoever saw it: it is not the mean of the replicas' means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor


class Sum(NamedTuple):
    """A sum of gradients over samples: a tensor per parameter (None: it had no part in the loss), and how many they are."""

    gradients: list[Tensor | None]
    samples: int


def summed(gradients: Sequence[Tensor | None], of_step: int, samples: int) -> Sum:
    """The sum over `samples` samples, from gradients of a loss that is the mean over `of_step` samples, of which only these
    have been seen. Writes into the given tensors."""
    return Sum([None if g is None else g.mul_(of_step) for g in gradients], samples)


def joined(one: Sum | None, other: Sum) -> Sum:
    """Both sums in one. Writes into the tensors of `other`."""
    if one is None:
        return other
    gradients = [a if b is None else b if a is None else b.add_(a) for a, b in zip(one.gradients, other.gradients)]
    return Sum(gradients, one.samples + other.samples)


def clip_factor(squares: Sequence[float], clip: float | None) -> float:
    """By what a gradient is multiplied so that its norm is at most about `clip`; its parts' squared norms are `squares`.

    The formula is that of torch.nn.utils.clip_grad_norm_: min(1, clip / (norm + 10⁻⁶)).
    """
    return 1.0 if clip is None else min(1.0, clip / (math.sqrt(math.fsum(squares)) + 1e-6))


class Piece(NamedTuple):
    """Values `begin` to `end` of a flattened tensor, the one with this number."""

    of: int
    begin: int
    end: int


def pieces_of(sizes: Sequence[int], begin: int, end: int) -> list[Piece]:
    """What lies between these two positions of tensors of these sizes, laid end to end."""
    edges = [0]
    for count in sizes:
        edges.append(edges[-1] + count)
    found = [Piece(k, max(a, begin) - a, min(b, end) - a) for k, (a, b) in enumerate(pairwise(edges))]
    return [piece for piece in found if piece.end > piece.begin]


def schedule_steps(samples: int, nominal: int) -> int:
    """How far a learning-rate schedule is after so many samples: one step for each full `nominal` of them."""
    return samples // nominal
