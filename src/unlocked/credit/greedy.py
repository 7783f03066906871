"""Greedy layer-wise learning (Belilovsky, Eickenberg & Oyallon, 2019; O Algorithm 2, §4.1).

    for j = 1..J:   (θ^j, ω^j) = argmin Σ_n ℓ^j(a^j(f^j(x_n^j, θ^j), ω^j), y_n)      over all epochs, x^j from frozen stages

    j stage, θ^j its weights, a^j its head with weights ω^j, ℓ^j its loss; stages below j are frozen, in evaluation mode.

Limits: J = 1 is backpropagation. J times the epochs are gone through; only one stage is trained at a time, so at any time
the memory is that of one stage. While it trains, nothing of another stage changes, BatchNorm statistics included.

Frozen stages give the same features for the same sample in every epoch. With `cache` these are kept in a file when they come
for the first time, and the stages below do nothing more (feature_cache.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..batch import Batch
from ..chain import Chain, Stage
from ..consensus.base import Weights
from ..errors import InvalidChoice
from ..feature_cache import features_of
from ..heads import HeadReport
from ..work import work
from ..worker import Worker
from .base import Properties, SynchronousCredit, attach_heads, local_backward
from .lending import borrower_of


@work("forward", gives=lambda stage, x: stage.body.gives(x))
@torch.no_grad()
def frozen_forward(stage: Stage, x: Tensor) -> Tensor:
    """The stage's output in evaluation mode, without a graph."""
    if stage.training:
        stage.eval()
    return stage.body(x)


@dataclass(frozen=True)
class Greedy(SynchronousCredit):
    """Stages trained one after the other, each to the end of its own epochs.

    Args:
        head, budget: as in DGL. `fit(epochs=E)` trains each stage for E epochs.
        cache: folder for the features that go into the stage that is trained, each kept at its first coming; None: they are
            computed anew in every epoch. For data without augmentation and regularisers. A run that is resumed goes on with
            what it finds there; when a stage is done its files go.
    """

    head: Any = "mlp"
    budget: float | None = 0.10
    cache: str | None = None

    name: ClassVar[str] = "greedy"
    properties: ClassVar[Properties] = Properties(
        title="Greedy layer-wise learning (Belilovsky et al. 2019)",
        source="O Algorithm 2",
        locks="forward; stages wait for the end of training below",
        memory="one stage and its head",
        up="Ψ_A",
        down="0",
        delay="0",
        objective="local, one stage at a time",
    )
    local: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.cache, Path):
            object.__setattr__(self, "cache", str(self.cache))
        if self.cache is not None and not (isinstance(self.cache, str) and self.cache):
            raise InvalidChoice(f"cache={self.cache!r} is no folder; give its path, or None to keep nothing.")

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        reports = attach_heads(chain, self.head, self.budget, seed, 0)
        if any((borrower := borrower_of(stage)) is not None and borrower.needs_news for stage in chain):
            raise InvalidChoice(
                "greedy trains one stage after the other, so a head that reads another stage's weights (shared-unembedding) "
                "would read weights that nobody has trained yet; take dgl, or a head of its own."
            )
        return reports

    def phases(self, stages: int) -> int:
        return stages

    def readout(self, phase: int, stages: int) -> int:
        return min(phase, stages - 1)

    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        if worker.stage > batch.phase:
            return
        features = None
        if self.cache is not None and batch.phase > 0:
            features = await features_of(worker, stage, batch, weights, self.cache)
        known = features is not None and features.known(batch)
        if worker.stage == batch.phase:
            if features is not None and known:
                x = features.read(worker, batch)
            else:
                x = await worker.below.recv("activation", batch)
                if features is not None:
                    features.write(batch, x)
            await weights.read()
            h = await worker.run("F", stage.body, x)
            await worker.run("B", local_backward, worker, stage, h, batch)
            await weights.write()
        elif not known:
            x = await worker.below.recv("activation", batch)
            await worker.above.send("activation", await worker.run("F", frozen_forward, stage, x))
