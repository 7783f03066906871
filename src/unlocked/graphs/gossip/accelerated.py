"""Accelerated randomized gossip (Even et al. 2021; Oyallon Eq. 5.18; in the form of Nabli, Belilovsky & Oyallon 2023).

    dx  = η (x̃ − x) dt − α  Σ_{(ij) ∈ E} (e_i − e_j)(e_i − e_j)ᵀ x dM_ij
    dx̃ = η (x − x̃) dt − α̃ Σ_{(ij) ∈ E} (e_i − e_j)(e_i − e_j)ᵀ x dM_ij
    η = 1/(2√(χ₁χ₂)),   α = ½,   α̃ = ½√(χ₁/χ₂)

x value and x̃ momentum of each node, equal in the beginning; M_ij Poisson process of intensity λ_ij. (The text writes α, β, β̃
for η, α, α̃.) Between two events of a node its pair (x, x̃) is mixed in closed form over the time dt since the last one,

    (x, x̃) ← (c x + (1−c) x̃, c x̃ + (1−c) x),   c = (1 + e^{−2η dt})/2,

when it is needed: before an exchange, and before anything is measured (`flush`).

    E‖πx_t‖² ≤ 2 e^{−t/(2√(χ₁χ₂))} ‖πx_0‖²

Proof. V = ‖πx‖² + ‖πx̃‖²_{Λ⁺}/χ₁. The jumps change E V by −½‖x‖²_Λ − (2α̃/χ₁)⟨πx, πx̃⟩ + (α̃²/χ₁) Σ λ_ij R_ij (x_i − x_j)²
per unit of time, and Σ λ_ij R_ij (x_i − x_j)² ≤ 2χ₂‖x‖²_Λ, so the first term and the last cancel; the middle one cancels the
flow's 2η⟨πx, πx̃⟩, as η = α̃/χ₁. What is left of the flow is ≤ −η V, as ‖·‖²_{Λ⁺} ≤ χ₁‖π·‖². With x̃ = x, V_0 ≤ 2‖πx_0‖².

Limits: η = 0 is randomized gossip, bit for bit in x. χ₁ = χ₂ (complete graph): no faster than it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import InvalidChoice
from ..graph import Floats, Graph, Integers
from ..spectra import chi1, chi2
from .engine import Engine, rows_of
from .events import AnyGraph
from .trajectory import Trajectory, follow


@dataclass(frozen=True)
class Momentum:
    """η, α, α̃."""

    eta: float
    alpha: float = 0.5
    alpha_tilde: float = 0.5

    @classmethod
    def of(cls, graph: Graph) -> Momentum:
        """Those of the theorem. Raises InvalidChoice for a graph that is not connected, or a single node."""
        return cls.from_constants(chi1(graph), chi2(graph))

    @classmethod
    def from_constants(cls, chi_1: float, chi_2: float) -> Momentum:
        """From χ₁ and χ₂, or the suprema χ₁*, χ₂* of a graph that changes. Raises InvalidChoice."""
        if not 0 < chi_2 <= chi_1 * (1 + 1e-9) < math.inf:
            raise InvalidChoice(
                f"There is no acceleration with χ₁ = {chi_1:g} and χ₂ = {chi_2:g}; the graph has to be connected, with two "
                "nodes or more, and then 0 < χ₂ ≤ χ₁."
            )
        return cls(1 / (2 * math.sqrt(chi_1 * chi_2)), 0.5, 0.5 * math.sqrt(chi_1 / chi_2))


class Accelerated:
    """The rule. x, x_tilde: (S·n,) or (S·n, d); last: (S·n,), the time at which each node's pair was mixed."""

    def __init__(self, x: Floats, momentum: Momentum) -> None:
        self.x, self.x_tilde, self.momentum = x, x.copy(), momentum
        self.last = np.zeros(len(x))

    def meet(self, i: Integers, j: Integers, times: Floats) -> None:
        nodes, half = np.concatenate((i, j)), len(i)
        x, x_tilde = self._mixed(self.x[nodes], self.x_tilde[nodes], np.concatenate((times, times)) - self.last[nodes])
        difference = x[:half] - x[half:]
        moved = difference * self.momentum.alpha
        x[:half] -= moved
        x[half:] += moved
        difference *= self.momentum.alpha_tilde
        x_tilde[:half] -= difference
        x_tilde[half:] += difference
        self.x[nodes], self.x_tilde[nodes] = x, x_tilde
        self.last[i] = self.last[j] = times

    def flush(self, time: float) -> None:
        self.x, self.x_tilde = self._mixed(self.x, self.x_tilde, time - self.last)
        self.last.fill(time)

    def _mixed(self, x: Floats, x_tilde: Floats, waited: Floats) -> tuple[Floats, Floats]:
        """The flow of η over the times waited; the same number is added to one and taken from the other."""
        share = np.expm1(waited * (-2.0 * self.momentum.eta))
        share *= -0.5
        moved = x_tilde - x
        moved *= share if x.ndim == 1 else share[:, None]
        return x + moved, x_tilde - moved


def accelerated_gossip(
    graph: AnyGraph,
    values: Floats,
    times: Sequence[float] | Floats,
    seeds: Sequence[int] = (0,),
    momentum: Momentum | None = None,
) -> Trajectory:
    """The process at the times given (ascending), for every seed; values: (n,), (n, d) or (S, n, d).

    momentum: None for that of the graph; a graph that changes needs one. Raises InvalidChoice.
    """
    if momentum is None and not isinstance(graph, Graph):
        raise InvalidChoice("The graph changes; give the momentum, e.g. Momentum.from_constants(χ₁*, χ₂*).")
    chosen = momentum or Momentum.of(graph)  # type: ignore[arg-type]

    def begin(x: Floats, group: Sequence[int]) -> Engine:
        return Engine(graph, Accelerated(rows_of(x, graph.n, len(group)), chosen), group)

    return follow(begin, values, graph.n, times, seeds)


def accelerated_rate(graph: Graph) -> float:
    """1/(2√(χ₁χ₂)); 0 where the graph is not connected."""
    return float(0.5 / math.sqrt(chi1(graph) * chi2(graph))) if graph.n > 1 else math.inf
