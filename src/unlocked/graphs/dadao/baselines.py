"""Synchronous decentralised baselines with gradients: DGD, gradient tracking, EXTRA.

    DGD       x⁺ = W x − a ∇f(x)                                             Yuan, Ling & Yin (2016)
    tracking  x⁺ = W (x − a y),  y⁺ = W (y + ∇f(x⁺) − ∇f(x)),  y_0 = ∇f(x_0)  adapt-then-combine form of Nedić, Olshevsky & Shi
                                                                             (2017, DIGing), Qu & Li (2018)
    EXTRA     x⁺ = (I+W) x − (I+W)/2 x⁻ − a (∇f(x) − ∇f(x⁻)),  x_1 = W x_0 − a ∇f(x_0)      Shi, Ling, Wu & Yin (2015)

W = I − Λ with Metropolis rates (`degrees.metropolis`); its eigenvalues are 1 > λ₂ ≥ … ≥ λ_n > −1; σ = max(λ₂, −λ_n). a: step.

What each computes: DGD the minimum of Σ f_i(x_i) + 1/(2a) xᵀ(I−W)x, which is not x* unless all nodes agree there; its distance
is O(a/(1−σ)). Tracking and EXTRA x* itself. On a complete graph W is the mean, and tracking is centralised gradient descent.

Steps by the theory, unless given:
- DGD: (1 + min(λ_n, 0))/(L + μ), the largest within both conditions of its Theorem (a ≤ (1+λ_n)/L, a ≤ 1/(L+μ)).
- tracking: the step at which the bound of Qu & Li (Theorem 1), the spectral radius of a 3 × 3 matrix, is least; here the
  matrix is for adapt-then-combine: σ more in the two rows that mix. On a complete graph it is 2/(L+μ).
- EXTRA: (1+λ_n)/(2L), half of the limit (1+λ_n)/L below which its Theorem 3.5 has it converge.

Counts: n gradients a round; DGD and EXTRA |E| communications, tracking 2|E| (two vectors, the second after the first).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import minimize_scalar

from ..degrees import metropolis
from ..graph import Floats, Graph
from .problems import Problem


@dataclass(frozen=True)
class Round:
    """After a round: x (n, d), and what was spent so far."""

    x: Floats
    gradients: int
    communications: int


class Mixing:
    """W of a graph, as an operator, and its extreme eigenvalues."""

    def __init__(self, graph: Graph) -> None:
        self.matrix = np.eye(graph.n) - (metropolis(graph).laplacian() if len(graph) else 0.0)
        values = np.linalg.eigvalsh(self.matrix)
        self.least, self.second = float(values[0]), float(values[-2]) if graph.n > 1 else 0.0
        few = np.count_nonzero(self.matrix) < 0.1 * self.matrix.size
        self._kept = sparse.csr_array(self.matrix) if few else self.matrix

    @property
    def sigma(self) -> float:
        """σ: what is left, at most, of the distance to the mean."""
        return max(self.second, -self.least, 0.0) if len(self.matrix) > 1 else 0.0

    def __call__(self, x: Floats) -> Floats:
        return np.asarray(self._kept @ x)


def dgd_step(problem: Problem, mixing: Mixing) -> float:
    """See the module's text."""
    return (1 + min(mixing.least, 0.0)) / (problem.L + problem.mu)


def extra_step(problem: Problem, mixing: Mixing) -> float:
    """See the module's text."""
    return (1 + mixing.least) / (2 * problem.L)


def tracking_step(problem: Problem, mixing: Mixing) -> float:
    """See the module's text."""
    top = 2 / (problem.L + problem.mu)
    if mixing.sigma < 1e-9:
        return top
    best = minimize_scalar(
        lambda log: tracking_radius(problem, mixing.sigma, float(np.exp(log))),
        bounds=(np.log(top) - 30.0, np.log(top)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(best.x))


def tracking_radius(problem: Problem, sigma: float, step: float) -> float:
    """Bound on the factor a round: of (‖y − ȳ‖, ‖x − x̄‖, √n ‖x̄ − x*‖), where x̄ is the mean over the nodes.

    From ‖W v‖ ≤ σ‖v‖ for v of mean 0, ȳ = mean of ∇f(x), and ‖x⁺ − x‖ ≤ 2‖x−x̄‖ + a(‖y−ȳ‖ + √n‖ȳ‖).
    """
    mu, L = problem.mu, problem.L
    shrinks = max(abs(1 - step * mu), abs(1 - step * L))
    rows = [
        [sigma * (1 + step * L), sigma * L * (2 + step * L), sigma * step * L**2],
        [sigma * step, sigma, 0.0],
        [0.0, step * L, shrinks],
    ]
    return float(np.abs(np.linalg.eigvals(np.array(rows))).max())


def dgd(problem: Problem, graph: Graph, start: Floats, step: float | None = None) -> Iterator[Round]:
    """Decentralised gradient descent, from x_0 (n, d); endless."""
    mixing, x, k = Mixing(graph), start, 0
    step = dgd_step(problem, mixing) if step is None else step
    while True:
        x, k = mixing(x) - step * problem.gradients(x), k + 1
        yield Round(x, k * problem.n, k * len(graph))


def tracking(problem: Problem, graph: Graph, start: Floats, step: float | None = None) -> Iterator[Round]:
    """Gradient tracking, adapt-then-combine; endless."""
    mixing, x, k = Mixing(graph), start, 0
    step = tracking_step(problem, mixing) if step is None else step
    g = y = problem.gradients(x)
    while True:
        x, k = mixing(x - step * y), k + 1
        yield Round(x, k * problem.n, (2 * k - 1) * len(graph))
        g, before = problem.gradients(x), g
        y = mixing(y + g - before)


def extra(problem: Problem, graph: Graph, start: Floats, step: float | None = None) -> Iterator[Round]:
    """EXTRA; endless."""
    mixing, k = Mixing(graph), 1
    step = extra_step(problem, mixing) if step is None else step
    g, mixed, before = problem.gradients(start), mixing(start), start
    x = mixed - step * g
    while True:
        yield Round(x, k * problem.n, k * len(graph))
        now, mixed_now = problem.gradients(x), mixing(x)
        after = x + mixed_now - (before + mixed) / 2 - step * (now - g)
        g, mixed, before, x, k = now, mixed_now, x, after, k + 1
