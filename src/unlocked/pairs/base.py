"""Losses over pairs of views: what self-supervised learning trains on instead of labels.

A batch of B images comes as 2B rows, two views of an image one after the other: rows 2k and 2k + 1 (from 0) are views of image
k. So the positive partner of row i is i XOR 1, and rows of several micro-batches, or of several replicas, one after the other
are again such a batch. All other rows are row i's negatives.

Legend: B images, N = 2B rows, D entries of a projection.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..losses import WrongTarget
from ..option_types import Typed


class Judged(NamedTuple):
    """loss: scalar. notes: what there is to watch about the pairs, scalars without gradient, such as the share kept."""

    loss: Tensor
    notes: dict[str, Tensor]


class PairLoss(Typed, ABC):
    """A loss of projections z (N, D) of views, N even and laid out as above. Subclasses are frozen dataclasses.

    Args of `judge`: z; y (N,), the labels of the images, which only losses with `reads_labels` look at; oracle (N, E):
    projections of the same rows by another network, without gradient, for losses with `reads_oracle`.
    """

    classifies: ClassVar[bool] = False
    contrasts: ClassVar[bool] = False  # True: with a single image, which has no negatives, there is nothing to learn
    known: ClassVar[bool] = True  # False: it has to meet the training data first (Credit.meet)

    @property
    def reads_labels(self) -> bool:
        """Whether the loss cannot do without y."""
        return False

    @property
    def reads_oracle(self) -> bool:
        """Whether the loss cannot do without the oracle."""
        return False

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss alone, as other losses are called."""
        return self.judge(z, y).loss

    @abstractmethod
    def judge(self, z: Tensor, y: Tensor, oracle: Tensor | None = None) -> Judged:
        """The loss, and notes. Raises WrongTarget."""

    def by_itself(self) -> PairLoss:
        """The same work on projections alone, for who measures it: the oracle's are the stage's own; of thresholds that are
        not known yet, all pairs pass."""
        return _OwnOracle(self) if self.reads_oracle else self

    def at(self, stage: int, stages: int) -> PairLoss:
        """The loss of stage `stage` (from 0) of `stages`: another one, where thresholds depend on the depth."""
        return self


@dataclass(frozen=True)
class _OwnOracle(PairLoss):
    loss: PairLoss

    def judge(self, z: Tensor, y: Tensor, oracle: Tensor | None = None) -> Judged:
        return self.loss.judge(z, y, z.detach())


def partners(rows: int, device: torch.device) -> Tensor:
    """(rows,) int64: the row of the other view of the same image."""
    return torch.arange(rows, device=device) ^ 1


def check_pairs(loss: str, z: Tensor) -> None:
    """Raises WrongTarget unless z can be projections of pairs of views."""
    if not isinstance(z, Tensor) or z.dim() != 2 or len(z) % 2 or z.numel() == 0:
        shape = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise WrongTarget(
            f"{loss} compares two views of each image and needs projections (2B, D), views of an image one after the other; "
            f"got {shape}. Train on data with augment='simclr' (or 'views+…'), and with micro-batches of an even number of "
            "rows."
        )
