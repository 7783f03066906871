"""Cyclic data parallelism, one replica after the other, in float64: what every way of running it must agree with.

Written from the formula with plain matrix products, as delayed_reference.py, whose layers, loss and optimizers it takes: no
autograd, no torch.optim, nothing of the library.

    θ_{t+1}^j = OPT(θ_t^j, clip((1/N) Σ_n (1/k) Σ_b ∇^j ℓ(batch_{t,n,b}; θ̂_{n,t})))

    θ̂_{n,t}^j = θ_t^j if u[n][j] else θ_{t−1}^j,  θ_{−1} = θ_0;   clip(g) = g · min(1, c / (|g| + 10⁻⁶)), |g| of the stage

n replica, j stage, t step, b one of k micro-batches. Two versions of every stage, θ_t and θ_{t−1}, are all it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from delayed_reference import SGD, Adam, Batch, Network, Weights, cross_entropy, stage_backward, stage_forward

Matrix = Sequence[Sequence[bool]]  # u, a row for each replica
Gradients = Callable[[Network, list[Weights], Batch], list[Weights]]


def of_rule(rule: str, replicas: int, stages: int) -> list[list[bool]]:
    """v1, or v2 in the thesis' own terms: at a time when replica n's forward of stage j begins, is the update over?"""
    late = [[_forward_begins(n, j, replicas, stages) for j in range(stages)] for n in range(replicas)]
    over = [_update_ends(j, replicas, stages) for j in range(stages)]
    return [[rule == "v2" and begin >= end for begin, end in zip(row, over)] for row in late]


def _forward_begins(n: int, j: int, replicas: int, stages: int) -> int:
    """In units of 1/N of a stage's forward, since step t began."""
    return 2 * stages * n + replicas * j


def _update_ends(j: int, replicas: int, stages: int) -> int:
    """The same, of the update to θ_t: a step before, the last replica's backward of stage j, counted from the top."""
    begins = 2 * stages * (replicas - 1) + replicas * (2 * stages - 1 - j)
    return begins + replicas - 2 * stages * replicas


def global_gradients(network: Network, weights: list[Weights], batch: Batch) -> list[Weights]:
    """Of the network's own loss, by backpropagation."""
    h, y = batch
    saved = []
    for names, w in zip(network.layers, weights):
        h, kept = stage_forward(names, w, h)
        saved.append(kept)
    _, d = cross_entropy(h, y)
    gradients: list[Weights] = []
    for names, w, kept in reversed(list(zip(network.layers, weights, saved))):
        d, own = stage_backward(names, w, kept, d)
        gradients = [own, *gradients]
    return gradients


def local_gradients(network: Network, weights: list[Weights], batch: Batch) -> list[Weights]:
    """Of every stage's own loss: each stage but the last ends with one linear layer more, its head."""
    h, y = batch
    gradients = []
    for j, (names, w) in enumerate(zip(network.layers, weights)):
        last = j == len(weights) - 1
        body, head = (names, w), ([], []) if last else (["linear"], w[-2:])
        if not last:
            body = (names, w[:-2])
        h, kept = stage_forward(*body, h)
        scores, kept_above = stage_forward(*head, h)
        _, d = cross_entropy(scores, y)
        d, above = stage_backward(*head, kept_above, d)
        _, own = stage_backward(*body, kept, d)
        gradients.append(own + above)
    return gradients


def run(
    network: Network,
    steps: Sequence[Sequence[Sequence[Batch]]],
    fresh: Matrix | Sequence[Matrix],
    optimizer: SGD | Adam,
    *,
    clip: float | None = None,
    rates: Sequence[float] | None = None,
    gradients: Gradients = global_gradients,
) -> list[list[Weights]]:
    """θ_0, θ_1, … by step, each by stage.

    steps[t][n]: the micro-batches of replica n in step t. fresh: u, or a matrix for each step. rates: by step.
    """
    several = isinstance(fresh[0][0], Sequence)
    matrices = fresh if several else [fresh] * len(steps)
    now = before = [list(stage) for stage in network.weights]
    states: list[list[dict[str, Tensor]]] = [[{} for _ in stage] for stage in now]
    history = [now]
    for t, replicas in enumerate(steps):
        rule = optimizer if rates is None else replace(optimizer, rate=rates[t])
        total = [[torch.zeros_like(x) for x in stage] for stage in now]
        for row, micro_batches in zip(matrices[t], replicas):
            seen = [new if u else old for u, new, old in zip(row, now, before)]
            share = 1.0 / (len(replicas) * len(micro_batches))
            for batch in micro_batches:
                found = gradients(network, seen, batch)
                total = [[a + share * b for a, b in zip(*pair)] for pair in zip(total, found)]
        total = [_clipped(stage, clip) for stage in total]
        before, now = (
            now,
            [[rule.step(x, g, state, t + 1) for x, g, state in zip(*stage)] for stage in zip(now, total, states)],
        )
        history.append(now)
    return history


def _clipped(gradients: Weights, largest: float | None) -> Weights:
    if largest is None:
        return gradients
    norm = sum(float((g * g).sum()) for g in gradients) ** 0.5
    return [g * min(1.0, largest / (norm + 1e-6)) for g in gradients]
