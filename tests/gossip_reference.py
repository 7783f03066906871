"""Gossip while gradients are computed, one event after the other on N plain models: the equations of the files' headers,
nothing of the library.

    dx = η(x̃ − x) dt − ½ Σ (x_i − x_j) dM + Δ dN        dx̃ = η(x − x̃) dt − α̃ Σ (x_i − x_j) dM + Δ dN

`events`: (time, i, j) of one stage, in order, in gradients. Weights of a stage, and BatchNorm's statistics if they are
exchanged, are one vector. Between events everybody flows, by the exponential of the equation's matrix.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.linalg import expm
from torch import Tensor, nn

from averaging_reference import vector, write

Event = tuple[float, int, int]


def flow(eta: float, passed: float) -> Tensor:
    """(2, 2): what makes (x, x̃) after so long of (x, x̃)."""
    return torch.from_numpy(expm(eta * passed * np.array([[-1.0, 1.0], [1.0, -1.0]])))


class Pair:
    """z: (2, N, d), x and x̃ of all, which begin alike."""

    def __init__(self, x: Tensor, eta: float, alpha_tilde: float) -> None:
        self.z, self.eta, self.alpha_tilde, self.time = torch.stack([x, x]), eta, alpha_tilde, 0.0

    def until(self, time: float) -> None:
        self.z = torch.einsum("ab,bnd->and", flow(self.eta, time - self.time), self.z)
        self.time = time

    def exchange(self, time: float, i: int, j: int) -> None:
        self.until(time)
        m = self.z[0, i] - self.z[0, j]
        for part, share in ((0, 0.5), (1, self.alpha_tilde)):
            self.z[part, i] -= share * m
            self.z[part, j] += share * m

    def go(self, events: Sequence[Event], end: float) -> None:
        """The events up to a moment, then the rest of the time."""
        for time, i, j in events:
            self.exchange(time, i, j)
        self.until(end)


def batchnorms(model: nn.Module) -> list[Tensor]:
    """Running means and variances."""
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm1d)]
    return [x for part in norms for x in (part.running_mean, part.running_var)]


class Training:
    """N models whose J stages hold the given numbers of layers; `events`: of each stage."""

    def __init__(
        self,
        model: nn.Sequential,
        replicas: int,
        parts: Sequence[int],
        events: Sequence[Sequence[Event]],
        momentum: tuple[float, float],
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        schedule: Callable[[torch.optim.Optimizer], Any],
        statistics: bool = False,
    ) -> None:
        self.models, self.events = [copy.deepcopy(model) for _ in range(replicas)], events
        cuts = np.cumsum([0, *parts])
        stages = [[one[int(a) : int(b)] for a, b in itertools.pairwise(cuts)] for one in self.models]
        self.rows = [
            [[*stage.parameters(), *(batchnorms(stage) if statistics else [])] for stage in row] for row in stages
        ]
        self.optimizers = [[optimizer(list(stage.parameters())) for stage in row] for row in stages]
        self.schedules = [[schedule(one) for one in row] for row in self.optimizers]
        self.pairs = [Pair(self.values(j), *momentum) for j in range(len(parts))]
        self.updates = 0

    def values(self, j: int) -> Tensor:
        """(N, d): what stage j of all replicas holds."""
        return torch.stack([vector(row[j]) for row in self.rows])

    def step(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Gradients of the weights in place; then the exchanges made meanwhile; then what the gradients have moved."""
        before = [self.values(j) for j in range(len(self.pairs))]
        for model, optimizers, schedules, (x, y) in zip(self.models, self.optimizers, self.schedules, batches):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            for optimizer, schedule in zip(optimizers, schedules):
                optimizer.step()
                schedule.step()
        for j, pair in enumerate(self.pairs):
            displacement = self.values(j) - before[j]
            now = [event for event in self.events[j] if self.updates <= event[0] < self.updates + 1]
            pair.go(now, self.updates + 1.0)
            pair.z += displacement
            for row, values in zip(self.rows, pair.z[0]):
                write(values, row[j])
        self.updates += 1
