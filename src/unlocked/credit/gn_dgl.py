"""Neuron groups, GN-DGL (Patel, Eickenberg & Belilovsky, 2022; P §3.2, Algorithms 1 and 2, Eq. 1; FACTS 1.7).

    x^j   = ‖_g x^j_g,   x^j_g = f^j_g(sg[x^{j−1}], θ^j_g)            all groups of a depth read all that is below
    ℓ^j_g = CE(a^j_g(s^j_g, ω^j_g), y) + φ^j_g                        each minimises its own loss in (θ^j_g, ω^j_g)
    s^j_g = x^j_g (naive)   or   ‖_k (x^j_g if k = g, else sg[x^j_k]) (stop_gradient)
    φ^j_g = diversity · Σ_{k≠g} cos(p̂^j_g, sg[p̂^j_k])                p̂: predicted probabilities of the wrong classes

    j depth, g, k groups of it, ‖ joined along channels, θ weights, ω those of the head a, sg stop-gradient
    (rules/diversity.py).

The chain says which stages stand side by side (`Chain.layout`): cut(model, stages=K, groups=G) makes one. Under stop_gradient
the groups of a depth send each other their features, under `diversity` their p̂; `pool` > 1 averages the features over pool ×
pool pixels before they are sent, and the receiver fills the pixels up again.

The stem, one stage below a depth of several groups, belongs to all of them: under stem="groups" it has no head, each group
sends it the gradient of its loss and it learns from their sum, as in the authors' code, where stem and first groups are one
graph. It is the only gradient that is sent; with stem="own" the stem has a head and a loss of its own and none is, and neither
with stem="split", where each of the first groups has its share of the stem's channels.

Limits: one group at every depth is DGL. The authors' code softens p with T = 3 and weighs its mean over all pairs by 0.5,
without stop-gradient: diversity = 1/(G(G − 1)) has the same gradient. The thesis writes T = 1 and gives no weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from ..batch import Batch
from ..chain import Chain, Stage, join
from ..consensus.base import Weights
from ..errors import InvalidChoice, choose
from ..heads import HeadReport
from ..losses import classifies, logits
from ..rules.diversity import diversity_penalty, wrong_classes
from ..work import work
from ..worker import Link, Worker
from .base import Properties, SynchronousCredit, attach_heads, backward, leaf, local_backward, reported
from .lending import exchange


@work("head-forward", gives=lambda stage, seen, y, temperature: (None, stage.head(seen)))
def predictions(stage: Stage, seen: Tensor, y: Tensor, temperature: float) -> tuple[Any, Tensor]:
    """The head's output, and p̂ to be told to the other groups."""
    output = stage.read(seen)
    return output, wrong_classes(logits(output), y, temperature)


@work("head-backward", "weight-backward")
def diverse_backward(
    worker: Worker, stage: Stage, output: Any, own: Tensor, others: list[Tensor], weight: float, batch: Batch
) -> None:
    """Backward of the group's loss with the penalty."""
    loss = stage.judge(output, batch)
    reported(worker, loss + diversity_penalty(own, others, weight).to(loss.dtype), batch).backward()


@dataclass(frozen=True)
class GNDGL(SynchronousCredit):
    """Every neuron group of every depth learns from a head of its own.

    Args:
        head, budget: as in DGL.
        stop_gradient: each head also reads what the other groups of its depth put out, without gradient.
        diversity: weight ≥ 0 of the penalty on each pair of groups; 0: none.
        pool: side of the squares of pixels that are averaged before features are sent to the other groups; 1: none.
        temperature: T > 0 of the penalty's softmax.
        stem: what a stage below the first groups learns from: the sum of their gradients ("groups") or its own head ("own").
            "split": there is none, each of the first groups has its own share of it (cut(…, stem="split")).
        groups: into how many groups train and compare cut each module; from Python, cut(model, stages, groups=…) does it, and
            the rule takes the chain as it is.
        final: head that train and compare put in the place of the network's last layer, as the authors do ("1c2f"); None: that
            layer itself.
    """

    head: Any = "mlp"
    budget: float | None = 0.10
    stop_gradient: bool = False
    diversity: float = 0.0
    pool: int = 1
    temperature: float = 3.0
    stem: Literal["groups", "own", "split"] = "groups"
    groups: int | None = None
    final: str | None = None

    name: ClassVar[str] = "gn-dgl"
    properties: ClassVar[Properties] = Properties(
        title="Neuron groups, GN-DGL (Patel et al. 2022)",
        source="P §3.2, Algorithms 1-2",
        locks="forward; the stem waits for the first groups",
        memory="one group and its head",
        up="Ψ_A to every group above; stop_gradient: and to those beside",
        down="0; to the stem Ψ_A of each group",
        delay="0",
        objective="local, per group",
    )
    grouped: ClassVar[bool] = True
    one_backward: ClassVar[bool] = True
    planned: ClassVar[bool] = False  # a plan cuts in depth only

    def __post_init__(self) -> None:
        choose("stem", self.stem, ("groups", "own", "split"))
        for name, value, fits, allowed in (
            ("diversity", self.diversity, 0 <= self.diversity < math.inf, "0 or more"),
            ("temperature", self.temperature, self.temperature > 0, "above 0"),
            (
                "groups",
                self.groups,
                self.groups is None or _counts(self.groups),
                "a whole number of at least 1, or None",
            ),
            ("pool", self.pool, _counts(self.pool), "a whole number of at least 1"),
        ):
            if not fits:
                raise InvalidChoice(f"gn-dgl's {name}={value} is not possible; give {allowed}.")

    @property
    def local(self) -> bool:  # type: ignore[override]
        """Whether no gradient comes from the stage above: not if the stem learns from the groups."""
        return self.stem != "groups"

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        if self.groups is not None and self.groups > 1 and chain.layout.plain:
            raise InvalidChoice(
                f"gn-dgl(groups={self.groups}) was given a chain without groups; cut it so: cut(model, stages, "
                f"groups={self.groups}, like=x)."
            )
        keep = 1 if self._has_stem(chain.layout.groups) else 0
        reports = attach_heads(chain, self.head, self.budget, seed, keep, siblings=self.stop_gradient)
        for j, stage in enumerate(chain):
            if self.diversity and len(chain.layout.beside(j)) > 1 and not classifies(stage.loss):
                raise InvalidChoice(
                    f"gn-dgl's diversity compares what groups say of the wrong classes, but the head of stage {j} gives no "
                    "scores of classes; take diversity=0, or another head or loss."
                )
        return reports

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        await exchange(worker, stage, batch, weights)
        learns_from_groups = self._has_stem(worker.layout)
        x = await worker.below.recv("activation", batch)
        x = leaf(worker, x) if learns_from_groups and worker.depth == 1 else x
        await weights.read()
        h = await worker.run("F", stage.body, x)
        await worker.above.send("activation", h.detach())
        if learns_from_groups and worker.depth == 0:
            gradient = await worker.above.recv("gradient", h)
            await worker.run("B", backward, worker, stage, h, gradient)
        else:
            await self._local(worker, stage, h, batch)
            if learns_from_groups and worker.depth == 1:
                assert x.grad is not None
                await worker.below.send("gradient", x.grad)
        del x, h  # the update may wait for other replicas; their memory need not
        await weights.write()

    async def _local(self, worker: Worker, stage: Stage, h: Tensor, batch: Batch) -> None:
        """A group's own loss, backward."""
        seen = await self.seen_by_head(worker, stage, h)
        if not (self.diversity and worker.siblings):
            await worker.run("B", local_backward, worker, stage, seen, batch)
            return
        output, own = await worker.run("L", predictions, stage, seen, batch.y, self.temperature)
        for place in worker.siblings:
            await Link(worker, place).send("wrong classes", own.detach())
        others = [await Link(worker, place).recv("wrong classes", own) for place in worker.siblings]
        await worker.run("B", diverse_backward, worker, stage, output, own, others, self.diversity, batch)

    async def seen_by_head(self, worker: Worker, stage: Stage, h: Tensor) -> Tensor:
        """The group's own features, or those of its whole depth, from the others without gradient."""
        if not (self.stop_gradient and worker.siblings):
            return h
        sent = pooled(h.detach(), self.pool)
        for place in worker.siblings:
            await Link(worker, place).send("features", sent)
        parts = [filled_up(await Link(worker, place).recv("features", sent), h) for place in worker.siblings]
        return join([*parts[: worker.group], h, *parts[worker.group :]])

    def _has_stem(self, groups: tuple[int, ...]) -> bool:
        """Whether the first stage is the stem of several groups, and learns from them."""
        return self.stem == "groups" and len(groups) > 1 and groups[0] == 1 and groups[1] > 1


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def pooled(h: Tensor, side: int) -> Tensor:
    """Means over squares of `side` × `side` pixels of (B, C, H, W), cut off at the border; anything else as it is."""
    return F.avg_pool2d(h, side, ceil_mode=True, count_include_pad=False) if side > 1 and h.dim() == 4 else h


def filled_up(x: Tensor, like: Tensor) -> Tensor:
    """Each pixel repeated, up to the height and width of `like`; what has them already as it is."""
    if x.dim() != 4 or x.shape[2:] == like.shape[2:]:
        return x
    side = -(-like.shape[2] // x.shape[2])
    return x.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, : like.shape[2], : like.shape[3]]
