"""Local forward gradients, LG-FG-A (Ren, Kornblith, Liao & Hinton, "Scaling forward gradient with local losses", 2023).

    s_b = ⟨∂ℓ^j/∂z_b, u_b⟩           ĝ_z = (s_b u_b)_b           θ_l.grad = (∂z/∂θ_l)ᵀ ĝ_z,   u ~ N(0, 1)

l layer inside stage j (layers_inside.py), θ_l its own weights, z (B, …) its output, ℓ^j the loss of the stage's head, b sample.
Every layer has a tangent of its own, so its scalars know of no other layer's direction. Where a ReLU alone reads z, u is zero
for units that are off (`mask`): their derivative is zero, so nothing is lost and there is less variance. Heads learn exactly,
and so does the last stage.

    forward         s = ⟨∂ℓ^j/∂h, ḣ⟩, ḣ the tangent u pushed in forward mode through the rest of the body to its output h, one
                    layer after the other; the head's derivative is known from its own training
    two-backward    ∂ℓ^j/∂z by a backward through the body, then projected
    weights         one forward more, in which each layer's graph is gone before the next layer computes

patches, groups: z is cut into patches × patches windows and `groups` of channels, each with a scalar and a tangent of its own.
In the paper one tangent serves all of them, since a block's loss is replicated patch by patch and group by group: its value is
the ordinary one, but its derivative along a slice of the block's output counts for that slice only. At the output of a stage
it is the same: perturb="output" (then a backward stays inside the stage; this is forward-gradient with a local target in
activity space). A layer further inside reaches all slices above it, so there R slices cost R products.

What else the paper has is a matter of the network: LayerNorm without weights around every linear map, token mixing, patches
that are never joined, classifiers that begin at zero. Where a body mixes samples (BatchNorm in training), forward mode pushes a
tangent for each sample to be exact; samples="together" pushes one, whose scalars leak between samples.

Limits: E ĝ is the gradient of ℓ^j (dgl). J = 1 is backpropagation. Both modes agree to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ..batch import Batch
from ..chain import Chain, Stage
from ..consensus.base import Weights
from ..costs import run_once
from ..errors import choose
from ..forward_ad import check_forward_mode
from ..heads import HeadReport
from ..option_types import check_types
from ..worker import Worker
from .base import Held, Properties, SynchronousCredit, attach_heads, objective, refuse_nothing_to_train
from .forward_gradient import ForwardGradient
from .guesses import RANDOM
from .interlocking import head_gradient
from .layer_directions import backward_scalars, forward, forward_scalars, learn, products
from .lending import exchange
from .mezo import check_count


@dataclass(frozen=True)
class LocalForwardGradient(SynchronousCredit):
    """Every layer inside a stage learns from the derivative of the stage's own loss along a random direction of its output.

    Args:
        guess: what u is drawn from, "gaussian" or "rademacher" (±1).
        mask: whether u is zero where a ReLU that follows is off.
        perturb: the outputs of all "layers", or the stage's "output" only.
        patches, groups: slices of a sample with a scalar each.
        mode: "forward" or "two-backward".
        samples: forward mode where a body mixes samples: "exact" or "together".
        head, budget: as in DGL.

    Raises InvalidChoice.
    """

    guess: Literal["gaussian", "rademacher"] = "gaussian"
    mask: bool = True
    perturb: Literal["layers", "output"] = "layers"
    patches: int = 1
    groups: int = 1
    mode: Literal["forward", "two-backward"] = "forward"
    samples: Literal["exact", "together"] = "exact"
    head: Any = "mlp"
    budget: float | None = 0.10

    name: ClassVar[str] = "local-forward-gradient"
    properties: ClassVar[Properties] = Properties(
        title="Local forward gradients (Ren et al. 2023)",
        source="Ren et al. 2023, LG-FG-A",
        locks="forward",
        memory="one layer or the head; tangents of one layer",
        up="Ψ_A",
        down="0",
        delay="0",
        objective="the local gradient's projection on random directions, layer by layer",
    )
    local: ClassVar[bool] = True
    planned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        choose("guess", self.guess, RANDOM)
        choose("perturb", self.perturb, ("layers", "output"))
        choose("mode", self.mode, ("forward", "two-backward"))
        choose("samples", self.samples, ("exact", "together"))
        check_count("patches", self.patches)
        check_count("groups", self.groups)

    def at_output(self) -> ForwardGradient:
        """The rule that perturb="output" is."""
        slicing = {"patches": self.patches, "groups": self.groups}
        options = {"mode": self.mode, "samples": self.samples, "head": self.head, "budget": self.budget}
        return ForwardGradient(self.guess, "local", "activity", normalise=False, **slicing, **options)  # type: ignore[arg-type]

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        if self.perturb == "output":
            return self.at_output().prepare(chain, seed)
        refuse_nothing_to_train(chain, self.name)
        reports = attach_heads(chain, self.head, self.budget, seed, 0)
        if self.mode == "forward" and chain.like is not None:
            x = chain.example()
            for j, stage in enumerate(list(chain)[:-1]):
                check_forward_mode(stage.body, x, f"Stage {j}", weights=False)
                x = run_once(stage.body, x)
        return reports

    def held(self, last: bool) -> Held:
        """Below the last stage an upper bound: a layer's graph at a time, not the whole body's."""
        return self.at_output().held(last) if self.perturb == "output" else Held("graph" if last else "input")

    def remarks(self, chain: Chain, batch_size: int) -> list[str]:
        if self.perturb == "output":
            return self.at_output().remarks(chain, batch_size)
        if self.mode == "two-backward" or len(chain) == 1:
            return []
        counts, x = [], chain.example().to(next(chain.parameters()).device)  # on "meta" only shapes are counted
        for stage in list(chain)[:-1]:
            counts.append(products(self, stage.body, x, batch_size))
            x = run_once(stage.body, x)
        return [
            f"Forward mode pushes {sum(counts)} tangents a step through one stage each, {max(counts)} in the largest."
        ]

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        if self.perturb == "output":
            await self.at_output().step(worker, stage, batch, weights)
            return
        await exchange(worker, stage, batch, weights)
        x = await worker.below.recv("activation", batch)
        await weights.read()
        if worker.last:
            h = await worker.run("F", stage.body, x)
            loss = await worker.run("L", objective, worker, stage, h, batch)
            await worker.run("B", torch.autograd.backward, loss)
        else:
            h, seen = await worker.run("F", forward, worker, stage, x)
            await worker.above.send("activation", h)
            gradient = await worker.run("L", head_gradient, worker, stage, h, batch)
            found = forward_scalars if self.mode == "forward" else backward_scalars
            await worker.run("B", found, self, worker, stage, seen, gradient)
            await worker.run("B", learn, self, worker, stage, seen)
            del gradient, seen
        del x, h
        await weights.write()
