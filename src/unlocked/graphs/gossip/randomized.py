"""Randomized gossip (Boyd, Ghosh, Prabhakar & Shah 2006; Oyallon §5.1.1).

    dx_i = −½ Σ_{j: (ij) ∈ E} (x_i − x_j) dN_ij                    Oyallon Eq. 5.7

x_i value of node i, in R^d; N_ij Poisson process of intensity λ_ij: when it rings, i and j both take their mean. π = I − 11ᵀ/n.

    E‖πx_t‖² ≤ e^{−t/2χ₁} ‖πx_0‖²

Limits: the mean of x never changes; on a complete graph nothing mixes faster per exchange.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..graph import Floats, Graph, Integers
from ..spectra import chi1
from .engine import Engine, rows_of
from .events import AnyGraph
from .trajectory import Trajectory, follow


class Randomized:
    """The rule: x_i ← x_i − α(x_i − x_j), x_j ← x_j + α(x_i − x_j); α = ½ puts the mean in both."""

    def __init__(self, x: Floats, alpha: float = 0.5) -> None:
        self.x, self.alpha = x, alpha

    def meet(self, i: Integers, j: Integers, times: Floats) -> None:
        ours, theirs = self.x[i], self.x[j]
        moved = ours - theirs
        moved *= self.alpha
        self.x[i], self.x[j] = ours - moved, theirs + moved

    def flush(self, time: float) -> None:
        """Nothing happens between events."""


def randomized_gossip(
    graph: AnyGraph, values: Floats, times: Sequence[float] | Floats, seeds: Sequence[int] = (0,)
) -> Trajectory:
    """The process at the times given (ascending), for every seed; values: (n,), (n, d) or (S, n, d). Raises InvalidChoice."""

    def begin(x: Floats, group: Sequence[int]) -> Engine:
        return Engine(graph, Randomized(rows_of(x, graph.n, len(group))), group)

    return follow(begin, values, graph.n, times, seeds)


def randomized_rate(graph: Graph) -> float:
    """1/2χ₁: E‖πx‖² decays by e in no more than its inverse; 0 where the graph is not connected."""
    return float(0.5 / chi1(graph)) if graph.n > 1 else np.inf
