"""Asynchronous DGL with replay buffers (Belilovsky, Eickenberg & Oyallon, 2020, Algorithm 2; O §4.2; METHODS A3b).

    (x^j, y) ← B_j                           what stage j takes from its buffer; stage 0 takes the next micro-batch of the data
    x^{j+1} = f^j(sg[x^j], θ^j),             B_{j+1} ← (x^{j+1}, y)
    (θ^j, ω^j) ← (θ^j, ω^j) − γ ∇ ℓ^j(a^j(x^{j+1}, ω^j), y)

    j stage; B_j its buffer of M whole micro-batches (rules/replay.py); θ^j, ω^j weights of the stage and its head; a^j head;
    ℓ^j loss; sg stop-gradient; γ learning rate, by the stage's own schedule, which counts the stage's own updates.

No stage waits for another one: neither above nor below. Who is how fast:

    rates="own"        as fast as it is: on the simulated clock (devices' speeds), and on processes, where no two runs are alike
    rates=(1, 0.5, 1)  in process: the active stage of every tick is drawn with these weights (FACTS 1.2: the slow stage's share
                       is lessened by `noise`, its slow-down is 1/(1 − noise)), after a staircase that fills the buffers:
                       0; 0 1; 0 1 2; … A stage with nothing usable skips its turn.
    rates="equal"      one micro-batch for each stage in every step, in every world alike. The only form that has steps by hand,
                       more micro-batches per update, and a rule for the replicas other than "independent".

An epoch ends, where stages have their own rates, in one of two ways:

    ends="updates"     every stage makes as many updates as there are micro-batches (the paper's). One that has made them goes
                       on with forwards in evaluation mode, going round the data, until all stages above have made theirs.
    ends="data"        when stage 0 has gone through the data. What is in a buffer and was never used is used once, no more: a
                       slow stage has made fewer updates, and others have been overwritten before it came to them.

At the end of an epoch entries that nobody used are dropped (there are none with ends="data"); the others stay.

Limits: rates="equal" and M = 1 is DGL, bit for bit. So is rates="own" with M = 1 and reuse = 1 on a clock, if no stage takes
longer than the one below it: a faster one waits for something unused, and no slower one is there that would miss something.
Without the reuse limit all stages must take the same time, to the last bit of the clock. J = 1 is backpropagation. Nothing is
ever reused with reuse = 1.

Differs from the authors' code: no reset of the momentum and no new staircase when the learning rate falls; uses are counted
from 0; slow stages on processes are slow because of their processes (`Distributed(slow=…)` makes them so).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..batch import Batch
from ..chain import Chain, Stage
from ..consensus.base import Weights
from ..errors import InvalidChoice, choose
from ..heads import HeadReport
from ..losses import reads_input
from ..rules.replay import Policy, check
from ..worker import Worker
from .at_own_rate import AtOwnRate, Window
from .base import Credit, Properties, attach_heads
from .buffering import Buffered, Kept, receive_features, send_features
from .dgl import learn
from .lending import exchange


@dataclass(frozen=True)
class AsyncDGL(Credit):
    """Every stage learns from the loss of its own head, on what it finds in its buffer.

    Args:
        buffer: M ≥ 1 micro-batches.
        policy: which of them is taken: "least-used" (then the freshest), "fifo", "uniform"; see rules/replay.py.
        reuse: times a micro-batch may be used, ≥ 1; None: any, as in the paper. A stage with nothing usable waits. Where stages
            differ much, 1 is better (docs/results/async_buffers.md).
        quantise: features travel and are kept as they are ("none") or as int8 with a scale per 256 values ("int8").
        rates: how fast the stages are, see above: "own", "equal", or a number above 0 for each stage.
        ends: when an epoch ends where rates are not equal, see above: "updates" or "data".
        head, budget: as in DGL.
    """

    buffer: int = 1
    policy: Policy = "least-used"
    reuse: int | None = None
    quantise: Literal["none", "int8"] = "none"
    rates: Literal["own", "equal"] | tuple[float, ...] = "own"
    ends: Literal["updates", "data"] = "updates"
    head: Any = "mlp"
    budget: float | None = 0.10

    name: ClassVar[str] = "async-dgl"
    properties: ClassVar[Properties] = Properties(
        title="Asynchronous DGL with replay buffers (Belilovsky et al. 2020)",
        source="O §4.2; METHODS A3b",
        locks="none",
        memory="one stage, its head, M inputs",
        up="Ψ_A (int8: Ψ_A/4)",
        down="0",
        delay="0",
        objective="local, on buffered features",
    )
    one_backward: ClassVar[bool] = True
    local: ClassVar[bool] = True
    buffers: ClassVar[bool] = True
    planned: ClassVar[bool] = False  # a plan simulates steps of all, in which it is dgl

    def __post_init__(self) -> None:
        check(self.buffer, self.policy, self.reuse)
        choose("quantise", self.quantise, ("none", "int8"))
        choose("ends", self.ends, ("updates", "data"))
        if isinstance(self.rates, str):
            choose("rates", self.rates, ("own", "equal"))
        elif not _are_rates(self.rates):
            raise InvalidChoice(
                f"rates={self.rates!r} are no rates; give 'own', 'equal', or a number above 0 for each stage."
            )

    @property
    def free(self) -> bool:
        return self.rates != "equal"

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        """Raises InvalidChoice: rates for another number of stages, heads that need what no buffer holds."""
        if not isinstance(self.rates, str) and len(self.rates) != len(chain):
            raise InvalidChoice(f"rates={self.rates!r} are of {len(self.rates)} stages, but there are {len(chain)}.")
        reports = attach_heads(chain, self.head, self.budget, seed, 0)
        if self.free and any(reads_input(stage.loss) or stage.borrows is not None for stage in chain):
            raise InvalidChoice(
                "Stages at their own rates know only what is in their buffers, but a head here reads the network's input or "
                "another stage's weights; give rates='equal', or another head."
            )
        return reports

    def buffered(self, weights: Weights) -> Buffered:
        if weights.buffer is None:
            weights.buffer = Buffered(self)
        return weights.buffer

    async def run(self, worker: Worker, stage: Stage, batches: Iterable[Batch], weights: Weights) -> None:
        """All stages at equal rates: one micro-batch comes, one is taken from the buffer."""
        memory = self.buffered(weights)
        for batch in batches:
            worker.at(batch.number, len(batch.x))
            await exchange(worker, stage, batch, weights)
            await self._step(worker, stage, batch, weights, memory)

    async def _step(self, worker: Worker, stage: Stage, batch: Batch, weights: Weights, memory: Buffered) -> None:
        x: Tensor = batch.x
        if not worker.first:
            features = await receive_features(self.quantise, worker)
            wanted = hasattr(stage, "loss") and reads_input(stage.loss)  # where only shapes are handled, it has none
            memory.replay.put(Kept(batch.number, batch.y, batch.x if wanted else None, features))
            kept = memory.take(worker)
            assert kept is not None  # what has just come
            x, batch = memory.features_of(kept, weights), Batch(kept.x, kept.y, kept.number, batch.weight)  # type: ignore[arg-type]
        memory.turns += 1

        async def pass_on(h: Tensor) -> None:
            await send_features(self.quantise, worker, weights, h)

        await learn(worker, stage, x, batch, weights, pass_on)
        memory.made += 1

    async def run_freely(self, worker: Worker, stage: Stage, weights: Weights, window: Window) -> None:
        await AtOwnRate(self, worker, stage, weights, window).run()


def _are_rates(given: Any) -> bool:
    """Whether it is a row of numbers above 0."""
    row = isinstance(given, (tuple, list)) and len(given) > 0
    return row and all(isinstance(rate, (int, float)) and 0 < rate < math.inf for rate in given)
