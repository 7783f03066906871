"""A²CiD²: accelerated asynchronous gossip (Nabli, Belilovsky & Oyallon, 2023; Oyallon §5.4, Eq. 5.22-5.23; FACTS 2.4).

    dx_i = η(x̃_i − x_i) dt − ½ Σ_j (x_i − x_j) dM_ij(t) + Δ_i dN_i(t)
    dx̃_i = η(x_i − x̃_i) dt − α̃ Σ_j (x_i − x_j) dM_ij(t) + Δ_i dN_i(t)

x̃_i momentum of the weights, beginning at x_i; λ_ij, M_ij, Δ_i as in gossip.py: the displacement of the optimizer, whichever it
is, goes to x and x̃ alike (with weight decay, if it is the optimizer's). η = 1/(2√(χ₁χ₂)), α̃ = ½√(χ₁/χ₂) by the graph's rates
unless given. Between two events of a worker x and x̃ mix by the flow's closed form (rules/gossip.py), always before anything is
sent: only so is the mean conserved. The means of x and of x̃ are equal at every common moment.

The distance to the mean decays with √(χ₁χ₂) in place of χ₁: on a ring as if there were many more exchanges, on a complete graph
not at all faster. Limits: η = 0 is gossip.py, bit for bit. Memory: one more copy of the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..errors import InvalidChoice
from ..graphs import Graph
from ..rules.gossip import acid_parameters
from .base import Properties
from .gossip import Gossip


@dataclass(frozen=True, kw_only=True)
class ACiD(Gossip):
    """Gossip with a continuous momentum.

    Args:
        eta: mixing rate η per gradient, ≥ 0; None: the graph's.
        alpha_tilde: share α̃ > 0 of a difference that goes to the momentum; None: the graph's.
        graph, rates, rate, pairing: see gossip.py.
    """

    eta: float | None = None
    alpha_tilde: float | None = None

    name: ClassVar[str] = "acid"
    properties: ClassVar[Properties] = Properties(
        title="A²CiD² (Nabli et al. 2023)",
        source="O §5.4",
        barrier="none; pairs of neighbours",
        bytes="λ Ψ_P, λ exchanges per gradient",
        replicas="differ, close to their mean",
        result="mean of the replicas",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta is not None and not 0.0 <= self.eta < math.inf:
            raise InvalidChoice(
                f"eta={self.eta} is no mixing rate; give a number of at least 0, or None for the graph's."
            )
        if self.alpha_tilde is not None and not 0.0 < self.alpha_tilde < math.inf:
            raise InvalidChoice(
                f"alpha_tilde={self.alpha_tilde} is no share of a difference; give a number above 0, or None for the graph's."
            )

    def parameters(self, graph: Graph) -> tuple[float, float]:
        """(η, α̃): what was given, else what belongs to the graph."""
        eta, alpha_tilde = acid_parameters(graph)
        return (
            eta if self.eta is None else float(self.eta),
            alpha_tilde if self.alpha_tilde is None else float(self.alpha_tilde),
        )
