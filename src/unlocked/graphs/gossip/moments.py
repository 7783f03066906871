"""The exact second moments of the gossip processes: no simulation, no bound.

With z = (x, x̃) and M = E zzᵀ, randomized and accelerated gossip have the same linear equation,

    Ṁ = AM + MAᵀ + K ⊗ L(w),     w_ij = λ_ij E(x_i − x_j)²
    A = [[−η − αΛ, η], [η − α̃Λ, −η]],   K = [[α², αα̃], [αα̃, α̃²]],   L(w) = Σ w_ij (e_i − e_j)(e_i − e_j)ᵀ

(for gossip without momentum the first row and column alone, η = 0). Its solutions decay as e^{−rt} with one rate r. AM + MAᵀ
alone is known in the basis of Λ's eigenvectors, pair by pair, so what is left is a problem with one unknown per edge: r is
where the map w ↦ λ_ij E(x_i − x_j)² has the spectral radius 1, and √λ makes that map symmetric. That takes Λ's eigenvectors
and a few products of n×n matrices for each step of Lanczos' method, where the equation itself has n² unknowns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.sparse.linalg import LinearOperator, eigsh, expm_multiply

from ...errors import InvalidChoice
from ..graph import Floats, Graph
from .accelerated import Momentum

_LANCZOS = 8  # vectors; below as many edges the map is made as a matrix


def second_moment_rate(graph: Graph, momentum: Momentum | None = None, tolerance: float = 1e-6) -> float:
    """r: E‖πx_t‖² decays as e^{−rt}, of the slowest start; momentum None: randomized gossip.

    tolerance: relative. Raises InvalidChoice for a graph that is not connected, or a single node.
    """
    if graph.n < 2 or not graph.connected:
        raise InvalidChoice(f"{graph.name} has to be connected, with two nodes or more.")
    problem = _EdgeProblem(graph, momentum, tolerance)
    low, high = 0.0, 0.75 * problem.mean_rate
    while problem.radius(high) < 1.0:
        low, high = high, 0.5 * (high + problem.mean_rate)
        if problem.mean_rate - low < tolerance * problem.mean_rate:
            return problem.mean_rate
    # near `mean_rate` the radius grows as the inverse of the distance to it, so its own inverse is almost a straight line
    return float(brentq(lambda rate: 1.0 - 1.0 / problem.radius(rate), low, high, rtol=tolerance, xtol=1e-300))


class _EdgeProblem:
    """w ↦ λ_ij E(x_i − x_j)² at M's growth rate s = −r.

    mean_rate: that of (E z)(E z)ᵀ, which no second moment can beat.
    """

    def __init__(self, graph: Graph, momentum: Momentum | None, tolerance: float) -> None:
        values, vectors = np.linalg.eigh(graph.laplacian())
        self.graph, self.values, self.vectors = graph, values[1:], vectors[:, 1:]
        blocks, kick = _blocks(self.values, momentum)
        self._poles, modes = np.linalg.eig(blocks)
        self._shares = (
            modes[:, 0] * np.linalg.solve(modes, np.broadcast_to(kick[:, None], (len(blocks), len(kick), 1)))[..., 0]
        )
        self.mean_rate = -2 * float(self._poles.real.max())
        self._tolerance = 0.01 * tolerance
        self._begin = np.sqrt(graph.rates)

    def radius(self, rate: float) -> float:
        """The spectral radius of the map; it grows with the rate, without bound at `mean_rate`."""
        size, apply = len(self.graph), self._map(self._gains(rate))
        if size <= _LANCZOS:
            return float(np.linalg.eigvalsh(np.stack([apply(row) for row in np.eye(size)]))[-1])
        operator = LinearOperator((size, size), matvec=apply, dtype=np.float64)
        found, vector = eigsh(operator, k=1, which="LA", v0=self._begin, ncv=_LANCZOS, tol=self._tolerance)
        self._begin = np.abs(vector[:, 0])
        return float(found[0])

    def _map(self, gains: Floats) -> Callable[[Floats], Floats]:
        """Made symmetric: √λ before and after."""
        (i, j), root, vectors = self.graph.edges.T, np.sqrt(self.graph.rates), self.vectors
        if len(root) < 4 * self.graph.n:
            slopes = vectors[i] - vectors[j]

            def few(w: Floats) -> Floats:
                kicks = slopes.T @ ((root * w.ravel())[:, None] * slopes)
                return root * ((slopes @ (gains * kicks)) * slopes).sum(axis=1)

            return few

        def many(w: Floats) -> Floats:  # the same by matrices of n × n
            moments = vectors @ (gains * (vectors.T @ (self._kicked(root * w.ravel()) @ vectors))) @ vectors.T
            own = np.diag(moments)
            return root * (own[i] + own[j] - 2 * moments[i, j])

        return many

    def _kicked(self, w: Floats) -> Floats:
        """L(w)."""
        i, j = self.graph.edges.T
        matrix = np.zeros((self.graph.n, self.graph.n))
        matrix[i, j] = matrix[j, i] = -w
        np.fill_diagonal(matrix, -matrix.sum(axis=0))
        return matrix

    def _gains(self, rate: float) -> Floats:
        """(n−1, n−1): E x_k x_l for a unit kick, k, l eigenvectors: the first entry of (s − A_k ⊗ I − I ⊗ A_l)⁻¹ vec K.

        Σ_ab c_ka c_lb / (s − θ_ka − θ_lb), with A_k = Σ_a θ_ka (its a-th projection), c_ka its share of the kick in x.
        """
        gains = np.zeros((len(self.values),) * 2, dtype=self._poles.dtype)
        for own, mine in zip(self._poles.T, self._shares.T):
            for other, theirs in zip(self._poles.T, self._shares.T):
                gains += np.outer(mine, theirs) / (-rate - own[:, None] - other)
        return np.ascontiguousarray(gains.real)


def _blocks(values: Floats, momentum: Momentum | None) -> tuple[Floats, Floats]:
    """(A_k of each eigenvalue of Λ, v with K = vvᵀ)."""
    if momentum is None:
        return -0.5 * values[:, None, None], np.array([0.5])
    eta, alpha, tilde = momentum.eta, momentum.alpha, momentum.alpha_tilde
    rest = np.full_like(values, eta)
    blocks = np.array([[-eta - alpha * values, rest], [eta - tilde * values, -rest]]).transpose(2, 0, 1)
    return blocks, np.array([alpha, tilde])


def expected_errors(
    graph: Graph, values: Floats, times: Sequence[float] | Floats, momentum: Momentum | None = None
) -> Floats:
    """(T,): E‖πx_t‖² of the process begun at values, (n,) or (n, d), at each time t ≥ 0.

    Solves the equation for M, of n² (with momentum 4n²) unknowns; n up to some hundreds. Raises InvalidChoice.
    """
    x = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    if len(x) != graph.n or np.ndim(values) > 2 or np.min(times, initial=0.0) < 0:
        raise InvalidChoice(f"Give values of ({graph.n},) or ({graph.n}, d), and times from 0.")
    copies = 1 if momentum is None else 2
    moments = np.kron(np.ones((copies, copies)), (x - x.mean(axis=0)) @ (x - x.mean(axis=0)).T).ravel()
    equation, trace, now, found = _equation(graph, momentum), _trace(graph, momentum), 0.0, []
    for time in np.asarray(times, dtype=np.float64):
        moments = expm_multiply((time - now) * equation, moments, traceA=(time - now) * trace)
        now = time
        found.append(np.trace(moments.reshape(copies * graph.n, -1)[: graph.n, : graph.n]))
    return np.array(found)


def _equation(graph: Graph, momentum: Momentum | None) -> LinearOperator:
    """M ↦ AM + MAᵀ + K ⊗ L(w), on M as a vector."""
    laplacian, eye = graph.laplacian(), np.eye(graph.n)
    if momentum is None:
        a, kick = -0.5 * laplacian, np.array([[0.25]])
    else:
        eta, alpha, tilde = momentum.eta, momentum.alpha, momentum.alpha_tilde
        a = np.block([[-eta * eye - alpha * laplacian, eta * eye], [eta * eye - tilde * laplacian, -eta * eye]])
        kick = np.outer([alpha, tilde], [alpha, tilde])
    i, j = graph.edges.T

    def kicked(moments: Floats) -> Floats:
        own = np.diag(moments)
        w, matrix = graph.rates * (own[i] + own[j] - moments[i, j] - moments[j, i]), np.zeros((graph.n, graph.n))
        matrix[i, j] = matrix[j, i] = -w
        np.fill_diagonal(matrix, -matrix.sum(axis=0))
        return np.kron(kick, matrix)

    def apply(vector: Floats) -> Floats:
        moments = vector.reshape(len(a), len(a))
        return (a @ moments + moments @ a.T + kicked(moments)).ravel()

    def transposed(vector: Floats) -> Floats:
        dual = vector.reshape(len(a), len(a))
        blocks = dual.reshape(len(kick), graph.n, len(kick), graph.n)
        seen = np.einsum("ab,aibj->ij", kick, blocks)
        w = graph.rates * (seen[i, i] + seen[j, j] - seen[i, j] - seen[j, i])
        matrix = np.zeros_like(dual)
        np.add.at(matrix, (i, i), w)
        np.add.at(matrix, (j, j), w)
        matrix[i, j] -= w
        matrix[j, i] -= w
        return (a.T @ dual + dual @ a + matrix).ravel()

    size = len(a) ** 2
    return LinearOperator((size, size), matvec=apply, rmatvec=transposed, dtype=np.float64)


def _trace(graph: Graph, momentum: Momentum | None) -> float:
    """Of that map; it only chooses the steps of the solver."""
    drift = 0.5 * graph.trace if momentum is None else 2 * momentum.eta * graph.n + momentum.alpha * graph.trace
    copies = 1 if momentum is None else 2
    return -2.0 * copies * graph.n * drift
