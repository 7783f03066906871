"""Optimal rates by a semidefinite program (Oyallon §5.2, after Nabli & Oyallon 2023, "DADAO").

The text's program, with the ½ of its χ₂ᴱ written out (q_e = e_i − e_j, π = I − 11ᵀ/n):

    min t₁ + t₂    over λ ≥ 0, u ≥ 1    subject to  λ ∈ u C
    [[Λ, u q_e/√2], [·, t₁]] ⪰ 0 for all e ∈ E       ⇔  t₁ ≥ u² ½ R_e(λ)
    [[Λ, π], [π, t₂ I]] ⪰ 0                          ⇔  t₂ ≥ χ₁(λ)

Why it is right: put λ = u μ, μ ∈ C. Then t₁ + t₂ = u χ₂ᴱ(μ) + χ₁(μ)/u, and the best u = √(χ₁/χ₂ᴱ) makes it 2 √(χ₁χ₂ᴱ)(μ). It
is at least 1, since χ₂ᴱ ≤ χ₁. So half the optimum is the value sought, and λ/u are the rates. Without the ½, as printed, the
best u would be √(χ₁/2χ₂ᴱ), which u ≥ 1 may forbid (on the complete graph it is √½).

Solved here is an equal program that is smaller. On the space orthogonal to 1, with orthonormal columns Q (n, n − 1):

    [[QᵀΛQ, uI], [uI, Y]] ⪰ 0,   t₁ ≥ ½ (Qᵀq_e)ᵀ Y (Qᵀq_e)    one block of 2(n − 1) for all edges: Y ⪰ u² (QᵀΛQ)⁻¹
    QᵀΛQ ⪰ σ I,   t₂ ≥ 1/σ

u ≥ 1 holds by itself with the ½, so it is left out: where it just binds it costs digits. (With u free the rates would be the
same without the ½, too.)

Time grows with n⁶ and memory with n⁴: for n < 64 at most.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy import linalg, sparse

from ...errors import UnlockedError
from ..graph import Floats, Graph
from .certificate import Dual, Found, Point
from .constraints import Region
from .polishing import best_bound


def solve(graph: Graph, region: Region) -> Found:
    """Rates that are optimal to about 1e-7. Raises UnlockedError: the extra is not installed, or Clarabel gives up."""
    cvxpy = _cvxpy()
    size = graph.n - 1
    basis = linalg.null_space(np.ones((1, graph.n)))
    squares = _squares(basis[graph.edges[:, 0]] - basis[graph.edges[:, 1]])
    usual = 2.0 * len(graph) / graph.n / region.gauge(region.free.astype(np.float64))  # the solver sees Λ_ii of about 1

    rates = cvxpy.Variable(len(graph), nonneg=True)
    u, sigma, t1 = cvxpy.Variable(nonneg=True), cvxpy.Variable(nonneg=True), cvxpy.Variable()
    inverse = cvxpy.Variable((size, size), symmetric=True)
    reduced = cvxpy.reshape(squares @ rates, (size, size), order="C")
    eye = np.eye(size)
    joined = cvxpy.bmat([[reduced, u * eye], [u * eye, inverse]]) >> 0
    connected = reduced - sigma * eye >> 0
    resisted = 0.5 * (squares.T @ cvxpy.reshape(inverse, (size * size,), order="C")) <= t1
    allowed = [region.rows @ rates <= u * (region.bounds / usual)]
    if not region.free.all():
        allowed.append(rates[~region.free] == 0)
    program = cvxpy.Problem(cvxpy.Minimize(t1 + cvxpy.inv_pos(sigma)), [joined, connected, resisted, *allowed])
    _run(program, cvxpy)

    found = np.where(region.free, np.maximum(rates.value, 0.0), 0.0)
    point = Point.at(graph.n, graph.edges, found / region.gauge(found))
    values, vectors = linalg.eigh(connected.dual_value)
    subspace = basis @ (vectors * np.sqrt(np.maximum(values, 0.0)))
    weights = np.maximum(resisted.dual_value, 0.0)
    fields = _fields(joined.dual_value, basis)
    bound = best_bound(point, region, Dual(weights, subspace), Dual(weights, subspace, fields))
    return Found(point.rates, bound, int(program.solver_stats.num_iters))


def _fields(dual: Floats, basis: Floats) -> Floats:
    """M = −B D⁺ from the joint block's dual [[A, B], [Bᵀ, D]], where A ⪰ B D⁺ Bᵀ. The program's own bound has these y_e."""
    size = len(dual) // 2
    fields: Floats = -basis @ dual[:size, size:] @ linalg.pinvh(dual[size:, size:], rtol=1e-10) @ basis.T
    return fields


def _squares(differences: Floats) -> sparse.csr_array:
    """((n − 1)², E): Qᵀq_e q_eᵀQ of every edge, as a column. differences: (E, n − 1), Qᵀq_e."""
    columns = differences[:, :, None] * differences[:, None, :]
    return sparse.csr_array(columns.reshape(len(differences), -1).T)


def _run(program: Any, cvxpy: Any) -> None:
    # more than it reaches, so that it goes on until nothing improves: the bound then is best
    tight = {f"tol_{what}": 1e-13 for what in ("gap_abs", "gap_rel", "feas")}
    enough = {f"reduced_tol_{what}": 1e-6 for what in ("gap_abs", "gap_rel", "feas")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "may be inaccurate": the bound says how accurate it is
            program.solve(solver="CLARABEL", **tight, **enough)
    except cvxpy.error.SolverError as error:
        raise UnlockedError(f"Clarabel gave up on the SDP ({error}); take solver='first-order'.") from error
    if program.status not in ("optimal", "optimal_inaccurate"):
        raise UnlockedError(f"Clarabel says of the SDP: {program.status}; take solver='first-order'.")


def _cvxpy() -> Any:
    try:
        import clarabel  # noqa: F401
        import cvxpy
    except ImportError as error:
        raise UnlockedError(
            "The SDP needs cvxpy and Clarabel; pip install 'unlocked[graphs]', or take solver='first-order'."
        ) from error
    return cvxpy
