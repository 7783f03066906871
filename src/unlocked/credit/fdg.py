"""Fully decoupled learning with delayed gradients, FDG (Zhuang et al., 2021; F §2.1.2; FACTS 1.13).

    Δ^j = ∇_{θ^j} at (x^j(m), θ^j of F(m)),   m = t − 2(J − 1 − j);    δ from above: the one of two turns before, times β

    t turn, j stage of J (from 0), β shrinking factor, so that the gradient of stage j is β^{J−1−j} of what it would be. In
    a turn a stage does its backward and its update first, then its forward: a gradient is 2(J − 1 − j) − 1 updates old.
    `replay`: only inputs wait, and the forward is run again with today's weights.

No stage waits for another within a turn: forward, backward and update are unlocked.

Limits: J = 1 is backpropagation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Properties
from .keeping import KeepGraph, Keeping, KeepInput
from .shrinking import Shrinking


@dataclass(frozen=True)
class FDG(Shrinking):
    """A turn of slack at every hop, and shrinking gradients.

    Args:
        shrink: β > 0, factor on the gradient at every hop (the paper's best: 0.2 to 0.8).
        replay: keep inputs only.
        drain, warm_up: see `Delayed`.
    """

    shrink: float = 0.5
    replay: bool = False

    name: ClassVar[str] = "fdg"
    properties: ClassVar[Properties] = Properties(
        title="FDG (Zhuang et al. 2021)",
        source="F §2.1.2",
        locks="none in the steady state",
        memory="2(J − 1 − j) micro-batches of own stage and copies of its weights; replay: of its input",
        up="Ψ_A",
        down="Ψ_A",
        delay="2(J − 1 − j) − 1",
        objective="global, shrunk with the distance to the loss",
    )
    hop: ClassVar[int] = 2
    backward_first: ClassVar[bool] = True

    @property
    def keeps_versions(self) -> bool:
        return not self.replay

    @property
    def keeping(self) -> Keeping:
        return KeepInput("current", self.shrink) if self.replay else KeepGraph("stash", self.shrink)
