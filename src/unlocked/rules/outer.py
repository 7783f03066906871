"""Outer optimizers: what a round of local training is worth as one big step.

x weights at the beginning of a round, alike on all replicas; x̄ the mean of the replicas' weights at its end;
Δ = x − x̄ the outer gradient; γ the inner learning rate.
"""

from __future__ import annotations

from torch import Tensor


def slow_momentum(u: Tensor, gradient: Tensor, beta: float, rates: float) -> None:
    """SlowMo's momentum (Wang et al. 2020, Algorithm 1) times the inner rate, in place: u ← β r u + Δ;  then x ← x − α u.

    The paper has v ← β v + Δ/γ, x ← x − α γ v. With u = γ v nothing is divided by γ but in r = γ_t/γ_{t−1}, `rates`.
    """
    u.mul_(beta * rates).add_(gradient)


def nesterov(x: Tensor, gradient: Tensor, m: Tensor, rate: float, momentum: float, nesterov: bool = True) -> None:
    """SGD with (Nesterov) momentum on the outer gradient Δ, in place (Douillard et al. 2023, §2; as torch.optim.SGD):

    m ← μ m + Δ;   x ← x − η (Δ + μ m)  with Nesterov,  x − η m  without;   m = 0 at first.
    """
    m.mul_(momentum).add_(gradient)
    x.sub_(gradient.add(m, alpha=momentum) if nesterov else m, alpha=rate)


def clipped(x: Tensor, largest: float | None) -> Tensor:
    """x, or x scaled to the norm `largest` if it is longer (None: never)."""
    if largest is None:
        return x
    norm = float(x.double().norm())
    return x * (largest / norm) if norm > largest else x


def staleness_gap(x: Tensor, before: Tensor, mean: Tensor) -> float:
    """Λ = 1 + ‖x − x_before‖ / ‖x_before − x̄‖: 1 if the weights have not moved since the round that the mean is of began.

    x: the weights at the beginning of this round, x_before those of the round of which `mean` is. 1 if the mean is where it
    began.
    """
    progress = float((before - mean).double().norm())
    return 1.0 if progress == 0.0 else 1.0 + float((x - before).double().norm()) / progress
