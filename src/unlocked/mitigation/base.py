"""Mitigation: what is done about a gradient that was read at weights which have been updated since (F Example 6; B5).

A mitigation is a frozen set of parameters; `start` makes, for one worker's weights, what does it. It may act at three moments:

    before a forward     predict     compute the forward at the weights that are expected when its gradient arrives
    after a backward     compensate  change this micro-batch's gradient, knowing its measured delay τ and how far the
                                     weights have moved since, θ_t − θ_{t−τ}
    at an update         step        look at what a step does

τ is always measured: the version of the weights now, less the version that the forward saw. With τ = 0 every mitigation is the
identity, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..versions import Reading, Versions


@dataclass(frozen=True)
class Properties:
    """What a mitigation declares. Ψ_P: bytes of a stage's weights."""

    title: str  # name, authors, year
    source: str  # where in the seed texts
    formula: str
    memory: str  # what it keeps besides the method's own


class Mitigating:
    """A mitigation at work on one worker's weights. `parameters` in the order of every list of tensors here."""

    compensates: ClassVar[bool] = False  # whether micro-batches' gradients are changed one by one

    def __init__(self, optimizer: torch.optim.Optimizer, versions: Versions) -> None:
        self.optimizer, self.versions = optimizer, versions

    def predict(self, tau: int) -> list[Tensor] | None:
        """The weights expected `tau` updates from now; None: compute with those of today."""
        return None

    def compensate(
        self, gradients: list[Tensor | None], reading: Reading, tau: int, share: float
    ) -> list[Tensor | None]:
        """The gradients to use in place of these, which were read at `reading`, `tau` ≥ 0 updates ago.

        share: > 0, the micro-batch's part of its update; `gradients` are its own gradients times this.
        """
        return gradients

    def step(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: numbers, and lists of tensors."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""

    def drift(self, reading: Reading) -> list[Tensor]:
        """θ_t − θ_{t−τ} of every weight."""
        return [x - old for x, old in zip(self.versions.today(), self.versions.weights(reading))]


class Mitigation(ABC):
    """Subclasses are frozen dataclasses: their fields are the rule's parameters."""

    name: ClassVar[str]
    properties: ClassVar[Properties]
    predicts: ClassVar[bool] = False  # whether forwards may see other weights than the newest

    @abstractmethod
    def start(self, optimizer: torch.optim.Optimizer, versions: Versions) -> Mitigating:
        """At work on one worker's weights. Raises InvalidChoice if it cannot work with this optimizer."""
