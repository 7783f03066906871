"""The two numbers that say how fast a graph mixes (Oyallon §5.1).

    χ₁ = 1/λ₂(Λ)                                     Eq. 5.6
    R_ij = (e_i − e_j)ᵀ Λ⁺ (e_i − e_j)               Eq. 5.9, of any two nodes
    χ₂ = ½ max_{(i,j) ∈ E} R_ij                      Eq. 5.10 with the ½ of §5.2, which the rates need

χ₂ ≤ χ₁. Both are times: they halve when all rates double. On a graph that is not connected both are infinite.
"""

from __future__ import annotations

import numpy as np

from .graph import Floats, Graph


def eigenvalues(graph: Graph) -> Floats:
    """(n,): those of Λ, ascending; the first is 0."""
    values: Floats = np.linalg.eigvalsh(graph.laplacian()).astype(np.float64)
    values[0] = 0.0
    return values


def chi1(graph: Graph) -> float:
    """χ₁; 0 for a single node, infinite where the graph is not connected."""
    if graph.n == 1:
        return 0.0
    return float(1.0 / eigenvalues(graph)[1]) if graph.connected else float("inf")


def resistances(graph: Graph) -> Floats:
    """(n, n): R_ij; infinite between parts that are not connected."""
    pseudo = np.linalg.pinv(graph.laplacian(), hermitian=True)
    own = np.diag(pseudo)
    found = own[:, None] + own[None, :] - 2 * pseudo
    part = graph.components()
    return np.where(part[:, None] == part[None, :], np.maximum(found, 0.0), np.inf)


def edge_resistances(graph: Graph) -> Floats:
    """(E,): R_ij of the edges."""
    i, j = graph.edges.T
    return resistances(graph)[i, j]


def chi2(graph: Graph) -> float:
    """χ₂; 0 for a single node, infinite where the graph is not connected."""
    if graph.n == 1:
        return 0.0
    return 0.5 * float(edge_resistances(graph).max()) if graph.connected else float("inf")
