"""SimCLR over stages (Chen, Kornblith, Norouzi & Hinton, A Simple Framework for Contrastive Learning of Visual
Representations, 2020; F §3.2.1, Eq. 3.1).

    z = g(f^J ∘ … ∘ f^1(x))             x: two views of each image, one after the other; g: the projector
    θ ← θ − γ ∇_θ ℓ(z)                  end to end, through all stages; ℓ: NT-Xent, or another loss over pairs

    Only the last stage has a projector, a perceptron of two layers; it is thrown away after training.

Limits: over any split it is the gradient of ℓ on the unsplit network. k micro-batches, and N replicas under all-reduce, are one
batch (contrasting.py), BatchNorm's statistics apart. The paper's LARS and its learning-rate schedule are not part of this rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..pairs import PairLoss
from .base import Properties
from .contrasting import Contrasting, Replicas, named_loss


@dataclass(frozen=True)
class SimCLR(Contrasting):
    """The loss of the last stage's projections, carried down through all stages.

    Args:
        loss: of the pairs: a name of `ul.pairs.PAIR_LOSSES`, or a PairLoss.
        dimension: entries of a projection.
        temperature: τ; None: the loss's own, 0.5 for NT-Xent.
        replicas: of rules that average gradients (all-reduce): "together", one loss over the views of all, or "alone".
    """

    loss: Any = "nt-xent"
    dimension: int = 128
    temperature: float | None = None
    replicas: Replicas = "together"

    projector: ClassVar[Any] = "0c2f"  # type: ignore[misc]
    name: ClassVar[str] = "simclr"
    properties: ClassVar[Properties] = Properties(
        title="SimCLR (Chen et al. 2020)",
        source="F §3.2.1",
        locks="forward, backward, update",
        memory="own stage until its gradient comes; several micro-batches: their inputs, and one stage",
        up="Ψ_A",
        down="Ψ_A",
        delay="0",
        objective="global, over pairs of views",
    )

    def __post_init__(self) -> None:
        self._check()
        named_loss(self.name, self.loss, self.temperature)  # checks it

    def loss_of(self, stage: int, stages: int) -> PairLoss:
        return named_loss(self.name, self.loss, self.temperature).at(stage, stages)
