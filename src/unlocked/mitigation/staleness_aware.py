"""Staleness-aware learning rates (Zhang et al., 2016; F Example 6).

    g ← g / max(1, τ)

    g gradient of a micro-batch, τ updates between its forward and now (measured).

Limits: τ ≤ 1 is the identity. The thesis prints g/τ, which τ = 0 leaves undefined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..rules.staleness import staleness_aware
from ..versions import Reading, Versions
from .base import Mitigating, Mitigation, Properties


class _Scaled(Mitigating):
    compensates = True

    def compensate(
        self, gradients: list[Tensor | None], reading: Reading, tau: int, share: float
    ) -> list[Tensor | None]:
        return [None if g is None else staleness_aware(g, tau) for g in gradients]


@dataclass(frozen=True)
class StalenessAware(Mitigation):
    """The older a gradient, the less it counts."""

    name: ClassVar[str] = "staleness-aware"
    properties: ClassVar[Properties] = Properties(
        title="Staleness-aware (Zhang et al. 2016)",
        source="F Example 6",
        formula="g / max(1, τ)",
        memory="0",
    )

    def start(self, optimizer: torch.optim.Optimizer, versions: Versions) -> Mitigating:
        return _Scaled(optimizer, versions)
