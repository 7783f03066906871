"""PETRA: parallel end-to-end training with reversible architectures (Rivaud et al., 2024; F Chapter 4, side contribution; B6).

    in turn t every stage does   F of micro-batch m            x^{j+1} = f^j(x^j; θ^j_t)
                                 B of m − 2(J − 1 − j)         x̃^j = (f^j)^{−1}(x̃^{j+1}; θ^j_t)
                                                               (δ^j, Δ^j) = ∂f^j(x̃^j; θ^j_t)ᵀ δ^{j+1}
                                 U, after every k-th B         θ^j_{t+1} = OPT(θ^j_t, Δ^j);   (x̃^j, δ^j) go down

    j stage of J (from 0), x^j its input, x̃^j the input reconstructed from the output that comes down with the gradient,
    θ^j_t its only weights, δ^j the gradient of x^j, k micro-batches per update (`accumulate`).

The backward of stage j comes 2(J − 1 − j) turns after its forward. Nothing is kept in between but the inputs of parts that
are not reversible (stem, down-sampling, a user's own modules), which are run again. Reconstructing and differentiating is
one evaluation of every F (reversible.py), four units of work per stage and micro-batch where backpropagation has three.

`keep` is what the paper's ablation takes back step by step:

    graph            everything that autograd saves, and the weights: exact gradients of the forward that was
    input+weights    the same gradients, recomputed from the stage's input with the forward's weights
    weights          the same gradients up to rounding, reconstructed with the forward's weights
    input            recomputed from the stage's input with today's weights
    nothing          PETRA

Differs from the paper: BatchNorm's running statistics are updated by the forward, not by the recomputation (once in both); the
pipeline is emptied at the end of an epoch unless drain="end".

Limits: J = 1 is backpropagation; learning rate 0 gives backpropagation's gradients up to the rounding of the
reconstruction. On a network without reversible parts it keeps every input: features replay with twice the delay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..batch import at_least_two
from ..chain import Chain
from ..costs import untouched
from ..errors import choose
from ..heads import HeadReport
from ..reversible import check, is_reversible, units
from .base import Properties
from .delayed import Delayed
from .keeping import KeepGraph, Keeping, KeepInput
from .reconstructing import Reconstruct

Keep = Literal["nothing", "input", "weights", "input+weights", "graph"]
_KEEPING: dict[Keep, Keeping] = {
    "nothing": Reconstruct("current"),
    "input": KeepInput("current"),
    "weights": Reconstruct("stash"),
    "input+weights": KeepInput("stash"),
    "graph": KeepGraph("stash"),
}
_LAST = {1: KeepGraph("stash"), 2: KeepGraph("stash", with_input=True)}  # by the number of messages down


@dataclass(frozen=True)
class PETRA(Delayed):
    """Reversible stages that keep neither activations nor old weights.

    Args:
        keep: what is kept of a micro-batch in flight, see above.
        drain, warm_up: see `Delayed`.
    """

    keep: Keep = "nothing"

    name: ClassVar[str] = "petra"
    properties: ClassVar[Properties] = Properties(
        title="PETRA (Rivaud et al. 2024)",
        source="F Chapter 4, side contribution",
        locks="none in the steady state",
        memory="own stage during its backward; inputs of parts that are not reversible, 2(J − 1 − j) of them",
        up="Ψ_A",
        down="2 Ψ_A",
        delay="2(J − 1 − j)",
        objective="global, approximated",
    )
    hop: ClassVar[int] = 2
    one_backward: ClassVar[bool] = False  # a weight of two units gets its gradient in two parts

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("keep", self.keep, tuple(_KEEPING))

    @property
    def keeps_versions(self) -> bool:
        return self.keep in ("weights", "input+weights", "graph")

    @property
    def keeping(self) -> Keeping:
        return _KEEPING[self.keep]

    @property
    def last(self) -> Keeping:
        return _LAST[len(self.messages)]

    @property
    def messages(self) -> tuple[str, ...]:
        return ("output", "gradient") if self.keep in ("nothing", "weights") else ("gradient",)

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        """Nothing is built; every reversible part is tried on the example. Raises UnlockedError if an inverse is none."""
        if chain.like is None or self.messages == ("gradient",):
            return []
        with torch.no_grad(), untouched(chain):
            x = at_least_two(chain.like)
            for unit in [unit for stage in chain for unit in units(stage.body)]:
                if is_reversible(unit):
                    check(unit, x)
                x = unit(x)
        return []
