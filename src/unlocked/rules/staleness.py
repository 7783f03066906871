"""Gradients that come late, corrected: staleness-aware, gap-aware, delay compensation (F Example 6).

    staleness-aware (Zhang et al., 2016)       g / max(1, τ)
    gap-aware (Barkai et al., 2020)            g / (1 + |d| / s)
    delay compensation (Zheng et al., 2017)    g + λ g⊙g⊙d

g = ∇ℓ(θ_{t−τ}): the gradient, read τ updates ago;  d = θ_t − θ_{t−τ}: the drift since then;  λ ≥ 0: strength;
s = γ_max · RMS of one step per unit of learning rate: how far one update moves a weight.  All element by element.

Limits: with τ = 0, or d = 0, each gives g back, bit for bit. F prints 1/τ for the first, which has no value at τ = 0.
With a constant gradient and plain SGD, |d| = τγ|g| and s = γ|g|, so gap-aware divides by 1 + τ. Delay compensation is
exact on a quadratic whose curvature is diagonal and equals λ g⊙g; for a log-likelihood at its optimum the diagonal of
the curvature is that in expectation (λ = 1).
"""

from __future__ import annotations

from torch import Tensor

from ..errors import InvalidChoice


def staleness_aware(g: Tensor, tau: int) -> Tensor:
    """g / max(1, τ), for a gradient that is τ ≥ 0 updates old."""
    return g / max(1, tau)


def gap_aware(g: Tensor, drift: Tensor, scale: Tensor) -> Tensor:
    """g / (1 + |drift| / scale), for a gradient whose weights have moved by `drift` since it was read.

    `g`, `drift` have the same shape, `scale` ≥ 0 broadcasts to it. Where `scale` is 0 the quotient is its limit: 0 if
    the drift is 0, else infinite, so that g becomes 0. Finite values give finite ones. To let such a weight go on, take
    `scale` from gradients as they came, not from those that this function made smaller.
    """
    size = drift.abs()
    return g / (1.0 + (size / scale).masked_fill(size == 0.0, 0.0))


def delay_compensation(g: Tensor, drift: Tensor, lam: float | Tensor) -> Tensor:
    """g + λ g⊙g⊙drift: the gradient a Taylor step nearer to today's weights, with λ g⊙g in place of the Hessian.

    `g`, `drift` have the same shape, `lam` is one number or broadcasts to it (`adaptive_lambda`).
    """
    return g * (1.0 + (lam * drift) * g)  # as a product it leaves −0 and what overflows alone where the drift is 0


def adaptive_lambda(lambda0: float, mean_square: Tensor, epsilon: float = 1e-7) -> Tensor:
    """λ_t = λ0 / √(E g² + ε), shaped as `mean_square` ≥ 0, the running average of g² (`running_square`).

    Raises InvalidChoice unless ε > 0: a weight that had no gradient yet would get an infinite λ.
    """
    if not epsilon > 0.0:
        raise InvalidChoice(
            f"epsilon={epsilon} is not possible for an adaptive λ; give a number above 0, such as 1e-7."
        )
    return lambda0 / (mean_square + epsilon).sqrt()


def running_square(previous: Tensor, x: Tensor, decay: float) -> Tensor:
    """decay · previous + (1 − decay) · x²: the running average of squares, begun at 0. `previous` is not changed."""
    return (decay * previous).addcmul(x, x, value=1.0 - decay)


def bias_corrected(average: Tensor, decay: float, count: int) -> Tensor:
    """average / (1 − decay^count): a running average begun at 0, of `count` values, without its pull towards 0.

    0 ≤ decay < 1. With `count` 0 nothing was averaged: the average, which is 0, is given back.
    """
    return average / (1.0 - decay**count) if count > 0 else average
