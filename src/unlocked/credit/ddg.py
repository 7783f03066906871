"""Decoupled parallel backpropagation with delayed gradients, DDG (Huo et al., 2018; F §2.1.2; FACTS 1.13).

    Δ^j = ∇_{θ^j} at (x^j(m), θ^j of F(m)),   m = t − (J − 1 − j);    δ from above: the one of the turn before, times β

    t turn, j stage of J (from 0), β shrinking factor of the gradient at every hop (1: none). Whole graphs wait in a queue.

The rule is PipeDream's without vertical synchronisation; the paper runs the forwards of one batch through all stages in a
row and the backwards side by side, here both run side by side.

Limits: J = 1 is backpropagation. β = 1 is PipeDream, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Properties
from .keeping import KeepGraph, Keeping
from .shrinking import Shrinking


@dataclass(frozen=True)
class DDG(Shrinking):
    """Stale graphs side by side.

    Args:
        shrink: β > 0, factor on the gradient at every hop.
        drain, warm_up: see `Delayed`.
    """

    name: ClassVar[str] = "ddg"
    properties: ClassVar[Properties] = Properties(
        title="DDG (Huo et al. 2018)",
        source="F §2.1.2",
        locks="none in the steady state; a gradient is needed when it can be there",
        memory="J − j micro-batches of own stage, J − j − 1 copies of its weights",
        up="Ψ_A",
        down="Ψ_A",
        delay="J − 1 − j",
        objective="global",
    )

    @property
    def keeps_versions(self) -> bool:
        return True

    @property
    def keeping(self) -> Keeping:
        return KeepGraph("stash", self.shrink)
