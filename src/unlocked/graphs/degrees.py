"""Rates from the degrees of an edge's ends. d_i: number of neighbours of node i; the rates the graph had are forgotten.

    by_degree           λ_ij = ½ (1/d_i + 1/d_j)          Tr Λ = n: a node exchanges once per unit of time, on average
    by_largest_degree   λ_ij = 1/max_k d_k                every edge alike; the busiest node exchanges once
    metropolis          λ_ij = 1/(1 + max(d_i, d_j))      no node more than once; W = I − Λ is doubly stochastic, W_ii > 0

All three are 1/d on a graph where every node has d neighbours, but for metropolis: 1/(d + 1).

"Renormalization by the degree" of Oyallon's Table 5.2 is `by_degree` here: 1/d on regular graphs, as A²CiD² has it, and such
that a node still exchanges once on average where degrees differ. The table's numbers do not change when all rates are scaled
alike.
"""

from __future__ import annotations

import numpy as np

from .graph import Floats, Graph


def by_degree(graph: Graph) -> Graph:
    """λ_ij = ½ (1/d_i + 1/d_j)."""
    return graph.with_rates((0.5 / _ends(graph)).sum(axis=1))


def by_largest_degree(graph: Graph) -> Graph:
    """λ_ij = 1/max_k d_k."""
    return graph.with_rates(1.0 / max(int(graph.degrees.max()), 1))


def metropolis(graph: Graph) -> Graph:
    """λ_ij = 1/(1 + max(d_i, d_j)) (Xiao & Boyd 2004)."""
    return graph.with_rates(1.0 / (1.0 + _ends(graph).max(axis=1, initial=0)))


def _ends(graph: Graph) -> Floats:
    """(E, 2): the degrees of each edge's ends."""
    return graph.degrees[graph.edges].astype(np.float64)
