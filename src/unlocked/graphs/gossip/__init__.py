"""Gossip: everybody reaches the mean by exchanges with neighbours (Oyallon §5.1).

Four processes on values in R^d: randomized, synchronous, the same accelerated by Chebyshev polynomials, accelerated randomized;
the clocks of the edges; the exact second moments.
"""

from typing import TYPE_CHECKING

from ...lazy import on_first_use

if TYPE_CHECKING:
    from .accelerated import Accelerated, Momentum, accelerated_gossip, accelerated_rate
    from .engine import Engine
    from .events import poisson_events
    from .moments import expected_errors, second_moment_rate
    from .randomized import Randomized, randomized_gossip, randomized_rate
    from .synchronous import chebyshev_gossip, synchronous_gossip
    from .trajectory import Trajectory

__all__ = [
    "Accelerated",
    "Engine",
    "Momentum",
    "Randomized",
    "Trajectory",
    "accelerated_gossip",
    "accelerated_rate",
    "chebyshev_gossip",
    "expected_errors",
    "poisson_events",
    "randomized_gossip",
    "randomized_rate",
    "second_moment_rate",
    "synchronous_gossip",
]

_HOMES = {
    "Accelerated": "accelerated",
    "Engine": "engine",
    "Momentum": "accelerated",
    "Randomized": "randomized",
    "Trajectory": "trajectory",
    "accelerated_gossip": "accelerated",
    "accelerated_rate": "accelerated",
    "chebyshev_gossip": "synchronous",
    "expected_errors": "moments",
    "poisson_events": "events",
    "randomized_gossip": "randomized",
    "randomized_rate": "randomized",
    "second_moment_rate": "moments",
    "synchronous_gossip": "synchronous",
}
__getattr__ = on_first_use(__name__, _HOMES)  # SciPy takes a third of a second
