"""PipeDream: 1F1B without flush, weights stashed (Narayanan et al., 2019; F §2.1.2, Figure 2.5c; B2; FACTS 2.8).

    Δ^j(m) = ∇_{θ^j} ℓ(x_m; θ^j_v),   θ^j_{v+1} = OPT(θ^j_v', Δ^j(m))      v = updates of stage j before F(m), v' before B(m)

    j stage of J (from 0), x_m micro-batch, θ^j_v weights of stage j after v updates. In the steady state v' − v = J − 1 − j (k
    micro-batches per update: a k-th of it). Every stage sees the newest weights it has, so a micro-batch meets different
    delays on different stages (no vertical synchronisation, as in the paper's default).

A backward uses the weights of its forward: they are copied before an update (`stash`: J − j versions) or kept by the graph
itself (`snapshot`). `keep="input"` keeps the stage's input and runs the forward again, with those weights.

Limits: J = 1 is backpropagation; learning rate 0 gives backpropagation's gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import InvalidChoice, choose
from .base import Properties
from .delayed import Delayed
from .keeping import KeepGraph, Keeping, KeepInput


@dataclass(frozen=True)
class PipeDream(Delayed):
    """Every backward with the weights of its forward.

    Args:
        keep: "graph" or "input". weights: "stash" or "snapshot" (graph only).
        drain, warm_up: see `Delayed`.
    """

    keep: Literal["graph", "input"] = "graph"
    weights: Literal["stash", "snapshot"] = "stash"

    name: ClassVar[str] = "pipedream"
    properties: ClassVar[Properties] = Properties(
        title="PipeDream (Narayanan et al. 2019)",
        source="F Figure 2.5c",
        locks="none in the steady state; a gradient is needed when it can be there",
        memory="J − j micro-batches of own stage, J − j − 1 copies of its weights",
        up="Ψ_A",
        down="Ψ_A",
        delay="J − 1 − j",
        objective="global",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("keep", self.keep, ("graph", "input"))
        choose("weights", self.weights, ("stash", "snapshot"))
        if self.keep == "input" and self.weights == "snapshot":
            raise InvalidChoice(
                "Only a graph can keep a snapshot of the weights; take keep='graph' or weights='stash'."
            )

    @property
    def keeps_versions(self) -> bool:
        return self.weights == "stash"

    @property
    def keeping(self) -> Keeping:
        return KeepGraph(self.weights) if self.keep == "graph" else KeepInput("stash")
