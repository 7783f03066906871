"""Seconds of every kind of work of a chain's stages, measured as training runs them.

Each stage is trained by itself, by a rule that does everything a stage may have to do: forward, head, backward (to the weights,
to the input, to both, in turn), update. It runs through the Trainer, so what is measured has the caches, the allocator and the
bookkeeping of training. What a step takes besides computing counts as part of the update.

A window of some steps gives the mean of each kind of work, as a step's time is made of means; of several windows the fastest
counts: what disturbs only adds.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..chain import Chain, Stage, join
from ..consensus.base import Weights
from ..costs import run_once
from ..credit.base import Properties, SynchronousCredit, backward, objective
from ..credit.interlocking import through
from ..errors import InvalidChoice, choose
from ..pairs import PairLoss
from ..session import Trainer
from ..simulation.costs import Costs, StageCosts
from ..simulation.network import Line
from ..simulation.profile import STATES, StageProfile, profile
from ..work import WORKS, Work
from .stopwatch import Stopwatch

Seconds = dict[Work, float]
Points = dict[int, Seconds]  # by the number of samples
_RATE = 1e-4  # so small that nothing diverges on made-up targets


def optimizer_of(name: str) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """An optimizer by the name of `simulation.profile.STATES`. Raises InvalidChoice."""
    choose("optimizer", name, STATES)
    if name in ("sgd", "momentum"):
        return lambda parameters: torch.optim.SGD(parameters, lr=_RATE, momentum=0.9 if name == "momentum" else 0.0)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return lambda parameters: kind(parameters, lr=_RATE)


@dataclass(frozen=True)
class Everything(SynchronousCredit):
    """All a stage may have to do, one after the other, each an act by the name of its kind of work.

    first: the stage reads the data, so nothing is computed for its input. loss: it has a loss to begin its backward with;
    otherwise a made-up gradient does. timed: calls a function and remembers how long it takes.
    """

    first: bool
    loss: bool
    timed: Callable[..., Any]

    name: ClassVar[str] = "everything"
    properties: ClassVar[Properties] = Properties("", "", "", "", "", "", "", "")

    async def step(self, worker: Any, stage: Stage, batch: Batch, weights: Weights) -> None:
        def run(what: str, function: Callable[..., Any], *arguments: Any) -> Awaitable[Any]:
            return worker.run(what, self.timed, what, function, *arguments)

        passes = not self.first and batch.x.is_floating_point()
        turn = batch.number % 3 if passes else 0  # one kind of backward for each step
        x = batch.x.detach().requires_grad_(passes and turn != 1)
        h = await run("forward", stage.body, x)
        gradient = torch.full_like(h, 1e-3)
        if self.loss:
            leaf = h.detach().requires_grad_()
            loss = await run("head-forward", objective, worker, stage, leaf, batch)
            await run("head-backward", torch.autograd.backward, loss)
            assert leaf.grad is not None
            gradient = leaf.grad
        if turn == 2:
            await run("input-backward", through, h, x, gradient)
            await run("warm backward", backward, worker, stage, h, gradient)  # counts for nothing, but frees the graph
        else:
            await run("weight-backward" if turn == 1 else "backward", backward, worker, stage, h, gradient)
        del x, h, gradient
        await weights.write()


class Beside(nn.Module):
    """A head that reads what all groups of its depth put out, with the others' outputs kept; its own group is the k-th."""

    def __init__(self, head: nn.Module | None, outputs: list[Tensor], k: int) -> None:
        super().__init__()
        assert head is not None
        self.head, self._before, self._after = head, outputs[:k], outputs[k + 1 :]

    def forward(self, h: Tensor) -> Any:
        return self.head(join([*self._before, h, *self._after]))


class Rig:
    """One stage of a chain with a batch of made-up data, ready to be trained by itself.

    `chain` is not changed: the stage is a copy.
    """

    def __init__(self, chain: Chain, j: int, x: Tensor, y: Tensor, optimizer: str) -> None:
        alone = Chain([copy.deepcopy(chain[j])], like=x[:2])
        if chain[j].reads_siblings:
            row = chain.layout.beside(j)
            alone[0].head = Beside(alone[0].head, [run_once(chain[k].body, x) for k in row], j - row[0])
        if isinstance(alone[0].loss, PairLoss):
            alone[0].loss = alone[0].loss.by_itself()
        rule = Everything(chain.layout.depth(j) == 0, chain[j].head is not None or j == len(chain) - 1, self._timed)
        self._watch, self._found = Stopwatch(), defaultdict[str, list[float]](list)
        self._trainer = Trainer(alone, credit=rule, optimizer=optimizer_of(optimizer))
        self._x, self._y = x, y

    def window(self, steps: int) -> Seconds:
        """The mean of each kind of work over some steps; the update is what is left of a step."""
        self._found.clear()
        left = []
        for _ in range(steps):
            before = sum(map(sum, self._found.values()))
            begin = self._watch.now()
            self._trainer.step(self._x, self._y)
            left.append(self._watch.now() - begin - (sum(map(sum, self._found.values())) - before))
        return {part: fmean(self._found[part]) for part in WORKS if part in self._found} | {"update": fmean(left)}

    def _timed(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        begin = self._watch.now()
        result = function(*arguments)
        self._found[what].append(self._watch.now() - begin)
        return result


def made_up(chain: Chain, samples: int) -> tuple[list[Tensor], Tensor]:
    """What goes into each stage (`samples` of the example batch, repeated), and targets for the losses."""
    like = chain.example()
    x = like.repeat(-(-samples // len(like)), *[1] * (like.dim() - 1))[:samples]
    walked = list(chain.walk(x, lambda j, x: run_once(chain[j].body, x)))
    inputs, output = [x for _, x, _ in walked], walked[-1][2]
    if output.dim() not in (2, 3):
        return inputs, torch.zeros(samples)
    return inputs, torch.arange(output.shape[:-1].numel()).remainder(output.shape[-1]).view(output.shape[:-1])


def measure_stages(
    chain: Chain,
    samples: Sequence[int],
    optimizer: str = "momentum",
    *,
    windows: int = 3,
    seconds: float = 0.3,
    order: int = 0,
    together: Callable[[], object] = lambda: None,
) -> list[Points]:
    """For every stage: seconds of each kind of work at each of the numbers of `samples`.

    windows: how many, of which the fastest counts. seconds: length of one. order: with which stage to begin. together: called
    before every window, to wait for others that measure, too. The chain stays as it is.
    """
    if not samples or min(samples) < 1:
        raise InvalidChoice(f"Stages are measured with at least 1 sample; given {list(samples)}.")
    found: list[Points] = [{} for _ in chain]
    inputs = {count: made_up(chain, count) for count in samples}
    for j, count in itertools.product(range(len(chain)), samples):
        j = (j + order) % len(chain)
        rig = Rig(chain, j, inputs[count][0][j], inputs[count][1], optimizer)
        found[j][count] = _fastest(rig, windows, seconds, together)
    return found


def _fastest(rig: Rig, windows: int, seconds: float, together: Callable[[], object]) -> Seconds:
    rig.window(3)
    begin = time.perf_counter()
    rig.window(3)
    steps = max(9, round(seconds / (time.perf_counter() - begin) * 3))
    rows = []
    for _ in range(windows):
        together()
        rows.append(rig.window(steps))
    return fastest(rows)


def fastest(rows: Iterable[Seconds]) -> Seconds:
    """The least of each kind of work."""
    least: Seconds = {}
    for row in rows:
        for part, seconds in row.items():
            least[part] = min(seconds, least.get(part, seconds))
    return least


def costs_of_measured(chain: Chain, measured: Sequence[Points], optimizer: str) -> Costs:
    """Costs with lines through the measured points; bytes and shapes are read off the chain."""
    shapes = profile(chain)
    return Costs(tuple(_stage(stage, points, STATES[optimizer]) for stage, points in zip(shapes.stages, measured)))


def _stage(shape: StageProfile, points: Points, states: int) -> StageCosts:
    largest = points[max(points)]
    seconds = {part: _line(part, {count: row[part] for count, row in points.items()}) for part in largest}
    return StageCosts(seconds, shape, states * shape.trained)


def _line(part: Work, points: dict[int, float]) -> Line:
    """Through the smallest and the largest number of samples; an update's does not depend on it."""
    small, large = min(points), max(points)
    if part == "update":
        return Line(min(points.values()))
    if small == large:
        return Line(0.0, points[large] / large)
    each = max(0.0, (points[large] - points[small]) / (large - small))
    return Line(max(0.0, points[large] - each * large), each)
