"""Weight prediction: where the weights will be τ updates from now, if no further gradient came (F Example 6).

    linear                 θ̂ = θ − Σ_s γ_s v          = θ − τγv
    SGD with momentum      θ̂ = θ − Σ_s γ_s μ^s v      = θ − γv (μ − μ^{τ+1}) / (1 − μ)
    Adam                   θ̂ = θ − Σ_s γ_s [β1^s m / (1 − β1^{n+s})] / (√(β2^s u / (1 − β2^{n+s})) + ε)

s = 1..τ;  γ_s: the learning rate of the s-th update from now (constant on the right);  v: the momentum buffer after the
last update, v ← μv + g;  m, u: Adam's first and second moment after n updates.  SGD: SpecTrain (Chen et al., 2018) and
FTPipe (Eliad et al., 2021); Adam: XPipe (Guan et al., 2019) and FTPipe.

The last two are the weights that torch.optim.SGD, Adam and AdamW reach in τ steps with gradients of zero. FTPipe's form
for Adam leaves out β2^s, as if the second moment stayed as it is (`frozen_second`): its steps are shorter.

Limits: τ = 0 gives θ itself. μ = 0 gives θ; μ = 1 gives the linear form, which is also exact when the gradients to come
keep v as it is. With gradients g_s to come and a constant γ, SGD will be at θ̂ − Σ_s γ g_s (1 − μ^{τ−s+1}) / (1 − μ).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..errors import InvalidChoice


def predict_linear(theta: Tensor, velocity: Tensor, rate: float | Sequence[float], tau: int) -> Tensor:
    """θ − τγv, or θ − Σ_s γ_s v with the learning rates of the next updates, at least τ of them.

    Raises InvalidChoice for a negative τ or too few rates.
    """
    rates = _rates(rate, tau)
    return theta.sub(velocity, alpha=math.fsum(rates)) if rates else theta


def predict_sgd(
    theta: Tensor,
    velocity: Tensor,
    rate: float | Sequence[float],
    momentum: float,
    tau: int,
    *,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Tensor:
    """The weights after τ steps of torch.optim.SGD without gradients: θ − Σ_s γ_s μ^s v, one μ more with Nesterov's.

    `velocity`: the momentum buffer. `rate`: one learning rate, or those of the next updates, at least τ of them. Weight
    decay is known in advance, so it goes on (with dampening 0). Raises InvalidChoice for a negative τ or too few rates.
    """
    if tau == 0:
        return theta
    a, b = 1.0, 0.0  # the weights are aθ + bv,
    c, d = 0.0, 1.0  # the buffer is cθ + dv
    for gamma in _rates(rate, tau):
        c, d = momentum * c + weight_decay * a, momentum * d + weight_decay * b
        step = (weight_decay * a + momentum * c, weight_decay * b + momentum * d) if nesterov else (c, d)
        a, b = a - gamma * step[0], b - gamma * step[1]
    return (a * theta).add(velocity, alpha=b)


def predict_adam(
    theta: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    rate: float | Sequence[float],
    betas: tuple[float, float],
    epsilon: float,
    tau: int,
    *,
    weight_decay: float = 0.0,
    frozen_second: bool = False,
) -> Tensor:
    """The weights after τ steps of torch.optim.Adam without gradients; with `weight_decay`, of AdamW.

    `first`, `second`, `step`: Adam's `exp_avg`, `exp_avg_sq` and count of updates so far. `rate` as in `predict_sgd`.
    `frozen_second`: FTPipe's form. ε > 0. Neither Adam's own weight decay (part of its gradient) nor amsgrad is
    foreseen. Raises InvalidChoice for a negative τ or too few rates.
    """
    predicted, root = theta, second.sqrt() if tau else second
    for s, gamma in enumerate(_rates(rate, tau), start=1):
        left = 1.0 if frozen_second else betas[1] ** s
        size = root * math.sqrt(left / (1.0 - betas[1] ** (step + s))) + epsilon
        share = betas[0] ** s / (1.0 - betas[0] ** (step + s))
        predicted = (predicted * (1.0 - gamma * weight_decay)).addcdiv(first, size, value=-gamma * share)
    return predicted


def _rates(rate: float | Sequence[float], tau: int) -> list[float]:
    """γ_1 … γ_τ."""
    if tau < 0:
        raise InvalidChoice(f"Weights cannot be predicted {tau} updates ahead; give a whole number of at least 0.")
    if not isinstance(rate, Sequence):
        return [rate] * tau
    if len(rate) < tau:
        raise InvalidChoice(f"{len(rate)} learning rates do not reach {tau} updates ahead; give at least {tau}.")
    return list(rate[:tau])
