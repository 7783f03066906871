"""Credit: where a stage's gradient comes from.

A credit rule is a frozen set of parameters plus a program for one worker. Every rule below is one file; each opens with its
paper, its formula and its limits. Famous methods as pairs (credit, consensus):

    data parallelism            (Backprop, AllReduce)
    greedy layer-wise learning  (Greedy, Independent)
    DGL, local error signals    (DGL, Independent), (PredSim, Independent)
    WASH                        (Backprop, WASH)

What a rule declares about itself (`properties`) is what `unlocked methods` prints.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..batch import Batch
from ..chain import Chain, Stage
from ..consensus.base import Consensus, Weights
from ..costs import flops, run_once
from ..errors import NonFiniteLoss, UnlockedError
from ..heads import HeadReport, build
from ..rng import seed_of
from ..work import work
from ..worker import Worker

if TYPE_CHECKING:
    from ..worlds import World
    from .stacking import Stack


@dataclass(frozen=True)
class Properties:
    """What a credit rule declares: F Table 2.1's columns and what it costs. J stages, Ψ_A one boundary activation."""

    title: str  # name, authors, year
    source: str  # where in the seed texts
    locks: str  # which of forward, backward, update lock remain
    memory: str  # activations kept at the peak by one worker per stage
    up: str  # bytes to the stage above, per batch
    down: str  # bytes to the stage below, per batch
    delay: str  # updates between the weights of a forward and the update it causes
    objective: str  # what a stage's weights minimise


What = Literal["graph", "graph+buffers", "graph+weights", "input", "parts"]


@dataclass(frozen=True)
class Held:
    """What a stage holds of a micro-batch from its forward to its backward.

    what    "graph"          what autograd keeps
            "graph+buffers"  the same, with copies of the buffers in it
            "graph+weights"  the same, with copies of the buffers and of the weights in it
            "input"          the stage's input; the graph only while the backward runs the forward again
            "parts"          the inputs of what cannot be reversed; in the backward the graph of one part at a time
    versions: whether old weights are copied while a micro-batch is in flight that has seen them. crosses: whether
    micro-batches are in flight between two steps.
    """

    what: What = "graph"
    versions: bool = False
    crosses: bool = False


class Credit(ABC):
    """How a stage gets its gradient. Subclasses are frozen dataclasses: their fields are the rule's parameters."""

    name: ClassVar[str]
    properties: ClassVar[Properties]
    needs_processes: ClassVar[bool] = False  # True: PyTorch does the communicating, so every worker needs a process
    one_backward: ClassVar[bool] = False  # True: a parameter's gradient is complete once a backward has reached it
    local: ClassVar[bool] = False  # True: no gradient comes from the stage above

    @abstractmethod
    async def run(self, worker: Worker, stage: Stage, batches: Iterable[Batch], weights: Weights) -> None:
        """The program of one worker for a row of micro-batches."""

    @property
    def crossing(self) -> frozenset[str]:
        """Channels whose messages may be under way between two steps; rules that finish every step have none."""
        return frozenset()

    @property
    def parts(self) -> int:
        """Into how many micro-batches of its own the rule splits each one it is given."""
        return 1

    def held(self, last: bool) -> Held:
        """What a stage holds of a micro-batch; `last`: the last stage."""
        return Held()

    def filling(self, stages: int, accumulate: int) -> int:
        """Updates until as much is in flight as ever will be; 0 for rules that finish every step."""
        return 0

    def drains(self, last: bool) -> bool:
        """Whether what is in flight is to be finished at the end of an epoch (`last`: of the last one)."""
        return False

    async def empty(self, worker: Worker, stage: Stage, weights: Weights) -> None:  # noqa: B027  # most rules carry nothing over
        """Finish what is in flight between two steps."""

    async def collect(self, worker: Worker, weights: Weights) -> None:  # noqa: B027
        """Take the messages under way between two steps into the worker's state."""

    def phases(self, stages: int) -> int:
        """How many times the epochs are gone through: 1, but for rules that train one stage after the other."""
        return 1

    def readout(self, phase: int, stages: int) -> int:
        """The stage whose head is the network's output while `phase` lasts: the last one."""
        return stages - 1

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        """Build what the rule needs on the stages (heads). Called once, before the chain is copied to the replicas."""
        return []

    def stack(self, chains: Sequence[Chain], consensus: Consensus, world: World) -> Stack | None:
        """The replicas as one computation, if they are to compute so (stacking.py). Called once, after the chain was copied and
        before there are optimizers. Raises InvalidChoice if it cannot be done."""
        return None


class SynchronousCredit(Credit):
    """A rule that finishes one micro-batch before it begins the next."""

    async def run(self, worker: Worker, stage: Stage, batches: Iterable[Batch], weights: Weights) -> None:
        for batch in batches:
            worker.at(batch.number, len(batch.x))
            await self.step(worker, stage, batch, weights)

    @abstractmethod
    async def step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights) -> None:
        """The program of one worker for one micro-batch."""


# ---- what several rules compute ---------------------------------------------------------------------------------------


def leaf(worker: Worker, x: Tensor) -> Tensor:
    """A stage's input as a leaf that collects its gradient; the data need none, and asking for it would cost time."""
    return x if worker.first else x.detach().requires_grad_()


@work("head-forward")
def objective(worker: Worker, stage: Stage, h: Tensor, batch: Batch) -> Tensor:
    """The stage's loss at its output `h`, weighted for accumulation, reported to the worker.

    Raises NonFiniteLoss if it is NaN or infinite (on accelerators the session checks, once a step, not to wait here).
    """
    loss = stage.loss(stage.read(h), batch.y)
    if loss.dim() != 0:
        raise UnlockedError(f"The loss of stage {worker.stage} has shape {tuple(loss.shape)}; it must be one number.")
    if batch.weight != 1.0:
        loss = loss * batch.weight
    value = loss.detach()
    worker.report(value)
    if not value.is_cuda:
        refuse_non_finite(worker, value.item())
    return loss


def refuse_non_finite(worker: Worker, value: float, updated: bool = False) -> None:
    """Raises NonFiniteLoss, naming the stage. `updated`: whether it was noticed only after the stage's update."""
    if not math.isfinite(value):
        touched = (
            "was noticed after the update, so go back to the last checkpoint"
            if updated
            else "did not touch its weights"
        )
        raise NonFiniteLoss(
            f"The loss of stage {worker.stage} of replica {worker.replica} is {value} at update {worker.version} "
            f"(micro-batch {worker.micro_batch}); it {touched}. "
            "Try a smaller learning rate, gradient clipping (clip=), or look at the data of this batch."
        )


@work("head-forward", "head-backward", "weight-backward")
def local_backward(worker: Worker, stage: Stage, h: Tensor, batch: Batch) -> None:
    """Backward of the stage's own loss through its head and body: gradients stay inside the stage."""
    objective(worker, stage, h, batch).backward()


def attach_heads(chain: Chain, spec: Any, budget: float | None, seed: int, keep: int) -> list[HeadReport]:
    """Build a head of kind `spec` on every stage below the last that has none (stages before `keep` need none).

    Heads are sized under `budget` × the stage's forward FLOPs and start from a seed of (seed, "head", stage).
    """
    wanting = [j for j in range(keep, len(chain) - 1) if chain[j].head is None]
    if not wanting:
        return []
    reports = []
    x = chain.example()
    output = run_once(chain, x)
    per_token = output.dim() == 3
    for j, stage in enumerate(chain):
        h = run_once(stage.body, x)
        if j in wanting:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed_of(seed, "head", j))
                head, loss, report = build(
                    spec,
                    h,
                    output.shape[-1],
                    per_token=per_token,
                    stage_flops=flops(stage.body, x),
                    budget=budget,
                    where=f"stage {j}",
                )
            stage.head, stage.loss = head, loss
            reports.append(report)
        x = h
    return reports
