"""Features replay (Huo et al., 2018; F §2.1.2; FACTS 1.13).

    Δ^j = ∇_{θ^j} of f^j at (x^j(m), θ^j now),   m = t − (J − 1 − j);    δ from above: the one of the turn before, times β

    t turn, j stage of J (from 0), x^j(m) the stage's input when m came by (the feature, which is replayed), β shrinking
    factor (1: none, the paper's). BatchNorm statistics count a micro-batch once, not twice as in the reference code.

Limits: J = 1 is backpropagation; learning rate 0 gives backpropagation's gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Properties
from .keeping import Keeping, KeepInput
from .shrinking import Shrinking


@dataclass(frozen=True)
class FeaturesReplay(Shrinking):
    """Only inputs wait; the forward is run again with today's weights.

    Args:
        shrink: β > 0, factor on the gradient at every hop.
        drain, warm_up: see `Delayed`.
    """

    name: ClassVar[str] = "features-replay"
    properties: ClassVar[Properties] = Properties(
        title="Features replay (Huo et al. 2018)",
        source="F §2.1.2",
        locks="none in the steady state; a gradient is needed when it can be there",
        memory="own stage, and its input of J − 1 − j micro-batches",
        up="Ψ_A",
        down="Ψ_A",
        delay="J − 1 − j",
        objective="global, approximated",
    )

    @property
    def keeping(self) -> Keeping:
        return KeepInput("current", self.shrink)
