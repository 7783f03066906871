"""Forward gradients with local guesses (Fournier, Rivaud, Belilovsky, Eickenberg & Oyallon, 2023; F Ch. 4, Eq. 4.1-4.6).

    ĝ^j = ⟨t^j, u^j⟩ u^j,   u^j = G^j / ‖G^j‖ (random guesses: u^j = G^j)       θ^j ← θ^j − γ ĝ^j

    guess G      gaussian, rademacher | local: the gradient of the stage's own trained head | ntk: of a head drawn anew for
                 every batch | fixed-ntk: of one random head                                              (guesses.py)
    target t     global: the network's loss | local: the stage's head's loss | intermediate: that of the head of stage j + 1
    space        weight: in the space of θ^j, one scalar for each tensor (the thesis' code), for the stage (Eq. 4.4) or "shared"
                 by all stages; activity: in that of the stage's output, one scalar for each sample (Eq. 4.5), then a backward
                 inside the stage only
    subspace     activity: the target's projection on the span of the whole batch's guesses (Table 4.6)
    mode         forward: ⟨t, u⟩ is a Jacobian-vector product, pushed through the stages above during the forward pass
                 (forward_mode.py) | two-backward: t and G by two backward passes, then projected (B.1.3; two_backward.py)

j stage, θ^j weights, γ learning rate. The last stage always learns from its exact gradient. A head is trained on its own loss,
exactly, under every guess and target; those that no guess and no target needs are not built (`watch=True` does).

Forward mode has no backward between stages and keeps no activation while it waits. What it costs: stage j's tangents go
through every stage up to its target, so stage k carries those of all stages below it, O(J²) products for J stages, but 1 under
"shared". Activity below stages that mix samples (BatchNorm in training) needs a tangent for each sample to be exact;
samples="together" pushes one for all, whose scalars leak between the samples of a batch.

Limits: guess = target (local, local) is DGL. G normalised and parallel to t gives t back. Gaussian or Rademacher guesses are
unbiased, E ĝ = t, unless normalised. A subspace of full rank gives the target. J = 1 is backpropagation. Both modes agree to
rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..batch import Batch
from ..chain import Chain, Stage
from ..consensus.base import Weights
from ..costs import run_once
from ..errors import InvalidChoice, choose
from ..forward_ad import check_forward_mode, couples_samples
from ..heads import HeadReport
from ..modes import modes_kept
from ..option_types import check_types
from ..worker import Worker
from . import forward_mode, two_backward
from .base import Held, Properties, SynchronousCredit, attach_heads, refuse_nothing_to_train
from .guesses import RANDOM, Guess, add_guess_heads
from .streams import Streams, counted

Target = Literal["global", "local", "intermediate"]
Scalars = Literal["tensor", "stage", "shared"]


@dataclass(frozen=True)
class ForwardGradient(SynchronousCredit):
    """Every stage learns from the projection of a gradient on a guessed direction.

    Args:
        guess, target, space, mode: see above.
        scalars: weight space: what one scalar spans, a "tensor" (default), a "stage", or all stages ("shared").
        normalise: whether guesses are brought to length 1; None: local ones are, random ones are not.
        subspace: activity: True: the span of all guesses of the batch; k: of their k principal components.
        patches, groups: activity: one scalar for each of patches × patches windows and groups of channels of a sample.
        samples: forward mode in activity space, where stages mix samples: "exact" or "together".
        at_once: forward mode: tangents pushed through a stage as one batch; more are faster, and take more memory.
        head, budget: as in DGL; the head also makes the guesses ntk and fixed-ntk.
        watch: train heads that nothing needs, to see their losses by depth; in mode two-backward also note the cosine of guess
            and target, of activations (Eq. 4.6) and of weights, and the estimate's squared error over the target's length²
            (under a shared scalar s, of the stage's part s u^j of it). The other weights are trained as without it, bit for
            bit, if the optimizer and the rule for the replicas treat every tensor by itself.
    """

    guess: Guess = "local"
    target: Target = "global"
    space: Literal["weight", "activity"] = "weight"
    scalars: Scalars | None = None
    normalise: bool | None = None
    subspace: bool | int = False
    patches: int = 1
    groups: int = 1
    samples: Literal["exact", "together"] = "exact"
    at_once: int = 4
    mode: Literal["forward", "two-backward"] = "forward"
    head: Any = "mlp"
    budget: float | None = 0.10
    watch: bool = False

    name: ClassVar[str] = "forward-gradient"
    properties: ClassVar[Properties] = Properties(
        title="Forward gradients with local guesses (Fournier et al. 2023)",
        source="F Ch. 4",
        locks="forward; update waits for a scalar of the target",
        memory="one stage and its head, and S tangents of its output",
        up="(1 + S) Ψ_A, S tangents of the stages below and its own",
        down="S scalars",
        delay="0",
        objective="the target's projection on a guess",
    )

    def __post_init__(self) -> None:
        check_types(self)
        choose("guess", self.guess, ("local", "ntk", "fixed-ntk", *RANDOM))
        choose("target", self.target, ("global", "local", "intermediate"))
        choose("space", self.space, ("weight", "activity"))
        choose("mode", self.mode, ("forward", "two-backward"))
        choose("samples", self.samples, ("exact", "together"))
        if self.scalars is not None:
            choose("scalars", self.scalars, ("tensor", "stage", "shared"))
        self._check_space()
        if self.scalars == "shared" and self.target != "global":
            raise InvalidChoice(
                f"One scalar shared by all stages is a derivative of one loss, the network's; target={self.target!r} has a "
                "loss for each stage. Take target='global', or scalars='stage'."
            )

    def _check_space(self) -> None:
        """Raises InvalidChoice for options of the other space."""
        whole = [
            value
            for value in (self.subspace, self.patches, self.groups, self.at_once)
            if not isinstance(value, int) or value < 0
        ]
        if whole or min(self.patches, self.groups, self.at_once) < 1:
            raise InvalidChoice(
                f"subspace={self.subspace!r}, patches={self.patches!r}, groups={self.groups!r}, at_once={self.at_once!r}: "
                "give whole numbers, all but subspace at least 1."
            )
        if self.space == "activity":
            if self.scalars is not None:
                raise InvalidChoice(
                    f"In activity space every sample has its own scalar; scalars={self.scalars!r} is for space='weight'."
                )
            if self.subspace and (self.patches > 1 or self.groups > 1 or self.normalise is False):
                raise InvalidChoice(
                    "A subspace has an orthonormal basis, the same for all of a sample; leave out patches, groups and "
                    "normalise."
                )
            return
        if self.subspace or self.patches > 1 or self.groups > 1:
            raise InvalidChoice(
                "subspace, patches and groups are about the samples of a batch, but in weight space a batch has one gradient; "
                "take space='activity'."
            )

    @property
    def normalised(self) -> bool:
        """Whether guesses are brought to length 1."""
        return self.normalise if self.normalise is not None else self.guess not in RANDOM

    @property
    def local(self) -> bool:  # type: ignore[override]
        """Whether no stage hears of another one's loss."""
        return self.target == "local"

    @property
    def awaits(self) -> str:  # type: ignore[override]
        """What comes down."""
        return "scalars" if self.mode == "forward" else "gradients"

    @property
    def shared(self) -> bool:
        """Whether all stages have one scalar."""
        return self.scalars == "shared"

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        refuse_nothing_to_train(chain, self.name)
        built = [stage for stage in list(chain)[:-1] if stage.head is None]
        if self.guess in RANDOM and self.target == "global" and not self.watch:
            reports = []
        else:
            first = 1 if self.guess in RANDOM and self.target == "intermediate" and not self.watch else 0
            reports = attach_heads(chain, self.head, self.budget, seed, first)
        if self.guess in ("ntk", "fixed-ntk"):
            add_guess_heads(chain, seed)
            if self.target == "global" and not self.watch:
                for stage in built:
                    stage.head = None  # it was the pattern of the random one; nothing else needs it
        for j, stage in enumerate(chain):
            stage.watched = not (
                self.guess == "local" or self.target == "local" or (self.target == "intermediate" and j)
            )
        if self.mode == "forward" and chain.like is not None:
            self._look_at_bodies(chain)
        return reports

    def _look_at_bodies(self, chain: Chain) -> None:
        """Whether tangents can be pushed through them at all, and how many samples need. Raises InvalidChoice."""
        x, mixes = chain.example(), []
        with modes_kept(chain):
            if not chain.training:
                chain.train()  # as the trainer does before a step
            for j, stage in enumerate(chain):
                if j < len(chain) - 1:
                    check_forward_mode(stage.body, x, f"Stage {j}", self.space == "weight")
                mixes.append(couples_samples(stage.body, x))
                x = run_once(stage.body, x)
        for j, stage in enumerate(chain):
            stage.mixed_above = any(mixes[j + 1 : self.reach(j, len(chain))])

    def reach(self, j: int, stages: int) -> int:
        """The stage up to which the tangents of stage j are pushed, not included; the last one learns its input's gradient."""
        return {"local": j + 1, "intermediate": min(j + 2, stages - 1), "global": stages - 1}[self.target]

    def held(self, last: bool) -> Held:
        """In forward mode a local guess of weights needs the graph for a moment; other forwards leave none (an upper bound: a
        head's is gone before another one is made)."""
        graph = last or self.mode == "two-backward" or (self.space == "weight" and self.guess not in RANDOM)
        return Held("graph" if graph else "input")

    def streams(self, chain: Chain, batch_size: int) -> Streams:
        """How many tangents each stage pushes in forward mode, for a batch of this size."""
        return counted(self, chain, batch_size)

    def remarks(self, chain: Chain, batch_size: int) -> list[str]:
        return [str(self.streams(chain, batch_size))] if self.mode == "forward" and len(chain) > 1 else []

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        program = forward_mode.step if self.mode == "forward" else two_backward.step
        await program(self, worker, stage, batch, weights)
