"""What forward mode costs: how many tangents each stage pushes (see forward_gradient.py).

    own_j       tangents that begin at stage j       weight: its tensors, or 1; activity: R, times B where samples are mixed
    carried_k   those that pass through stage k       global: Σ_{j<k} own_j; intermediate: own_{k−1}; local: 0; shared: 1

R directions for each sample (slices, or the rank of a subspace, at most B), B samples. A product costs about as much as a
forward; those that are carried run as one batch. The last stage pushes none: it knows the gradient at its input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..chain import Chain, Stage
from ..costs import run_once

if TYPE_CHECKING:
    from .forward_gradient import ForwardGradient


@dataclass(frozen=True)
class Streams:
    """own, carried: of each stage but the last. begun: products that a stage needs to begin its own."""

    own: tuple[int, ...]
    carried: tuple[int, ...]
    begun: tuple[int, ...]

    @property
    def products(self) -> int:
        """Jacobian-vector products of a stage in one step, all stages together."""
        return sum(self.carried) + sum(self.begun)

    def __str__(self) -> str:
        at = max(range(len(self.own)), key=lambda k: self.carried[k] + self.begun[k])
        return (
            f"Forward mode pushes {self.products} tangents a step through one stage each; stage {at} pushes most, "
            f"{self.carried[at] + self.begun[at]} ({self.carried[at]} from below)."
        )


def counted(rule: ForwardGradient, chain: Chain, batch_size: int) -> Streams:
    """The tangents of `rule` on this chain, which it has prepared."""
    local = list(chain)[:-1]
    if rule.shared:
        ones = (1,) * len(local)
        return Streams(
            ones, (0, *ones[1:]), (0,) * len(local) if rule.space == "activity" else (1, *[0] * (len(local) - 1))
        )
    own = [_own(rule, chain, j, batch_size) for j in range(len(local))]
    carried = [sum(own[i] for i in range(k) if rule.reach(i, len(chain)) > k) for k in range(len(local))]
    begun = own if rule.space == "weight" else [0] * len(own)
    return Streams(tuple(own), tuple(carried), tuple(begun))


def _own(rule: ForwardGradient, chain: Chain, j: int, batch_size: int) -> int:
    h = chain.example().to(next(chain.parameters()).device)  # on "meta" only shapes are counted
    for stage in list(chain)[: j + 1]:
        h = run_once(stage.body, h)
    return begun_at(rule, chain[j], h, batch_size)


def begun_at(rule: ForwardGradient, stage: Stage, h: Tensor, batch_size: int) -> int:
    """The tangents that begin at a stage whose output is like `h`."""
    if rule.space == "weight":
        trained = [name for name, p in stage.body.named_parameters() if p.requires_grad]
        return max(1, len(trained)) if rule.scalars != "stage" else 1
    mixed = stage.mixed_above and rule.samples == "exact" and rule.target != "local"
    return (batch_size if mixed else 1) * _directions(rule, h, batch_size)


def _directions(rule: ForwardGradient, h: Tensor, batch_size: int) -> int:
    if rule.subspace:
        most = min(batch_size, math.prod(h.shape[1:]))
        return most if rule.subspace is True else min(most, rule.subspace)
    sides = list(h.shape[1:])
    channels = sides.pop(1 if h.dim() == 3 else 0)
    return min(rule.groups, channels) * math.prod(min(rule.patches, side) for side in sides)
