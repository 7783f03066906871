"""What rates are allowed.

    C = { λ ≥ 0 :  Tr Λ ≤ B,   Λ_ii ≤ b_i for every node,   λ_ij ≤ c_ij for every edge }          Oyallon §5.2, with B = 1: C_1

B `trace`, b `per_node`, c `caps`. All in exchanges per unit of time; Tr Λ = 2 Σ λ_ij counts an exchange at both its ends.
At most, not exactly: a higher rate never slows gossip down, so the bandwidth is used up wherever the other bounds let it be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from ...errors import InvalidChoice
from ..graph import Floats, Graph, Integers


@dataclass(frozen=True, eq=False)
class Constraint:
    """Bounds on the rates; those given hold together. None of the three: the trace of the given graph.

    Args:
        trace: B > 0, the bandwidth of the whole graph, Tr Λ.
        per_node: b ≥ 0, for every node the same or n numbers.
        caps: c ≥ 0, for every edge the same or E numbers in the order of `Graph.edges`; infinite: no cap. An edge whose cap
            is 0 is never used, but its resistance still counts (see Optimal.chi2_fixed).
    """

    trace: float | None = None
    per_node: float | Sequence[float] | Floats | None = None
    caps: float | Sequence[float] | Floats | None = None

    @property
    def given(self) -> bool:
        """Whether there is any bound."""
        return any(bound is not None for bound in (self.trace, self.per_node, self.caps))


@dataclass(frozen=True, eq=False)
class Region:
    """C as rows of numbers: λ ≥ 0 and Aλ ≤ b, where every λ_ij is bounded by a row.

    Args:
        rows: A, (m, E), entries ≥ 0.
        bounds: b, (m,), > 0.
        free: (E,) bool; λ_ij = 0 where not.
    """

    rows: sparse.csr_array
    bounds: Floats
    free: np.ndarray

    @classmethod
    def of(cls, graph: Graph, constraint: Constraint | None) -> Region:
        """The constraint for this graph. Raises InvalidChoice if it cannot be read, or leaves the graph in parts."""
        given = constraint if constraint is not None and constraint.given else Constraint(trace=graph.trace)
        nodes, caps = _numbers("per_node", given.per_node, graph.n), _numbers("caps", given.caps, len(graph))
        if given.trace is not None and not (np.isfinite(given.trace) and given.trace > 0):
            raise InvalidChoice(f"A trace of {given.trace:g} is not possible; give a positive number.")
        free = (caps > 0) & (nodes[graph.edges] > 0).all(axis=1)
        _refuse_parts(graph, free)
        rows, bounds = _rows(graph, given.trace, nodes, np.where(free, caps, np.inf))
        used = np.asarray(rows.sum(axis=0)).ravel() > 0
        if (free & ~used).any():
            i, j = graph.edges[np.nonzero(free & ~used)[0][0]]
            raise InvalidChoice(f"Nothing bounds the rate of the edge {i}-{j}; give a trace, or a finite cap.")
        return cls(rows, bounds, free)

    def gauge(self, rates: Floats) -> float:
        """The least u ≥ 0 with λ ∈ u C."""
        return float((self.rows @ rates / self.bounds).max())

    def highest(self) -> Floats:
        """(E,): the most that each rate alone can be."""
        entries = self.rows.tocoo()
        most = np.full(self.rows.shape[1], np.inf)
        np.minimum.at(most, entries.coords[1], self.bounds[entries.coords[0]] / entries.data)
        return np.where(self.free, most, 0.0)

    def support(self, weights: Floats) -> float:
        """max_{λ ∈ C} Σ h_ij λ_ij for weights h ≥ 0, rounded upwards: by duality, whatever the LP solver's tolerance is."""
        if len(self.bounds) == 1:
            return float((weights * self.highest()).max())
        found = linprog(-np.where(self.free, weights, 0.0), A_ub=self.rows, b_ub=self.bounds, method="highs")
        prices = np.maximum(-found.ineqlin.marginals, 0.0)
        missing = np.maximum(weights - self.rows.T @ prices, 0.0)
        return float(self.bounds @ prices + missing @ self.highest())


def _numbers(what: str, given: float | Sequence[float] | Floats | None, length: int) -> Floats:
    """One number for each; infinite where there is no bound."""
    values = np.asarray(np.inf if given is None else given, dtype=np.float64)
    if values.ndim > 1 or (values.ndim == 1 and len(values) != length):
        raise InvalidChoice(f"{what} has the shape {values.shape}; give one number, or {length} of them.")
    wrong = values[~(values >= 0)]
    if wrong.size:
        raise InvalidChoice(f"{what} holds {wrong.flat[0]:g}, which is no bandwidth; give numbers of at least 0.")
    return np.broadcast_to(values, (length,)).astype(np.float64)


def _refuse_parts(graph: Graph, free: np.ndarray) -> None:
    if not graph.connected:
        raise InvalidChoice("The graph is not connected, so no rates make it agree; add edges between its parts.")
    kept = Graph.make(graph.n, graph.edges[free])
    if not kept.connected:
        cut = int(np.nonzero(kept.components() != kept.components()[0])[0][0])
        raise InvalidChoice(
            f"No rates are possible: bounds of 0 cut node {cut} off from node 0; raise a cap or a node's bandwidth."
        )


def _rows(graph: Graph, trace: float | None, nodes: Floats, caps: Floats) -> tuple[sparse.csr_array, Floats]:
    """A and b without the rows whose bound is infinite, or 0 (those edges are not free)."""
    edges, size = graph.edges, len(graph)
    parts: list[sparse.csr_array] = []
    bounds: list[Floats] = []
    if trace is not None:
        parts.append(sparse.csr_array(np.full((1, size), 2.0)))
        bounds.append(np.array([trace], dtype=np.float64))
    for matrix, values in ((_incidence(graph.n, edges), nodes), (sparse.eye_array(size, format="csr"), caps)):
        kept = np.isfinite(values) & (values > 0)
        if kept.any():
            parts.append(sparse.csr_array(matrix[kept]))
            bounds.append(values[kept])
    if not parts:
        return sparse.csr_array((0, size)), np.zeros(0)
    return sparse.csr_array(sparse.vstack(parts)), np.concatenate(bounds)


def _incidence(n: int, edges: Integers) -> sparse.csr_array:
    """(n, E): 1 where a node is an end of an edge."""
    size = len(edges)
    columns = np.tile(np.arange(size), 2)
    return sparse.coo_array((np.ones(2 * size), (edges.T.ravel(), columns)), shape=(n, size)).tocsr()
