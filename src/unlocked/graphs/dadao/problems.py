"""Strongly convex finite sums over the nodes of a graph: ridge and logistic regression.

    min_x Σ_i f_i(x)                                                        Oyallon Eq. 5.1
    ridge:     f_i(x) = 1/(2m) ‖A_i x − b_i‖² + (ρ/2) ‖x‖²
    logistic:  f_i(x) = 1/m Σ_k log(1 + exp(−b_ik a_ikᵀx)) + (ρ/2) ‖x‖²,    b = ±1

n nodes with m samples each of d features: A is (n, m, d), b is (n, m); ρ the ridge. f_i is μ-strongly convex and L-smooth for
all nodes, so μ is the least and L the greatest over the nodes: ridge from the eigenvalues of A_iᵀA_i/m; logistic μ = ρ and
L = ρ + max_i λ_max(A_iᵀA_i/m)/4, the best bounds that hold everywhere. All float64.

Limits: all nodes with the same data is one problem in n copies. κ = L/μ is the condition number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
from scipy.special import expit

from ...errors import InvalidChoice
from ..graph import Floats, Integers


class Problem(ABC):
    """Σ_i f_i. n: nodes; d: features; mu, L: constants of the worst node; name: for tables and titles."""

    n: int
    d: int
    mu: float
    L: float
    name: str

    @property
    def condition(self) -> float:
        """κ = L/μ."""
        return self.L / self.mu

    @abstractmethod
    def values(self, x: Floats) -> Floats:
        """(n,): f_i(x_i) for x (n, d)."""

    @abstractmethod
    def gradient(self, nodes: Integers, x: Floats) -> Floats:
        """(k, d): ∇f_i(x_i) of the k nodes given, which may repeat; x is (k, d)."""

    @abstractmethod
    def hessians(self, x: Floats) -> Floats:
        """(n, d, d): ∇²f_i(x_i) for x (n, d)."""

    def gradients(self, x: Floats) -> Floats:
        """(n, d): ∇f_i(x_i) of all nodes; x is (n, d), or (d,) for the same point everywhere."""
        return self.gradient(np.arange(self.n), np.broadcast_to(x, (self.n, self.d)))

    @cached_property
    def optimum(self) -> Floats:
        """(d,): x*, by Newton's method until no step improves it; for ridge that is the closed form."""
        return minimised(_Sum(self), np.zeros((1, self.d)))[0]

    def conjugate(self, y: Floats, near: Floats | None = None) -> Floats:
        """(n, d): ∇f_i*(y_i) = argmin_x f_i(x) − ⟨x, y_i⟩, to machine precision; `near`: where to begin, such as the last."""
        return minimised(_Tilted(self, y), np.zeros((self.n, self.d)) if near is None else near)


class Ridge(Problem):
    """Least squares with a ridge. Raises InvalidChoice for arrays that do not fit, or a sum that is not strongly convex."""

    def __init__(self, A: Floats, b: Floats, ridge: float, name: str = "ridge") -> None:
        _check(A, b)
        self.n, m, self.d = A.shape
        self.name, self.ridge = name, ridge
        self.hessian = A.transpose(0, 2, 1) @ A / m + ridge * np.eye(self.d)
        self.linear = np.einsum("nmd,nm->nd", A, b) / m
        self.offset = (b**2).mean(axis=1) / 2
        spectrum = np.linalg.eigvalsh(self.hessian)
        self.mu, self.L = float(spectrum.min()), float(spectrum.max())
        _check_convex(self)

    def values(self, x: Floats) -> Floats:
        return np.einsum("nd,nde,ne->n", x, self.hessian, x) / 2 - np.einsum("nd,nd->n", self.linear, x) + self.offset

    def gradient(self, nodes: Integers, x: Floats) -> Floats:
        return np.matvec(self.hessian[nodes], x) - self.linear[nodes]

    def hessians(self, x: Floats) -> Floats:
        return self.hessian


class Logistic(Problem):
    """Logistic regression with a ridge; labels b are ±1. Raises InvalidChoice as `Ridge`, and for other labels."""

    def __init__(self, A: Floats, b: Floats, ridge: float, name: str = "logistic") -> None:
        _check(A, b)
        if not np.isin(b, (-1.0, 1.0)).all():
            raise InvalidChoice("Logistic regression needs the labels −1 and 1; give b of these two.")
        self.n, self.m, self.d = A.shape
        self.name, self.ridge = name, ridge
        self.signed = A * b[:, :, None]
        self.mu, self.L = float(ridge), float(ridge + largest(A) / 4)
        _check_convex(self)

    def values(self, x: Floats) -> Floats:
        losses = np.logaddexp(0.0, -np.matvec(self.signed, x)).mean(axis=1)
        return np.asarray(losses + self.ridge / 2 * (x**2).sum(axis=1))

    def gradient(self, nodes: Integers, x: Floats) -> Floats:
        rows = self.signed[nodes]
        return self.ridge * x - np.vecmat(expit(-np.matvec(rows, x)), rows) / self.m

    def hessians(self, x: Floats) -> Floats:
        share = expit(np.matvec(self.signed, x))
        weighted = self.signed * (share * (1 - share) / self.m)[:, :, None]
        return weighted.transpose(0, 2, 1) @ self.signed + self.ridge * np.eye(self.d)


def largest(A: Floats) -> float:
    """max_i λ_max(A_iᵀA_i/m)."""
    return float(np.linalg.norm(A, ord=2, axis=(1, 2)).max() ** 2 / A.shape[1])


def smallest(A: Floats) -> float:
    """min_i λ_min(A_iᵀA_i/m); 0 where a node has fewer samples than features."""
    return float(np.linalg.eigvalsh(A.transpose(0, 2, 1) @ A / A.shape[1]).min().clip(0.0))


# ---- Newton's method for many functions at once ----------------------------------------------------------------------


class _Sum:
    """Σ_i f_i, as one function of a (1, d)."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def _everywhere(self, x: Floats) -> Floats:
        return np.broadcast_to(x, (self.problem.n, self.problem.d))

    def values(self, x: Floats) -> Floats:
        return self.problem.values(self._everywhere(x)).sum(keepdims=True)

    def gradients(self, x: Floats) -> Floats:
        return self.problem.gradients(x).sum(axis=0, keepdims=True)

    def hessians(self, x: Floats) -> Floats:
        return self.problem.hessians(self._everywhere(x)).sum(axis=0, keepdims=True)


class _Tilted:
    """f_i(x_i) − ⟨x_i, y_i⟩, n functions."""

    def __init__(self, problem: Problem, y: Floats) -> None:
        self.problem, self.y = problem, y

    def values(self, x: Floats) -> Floats:
        return self.problem.values(x) - (x * self.y).sum(axis=1)

    def gradients(self, x: Floats) -> Floats:
        return self.problem.gradients(x) - self.y

    def hessians(self, x: Floats) -> Floats:
        return self.problem.hessians(x)


def minimised(functions: _Sum | _Tilted, x: Floats, steps: int = 100) -> Floats:
    """Newton's method with halved steps (Armijo), until the gradients are those of rounding: then the last step is the best."""
    for _ in range(steps):
        gradients, before = functions.gradients(x), functions.values(x)
        direction = -np.linalg.solve(functions.hessians(x), gradients[:, :, None])[:, :, 0]
        slope, share = (gradients * direction).sum(axis=1), np.ones(len(x))
        if (np.abs(direction).max(axis=1) <= 1e-15 * (1e-3 + np.abs(x).max(axis=1))).all():
            break
        slack = 1e-14 * (1 + np.abs(before))  # what rounding does to a value near the minimum
        while (
            (after := functions.values(x + share[:, None] * direction)) > before + 1e-4 * share * slope + slack
        ).any():
            share[after > before + 1e-4 * share * slope + slack] /= 2
        x = x + share[:, None] * direction
        if (-slope <= 1e-26 * (1 + np.abs(before))).all():  # quadratic convergence: the step just made was the last one
            break
    return x


def _check(A: Floats, b: Floats) -> None:
    if A.ndim != 3 or b.shape != A.shape[:2] or not A.size:
        raise InvalidChoice(f"Data of shapes {A.shape} and {b.shape} do not fit; give A (n, m, d) and b (n, m).")


def _check_convex(problem: Problem) -> None:
    if not problem.mu > 1e-12 * problem.L:
        raise InvalidChoice(
            f"The sum is not strongly convex (μ = {problem.mu:.3g}, L = {problem.L:.3g}); give a larger ridge."
        )
