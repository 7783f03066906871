"""What all self-supervised rules do: one update from all the views that an update has.

    z = g^j(x^j)                    projections of the stage's output, of all views of the update: of its k micro-batches, and
                                    under all-reduce of all N replicas
    L = ℓ(z)                        a loss over pairs (pairs/), which no part of the views has for itself
    Δ = (∂z_n/∂θ)ᵀ ∂L/∂z_n          what replica n adds: its own views' share of the whole loss's gradient

    pass 1, for every micro-batch    receive, forward, send up, project
    between                          gather z of the replicas, judge all of it, ∂L/∂z of the own rows
    pass 2, for every micro-batch    backward from ∂L/∂z (or from what comes down), send down, write

With one micro-batch the graph of pass 1 is kept and nothing runs twice. With several, pass 1 keeps inputs only and pass 2 runs
the forward again with the same random numbers, leaving buffers alone (Gao, Zhang, Han & Callan, Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup, 2021: GradCache). Then k micro-batches are one batch of k times the size, and N
replicas one of N times the size, but for BatchNorm, whose statistics are those of a micro-batch.

Under rules for the replicas other than all-reduce the weights of replicas differ, or step on their own: each contrasts its own
views. Rules that step in the middle of an update, or that leave gradients to PyTorch, are refused.

An oracle (`Oracle`) sees each micro-batch once, at stage 0; its projections go up with the activations, on channel "oracle".
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..batch import Batch, own_memory
from ..chain import Chain, Stage
from ..consensus.base import Consensus, Weights
from ..costs import flops, run_once
from ..errors import InvalidChoice, choose
from ..heads import PROJECTORS, HeadReport, build
from ..pairs import PAIR_LOSSES, PairLoss
from ..rng import seed_of
from ..worker import Worker
from .base import Credit, Held, leaf
from .contrasted import (
    Part,
    again,
    again_local,
    forward_only,
    joined,
    judge,
    project,
    project_only,
    refuse_odd,
    seen_by,
    through,
    through_local,
)
from .oracle import Oracle

if TYPE_CHECKING:
    from ..session import Trainer

Replicas = Literal["together", "alone"]


class Contrasting(Credit):
    """A rule that learns from pairs of views. Subclasses are frozen dataclasses with the options that are annotated here."""

    projector: Any
    dimension: int
    replicas: Replicas

    self_supervised: ClassVar[bool] = True
    one_backward: ClassVar[bool] = True
    planned: ClassVar[bool] = False  # no alternative to rules that learn from labels

    @abstractmethod
    def loss_of(self, stage: int, stages: int) -> PairLoss:
        """The loss of a stage that has one."""

    @property
    def oracle_rows(self) -> Oracle | None:
        """What gives the oracle's projections (n, E) of views, where the losses read them in training."""
        return None

    def _check(self) -> None:
        """Raises InvalidChoice for options that all these rules have."""
        choose("replicas", self.replicas, ("together", "alone"))
        if isinstance(self.dimension, bool) or not isinstance(self.dimension, int) or self.dimension < 1:
            raise InvalidChoice(
                f"{self.name}'s dimension={self.dimension} is not possible; give a whole number of at least 1."
            )
        if isinstance(self.projector, str):
            choose("projector", self.projector, PROJECTORS)
        elif not callable(self.projector) and not dataclasses.is_dataclass(self.projector):
            raise InvalidChoice(
                f"{self.name}'s projector={self.projector!r} is none; give {' or '.join(map(repr, PROJECTORS))}, a head's "
                "dataclass, or a function (features, outputs) → module."
            )

    def held(self, last: bool) -> Held:
        return Held(several="input")

    def holds_beside(self, stage: int) -> int:
        return 0 if stage or self.oracle_rows is None else self.oracle_rows.bytes

    # ---- before training -----------------------------------------------------------------------------------------------

    def check(self, consensus: Consensus) -> None:
        if consensus.one_at_a_time or consensus.needs_processes:
            reason = (
                "a replica begins a micro-batch when the one before it is done"
                if consensus.one_at_a_time
                else "PyTorch itself exchanges gradients during a backward"
            )
            raise InvalidChoice(
                f"{self.name} judges all views of an update together before its first backward, but under {consensus.name} "
                f"{reason}; take all-reduce, wash, papa, local-sgd, independent or another rule of that kind."
            )

    def meet(self, trainer: Trainer, data: Any) -> None:
        from ..held_out_pairs import pair_batch_size  # late: it imports what imports this

        super().meet(trainer, data)
        contrasts = any(getattr(stage.loss, "contrasts", False) for stage in trainer.template)
        if contrasts and pair_batch_size(trainer) == 1:
            raise InvalidChoice(
                f"{self.name} tells images from each other, but an update has a single image, of which nothing can be learned; "
                "take a batch size of at least 2."
            )

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        """Losses and projectors of the stages that learn by themselves; the last one's is always a perceptron."""
        learning = range(len(chain)) if self.local else [len(chain) - 1]
        for j in learning:
            chain[j].loss = self.loss_of(j, len(chain))
        wanting = [j for j in learning if chain[j].head is None]
        if not wanting:
            return []
        walked = {j: (x, h) for j, x, h in chain.walk(chain.example(), lambda j, x: run_once(chain[j].body, x))}
        return [self._projector(chain, j, *walked[j], seed) for j in wanting]

    def _projector(self, chain: Chain, j: int, x: Tensor, h: Tensor, seed: int) -> HeadReport:
        last = j == len(chain) - 1
        spec = PROJECTORS["0c2f"] if last else self.projector
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(seed, "head", j))
            head, _, report = build(
                PROJECTORS[spec] if isinstance(spec, str) else spec,
                h,
                self.dimension,
                per_token=False,
                stage_flops=flops(chain[j].body, x),
                budget=None,
                where=f"stage {j}",
            )
        chain[j].head = head
        return report

    @property
    def needs_labels(self) -> bool:
        return bool(getattr(getattr(self, "loss", None), "reads_labels", False))

    def check_data(self, data: Any, batch_size: int | None, accumulate: int) -> None:
        super().check_data(data, batch_size, accumulate)
        if getattr(data, "views", 1) != 2:
            raise InvalidChoice(
                f"{self.name} compares two views of each image, but these data give one; load them with augment='simclr' (for "
                "--augment simclr), or with views+ before another augmentation, as in 'views+crop-flip'."
            )
        if batch_size is not None and batch_size % accumulate:
            raise InvalidChoice(
                f"A batch of {batch_size} images is not {accumulate} micro-batches of whole images; give a batch_size that "
                "accumulate divides."
            )

    # ---- the program ---------------------------------------------------------------------------------------------------

    async def run(self, worker: Worker, stage: Stage, batches: Iterable[Batch], weights: Weights) -> None:
        row: list[Batch] = []
        for batch in batches:
            row.append(batch)
            if len(row) == weights.micro_batches:
                await self._update(worker, stage, row, weights)
                row = []
        if row:
            await self._update(worker, stage, row, weights)

    async def _update(self, worker: Worker, stage: Stage, row: Sequence[Batch], weights: Weights) -> None:
        alone, learns = len(row) == 1, self.local or worker.last
        parts = [await self._forward(worker, stage, batch, weights, alone, learns) for batch in row]
        if learns:
            await self._judge(worker, stage, parts, weights)
        for part in parts:
            await self._backward(worker, stage, part, weights, alone)

    async def _forward(
        self, worker: Worker, stage: Stage, batch: Batch, weights: Weights, alone: bool, learns: bool
    ) -> Part:
        """Pass 1 of a micro-batch."""
        worker.at(batch.number, len(batch.x))
        refuse_odd(batch)
        x = await worker.below.recv("activation", batch)
        x = x if alone else own_memory(x)
        part = Part(batch, x if self.local else leaf(worker, x))
        await weights.read()
        if alone:
            part.h = await worker.run("F", stage.body, part.x)
        else:
            part.h = await worker.run("F", forward_only, worker, stage, part.x, part)
        assert part.h is not None
        await worker.above.send("activation", part.h.detach())
        if self.oracle_rows is not None:
            part.oracle = await self._seen_by_oracle(worker, batch)
            await worker.above.send("oracle", part.oracle)
        if learns:
            part.z = await worker.run("L", project if alone else project_only, worker, stage, part, self.dimension)
        if not alone or learns:
            part.h = None  # its graph is in z's, or will be made again
        return part

    async def _seen_by_oracle(self, worker: Worker, batch: Batch) -> Tensor:
        if not worker.first:
            return await worker.below.recv("oracle", batch)
        assert self.oracle_rows is not None
        return await worker.run("L", seen_by, self.oracle_rows, batch.x)

    async def _judge(self, worker: Worker, stage: Stage, parts: Sequence[Part], weights: Weights) -> None:
        """The loss of all views; its gradient with respect to the own ones."""
        loss = self.loss_of(worker.stage, worker.stages)
        together = self.replicas == "together" and weights.one_gradient
        columns = [[part.z for part in parts]]
        columns.append([part.batch.y for part in parts] if loss.reads_labels else [])
        columns.append([part.oracle for part in parts] if loss.reads_oracle else [])
        gathered: list[list[Tensor]] = []  # of each replica; nothing that the loss does not read
        for name, column in zip(("pairs", "labels", "oracle"), columns):
            rows = [weights.move(joined, column)] if column else []
            gathered.append(await worker.replicas.gather(name, rows[0]) if rows and together else rows)
        await worker.run("L", judge, worker, stage, parts, gathered)

    async def _backward(self, worker: Worker, stage: Stage, part: Part, weights: Weights, alone: bool) -> None:
        """Pass 2 of a micro-batch."""
        worker.at(part.batch.number, len(part.batch.x))
        gradient = part.dz if self.local or worker.last else await worker.above.recv("gradient", part.batch)
        function = (through_local if self.local else through) if alone else (again_local if self.local else again)
        await worker.run("B", function, worker, stage, weights, part, gradient)
        del gradient
        part.z = part.dz = part.h = None
        if not (self.local or worker.first):
            assert part.x.grad is not None
            await worker.below.send("gradient", part.x.grad)
        await weights.write()


def named_loss(rule: str, given: Any, temperature: float | None) -> PairLoss:
    """The loss of this name, or as given, with this temperature unless that is None. Raises InvalidChoice."""
    if not isinstance(given, PairLoss) and not isinstance(given, str):
        raise InvalidChoice(
            f"{rule}'s loss is a {type(given).__name__}; give a name ({', '.join(PAIR_LOSSES)}) or a PairLoss of ul.pairs."
        )
    loss = PAIR_LOSSES[choose(f"loss of {rule}", given, PAIR_LOSSES)] if isinstance(given, str) else given
    if loss.reads_oracle:
        raise InvalidChoice(
            f"{rule} has no oracle, whose projections {type(loss).__name__} looks at; take oracle-simclr or dgssl-llm, or "
            "another loss."
        )
    if temperature is None:
        return loss
    if "temperature" not in {field.name for field in dataclasses.fields(loss)}:  # type: ignore[arg-type]
        raise InvalidChoice(
            f"{rule} was given temperature={temperature}, but its loss {type(loss).__name__} has none; leave it out."
        )
    return dataclasses.replace(loss, temperature=temperature)  # type: ignore[type-var]
