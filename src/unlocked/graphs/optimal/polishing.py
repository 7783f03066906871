"""The best w and V for a bound (see certificate.py), among those near what a solver found: a linear program.

    min bᵀp    over p, w, z ≥ 0    subject to  Aᵀp ≥ s d(w) + v(z)/s,   Σ w_e a_e = max a,    Σ z_c = 1

A, b the rows of C; bᵀp is max_{μ ∈ C} (s d + v/s)·μ by duality; V = Σ z_c u_c u_cᵀ with the main directions u_c of the given V
and their sums and differences in pairs; w on the edges that had a weight; a_e = y_eᵀq_e. A solver's dual is good to 1e-5 or so,
which this improves by some digits.
"""

from __future__ import annotations

import numpy as np
from scipy import linalg
from scipy.optimize import linprog

from ..graph import Floats
from .certificate import Dual, Point, on_edges
from .constraints import Region

ENTRIES = 4_000_000  # of the program's matrix; with more, the bound stays as it is
SECONDS = 20.0  # for the program; it is a refinement
PAIRS = 12  # directions that are also taken in pairs


def best_bound(point: Point, region: Region, *duals: Dual) -> float:
    """The highest of the bounds by these, and of those after the linear program."""
    found = [point.bound(region, dual) for dual in duals]
    polished = [_polished(point, region, dual) for dual in duals]
    return max(found + [point.bound(region, dual) for dual in polished if dual is not None])


def _polished(point: Point, region: Region, dual: Dual) -> Dual | None:
    """With w and V of the program; None where it is too large or was not solved."""
    weights, top = dual.weights, point.resistances.max()
    active = np.nonzero((weights > 1e-6 * weights.max()) | (point.resistances > (1.0 - 1e-7) * top))[0]
    directions = _directions(dual.subspace)
    if len(weights) * (len(active) + directions.shape[1]) > ENTRIES:
        return None
    fields = point.inverse if dual.fields is None else dual.fields
    met = on_edges(fields, point.edges[active])
    d = point.differences(fields @ _sides(point, active)) ** 2
    v = point.differences(directions) ** 2
    scale = np.sqrt(point.eigenvalues[0] / ((d.T @ point.rates).max()))
    shares = _program(region, np.hstack([scale * d, v / scale])[region.free], met / met.max())
    if shares is None:
        return None
    best = np.zeros(len(weights))
    best[active] = shares[: len(active)]
    return Dual(best, directions * np.sqrt(shares[len(active) :]), dual.fields)


def _program(region: Region, columns: Floats, met: Floats) -> Floats | None:
    """w and z, one after the other. columns: (free edges, w and z). met: y_eᵀq_e, against the most."""
    rows, size = len(region.bounds), len(met)
    unit = columns.max()  # the solver's tolerances are absolute
    matrix = np.hstack([-region.rows.T.toarray()[region.free], columns / unit])
    equal = np.zeros((2, matrix.shape[1]))
    equal[0, rows : rows + size], equal[1, rows + size :] = met, 1.0
    cost = np.concatenate([region.bounds, np.zeros(columns.shape[1])])
    limits = {"time_limit": SECONDS, "primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    found = linprog(cost, matrix, np.zeros(len(matrix)), equal, np.ones(2), method="highs", options=limits)
    return None if found.x is None else np.maximum(found.x[rows:], 0.0)


def _sides(point: Point, active: np.ndarray) -> Floats:
    """(n, active): e_i − e_j of these edges as columns."""
    columns = np.arange(len(active))
    sides = np.zeros((len(point.inverse), len(active)))
    i, j = point.edges[active].T
    sides[i, columns], sides[j, columns] = 1.0, -1.0
    return sides


def _directions(subspace: Floats) -> Floats:
    """(n, columns) of length 1: where V = SSᵀ lies, strongest first, and the sums and differences of the first few."""
    main, sizes, _ = linalg.svd(subspace, full_matrices=False)
    main = main[:, sizes > 1e-4 * sizes[0]]
    first = main[:, :PAIRS]
    i, j = np.triu_indices(first.shape[1], 1)
    pairs = [(first[:, i] + first[:, j]) / np.sqrt(2.0), (first[:, i] - first[:, j]) / np.sqrt(2.0)]
    return np.hstack([main, *pairs])
