"""What automatic heads are to give: read off the network's own output and its own loss.

    network's output   heads give   target y
    (B,)               (B,)         one number per sample: regression
    (B, K)             (B, K)       classes (B,) of cross_entropy, or K numbers per sample
    (B, T, V)          (B, T, V)    tokens (B, T) of cross_entropy, or V numbers per position

The local loss is the network's (that of the last stage), unless a head brings one of its own (predsim).
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import InvalidChoice
from ..losses import Loss, cross_entropy, is_regression
from .budget import HEADS
from .spec import HeadSpec


class Goal(NamedTuple):
    """outputs: numbers per row; shape: of the network's output for the example; loss: the network's own."""

    outputs: int
    shape: tuple[int, ...]
    loss: Loss

    @property
    def per_token(self) -> bool:
        """Whether there is a target for each position."""
        return len(self.shape) == 3

    def reads(self, features: Tensor, where: str) -> Tensor:
        """The features of a stage. Raises InvalidChoice if they have other positions than the output."""
        if self.per_token and features.dim() == 3 and features.shape[:2] != self.shape[:2]:
            raise InvalidChoice(
                f"The network's output has shape {self.shape}, one row for each position, but {where} gives features of shape "
                f"{tuple(features.shape)}, other positions; give its head by hand, Stage(body, head=…, loss=…)."
            )
        return features

    def local_loss(self) -> Loss:
        """The network's loss for one more stage; a module is copied, since stages share no state."""
        return copy.deepcopy(self.loss) if isinstance(self.loss, nn.Module) else self.loss

    def finish(self, head: nn.Module) -> nn.Module:
        """The head, giving (B,) where the network does."""
        return nn.Sequential(head, OneNumber()) if len(self.shape) == 1 else head


class OneNumber(nn.Module):
    """(B, 1) -> (B,)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(-1)


def goal_of(output: Any, loss: Loss, spec: Any) -> Goal:
    """What heads made from `spec` are to give, so that `loss` can judge them as it judges the network's `output`.

    Raises InvalidChoice where no head can be guessed; a function that makes heads may give any shape.
    """
    by_hand = "Give the heads by hand, Stage(body, head=…, loss=…)"
    if not isinstance(output, Tensor):
        raise InvalidChoice(
            f"The network's output is a {type(output).__name__}; local heads are built for one tensor only. {by_hand}."
        )
    if isinstance(spec, str) and spec in HEADS:
        spec = HEADS[spec]
    shape = tuple(output.shape)
    if not output.is_floating_point() or not shape:
        raise InvalidChoice(f"No local loss can be guessed for an output of {output.dtype}, shape {shape}. {by_hand}.")
    if len(shape) == 1 and loss is cross_entropy:
        raise InvalidChoice(
            f"The network gives one number per sample, shape {shape}, which cross_entropy cannot read as scores of classes; "
            "say what it is trained with, cut(model, stages, like=x, loss=ul.losses.mean_squared_error)."
        )
    if len(shape) > 3 and (isinstance(spec, (str, HeadSpec)) or not callable(spec)):
        raise InvalidChoice(
            f"No head is known for a network whose output has shape {shape}; those built here give (B,), (B, K) or (B, T, V). "
            f"{by_hand}, or a function that makes them: head=lambda features, outputs: module, with outputs of that shape."
        )
    if isinstance(spec, HeadSpec) and spec.loss() is not None and (is_regression(loss) or len(shape) == 1):
        raise InvalidChoice(
            f"The head {spec.name!r} has a loss of its own, which compares classes, but the network learns numbers "
            f"({getattr(loss, '__name__', type(loss).__name__)}); take a head without one, such as 'linear' or 'mlp'."
        )
    outputs = 1 if len(shape) == 1 else shape[1] if len(shape) > 3 else shape[-1]
    return Goal(outputs, shape, loss)
