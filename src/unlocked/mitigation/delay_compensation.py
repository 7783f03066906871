"""Delay compensation (Zheng et al., 2017: DC-ASGD; F Example 6; FACTS 2.8).

    g ← g + λ g ⊙ g ⊙ (θ_t − θ_{t−τ})
    adaptive: λ = λ_0 / √(E[g²] + ε)          E an exponential average with `decay`, element by element

    g gradient read at θ_{t−τ}, θ_t weights now. g ⊙ g stands for the diagonal of the Hessian: this is the first-order
    expansion of the gradient at θ_t around θ_{t−τ}.

Limits: τ = 0, λ = 0, or weights that did not move, is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InvalidChoice
from ..rules.staleness import adaptive_lambda, delay_compensation, running_square
from ..versions import Reading, Versions
from .base import Mitigating, Mitigation, Properties


class _Compensated(Mitigating):
    compensates = True

    def __init__(self, optimizer: torch.optim.Optimizer, versions: Versions, rule: DelayCompensation) -> None:
        super().__init__(optimizer, versions)
        versions.keeps = True
        self._rule = rule
        self._squares: list[Tensor] = []

    def compensate(
        self, gradients: list[Tensor | None], reading: Reading, tau: int, share: float
    ) -> list[Tensor | None]:
        k = 1.0 / share
        factors: list[float | Tensor] = [k * self._rule.lam] * len(gradients)
        if self._rule.adaptive:
            self._note(gradients, share)
            factors = [k * adaptive_lambda(self._rule.lam, square, self._rule.epsilon) for square in self._squares]
        if tau == 0:
            return gradients
        return [
            None if g is None else delay_compensation(g, moved, factor)
            for g, moved, factor in zip(gradients, self.drift(reading), factors)
        ]

    def _note(self, gradients: list[Tensor | None], share: float) -> None:
        if not self._squares:
            self._squares = [torch.zeros_like(x) for x in self.versions.parameters]
        for k, g in enumerate(gradients):
            if g is not None:
                self._squares[k] = running_square(self._squares[k], g / share, self._rule.decay)

    def state(self) -> dict[str, Any]:
        return {"squares": self._squares}

    def load(self, state: Mapping[str, Any]) -> None:
        self._squares = [square.clone() for square in state["squares"]]


@dataclass(frozen=True)
class DelayCompensation(Mitigation):
    """Expand the gradient around the old weights to where they are now.

    Args:
        lam: λ ≥ 0 (λ_0 if adaptive). adaptive: whether λ follows the size of the gradients.
        decay: of the average of squared gradients, in [0, 1). epsilon: > 0, keeps λ finite.
    """

    lam: float = 0.04
    adaptive: bool = False
    decay: float = 0.95
    epsilon: float = 1e-7

    name: ClassVar[str] = "delay-compensation"
    properties: ClassVar[Properties] = Properties(
        title="Delay compensation (Zheng et al. 2017)",
        source="F Example 6",
        formula="g + λ g ⊙ g ⊙ (θ_t − θ_{t−τ})",
        memory="Ψ_P per version in flight; adaptive: + Ψ_P",
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.lam < float("inf"):
            raise InvalidChoice(f"lam={self.lam} is not possible; give a number of at least 0.")
        if not 0.0 <= self.decay < 1.0:
            raise InvalidChoice(f"decay={self.decay} is not possible; give a number of at least 0 and below 1.")
        if not self.epsilon > 0.0:
            raise InvalidChoice(f"epsilon={self.epsilon} is not possible; give a number above 0.")

    def start(self, optimizer: torch.optim.Optimizer, versions: Versions) -> Mitigating:
        return _Compensated(optimizer, versions, self)
