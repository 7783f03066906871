"""The mean of several networks of one architecture, in their weights.

    θ̄ = Σ_n w_n θ_n / Σ_n w_n        θ_n member n's parameters and floating-point buffers, w_n ≥ 0 its weight

Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (2018); Wortsman et al., "Model soups"
(2022). Limits: equal members give themselves; all weight on one member gives that member, bit for bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..chain import Chain
from ..errors import InvalidChoice


def averaged(models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> nn.Module:
    """A new network: the mean of the models, uniform or by `weights` (at least 0; divided by their sum).

    Floating-point parameters and buffers (BatchNorm statistics) are averaged, in float32 at least, in the order of the models;
    other buffers, such as counts, are the first model's, as are modes and all else. Tied parameters stay tied.
    Raises InvalidChoice for no models, models of different architectures, and weights that make no mean.
    """
    refuse_unlike(models)
    shares = _shares(len(models), weights)
    mean = copy.deepcopy(models[0])
    rows = [dict(tensors(model)) for model in models]
    with torch.no_grad():
        for name, target in tensors(mean):
            if target.is_floating_point():
                target.copy_(_mean([row[name] for row in rows], shares, target))
    return mean


def _mean(rows: Sequence[Tensor], shares: Sequence[float] | None, like: Tensor) -> Tensor:
    """Σ_n x_n / N in the models' order, as the trainer's own means; or Σ_n share_n x_n. A share of 0 reads nothing."""
    kind = torch.promote_types(like.dtype, torch.float32)
    used = [(share, x) for share, x in zip(shares or [1.0] * len(rows), rows) if share]
    total = torch.zeros_like(like, dtype=kind)
    for share, x in used:
        total += x.to(like.device, kind) if share == 1.0 else share * x.to(like.device, kind)
    return total / len(rows) if shares is None else total


def _shares(count: int, weights: Sequence[float] | None) -> list[float] | None:
    if weights is None:
        return None
    given = [float(weight) for weight in weights]
    if len(given) != count:
        raise InvalidChoice(f"There are {count} models and {len(given)} weights; give one weight for each model.")
    if not all(math.isfinite(weight) and weight >= 0 for weight in given) or not 0 < sum(given) < math.inf:
        raise InvalidChoice(f"The weights {given} make no mean; give finite numbers of at least 0, not all of them 0.")
    return [weight / sum(given) for weight in given]


# ---- what a network consists of --------------------------------------------------------------------------------------


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, with their names; a tied one once, under its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def network_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters of the network itself, in the order of its modules, which is that of the forward in all own networks and
    every nn.Sequential; tied ones once, and a chain's heads left out."""
    if isinstance(model, Chain):
        rows = [parameter for _, _, own in model.layers() for parameter in own]
    else:
        rows = list(model.parameters())
    return list({id(parameter): parameter.detach() for parameter in rows}.values())


def refuse_unlike(models: Sequence[nn.Module], names: Sequence[str] | None = None) -> None:
    """Raises InvalidChoice if there is no model, or if one has other tensors than the first; `names`: what they are called."""
    if len(models) == 0:
        raise InvalidChoice("There are no models to average; give at least one.")
    called = names or [f"model {n}" for n in range(len(models))]
    first = {name: x.shape for name, x in tensors(models[0])}
    for n, model in enumerate(models[1:], 1):
        mine = {name: x.shape for name, x in tensors(model)}
        for name in [*first, *mine]:
            if name not in mine or name not in first:
                there, lacks = (0, n) if name in first else (n, 0)
                raise InvalidChoice(
                    f"{called[there]} has a tensor {name} that {called[lacks]} has not; only models of one architecture can be "
                    "averaged."
                )
            if first[name] != mine[name]:
                raise InvalidChoice(
                    f"{name} has the shape {tuple(first[name])} in {called[0]} and {tuple(mine[name])} in {called[n]}; only "
                    "models of one architecture can be averaged."
                )
