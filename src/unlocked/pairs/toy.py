"""A linear model of dimensional collapse (Jing, Vincent, LeCun & Tian, 2022; F §3.2.3-3.2.4, Eq. 3.5-3.6, Figure 3.2).

    z = W x,  z' = W x'          two views of B points x; the augmentation adds noise to some entries of x only
    L = −Σ_i α_{ii'} log( e_{ii'} / Z_i ),   e_il = exp(−‖z_i − z_l‖² / 2),   e_{ii'} = exp(−‖z_i − z'_i‖² / 2)
    Z_i = e_{ii'} + Σ_{l≠i} α_il e_il

    dW/dt = −∂L/∂W = Σ_{i,l≠i} α_{ii'} α_il s_il (z_i − z_l)(x_i − x_l)ᵀ − Σ_i α_{ii'} (1 − s_{ii'}) (z'_i − z_i)(x'_i − x_i)ᵀ
    s_il = e_il / Z_i,  s_{ii'} = e_{ii'} / Z_i

    α 1 for a pair nearer than the radius r, else 0; B points, D entries, i and l number points.

r = ∞ is Eq. 3.5 (whose s_ii lost its prime): the first term spreads the data, the second shrinks what augmentation moves, and
where that is stronger W loses dimensions. A finite r is Eq. 3.6 with the masks of Eq. 3.8, where also the negatives of a point
go whose positive is masked. If no negative is kept, dW/dt = 0 for every W. At W = I the terms of a point add up to less than
2 r² in norm, so as r → 0 it is an equilibrium without a lost dimension.

The figure is of the cosine losses of this package instead (`train`, `spectrum`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InvalidChoice
from .base import PairLoss


def dynamics(weight: Tensor, x: Tensor, other: Tensor, radius: float = math.inf) -> Tensor:
    """dW/dt (E, D) above. weight: W (E, D). x, other: the two views (B, D) each. radius: r, a distance of z, above 0.

    Raises InvalidChoice.
    """
    if not radius > 0:
        raise InvalidChoice(f"Pairs are kept that are nearer than the radius, which must be above 0; given {radius}.")
    apart, moved = x[:, None] - x, other - x  # (B, B, D), (B, D)
    far, moved_far = apart @ weight.T, moved @ weight.T
    squares, moved_squares = far.square().sum(2), moved_far.square().sum(1)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    negative = squares.masked_fill(itself | (squares >= radius**2), math.inf)
    logits = -torch.cat([moved_squares[:, None], negative], 1) / 2
    kept = (moved_squares < radius**2).to(x.dtype)
    s = logits.softmax(1) * kept[:, None]
    spread = torch.einsum("il,ile,ild->ed", s[:, 1:], far, apart)
    shrink = torch.einsum("i,ie,id->ed", kept - s[:, 0], moved_far, moved)
    return spread - shrink


def noisy_views(
    points: int, sigma: float, generator: torch.Generator, dimensions: int = 16, noisy: int = 8
) -> tuple[Tensor, Tensor]:
    """(x, x'), (B, D) each, float64: standard normal points, seen twice with σ times standard normal noise on the last `noisy`
    entries."""
    amplitude = torch.zeros(dimensions, dtype=torch.float64)
    amplitude[dimensions - noisy :] = sigma
    draws = [torch.randn(points, dimensions, generator=generator, dtype=torch.float64) for _ in range(3)]
    return draws[0] + amplitude * draws[1], draws[0] + amplitude * draws[2]


def interleaved(one: Tensor, other: Tensor) -> Tensor:
    """(2B, D): rows 2k and 2k + 1 are the two views of point k."""
    return torch.stack([one, other], 1).flatten(0, 1)


def train(loss: PairLoss, views: Tensor, steps: int, rate: float) -> Tensor:
    """W (D, D) after `steps` of gradient descent W ← W − γ ∂L/∂W on all views (2B, D) at once, from W = I; rate: γ."""
    weight = torch.eye(views.shape[1], dtype=views.dtype)
    nobody = torch.zeros(len(views), dtype=torch.int64)
    for _ in range(steps):
        weight.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(views @ weight.T, nobody), weight)
        weight = weight.detach() - rate * gradient
    return weight.detach()


def spectrum(z: Tensor) -> Tensor:
    """(D,): the singular values of the covariance of z (N, D), the greatest first, over the greatest."""
    values = torch.linalg.svdvals(torch.cov(z.T))
    return values / values[0]
