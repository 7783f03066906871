"""The numbers that say how fast a graph mixes (Oyallon §5.1).

    χ₁ = 1/λ₂(Λ)                                     Eq. 5.6
    R_ij = (e_i − e_j)ᵀ Λ⁺ (e_i − e_j)               Eq. 5.9, of any two nodes
    χ₂ = ½ max_{(i,j) ∈ E} R_ij                      Eq. 5.10 with the ½ of §5.2, which the rates need
    γ = ‖Λ‖ χ₁                                       the spectral gap, as the text calls it: 1 is best

χ₂ ≤ χ₁. Both are times: they halve when all rates double; γ stays. On a graph that is not connected all three are infinite.

How: Λ without one node's row and column ("grounded") is positive definite, and its inverse G, with that node's zeros, is Λ⁺ up
to constants: Λ⁺ = πGπ. So χ₁ is the largest eigenvalue of πGπ, and R_ij = x_i − x_j for x = G(e_i − e_j), in which no
entry is larger than R_ij: both keep their digits where λ₂ is tiny against ‖Λ‖, as an eigenvalue of Λ would not.
Up to DENSE nodes G is a matrix, above it a sparse factorisation, whose fill is small on graphs that one can draw without many
crossings (line, grid, geometric) and grows as n² on expanders. There R_ij comes from entries of G, which are all found at once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import linalg, sparse
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, SuperLU, eigsh, splu

from ..errors import InvalidChoice
from .graph import Floats, Graph, Integers
from .selected_inverse import selected_inverse

DENSE = 1000
RESTARTS = 200  # of Lanczos' method from outside the spectrum
_BLOCK = 256  # right-hand sides at a time

Solve = Callable[[Floats], Floats]


def eigenvalues(graph: Graph) -> Floats:
    """(n,): those of Λ, ascending; the first is 0. By a dense method: n³ operations."""
    values: Floats = np.linalg.eigvalsh(graph.laplacian()).astype(np.float64)
    values[0] = 0.0
    return values


def chi1(graph: Graph) -> float:
    """χ₁; 0 for a single node, infinite where the graph is not connected."""
    if graph.n == 1:
        return 0.0
    if not graph.connected:
        return float("inf")
    if graph.n <= DENSE:
        return float(np.linalg.eigvalsh(pseudo_inverse(graph))[-1])
    solve = grounded(graph)
    return _largest(LinearOperator((graph.n,) * 2, lambda x: _centred(solve(_centred(x.ravel()))), dtype=np.float64))


def algebraic_connectivity(graph: Graph) -> float:
    """λ₂; 0 where the graph is not connected, infinite for a single node."""
    chi = chi1(graph)
    return float("inf") if chi == 0 else 1.0 / chi


def largest_eigenvalue(graph: Graph) -> float:
    """‖Λ‖; 0 where there is no edge."""
    if not len(graph):
        return 0.0
    if graph.n <= DENSE:
        return float(eigenvalues(graph)[-1])
    matrix = graph.sparse_laplacian()
    try:
        return _largest(matrix, maxiter=RESTARTS)
    except ArpackNoConvergence:  # the top eigenvalues lie close together, as on a ring: look from right above them
        above = 2.0 * float(graph.strengths.max()) * (1 + 1e-9)  # ‖Λ‖ ≤ 2 max Λ_ii
        inverse = _factor(above * sparse.eye_array(graph.n, format="csc") - matrix).solve
        return above - 1.0 / _largest(LinearOperator((graph.n,) * 2, inverse, dtype=np.float64))


def spectral_gap(graph: Graph) -> float:
    """γ = ‖Λ‖ χ₁ ≥ 1; 0 for a single node, infinite where the graph is not connected."""
    chi = chi1(graph)
    return largest_eigenvalue(graph) * chi if np.isfinite(chi) else chi


def edge_resistances(graph: Graph) -> Floats:
    """(E,): R_ij of the edges, in the order of `edges`."""
    found = np.empty(len(graph))
    part = graph.components()
    for k in range(int(part.max()) + 1):
        nodes = np.nonzero(part == k)[0]
        inside = part[graph.edges[:, 0]] == k
        if inside.any():
            found[inside] = _connected_resistances(graph if len(nodes) == graph.n else graph.among(nodes.tolist()))
    return found


def chi2(graph: Graph) -> float:
    """χ₂; 0 for a single node, infinite where the graph is not connected."""
    if graph.n == 1:
        return 0.0
    return 0.5 * float(edge_resistances(graph).max()) if graph.connected else float("inf")


def resistances(graph: Graph) -> Floats:
    """(n, n): R_ij; infinite between parts that are not connected. Dense: for all pairs of a graph of moderate size."""
    found = np.full((graph.n, graph.n), np.inf)
    part = graph.components()
    for k in range(int(part.max()) + 1):
        nodes = np.nonzero(part == k)[0]
        inverse = pseudo_inverse(graph if len(nodes) == graph.n else graph.among(nodes.tolist()))
        own = np.diag(inverse)
        found[np.ix_(nodes, nodes)] = np.maximum(own[:, None] + own[None, :] - 2 * inverse, 0.0)
    np.fill_diagonal(found, 0.0)
    return found


def pseudo_inverse(graph: Graph) -> Floats:
    """Λ⁺, (n, n), of a connected graph. Raises InvalidChoice for another one."""
    inverse = grounded(graph)(np.eye(graph.n))
    centred = _centred(_centred(inverse).T)
    return 0.5 * (centred + centred.T)


def grounded(graph: Graph) -> Solve:
    """b ↦ x with Λx = b for a b of sum zero, (n,) or (n, columns), and x = 0 at one node: the one with the largest Λ_ii.

    Raises InvalidChoice for a graph that is not connected.
    """
    if not graph.connected:
        raise InvalidChoice("The graph is not connected, so its Laplacian has no inverse there; join its parts.")
    rest = _not_grounded(graph)
    if graph.n <= DENSE:
        factor = linalg.cho_factor(graph.laplacian()[np.ix_(rest, rest)]) if graph.n > 1 else None
        inner: Solve = lambda b: linalg.cho_solve(factor, b)  # noqa: E731
    else:
        inner = _factor(graph.sparse_laplacian()[rest][:, rest].tocsc()).solve

    def solve(b: Floats) -> Floats:
        x = np.zeros_like(b, dtype=np.float64)
        if len(rest):
            x[rest] = inner(b[rest])
        return x

    return solve


def _connected_resistances(graph: Graph) -> Floats:
    """(E,): dense, by a solve for each edge; sparse, at once; for each node where neither is cheap."""
    found = _selected(graph) if graph.n > DENSE else _by_edges(graph) if len(graph) <= 4 * graph.n else None
    return _by_nodes(graph) if found is None else found


def _selected(graph: Graph) -> Floats | None:
    """R_ij = G_ii + G_jj − 2 G_ij from the entries of G that the factorisation gives; G is 0 at the grounded node."""
    rest = _not_grounded(graph)
    place = np.full(graph.n, -1)
    place[rest] = nodes = np.arange(len(rest))
    inner = (place[graph.edges] >= 0).all(axis=1)
    i, j = place[graph.edges[inner]].T
    rows, columns = np.concatenate([nodes, i]), np.concatenate([nodes, j])
    entries = selected_inverse(_factor(graph.sparse_laplacian()[rest][:, rest].tocsc()), rows, columns)
    if entries is None:
        return None
    own = np.zeros(graph.n)
    own[rest] = entries[: len(rest)]
    between = np.zeros(len(graph))
    between[inner] = entries[len(rest) :]
    return own[graph.edges].sum(axis=1) - 2 * between


def _by_edges(graph: Graph) -> Floats:
    """R_ij = x_i − x_j, x = G(e_i − e_j)."""
    solve, found = grounded(graph), np.empty(len(graph))
    for start in range(0, len(graph), _BLOCK):
        i, j = graph.edges[start : start + _BLOCK].T
        columns = np.arange(len(i))
        b = np.zeros((graph.n, len(i)))
        b[i, columns], b[j, columns] = 1.0, -1.0
        x = solve(b)
        found[start : start + _BLOCK] = x[i, columns] - x[j, columns]
    return found


def _by_nodes(graph: Graph) -> Floats:
    """R_ij = G_ii + G_jj − 2 G_ij, which loses digits only if G_ii is much larger: not where there are so many edges."""
    solve, (i, j) = grounded(graph), graph.edges.T
    own, between = np.empty(graph.n), np.empty(len(graph))
    for start in range(0, graph.n, _BLOCK):
        nodes = np.arange(start, min(start + _BLOCK, graph.n))
        b = np.zeros((graph.n, len(nodes)))
        b[nodes, nodes - start] = 1.0
        x = solve(b)
        own[nodes] = x[nodes, nodes - start]
        here = slice(*np.searchsorted(i, [nodes[0], nodes[-1] + 1]))  # the edges are in the order of i
        between[here] = x[j[here], i[here] - start]
    return own[i] + own[j] - 2 * between


def _factor(matrix: sparse.csc_array) -> SuperLU:
    """Of a positive definite matrix: no pivots, and an order made for symmetric ones."""
    return splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})


def _not_grounded(graph: Graph) -> Integers:
    """The nodes but the one with the largest Λ_ii: without the middle of a star, nothing is left to fill."""
    return np.delete(np.arange(graph.n), int(graph.strengths.argmax()))


def _largest(operator: LinearOperator | sparse.csc_array, maxiter: int | None = None) -> float:
    """The largest eigenvalue of a symmetric operator, by Lanczos; always from the same vector."""
    start = np.random.default_rng(0).standard_normal(operator.shape[0])
    found = eigsh(operator, k=1, which="LA", v0=start, maxiter=maxiter, tol=1e-13, return_eigenvectors=False)
    return float(found[0])


def _centred(x: Floats) -> Floats:
    """πx: without the mean of every column."""
    return x - x.mean(axis=0)
