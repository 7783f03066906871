"""The loss of each sample, of losses that are means over a batch.

    ℓ (B,),  mean_i ℓ_i = L        tokens: ℓ_i is the mean over the positions of sample i; where targets are left out (-100, as
                                   in PyTorch), B / (targets of all samples) times the sum over its own

Only losses that are known to be such means; another one may compare the samples of a batch with each other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidChoice
from ..losses import Loss, cross_entropy, mean_squared_error

_LEFT_OUT = -100  # F.cross_entropy's ignore_index


def refuse_unknown(loss: Loss, rule: str) -> None:
    """Raises InvalidChoice for a loss of which it is not known that it is a mean over samples."""
    known = any(loss is one for one in (cross_entropy, mean_squared_error, F.mse_loss))
    if not known and not (isinstance(loss, nn.MSELoss) and loss.reduction == "mean"):
        called = getattr(loss, "__name__", type(loss).__name__)
        raise InvalidChoice(
            f"{rule} needs the loss of each sample, and knows it of unlocked.losses.cross_entropy, of "
            f"mean_squared_error and of torch.nn.MSELoss(); this network's loss is {called}. Take one of those, or another "
            "rule (mezo needs only the loss of the batch)."
        )


def per_sample(loss: Loss, output: Any, y: Tensor) -> Tensor:
    """(B,): the loss of each sample; what the loss itself raises for an output and a target that do not fit."""
    loss(output, y)
    if loss is not cross_entropy:
        return (output - y).square().flatten(1).mean(1)
    targets = y.flatten()
    if y.is_floating_point():
        wide = torch.promote_types(output.dtype, y.dtype)
        output, targets = output.to(wide), y.flatten(0, -2).to(wide)
    found = F.cross_entropy(output.flatten(0, -2), targets, reduction="none").view(len(y), -1)
    if y.is_floating_point():
        return found.mean(1)
    return found.sum(1) * len(y) / (targets != _LEFT_OUT).sum()
