"""The exact second moment of DADAO's error, where all f_i are quadratic in one variable.

Each event is then linear in the distance S from the saddle point, so P_t = E[S_t S_tᵀ] follows

    dP/dt = M P + P Mᵀ + Σ_events rate_e (G_e P G_eᵀ − P),

a linear equation: E‖x_t − x*‖² without drawing anything, and its rate without a fit. f_i(x) = h_i x²/2 − b_i x; S is (6n,), the
six variables one after the other; matrices of (6n)² × (6n)², so for a handful of nodes.
"""

from __future__ import annotations

import numpy as np

from ..graph import Floats, Graph
from .constants import Y_TILDE, Constants, X, Y, Z


def generator(hessians: Floats, graph: Graph, constants: Constants) -> Floats:
    """((6n)², (6n)²): of P, row by row, for h (n,), at the graph's rates as they are."""
    n = len(hessians)
    size = 6 * n
    drift, unit = np.kron(constants.drift, np.eye(n)), np.eye(size)
    found = np.kron(drift, unit) + np.kron(unit, drift)
    for rate, jump in [*_gradients(hessians, constants), *_edges(graph, constants)]:
        found += rate * (np.kron(jump, jump) - np.eye(size * size))
    return np.asarray(found)


def _gradients(hessians: Floats, constants: Constants) -> list[tuple[float, Floats]]:
    n, found = len(hessians), []
    for i, h in enumerate(hessians):
        node = np.zeros(n)
        node[i] = 1.0
        sees = np.zeros(6)
        sees[X], sees[Y_TILDE] = h - constants.nu, -1.0
        found.append((1.0, np.eye(6 * n) + np.kron(np.outer(constants.gradient_jump, sees), np.outer(node, node))))
    return found


def _edges(graph: Graph, constants: Constants) -> list[tuple[float, Floats]]:
    found = []
    sees = np.zeros(6)
    sees[Y] = sees[Z] = 1.0
    for i, j, rate in graph.pairs():
        edge = np.zeros(graph.n)
        edge[i], edge[j] = 1.0, -1.0
        found.append((rate, np.eye(6 * graph.n) + np.kron(np.outer(constants.edge_jump, sees), np.outer(edge, edge))))
    return found


def decay(hessians: Floats, graph: Graph, constants: Constants) -> float:
    """The exponent at which E‖S_t‖² falls in the end, z summing to 0 as it always does."""
    n = graph.n
    free = np.linalg.svd(np.ones((1, n)))[2][1:].T  # orthogonal to the mean
    basis = np.zeros((6 * n, 6 * n - 2))
    basis[: 4 * n, : 4 * n] = np.eye(4 * n)
    basis[4 * n :, 4 * n :] = np.kron(np.eye(2), free)
    both = np.kron(basis, basis)
    return -float(np.linalg.eigvals(both.T @ generator(hessians, graph, constants) @ both).real.max())


def errors(of: Floats, begin: Floats, times: Floats) -> Floats:
    """(T,): E‖x_t − x*‖², summed over the nodes, at equally spaced times, from S_0 (6n,); `of`: the generator."""
    from scipy.sparse.linalg import expm_multiply

    size = len(begin)
    moments = expm_multiply(of, np.outer(begin, begin).ravel(), times[0], times[-1], len(times))
    diagonals = np.einsum("tii->ti", moments.reshape(-1, size, size))
    return np.asarray(diagonals[:, : size // 6].sum(axis=1))
