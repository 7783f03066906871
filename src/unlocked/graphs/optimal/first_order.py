"""Optimal rates by smoothing and L-BFGS: the convex problem of Oyallon §5.2 without a semidefinite program.

    f(λ) = √(χ₁ χ₂ᴱ),  log f convex on λ ≥ 0 (Lemma 1),  f(cλ) = f(λ)/c;   γ(λ) = max_r (Aλ)_r / b_r the gauge of C

So the least value on C is that of f γ over all λ ≥ 0. Its three maxima (over the eigenvalues σ_i of Λ that are not 0, over the
edges, over the rows of C) become p-norms:

    Φ_p(λ) = 1/2p log Σ_i σ_i^{−p} + 1/2p log Σ_{e ∈ E} (R_e/2)^p + 1/p log Σ_r ((Aλ)_r/b_r)^p

The first two terms are convex, and so is the set γ_p ≤ 1: where the gradient is 0 is the minimum, and there are no others.
Φ_p is above log fγ by at most (log n + log |E| + 2 log m)/2p. It is minimised by L-BFGS-B over x = log(λ + ε) ≥ log ε, for
p = 4, 8, 16, …, each from where the last ended. The error falls with 1/p, so 2 λ(2p) − λ(p) is much better than either: it is
tried, too. The p-norms' weights are the w and V of a bound from below (certificate.py), which says when to stop. The first
point is uniform rates: where these are optimal, as on edge-transitive graphs, nothing else is tried.

An evaluation is an eigendecomposition and three products of n × n matrices: time grows with n³, memory with n².
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from ..graph import Floats, Graph
from .certificate import Found, Point
from .constraints import Region
from .smoothing import Smoothed, dual, smoothing_gap

SHARPNESS = tuple(float(2**k) for k in range(2, 15))  # p of the stages
STEPS = 500  # of L-BFGS in a stage
MEMORY = 100  # pairs of vectors it keeps
CHECKED = 10  # steps between two bounds
INEXACT = 0.3  # a stage ends when its gap is so much above what p alone causes


def solve(graph: Graph, region: Region, tolerance: float) -> Found:
    """Rates (E,) in C with a bound; stops at the relative gap `tolerance`, or after the last stage."""
    search = _Search(graph, region, tolerance)
    for p in SHARPNESS:
        if search.done:
            break
        search.stage(p)
    return Found(search.best.rates, search.bound, search.problem.evaluations)


class _Search:
    """best: the best rates. bound: the highest so far. last, before: where the last two stages ended, if there are two."""

    def __init__(self, graph: Graph, region: Region, tolerance: float) -> None:
        self.problem, self.region, self.tolerance = Smoothed(graph, region), region, tolerance
        self.best = self.problem.within(self.problem.uniform)
        self.bound = max(self.best.bound(region, dual(self.best, p)) for p in (1e4, 1e6))
        self.last: Floats = self.best.rates
        self.before: Floats | None = None

    @property
    def done(self) -> bool:
        """Whether the gap is as small as it has to be."""
        return self.bound >= (1.0 - self.tolerance) * self.best.value

    def stage(self, p: float) -> None:
        """Minimise Φ_p."""
        steps = 0

        def look(x: Floats) -> None:
            nonlocal steps
            steps += 1
            if steps % CHECKED == 0 and self._good(self.problem.within(self.problem.rates(x)), p):
                raise StopIteration

        start = self.problem.variables(self._extrapolated(0.5))
        found = minimize(
            self.problem,
            start,
            args=(p,),
            jac=True,
            method="L-BFGS-B",
            bounds=[(np.log(self.problem.floor), None)] * len(start),
            callback=look,
            options={"maxiter": STEPS, "maxcor": MEMORY, "ftol": 0.0, "gtol": 1e-12},
        )
        end = self.problem.within(self.problem.rates(found.x))
        self._good(end, p)
        self.before, self.last = (None if p == SHARPNESS[0] else self.last), end.rates
        self._offer(self.problem.within(self._extrapolated(1.0)))

    def _extrapolated(self, share: float) -> Floats:
        """Where the next stage will end (½), or one of infinite p (1)."""
        ahead = self.last if self.before is None else self.last + share * (self.last - self.before)
        return np.maximum(ahead, self.last / 100.0)

    def _good(self, point: Point, p: float) -> bool:
        """Take what there is to take from this point; whether the stage may end."""
        at = dual(point, p)
        bound, only = point.bound(self.region, at), smoothing_gap(point, at)
        self.bound = max(self.bound, bound)
        self._offer(point)
        return self.done or 1.0 - bound / point.value < (1.0 + INEXACT) * only

    def _offer(self, point: Point) -> None:
        if point.value < self.best.value:
            self.best = point
