"""What a replica does with the mean of all: the rules of PAPA, local SGD and elastic averaging.

θ_n weights of replica n of N, θ̄ their mean, c a centre. All functions work element by element and in place.
"""

from __future__ import annotations

from torch import Tensor


def pull(theta: Tensor, mean: Tensor, share: float, begun: Tensor | None = None) -> None:
    """θ ← (1−s) θ + s θ̄ (F Example 4, PAPA), s = `share` in [0, 1]; s = 1 puts the mean in place bit for bit.

    With `begun`, what θ was when the mean was begun: θ ← θ + s (θ̄ − θ_begun). The training in between is kept, and the sum
    of θ over the replicas is not changed.
    """
    if begun is None:
        theta.lerp_(mean, share)
    else:
        theta.add_(mean - begun, alpha=share)


def elastic(theta: Tensor, centre: Tensor, rho: float) -> Tensor:
    """EASGD's exchange of one replica (Zhang, Choromanska & LeCun 2015, Eq. 2): θ ← θ − d; returns d = ρ (θ − c).

    The centre gets c ← c + d, at once or summed over the replicas: Σ_n θ_n + c is conserved.
    """
    difference = (theta - centre).mul_(rho)
    theta.sub_(difference)
    return difference


def share_of_rate(alpha: float, rate: float, first: float) -> float:
    """PAPA's share α γ_t/γ_0 (F Example 4); α where there is no first rate to compare with."""
    return min(1.0, alpha * rate / first) if first else alpha
