"""MSDA: multi-step dual accelerated method (Scaman, Bach, Bubeck, Lee & Massoulié 2017, Algorithm 3).

    θ_i = ∇f_i*(y_i);     u⁺ = y − a P_K θ;     y⁺ = (1+b) u⁺ − b u,    u_0 = y_0 = 0
    P_K = I − T_K(c₂(I − c₃Λ))/T_K(c₂),   K = ⌊1/√γ⌋,   γ = λ₂/λ_max of Λ,   q = ((1−√γ)/(1+√γ))^K
    a = μ (1+q²)/(1+q)²,   b = ((1+q)√κ − (1−q))/((1+q)√κ + (1−q)),   κ = L/μ

Nesterov's method on the dual, with K rounds of Chebyshev-accelerated gossip between two gradients (`gossip.chebyshev_gossip`:
P_K x is x less what it makes of x): P_K has the eigenvalues 0 and others within 1 ± 2q/(1+q²). θ is the estimate of x*; it
converges at the rate of √κ, whatever the graph. Σ_i y_i = 0 throughout.

∇f_i*(y) = argmin_x f_i(x) − ⟨x, y⟩ is exact: for ridge one solve, for logistic regression Newton's method to rounding from the
last θ. It is counted as one gradient, though for logistic regression it costs several Hessians: gradients of MSDA and of the
primal methods are not the same work. A round: n dual gradients, K|E| communications. Limits: γ = 1 (complete graph): K = 1 and
P is I − 11ᵀ/n.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import numpy as np

from ..gossip import chebyshev_gossip
from ..graph import Floats, Graph
from ..spectra import eigenvalues
from .baselines import Round
from .problems import Problem


def msda(problem: Problem, graph: Graph, start: Floats, step: float | None = None) -> Iterator[Round]:
    """Endless. `start` (n, d) only helps to find the first θ: the method itself begins with y = 0. step: a."""
    spectrum = eigenvalues(graph)
    gamma = float(spectrum[1] / spectrum[-1]) if graph.n > 1 else 1.0
    rounds = int(1 / sqrt(gamma) + 1e-12)
    q = max(0.0, (1 - sqrt(gamma)) / (1 + sqrt(gamma))) ** rounds
    root = sqrt(problem.condition)
    step = problem.mu * (1 + q**2) / (1 + q) ** 2 if step is None else step
    momentum = ((1 + q) * root - (1 - q)) / ((1 + q) * root + (1 - q))
    u = y = np.zeros((problem.n, problem.d))
    theta, k = start, 0
    while True:
        theta = problem.conjugate(y, theta)
        k += 1
        yield Round(theta, k * problem.n, (k - 1) * rounds * len(graph))
        before, u = u, y - step * _contrast(graph, theta, rounds)
        y = u + momentum * (u - before)


def _contrast(graph: Graph, x: Floats, rounds: int) -> Floats:
    """P_K x."""
    return x - chebyshev_gossip(graph, x, rounds).values[0] if graph.n > 1 else np.zeros_like(x)
