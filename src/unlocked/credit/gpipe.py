"""GPipe (Huang et al., 2019; F §2.1.2, Figure 2.5b; B1): a pipeline of micro-batches, flushed before every update.

    a batch is split into M micro-batches b_1 … b_M;  stage j:  F b_1, …, F b_M,  then  B b_1, …, B b_M,  then one update
    Δ^j = Σ_m w_m ∇_{θ^j} ℓ(b_m, θ),   w_m the share of the samples in b_m

    J = 3, M = 2 (time to the right; a backward as long as a forward; a dot is the bubble)
    stage 1    F1 F2 .  .  B1 B2
    stage 2    .  F1 F2 B1 B2 .
    stage 3    .  .  F1 F2 …            (here F and B of the last stage follow each other without waiting)

The backwards are in the order of the forwards, so that gradients are summed as plain accumulation sums them.

Limits: M = 1 is backpropagation. The numbers are those of backpropagation with M accumulated micro-batches, bit for bit; with
equal stages the idle share of the pipeline (the bubble) is (J − 1)/(M + J − 1).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..batch import Batch, micro_batches
from ..chain import Stage
from ..consensus.base import Weights
from ..errors import InvalidChoice
from ..worker import Worker
from .base import Credit, Properties, backward, leaf, objective


@dataclass(frozen=True)
class Flushed(Credit):
    """The program of pipelines that are filled and drained for every batch.

    Args:
        micro_batches: M ≥ 1, into which each batch is split, as equal as can be.
    """

    micro_batches: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.micro_batches, int) or self.micro_batches < 1:
            raise InvalidChoice(
                f"micro_batches={self.micro_batches} is not possible; give a whole number of at least 1."
            )

    @property
    def parts(self) -> int:
        return self.micro_batches

    @abstractmethod
    def ahead(self, worker: Worker) -> int:
        """Forwards of a stage that may be waiting for their backward after each of its turns."""

    async def run(self, worker: Worker, stage: Stage, batches: Iterable[Batch], weights: Weights) -> None:
        for batch in batches:
            await weights.read()
            in_flight: deque[tuple[Batch, torch.Tensor, torch.Tensor]] = deque()
            for part in self._split(batch):
                in_flight.append((part, *await self._forward(worker, stage, part)))
                while len(in_flight) > self.ahead(worker):
                    await self._backward(worker, stage, *in_flight.popleft())
            while in_flight:
                await self._backward(worker, stage, *in_flight.popleft())
            await weights.write()

    def _split(self, batch: Batch) -> list[Batch]:
        if len(batch.x) < self.micro_batches:
            raise InvalidChoice(
                f"{self.name} splits a batch into {self.micro_batches} micro-batches; {len(batch.x)} samples are too few "
                "for that."
            )
        first = batch.number * self.micro_batches
        parts = micro_batches(batch.x, batch.y, self.micro_batches, first, batch.phase)
        return [part._replace(weight=part.weight * batch.weight) for part in parts]

    async def _forward(self, worker: Worker, stage: Stage, part: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The stage's input and what its backward begins with: its output or, at the last stage, the loss."""
        worker.at(part.number)
        x = leaf(worker, await worker.below.recv("activation", part))
        h = await worker.run("F", stage.body, x)
        if worker.last:
            return x, await worker.run("L", objective, worker, stage, h, part)
        await worker.above.send("activation", h.detach())
        return x, h

    async def _backward(self, worker: Worker, stage: Stage, part: Batch, x: torch.Tensor, h: torch.Tensor) -> None:
        worker.at(part.number)
        gradient = None if worker.last else await worker.above.recv("gradient", h)
        await worker.run("B", backward, worker, stage, h, gradient)
        if not worker.first:
            assert x.grad is not None
            await worker.below.send("gradient", x.grad)


@dataclass(frozen=True)
class GPipe(Flushed):
    """The network's own loss through a pipeline that is filled and drained for every batch: all forwards, then all
    backwards."""

    name: ClassVar[str] = "gpipe"
    properties: ClassVar[Properties] = Properties(
        title="GPipe (Huang et al. 2019)",
        source="F Figure 2.5b",
        locks="forward, backward (per micro-batch), update",
        memory="own stage, all M micro-batches",
        up="Ψ_A",
        down="Ψ_A",
        delay="0",
        objective="global",
    )

    def ahead(self, worker: Worker) -> int:
        return self.micro_batches
