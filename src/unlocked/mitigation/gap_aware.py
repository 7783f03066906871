"""Gap-aware gradients (Barkai et al., 2020; F Example 6; FACTS 2.8).

    g ← g ⊘ (1 + |θ_t − θ_{t−τ}| / C),     C = γ_max √(E[u²]),   u_t = (θ_{t+1} − θ_t)/γ_t

    θ_t weights now, θ_{t−τ} those the gradient was read at, γ_t learning rate (γ_max the largest so far), u_t one step per
    unit of learning rate, its mean square an exponential average with `decay`, corrected for its start at 0. All element
    by element.

For SGD with momentum u is the momentum buffer, as in the paper; for other optimizers it is what they made of the gradient.
Differs from FTPipe's code: weight decay is not divided along with the gradient.

Limits: τ = 0, or weights that did not move, is the identity. Before the first update nothing is known of u and nothing is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InvalidChoice
from ..rules.staleness import bias_corrected, gap_aware, running_square
from ..versions import Reading, Versions
from .base import Mitigating, Mitigation, Properties


class _Gap(Mitigating):
    compensates = True

    def __init__(self, optimizer: torch.optim.Optimizer, versions: Versions, decay: float) -> None:
        super().__init__(optimizer, versions)
        versions.keeps = True
        self._decay, self._count = decay, 0
        self._squares: list[Tensor] = []
        self._highest: list[float] = []

    def compensate(
        self, gradients: list[Tensor | None], reading: Reading, tau: int, share: float
    ) -> list[Tensor | None]:
        if tau == 0 or not self._count:
            return gradients
        return [
            None
            if g is None
            else gap_aware(g, moved, highest * bias_corrected(square, self._decay, self._count).sqrt())
            for g, moved, square, highest in zip(gradients, self.drift(reading), self._squares, self._highest)
        ]

    def step(self) -> None:
        rates, before = self._rates(), [x.detach().clone() for x in self.versions.parameters]
        self.optimizer.step()
        if not self._squares:
            self._squares, self._highest = [torch.zeros_like(x) for x in before], [0.0] * len(before)
        self._highest = [max(pair) for pair in zip(self._highest, rates)]
        if all(rate > 0 for rate in rates):  # a step of length 0 says nothing about its direction
            self._count += 1
            for k, (now, old) in enumerate(zip(self.versions.parameters, before)):
                self._squares[k] = running_square(self._squares[k], (now.detach() - old) / rates[k], self._decay)

    def _rates(self) -> list[float]:
        """The learning rate of every weight."""
        known = {id(x): float(group["lr"]) for group in self.optimizer.param_groups for x in group["params"]}
        return [known[id(x)] for x in self.versions.parameters]

    def state(self) -> dict[str, Any]:
        return {"count": self._count, "squares": self._squares, "highest": self._highest}

    def load(self, state: Mapping[str, Any]) -> None:
        self._count, self._highest = state["count"], list(state["highest"])
        self._squares = [square.clone() for square in state["squares"]]


@dataclass(frozen=True)
class GapAware(Mitigation):
    """The farther a weight has moved since, the less its gradient counts.

    Args:
        decay: of the average of squared steps, in [0, 1).
    """

    decay: float = 0.999

    name: ClassVar[str] = "gap-aware"
    properties: ClassVar[Properties] = Properties(
        title="Gap-aware (Barkai et al. 2020)",
        source="F Example 6",
        formula="g / (1 + |θ_t − θ_{t−τ}| / (γ_max RMS step))",
        memory="Ψ_P per version in flight, + Ψ_P, + Ψ_P during a step",
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise InvalidChoice(f"decay={self.decay} is not possible; give a number of at least 0 and below 1.")

    def start(self, optimizer: torch.optim.Optimizer, versions: Versions) -> Mitigating:
        return _Gap(optimizer, versions, self.decay)
