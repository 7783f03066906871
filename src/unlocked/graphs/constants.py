"""What a graph promises: its constants together, and how many exchanges gossip needs (Oyallon §5.1).

To bring ‖πx‖² down to a share ε of what it was, in exchanges over edges, all multiplied by log 1/ε:

    synchronous gossip                     |E| ‖Λ‖ χ₁          all edges at once, |E| exchanges per round
    the same, Chebyshev-accelerated        |E| √(‖Λ‖ χ₁)
    randomized gossip                      Tr Λ χ₁             one edge at a time, by Poisson clocks
    the same, accelerated                  Tr Λ √(χ₁ χ₂)       χ₂ with its ½

Constants are one, as the text writes them. For randomized gossip that is a bound: E‖πx_t‖² ≤ e^{−t/2χ₁} ‖πx₀‖², and
½ Tr Λ exchanges happen per unit of time. The others are orders: right up to a factor that no graph changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InvalidChoice
from .graph import Graph


@dataclass(frozen=True)
class Constants:
    """Of one graph; infinite (λ₂: 0) where it is not connected.

    n, edges: how many. trace: Tr Λ. lambda2: λ₂. chi1, chi2: χ₁, χ₂. accelerated: √(χ₁χ₂). norm: ‖Λ‖. gap: γ = ‖Λ‖χ₁.
    largest_share: max λ_ij R_ij ≤ 1, which is 1 for an edge that alone holds the graph together. foster: Σ λ_ij R_ij, which is
    n less the number of parts (Foster's theorem).
    """

    n: int
    edges: int
    trace: float
    lambda2: float
    chi1: float
    chi2: float
    accelerated: float
    norm: float
    gap: float
    largest_share: float
    foster: float


def constants(graph: Graph) -> Constants:
    """All of them, at the price of χ₁ and of one solve per edge."""
    from .spectra import chi1, edge_resistances, largest_eigenvalue  # SciPy: see lazy.py

    first, norm, apart = chi1(graph), largest_eigenvalue(graph), not graph.connected
    shares = graph.rates * (found := edge_resistances(graph))
    second = math.inf if apart else 0.5 * float(found.max(initial=0.0))
    return Constants(
        n=graph.n,
        edges=len(graph),
        trace=graph.trace,
        lambda2=math.inf if first == 0 else 1.0 / first,
        chi1=first,
        chi2=second,
        accelerated=math.inf if apart else math.sqrt(first * second),
        norm=norm,
        gap=math.inf if apart else norm * first,
        largest_share=float(shares.max(initial=0.0)),
        foster=float(shares.sum()),
    )


def communications(found: Constants, epsilon: float) -> dict[str, float]:
    """Exchanges until ‖πx‖² is ε of what it was, by the kind of gossip. Raises InvalidChoice for an ε outside (0, 1)."""
    if not 0 < epsilon < 1:
        raise InvalidChoice(f"epsilon={epsilon:g} is no share that is left; give a number between 0 and 1.")
    orders = {
        "synchronous": found.edges * found.gap if found.edges else found.gap,
        "accelerated synchronous": found.edges * math.sqrt(found.gap) if found.edges else found.gap,
        "randomized": found.trace * found.chi1 if found.edges else found.chi1,
        "accelerated randomized": found.trace * found.accelerated if found.edges else found.accelerated,
    }
    return {kind: order * math.log(1 / epsilon) for kind, order in orders.items()}
