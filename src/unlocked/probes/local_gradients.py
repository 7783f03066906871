"""Where the loss that a stage learns from would take it, beside backpropagation's gradient of the network's loss.

    weights:       cos( Σ_b ∇_{θ^j} ℓ^{k(j)},   Σ_b ∇_{θ^j} ℓ^J )            θ^j of the stage's body
    activations:   cos( (∂ℓ^{k(j)}/∂x_b^{j+1})_b, (∂ℓ^J/∂x_b^{j+1})_b )       all batches b, one long vector

j stage, ℓ^k the loss at stage k's head, ℓ^J the network's own, x^{j+1} stage j's output, k(j) the stage whose loss j learns
from (of several, as the stem of neuron groups does, the sum). Both of the same forward of the same samples, in training mode:
the same dropout masks, BatchNorm with its batch's own statistics.

Limits: 1 where k(j) = J. A plain step of gradient descent by the rule goes against the first gradient. Of a rule's objective
only the stages' losses are seen: no penalties between groups, no late weights (for those, while it trains: alignment.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..chain import Chain
from .alignment import Gradient, cosine
from .features import by_depth

if TYPE_CHECKING:
    from ..credit import Credit

Cosine = float | None  # None: a gradient is zero


def teachers(chain: Chain, credit: Credit | None = None) -> list[tuple[int, ...]]:
    """The stages whose loss each stage learns from; without a rule its own if it has a head, else the last."""
    from ..credit.forward_gradient import ForwardGradient  # late: rules import much
    from ..credit.gn_dgl import GNDGL
    from ..credit.interlocking import Interlocking

    last = len(chain) - 1
    if isinstance(credit, Interlocking):
        return [(min(j + credit.d, last),) for j in range(last + 1)]
    if isinstance(credit, ForwardGradient) and credit.target == "intermediate":
        return [(min(j + 1, last),) for j in range(last + 1)]
    groups = isinstance(credit, GNDGL)
    local = credit is None or credit.local or groups
    found: list[tuple[int, ...]] = [
        (j,) if local and stage.head is not None else (last,) for j, stage in enumerate(chain)
    ]
    if groups and chain[0].head is None and last:  # the stem
        found[0] = tuple(chain.layout.row(1))
    return found


def cosines(
    chain: Chain,
    credit: Credit | None,
    batches: Iterable[Batch],
    learns_from: Sequence[tuple[int, ...]],
    told: Callable[[int], None],
) -> list[tuple[Cosine, Cosine]]:
    """(of the weights, of the activations) for every stage; each batch counts with its weight. `told`: samples done."""
    own = [[x for x in stage.body.parameters() if x.requires_grad] for stage in chain]
    local, whole = [_Sums() for _ in chain], [_Sums() for _ in chain]
    dots = [_Dots() for _ in chain]
    for batch in batches:
        outputs, losses = _forward(chain, credit, batch, {len(chain) - 1}.union(*learns_from))
        exact = _gradients(losses[len(chain) - 1], own, outputs)
        for j, from_these in enumerate(learns_from):
            mine = exact[j]
            if from_these != (len(chain) - 1,):
                loss = torch.stack([losses[k] for k in from_these]).sum()
                mine = _gradients(loss, own[j : j + 1], outputs[j : j + 1])[0]
            local[j].add(mine[:-1])
            whole[j].add(exact[j][:-1])
            dots[j].add(mine[-1], exact[j][-1])
        told(len(batch.x))
    return [(cosine(a.total, b.total), dot.cosine) for a, b, dot in zip(local, whole, dots, strict=True)]


def _forward(
    chain: Chain, credit: Credit | None, batch: Batch, wanted: set[int]
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """The output of every stage, in one graph, and the weighted losses of some."""

    def call(j: int, x: Tensor) -> Tensor:
        h = chain[j](x)
        return h if h.requires_grad else h.detach().requires_grad_()  # all below it is frozen

    outputs, losses = [], {}
    with torch.enable_grad():
        for row in by_depth(chain, batch.x, credit, call):
            outputs += row.outputs
            for j, seen in zip(row.stages, row.seen, strict=True):
                if j in wanted:
                    losses[j] = chain[j].judge(chain[j].read(seen), batch) * batch.weight
    return outputs, losses


def _gradients(loss: Tensor, weights: Sequence[list[nn.Parameter]], outputs: Sequence[Tensor]) -> list[Gradient]:
    """For each of these stages its weights' gradients and, last, its output's."""
    flat = [x for row, h in zip(weights, outputs, strict=True) for x in (*row, h)]
    found = iter(torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True))
    return [[next(found) for _ in range(len(row) + 1)] for row in weights]


class _Sums:
    """The sum of gradients over batches."""

    def __init__(self) -> None:
        self.total: Gradient = []

    def add(self, gradient: Gradient) -> None:
        before = self.total or [None] * len(gradient)
        self.total = [a if b is None else b if a is None else a + b for a, b in zip(before, gradient, strict=True)]


class _Dots:
    """The cosine of two long vectors that come batch by batch."""

    def __init__(self) -> None:
        self._dots = [0.0, 0.0, 0.0]

    def add(self, a: Tensor | None, b: Tensor | None) -> None:
        for k, (one, other) in enumerate(((a, b), (a, a), (b, b))):
            if one is not None and other is not None:
                self._dots[k] += float((one.double() * other.double()).sum())

    @property
    def cosine(self) -> Cosine:
        product, one, other = self._dots
        return product / (one**0.5 * other**0.5) if one and other else None
