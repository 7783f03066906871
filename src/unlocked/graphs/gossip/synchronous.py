"""Synchronous gossip, and the same accelerated by Chebyshev polynomials (Oyallon §5.1.1 and §5.1.3; Scaman et al. 2017).

    x_{k+1} = M x_k,   M = I − αΛ,   α = 2/(λ₂ + λ_max)                                            synchronous
    x_k = P_k(M) x_0,  P_k(z) = T_k(z/ρ)/T_k(1/ρ),   ρ = (κ−1)/(κ+1),  κ = λ_max/λ₂                Chebyshev

λ₂, λ_max smallest nonzero and largest eigenvalue of Λ (κ is the text's γ); T_k Chebyshev polynomial of degree k. On the mean
P_k(1) = 1; on everything else the eigenvalues of M lie in [−ρ, ρ], and of all polynomials of degree k with P(1) = 1 this one
is smallest there:

    ‖πx_k‖ ≤ ρᵏ ‖πx_0‖                                                                            synchronous
    ‖πx_k‖ ≤ ‖πx_0‖ / T_k(1/ρ) = 2qᵏ/(1 + q²ᵏ) ‖πx_0‖,   q = (√κ−1)/(√κ+1)                         Chebyshev

both with equality for an eigenvector of λ₂. P_k comes by a recurrence of three terms, so one may stop after any round:

    x_{k+1} = ω_{k+1} (M x_k − x_{k−1}) + x_{k−1},   ω_1 = 1,  ω_2 = 1/(1 − ρ²/2),  ω_{k+1} = 1/(1 − ρ²ω_k/4)

A round activates every edge once: |E| communications. Limits: κ = 1 (complete graph): both reach the mean in one round.
"""

from __future__ import annotations

import math

import numpy as np

from ...errors import InvalidChoice
from ..graph import Floats, Graph
from ..spectra import algebraic_connectivity, largest_eigenvalue
from .engine import rows_of
from .trajectory import Trajectory


def synchronous_gossip(graph: Graph, values: Floats, rounds: int) -> Trajectory:
    """Measured at the rounds 0, 1, …; values: (n,) or (n, d). Raises InvalidChoice."""
    return _rounds(graph, values, rounds, accelerate=False)


def chebyshev_gossip(graph: Graph, values: Floats, rounds: int) -> Trajectory:
    """Measured at the rounds 0, 1, …; values: (n,) or (n, d). Raises InvalidChoice."""
    return _rounds(graph, values, rounds, accelerate=True)


def synchronous_bound(kappa: float, rounds: int) -> float:
    """ρᵏ: what is left of ‖πx‖ after k rounds, at most."""
    return ((kappa - 1) / (kappa + 1)) ** rounds


def chebyshev_bound(kappa: float, rounds: int) -> float:
    """1/T_k(1/ρ): what is left of ‖πx‖ after k rounds, at most."""
    q = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    return 2 * q**rounds / (1 + q ** (2 * rounds))


def synchronous_rounds(kappa: float, epsilon: float) -> int:
    """Rounds after which ‖πx‖² ≤ ε ‖πx_0‖² whatever x_0; κ = 1 needs one."""
    rho = (kappa - 1) / (kappa + 1)
    return max(1, math.ceil(0.5 * math.log(epsilon) / math.log(rho))) if rho > 1e-12 else 1


def chebyshev_rounds(kappa: float, epsilon: float) -> int:
    """Rounds after which ‖πx‖² ≤ ε ‖πx_0‖² whatever x_0; κ = 1 needs one."""
    rho = (kappa - 1) / (kappa + 1)
    return max(1, math.ceil(math.acosh(epsilon**-0.5) / math.acosh(1 / rho))) if rho > 1e-12 else 1


def _extremes(graph: Graph) -> tuple[float, float]:
    if graph.n < 2 or not graph.connected:
        raise InvalidChoice(f"{graph.name} has to be connected, with two nodes or more.")
    return algebraic_connectivity(graph), largest_eigenvalue(graph)


def _rounds(graph: Graph, values: Floats, rounds: int, accelerate: bool) -> Trajectory:
    if rounds < 0 or np.ndim(values) > 2:
        raise InvalidChoice(
            "Give a number of rounds from 0, and values of (n,) or (n, d): there is nothing random here."
        )
    low, high = _extremes(graph)
    alpha, rho = 2 / (low + high), (high - low) / (high + low)
    laplacian = graph.sparse_laplacian().tocsr()
    x = rows_of(values, graph.n, 1).reshape(graph.n, -1)
    before, omega, errors = x, 1.0, [_error(x)]
    for k in range(rounds):
        if accelerate and k:
            omega = 1 / (1 - rho**2 / 2) if k == 1 else 1 / (1 - rho**2 * omega / 4)
        x, before = omega * (x - alpha * (laplacian @ x) - before) + before, x
        errors.append(_error(x))
    steps = np.arange(rounds + 1)
    return Trajectory(steps.astype(np.float64), len(graph) * steps[None], np.array([errors]), x[None])


def _error(x: Floats) -> float:
    return float(np.square(x - x.mean(axis=0)).sum())
