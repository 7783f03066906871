"""Decoupled greedy self-supervised learning, DGSSL (P §4.2.1, Algorithm 3; F §3.2.1, Eq. 3.2; also Löwe et al. 2019, Xiong et
al. 2020).

    x^j = f^j(sg[x^{j−1}], θ^j),   z^j = g^j(x^j, ω^j)                      x^0: two views of each image
    (θ^j, ω^j) ← (θ^j, ω^j) − γ ∇ ℓ(z^j)                                for every stage j, on every batch

    g^j projector with weights ω^j, ℓ NT-Xent or another loss over pairs, sg stop-gradient, γ learning rate.

Limits: J = 1 is SimCLR, bit for bit. No gradient crosses a stage boundary, as in DGL. k micro-batches, and N replicas under
all-reduce, are one batch (contrasting.py), BatchNorm's statistics apart.

The last stage's projector is SimCLR's own perceptron; the others' have a convolution ('1c2f') unless `projector` says
otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..pairs import PairLoss
from .base import Properties
from .contrasting import Contrasting, Replicas, named_loss


def local_properties(
    title: str, source: str, up: str = "Ψ_A", objective: str = "local, over pairs of views"
) -> Properties:
    """Of a rule whose stages learn by themselves from views."""
    return Properties(
        title=title,
        source=source,
        locks="forward",
        memory="one stage and its projector; several micro-batches: their inputs, too",
        up=up,
        down="0",
        delay="0",
        objective=objective,
    )


@dataclass(frozen=True)
class DGSSL(Contrasting):
    """Every stage learns from the loss of its own projections.

    Args:
        loss: of the pairs: a name of `ul.pairs.PAIR_LOSSES`, or a PairLoss.
        projector: of the stages below the last: "1c2f", "0c2f" (heads/projectors.py), a head's dataclass, or a function
            (features, outputs) → module.
        dimension: entries of a projection.
        temperature: τ; None: the loss's own, 0.5 for NT-Xent.
        replicas: of rules that average gradients (all-reduce): "together", one loss over the views of all, or "alone".
    """

    loss: Any = "nt-xent"
    projector: Any = "1c2f"
    dimension: int = 128
    temperature: float | None = None
    replicas: Replicas = "together"

    name: ClassVar[str] = "dgssl"
    properties: ClassVar[Properties] = local_properties(
        "DGSSL, decoupled SimCLR (Patel 2023)", "P §4.2.1, Algorithm 3; F Eq. 3.2"
    )
    local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check()
        named_loss(self.name, self.loss, self.temperature)  # checks it

    def loss_of(self, stage: int, stages: int) -> PairLoss:
        return named_loss(self.name, self.loss, self.temperature).at(stage, stages)
