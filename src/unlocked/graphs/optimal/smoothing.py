"""The smoothed value of rates, and what its weights prove (see first_order.py)."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp, softmax

from ..graph import Floats, Graph
from .certificate import Dual, Point, laplacian, on_edges
from .constraints import Region

FLOOR = 0.1  # ε against the largest uniform rate


class Smoothed:
    """Φ_p as a function of x = log(λ + ε) on the free edges. evaluations: how many there were."""

    def __init__(self, graph: Graph, region: Region) -> None:
        self.n, self.edges, self.region = graph.n, graph.edges, region
        self.rows = region.rows.multiply(1.0 / region.bounds[:, None]).tocsr()
        self.uniform = region.free.astype(np.float64)
        self.uniform /= region.gauge(self.uniform)
        self.floor = FLOOR * float(self.uniform.max())
        self.evaluations = 0

    def rates(self, x: Floats) -> Floats:
        """λ, (E,)."""
        rates = np.zeros(len(self.edges))
        rates[self.region.free] = np.maximum(np.exp(x) - self.floor, 0.0)
        return rates

    def variables(self, rates: Floats) -> Floats:
        """x of rates λ ≥ 0."""
        found: Floats = np.log(rates[self.region.free] + self.floor)
        return found

    def within(self, rates: Floats) -> Point:
        """λ/γ(λ), which are in C, and what follows from them."""
        return Point.at(self.n, self.edges, rates / self.region.gauge(rates))

    def __call__(self, x: Floats, p: float) -> tuple[float, Floats]:
        """Φ_p and its gradient in x."""
        self.evaluations += 1
        rates = self.rates(x)
        point = Point.at(self.n, self.edges, rates)
        used = np.maximum(self.rows @ rates, np.finfo(float).tiny)
        logs = -np.log(point.eigenvalues), np.log(point.resistances / 2.0), np.log(used)
        value = sum(share * logsumexp(p * each) for share, each in zip((0.5, 0.5, 1.0), logs)) / p
        slope = self.rows.T @ (softmax(p * logs[2]) / used) - self.gains(point, dual(point, p))
        return float(value), ((rates + self.floor) * slope)[self.region.free]

    def gains(self, point: Point, at: Dual) -> Floats:
        """(E,): −∂/∂λ_k of the first two terms; Σ λ_k of them is 1."""
        squares = point.inverse @ (laplacian(self.n, self.edges, at.weights) @ point.inverse)
        found: Floats = 0.5 * on_edges(squares, self.edges) + 0.5 * (point.differences(at.subspace) ** 2).sum(axis=1)
        return found


def dual(point: Point, p: float) -> Dual:
    """w_e ∝ R_e^p / R_e and V ∝ Σ σ_i^{−p} v_i v_iᵀ / σ_i, scaled as in the gradient."""
    shares = softmax(-p * np.log(point.eigenvalues))
    main = shares > 1e-14 * shares.max()
    weights = softmax(p * np.log(point.resistances)) / point.resistances
    return Dual(weights, point.vectors[:, main] * np.sqrt(shares[main] / point.eigenvalues[main]))


def smoothing_gap(point: Point, at: Dual) -> float:
    """The part of the gap that is due to p alone: what is left where the gradient is 0."""
    w = at.weights @ point.resistances / at.weights.sum()
    v = (point.differences(at.subspace) ** 2).sum(axis=1) @ point.rates / float((at.subspace**2).sum())
    return float(1.0 - np.sqrt(w / v / 2.0) / point.value)
