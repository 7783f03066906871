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
from ..chain import Chain, Stage, join
from ..consensus.base import Consensus, Weights
from ..costs import flops, run_once
from ..errors import InvalidChoice, NonFiniteLoss, UnlockedError
from ..heads import HeadReport, build, spec_at
from ..heads.goal import goal_of
from ..option_types import Typed
from ..rng import seed_of
from ..work import work
from ..worker import Worker
from .lending import arrange_loans

if TYPE_CHECKING:
    from ..session import Trainer
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


What = Literal["graph", "graph+buffers", "graph+weights", "input", "parts", "nothing"]


@dataclass(frozen=True)
class Held:
    """What a stage holds of a micro-batch from its forward to its backward.

    what    "graph"          what autograd keeps
            "graph+buffers"  the same, with copies of the buffers in it
            "graph+weights"  the same, with copies of the buffers and of the weights in it
            "input"          the stage's input; the graph only while the backward runs the forward again
            "parts"          the inputs of what cannot be reversed; in the backward the graph of one part at a time
            "nothing"        neither that nor the head's graph: there is no backward
    versions: whether old weights are copied while a micro-batch is in flight that has seen them. crosses: whether
    micro-batches are in flight between two steps. several: what is held instead where an update has several micro-batches.
    """

    what: What = "graph"
    versions: bool = False
    crosses: bool = False
    several: What | None = None


class Credit(Typed, ABC):
    """How a stage gets its gradient. Subclasses are frozen dataclasses: their fields are the rule's parameters."""

    name: ClassVar[str]
    properties: ClassVar[Properties]
    needs_processes: ClassVar[bool] = False  # True: PyTorch does the communicating, so every worker needs a process
    one_backward: ClassVar[bool] = False  # True: a parameter's gradient is complete once a backward has reached it
    local: ClassVar[bool] = False  # True: no gradient comes from the stage above
    awaits: ClassVar[str] = "gradients"  # what a stage waits for from those above it, if not `local`
    buffers: ClassVar[bool] = False  # True: stages keep micro-batches (`Weights.buffer`), of which a record tells
    planned: ClassVar[bool] = True  # False: the planner tries it only if it is named
    grouped: ClassVar[bool] = False  # True: several stages may stand side by side (`Chain.layout`)
    self_supervised: ClassVar[bool] = False  # True: learns from pairs of views (`Data.views`), not from labels

    @abstractmethod
    async def run(self, worker: Worker, stage: Stage, batches: Iterable[Batch], weights: Weights) -> None:
        """The program of one worker for a row of micro-batches."""

    @property
    def free(self) -> bool:
        """Whether the stages run freely, each at its own rate, so that an epoch has no steps of all (own_rates.py)."""
        return False

    async def run_freely(self, worker: Worker, stage: Stage, weights: Weights, window: Any) -> None:
        """Where the stages run freely: the program of one worker for the rest of an epoch (at_own_rate.Window)."""
        raise UnlockedError(f"{self.name} has no stages that run freely.")

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

    def holds_beside(self, stage: int) -> int:
        """Bytes of what a stage's worker holds always, beside the stage: weights of another network that is asked."""
        return 0

    def filling(self, stages: int, accumulate: int) -> int:
        """Updates until as much is in flight as ever will be; 0 for rules that finish every step."""
        return 0

    def drains(self, last: bool) -> bool:
        """Whether what is in flight is to be finished at the end of an epoch (`last`: of the last one)."""
        return False

    async def empty(self, worker: Worker, stage: Stage, weights: Weights) -> None:  # most rules carry nothing over
        """Finish what is in flight between two steps."""

    async def collect(self, worker: Worker, weights: Weights) -> None:
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

    def remarks(self, chain: Chain, batch_size: int) -> list[str]:
        """What a user should know of what the rule costs on this chain, in sentences, said before a run begins."""
        return []

    @property
    def needs_labels(self) -> bool:
        """Whether the rule learns from labels or targets."""
        return not self.self_supervised

    def check_data(self, data: Any, batch_size: int | None, accumulate: int) -> None:
        """Raises InvalidChoice for training data, or numbers of samples, that the rule cannot learn from."""
        if self.needs_labels and not getattr(data, "labelled", True):
            raise InvalidChoice(
                f"{self.name} learns from labels here, and the training data have none; give labelled data, or take a rule and "
                "a loss that learn from views of images, such as dgssl or simclr with their own loss."
            )

    def meet(self, trainer: Trainer, data: Any) -> None:
        """Look at the training data before the first step of a `fit`, also of one that goes on. Called by all processes."""
        self.check_data(data, trainer.batch_size, trainer.accumulate)

    def check(self, consensus: Consensus) -> None:
        """Raises InvalidChoice if the rule does not go with this one for the replicas."""

    def buffered(self, weights: Weights) -> Any:
        """The buffer of a worker, under rules that have some."""
        return weights.buffer

    async def seen_by_head(self, worker: Worker, stage: Stage, h: Tensor) -> Tensor:
        """What the stage's head reads when its body puts out `h`, in training and in evaluation. Here: `h`."""
        return h

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


def check_groups(chain: Chain, credit: Credit, consensus: Consensus) -> None:
    """Raises InvalidChoice if the chain has neuron groups, and one of the rules wants stages in a row."""
    if chain.layout.plain:
        return
    layout = "-".join(map(str, chain.layout.groups))
    if not credit.grouped:
        raise InvalidChoice(
            f"{credit.name} wants its stages in a row, but this chain has groups side by side (layout {layout}); take gn-dgl, "
            "dgl, predsim, infopro or backprop, or cut the model without groups."
        )
    if any(stage.reads_siblings for stage in chain) and not getattr(credit, "stop_gradient", False):
        raise InvalidChoice(
            f"The heads of this chain read what all groups of their depth put out, which {credit.name} does not give them; "
            "take gn-dgl(stop_gradient=True), with which they were made, or a chain without heads."
        )
    if consensus.in_a_row:
        raise InvalidChoice(
            f"{consensus.name} counts the stages below and above each one, but this chain has groups side by side (layout "
            f"{layout}); take another rule for the replicas, or cut the model without groups."
        )


# ---- what several rules compute ---------------------------------------------------------------------------------------


def leaf(worker: Worker, x: Tensor) -> Tensor:
    """A stage's input as a leaf that collects its gradient; the data need none, and asking for it would cost time."""
    return x if worker.first else x.detach().requires_grad_()


@work("head-forward")
def objective(worker: Worker, stage: Stage, h: Tensor, batch: Batch) -> Tensor:
    """The stage's loss at its output `h`, weighted for accumulation, reported to the worker.

    Raises NonFiniteLoss if it is NaN or infinite (on accelerators the session checks, once a step, not to wait here).
    """
    return reported(worker, stage.judge(stage.read(h), batch), batch)


def reported(worker: Worker, loss: Tensor, batch: Batch) -> Tensor:
    """A stage's loss, weighted for accumulation, when the worker has been told of it. Raises as `objective`."""
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


def backward(worker: Worker, stage: Stage, h: Tensor, gradient: Tensor | None = None) -> None:
    """Backward from what a stage gave, `h`, to its weights and its input; nothing where neither learns (a first stage whose
    body is frozen). Raises UnlockedError if `h` does not depend on what is to learn."""
    if h.requires_grad:
        torch.autograd.backward(h, gradient)
    elif not worker.first or any(p.requires_grad for p in stage.body.parameters()):
        raise detached(f"stage {worker.stage}")


def detached(stage: str) -> UnlockedError:
    """The sentence for an output without a graph."""
    return UnlockedError(
        f"What {stage} gives depends neither on its weights nor on its input, so no gradient can come to them; look for "
        "detach(), torch.no_grad() or whole numbers in its body."
    )


@work("head-forward", "head-backward", "weight-backward")
def local_backward(worker: Worker, stage: Stage, h: Tensor, batch: Batch) -> None:
    """Backward of the stage's own loss through its head and body: gradients stay inside the stage."""
    objective(worker, stage, h, batch).backward()


def refuse_nothing_to_train(chain: Chain, rule: str) -> None:
    """Raises InvalidChoice for a stage below the last whose body has no weights to learn, or frozen ones only."""
    for j, stage in enumerate(list(chain)[:-1]):
        if not any(p.requires_grad for p in stage.body.parameters()):
            raise InvalidChoice(
                f"The body of stage {j} has nothing to train: no parameters, or all of them frozen; {rule} has no use for it. "
                "Join it with the stage below or above."
            )


def attach_heads(
    chain: Chain, spec: Any, budget: float | None, seed: int, keep: int, siblings: bool = False
) -> list[HeadReport]:
    """Build a head of kind `spec` on every stage below the last that has none (stages before `keep` need none).

    Heads are sized under `budget` × the stage's forward FLOPs and start from a seed of (seed, "head", stage). `siblings`: they
    read what all groups of their depth put out, not the stage's own output alone.
    """
    wanting = [j for j in range(keep, len(chain) - 1) if chain[j].head is None]
    reports = _build_heads(chain, spec, budget, seed, wanting, siblings) if wanting else []
    for j in range(keep, len(chain) - 1):
        chain[j].reads_siblings |= siblings  # those given by hand, too
    arrange_loans(chain)
    return reports


def _build_heads(
    chain: Chain, spec: Any, budget: float | None, seed: int, wanting: list[int], siblings: bool
) -> list[HeadReport]:
    reports = []
    walked = list(chain.walk(chain.example(), lambda j, x: run_once(chain[j].body, x)))
    inputs, outputs = [x for _, x, _ in walked], [h for _, _, h in walked]
    specs = {j: spec_at(spec, chain, j) for j in wanting}
    goal = goal_of(outputs[-1], chain[-1].loss, specs[wanting[0]])
    for j in wanting:
        features = join([outputs[k] for k in chain.layout.beside(j)]) if siblings else outputs[j]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(seed, "head", j))
            head, loss, report = build(
                specs[j],
                goal.reads(features, where := f"stage {j}"),
                goal.outputs,
                per_token=goal.per_token,
                stage_flops=flops(chain[j].body, inputs[j]),
                budget=budget,
                where=where,
                loss=goal.local_loss(),
                shape=goal.shape,
            )
        chain[j].head, chain[j].loss = goal.finish(head), loss
        reports.append(report)
    return reports
