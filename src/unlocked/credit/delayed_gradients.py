"""Delayed gradients without stashing: one set of weights (F §2.1.2; DSP: Xu et al., 2020; PipeMare: Yang et al., 2021; B4).

    keep="graph"    Δ^j(m) = ∂f^j/∂θ^j at (activations of F(m), θ^j now),   δ^j likewise
    keep="input"    Δ^j(m) = ∇_{θ^j} of f^j at (x^j(m), θ^j now)             the forward is run again with today's weights

    j stage of J (from 0), x^j(m) the stage's input for micro-batch m, θ^j its weights. F(m) saw weights that are J − 1 − j
    updates older (with k micro-batches per update: a k-th of it).

With the graph the backward mixes activations of the old weights with today's weights, which is what PyTorch gives silently when
weights are written behind its back; here it is chosen. A module that keeps weights where no hook sees them (as attributes of a
custom autograd.Function) sees the old ones. In bf16 the graph keeps casts of the old weights, so the combination is refused.

Limits: J = 1 is backpropagation; learning rate 0 gives backpropagation's gradients. keep="input" is features replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import choose
from .base import Properties
from .delayed import Delayed
from .keeping import KeepGraph, Keeping, KeepInput


@dataclass(frozen=True)
class DelayedGradients(Delayed):
    """Every backward with today's weights.

    Args:
        keep: "graph" (activations of the forward) or "input" (activations made again).
        drain, warm_up: see `Delayed`.
    """

    keep: Literal["graph", "input"] = "graph"

    name: ClassVar[str] = "delayed-gradients"
    properties: ClassVar[Properties] = Properties(
        title="Delayed gradients without stashing (Xu et al. 2020)",
        source="F §2.1.2",
        locks="none in the steady state; a gradient is needed when it can be there",
        memory="J − j micro-batches of own stage (or of its input)",
        up="Ψ_A",
        down="Ψ_A",
        delay="J − 1 − j",
        objective="global, approximated",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("keep", self.keep, ("graph", "input"))

    @property
    def keeping(self) -> Keeping:
        return KeepGraph("current") if self.keep == "graph" else KeepInput("current")
