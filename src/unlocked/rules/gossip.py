"""What a worker does with its weights x and their momentum x̃ in A²CiD² (Oyallon Eq. 5.22-5.23; FACTS 2.4).

    between events   (x, x̃) ← (c x + (1−c) x̃,  c x̃ + (1−c) x),   c = (1 + e^{−2ηΔt})/2
                     the flow of ẋ = η(x̃ − x), x̃̇ = η(x − x̃)
    exchange         m = x_i − x_j;   x_i ← x_i − ½ m,   x̃_i ← x̃_i − α̃ m;   j the opposite
    gradient         x and x̃ get the same displacement

Δt time since the worker's last event; η ≥ 0 mixing rate; α̃ share of the momentum. η = 0 leaves x̃ without effect: plain gossip.
All functions work element by element and in place.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..graphs import Graph


def mixed_share(eta: float, passed: float) -> float:
    """1 − c = (1 − e^{−2ηΔt})/2: how much of the other copy each of x and x̃ takes."""
    return -0.5 * math.expm1(-2.0 * eta * passed)


def mix(x: Tensor, tilde: Tensor, share: float) -> None:
    """The flow between two events; x + x̃ stays. `share`: 1 − c, from 0 to ½."""
    moved = (tilde - x).mul_(share)
    x.add_(moved)
    tilde.sub_(moved)


def meet(x: Tensor, tilde: Tensor | None, difference: Tensor, alpha_tilde: float, share: float = 0.0) -> None:
    """An exchange, `difference` m = x_i − x_j of what was sent. `share`: 1 − c of the flow since the exchange's moment, for one
    that is taken in later: what it does to x and x̃ has flowed since."""
    if tilde is None:
        x.sub_(difference, alpha=0.5)
        return
    x.sub_(difference, alpha=0.5 + share * (alpha_tilde - 0.5))
    tilde.sub_(difference, alpha=alpha_tilde + share * (0.5 - alpha_tilde))


def acid_parameters(graph: Graph) -> tuple[float, float]:
    """(η, α̃) of a connected graph, its rates per gradient (graphs/gossip/accelerated.py); of a single node (0, ½)."""
    from ..graphs.gossip.accelerated import Momentum

    if not len(graph):
        return 0.0, 0.5
    momentum = Momentum.of(graph)
    return momentum.eta, momentum.alpha_tilde
