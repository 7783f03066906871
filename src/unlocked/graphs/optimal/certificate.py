"""The value of rates, and how far it can be from the optimum at most.

    f(λ) = √(χ₁ χ₂ᴱ)        χ₁ = 1/λ₂(Λ)        χ₂ᴱ = ½ max_{(i,j) ∈ E} R_ij, E fixed, also where λ_ij = 0       Oyallon §5.2

A bound from below for every μ ∈ C. Let q_e = e_i − e_j; V ⪰ 0 with V1 = 0, Tr V = 1; w ≥ 0 with Σ w_e = 1; any vectors y_e:

    λ₂(μ) ≤ ⟨V, Λ(μ)⟩ = v·μ                       v_k = q_kᵀ V q_k
    max R(μ) ≥ Σ w_e R_e(μ) ≥ a²/(d·μ)            a = Σ w_e y_eᵀq_e,   d_k = Σ w_e (y_eᵀ q_k)²;   R_e = max_y (yᵀq_e)²/yᵀΛy
    f(μ)² ≥ a² / (2 (d·μ)(v·μ)) ≥ 2 a² / ((s d + v/s)·μ)²    for every s > 0

so f ≥ √2 a / max_{μ ∈ C} (s d + v/s)·μ, a linear program. Here y_e = M q_e with one matrix M, as a rule
Λ(λ)⁺ at the rates λ that are to be judged, and s makes both terms equal there. With the right V and w the bound then meets f(λ)
at the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg, sparse

from ..graph import Floats, Integers
from .constraints import Region


@dataclass(frozen=True, eq=False)
class Point:
    """Rates and what follows from them.

    Args:
        edges: E, (E, 2). rates: (E,), ≥ 0, connected. eigenvalues: (n − 1,) of Λ, ascending, without the 0.
        vectors: (n, n − 1), theirs. inverse: Λ⁺. resistances: (E,), R_ij of the edges.
    """

    edges: Integers
    rates: Floats
    eigenvalues: Floats
    vectors: Floats
    inverse: Floats
    resistances: Floats

    @classmethod
    def at(cls, n: int, edges: Integers, rates: Floats) -> Point:
        """Rates (E,) ≥ 0 that connect all n nodes."""
        values, vectors = linalg.eigh(laplacian(n, edges, rates).toarray(), driver="evd", check_finite=False)
        values, vectors = np.maximum(values[1:], np.finfo(float).tiny), vectors[:, 1:]
        inverse = (vectors / values) @ vectors.T
        return cls(edges, rates, values, vectors, inverse, on_edges(inverse, edges))

    @property
    def chi1(self) -> float:
        """χ₁."""
        return float(1.0 / self.eigenvalues[0])

    @property
    def chi2_fixed(self) -> float:
        """χ₂ᴱ."""
        return 0.5 * float(self.resistances.max())

    @property
    def value(self) -> float:
        """√(χ₁ χ₂ᴱ)."""
        return float(np.sqrt(self.chi1 * self.chi2_fixed))

    def differences(self, matrix: Floats) -> Floats:
        """(E, columns): the rows of both ends of each edge, subtracted. matrix: (n, columns)."""
        return matrix[self.edges[:, 0]] - matrix[self.edges[:, 1]]

    def bound(self, region: Region, dual: Dual) -> float:
        """What the value of no rates of C is below."""
        weights = dual.weights / dual.weights.sum()
        fields = self.inverse if dual.fields is None else dual.fields
        squares = fields @ (laplacian(len(fields), self.edges, weights) @ fields.T)
        d = np.maximum(on_edges(squares, self.edges), 0.0)
        v = (self.differences(dual.subspace) ** 2).sum(axis=1) / float((dual.subspace**2).sum())
        scale = np.sqrt((v @ self.rates) / (d @ self.rates))
        met = float(weights @ on_edges(fields, self.edges))
        return float(np.sqrt(2.0) * met / region.support(scale * d + v / scale))


@dataclass(frozen=True, eq=False)
class Dual:
    """What a bound is made of; any will do.

    Args:
        weights: w, (E,), ≥ 0; their sum does not matter.
        subspace: S, (n, r), V = SSᵀ; its trace does not matter.
        fields: M, (n, n), y_e = M q_e; None: Λ⁺. Its scale does not matter.
    """

    weights: Floats
    subspace: Floats
    fields: Floats | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """What a solver returns: rates (E,) in C, and a bound that the value of no rates of C is below. steps: iterations taken."""

    rates: Floats
    bound: float
    steps: int


def laplacian(n: int, edges: Integers, rates: Floats) -> sparse.csr_array:
    """Λ, (n, n), of rates that may be 0."""
    i, j = edges.T
    rows, columns = np.concatenate([i, j, i, j]), np.concatenate([i, j, j, i])
    return sparse.coo_array((np.concatenate([rates, rates, -rates, -rates]), (rows, columns)), shape=(n, n)).tocsr()


def on_edges(matrix: Floats, edges: Integers) -> Floats:
    """(E,): (e_i − e_j)ᵀ M (e_i − e_j)."""
    i, j = edges.T
    own = np.diag(matrix)
    found: Floats = own[i] + own[j] - matrix[i, j] - matrix[j, i]
    return found
