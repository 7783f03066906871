"""Gossip: everybody reaches the mean by exchanges with neighbours (Oyallon §5.1).

Four processes on values in R^d: randomized, synchronous, the same accelerated by Chebyshev polynomials, accelerated randomized;
the clocks of the edges; the exact second moments.
"""

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
