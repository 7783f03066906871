"""Centralised baselines: every round all nodes know the mean of all gradients.

    gradient descent  x⁺ = x − a ∇f(x),  a = 2/(L+μ)                                          Nesterov (2004), Theorem 2.1.15
    Nesterov          x⁺ = y − ∇f(y)/L,  y⁺ = x⁺ + b (x⁺ − x),  b = (√κ−1)/(√κ+1)              Nesterov (2004), §2.2.1

f = (1/n) Σ f_i; L and μ those of the worst node, as for all methods here. A round: n gradients, and 2(n−1) communications, what
an all-reduce along a spanning tree takes: n − 1 messages up and n − 1 down.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import numpy as np

from ..graph import Floats, Graph
from .baselines import Round
from .problems import Problem


def _mean_gradient(problem: Problem, x: Floats) -> Floats:
    return np.broadcast_to(problem.gradients(x).mean(axis=0), x.shape)


def gradient_descent(problem: Problem, graph: Graph, start: Floats, step: float | None = None) -> Iterator[Round]:
    """From the mean of `start` (n, d); endless."""
    step = 2 / (problem.L + problem.mu) if step is None else step
    x, k = np.tile(start.mean(axis=0), (problem.n, 1)), 0
    while True:
        x, k = x - step * _mean_gradient(problem, x), k + 1
        yield Round(x, k * problem.n, 2 * k * (problem.n - 1))


def nesterov(problem: Problem, graph: Graph, start: Floats, step: float | None = None) -> Iterator[Round]:
    """From the mean of `start` (n, d); endless."""
    step = 1 / problem.L if step is None else step
    root = sqrt(problem.condition)
    momentum = (root - 1) / (root + 1)
    x = y = np.tile(start.mean(axis=0), (problem.n, 1))
    k = 0
    while True:
        before, x = x, y - step * _mean_gradient(problem, y)
        y, k = x + momentum * (x - before), k + 1
        yield Round(x, k * problem.n, 2 * k * (problem.n - 1))
