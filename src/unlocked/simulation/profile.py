"""What the stages of a chain cost, whatever the machine: operations, bytes and shapes, read off without computing anything.

Every stage is run once forward and backward on fake tensors (shapes and dtypes that behave like the CPU's), under torch's
flop counter and the meter of saved bytes, at two batch sizes: so what grows with the batch is told from what does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..batch import Batch
from ..chain import Chain, Stage, join
from ..credit.reconstructing import segments
from ..losses import logits
from ..pairs import PairLoss
from ..probes.memory import SavedBytes
from ..reversible import is_reversible
from ..work import Work
from .network import Line

STATES: dict[str, int] = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}
"""Tensors of a weight's size that an optimizer keeps, by its name."""


NOTHING = Line()


@dataclass(frozen=True)
class Holding:
    """Bytes that a stage's body holds of a micro-batch.

    kept: from its forward to the end of its backward. again: besides, while that backward runs.
    """

    kept: Line
    again: Line = NOTHING


@dataclass(frozen=True)
class StageProfile:
    """One stage and its head. Lines are in samples: what is there anyhow, and what each sample adds.

    flops: operations of each kind of work (a multiply-add is 2). input, output: shapes of one sample. dtype: of the output.
    weights: shape and dtype of every trained tensor, the body's first; head_weights: how many of the last are the head's.
    parameters: bytes of all weights and buffers; trained: of the trained ones. kept: bytes the body's forward keeps for its
    backward; head_kept: the head's and the loss's. done: how the body's backward proceeds: (share of its trained bytes whose
    gradient is complete, share of the backward's time). holdings: what rules hold that do not keep autograd's graph as it is,
    by `credit.base.Held.what`.
    """

    flops: Mapping[Work, Line]
    input: tuple[int, ...]
    output: tuple[int, ...]
    dtype: torch.dtype
    weights: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    head_weights: int
    parameters: int
    trained: int
    kept: Line
    head_kept: Line
    done: tuple[tuple[float, float], ...]
    holdings: Mapping[str, Holding] = field(default_factory=dict)

    def holding(self, what: str) -> Holding:
        """What the body holds of a micro-batch; where it was not read: the graph, or a float32 input and the graph again."""
        if what in self.holdings:
            return self.holdings[what]
        if what == "nothing":
            return Holding(NOTHING)
        if what.startswith("graph"):
            return Holding(self.kept)
        return Holding(Line(0.0, 4.0 * _numel(self.input)), self.kept)

    @property
    def head_trained(self) -> int:
        """Bytes of the head's trained tensors."""
        first = len(self.weights) - self.head_weights
        return sum(_numel(shape) * dtype.itemsize for shape, dtype in self.weights[first:])

    def boundary(self, samples: int) -> int:
        """Bytes of the stage's output."""
        return samples * _numel(self.output) * self.dtype.itemsize


@dataclass(frozen=True)
class Profile:
    """The stages of a chain, in order."""

    stages: tuple[StageProfile, ...]

    def __len__(self) -> int:
        return len(self.stages)


def profile(chain: Chain, sizes: tuple[int, int] = (2, 4)) -> Profile:
    """Read the costs of a chain's stages, heads included. Raises UnlockedError if it has no example batch.

    `sizes`: the two batch sizes; what does not grow in a line (a loss of all pairs) is right at these.
    """
    like = chain.example()
    small, large = (_read(chain, like, samples) for samples in sizes)
    return Profile(tuple(_stage(stage, *pair) for stage, pair in zip(chain, zip(small, large))))


@dataclass
class _Reading:
    """One stage at one batch size."""

    samples: int
    input: tuple[int, ...]
    output: Tensor
    flops: dict[Work, int]
    kept: int
    head_kept: int
    done: list[tuple[float, float]]
    holdings: dict[str, tuple[int, int]]


def _stage(stage: Stage, small: _Reading, large: _Reading) -> StageProfile:
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]

    def line(value: Callable[[_Reading], float]) -> Line:
        each = (value(large) - value(small)) / (large.samples - small.samples)
        return Line(value(small) - each * small.samples, each)

    return StageProfile(
        flops={part: line(lambda reading, part=part: reading.flops[part]) for part in small.flops},  # type: ignore[misc]
        input=small.input,
        output=tuple(small.output.shape[1:]),
        dtype=small.output.dtype,
        weights=tuple((tuple(x.shape), x.dtype) for x in trained),
        head_weights=0 if stage.head is None else sum(x.requires_grad for x in stage.head.parameters()),
        parameters=_bytes([*stage.parameters(), *stage.buffers()]),
        trained=_bytes(trained),
        kept=line(lambda reading: reading.kept),
        head_kept=line(lambda reading: reading.head_kept),
        done=tuple(large.done),
        holdings={
            what: Holding(
                line(lambda reading, what=what: reading.holdings[what][0]),  # type: ignore[misc]
                line(lambda reading, what=what: reading.holdings[what][1]),  # type: ignore[misc]
            )
            for what in small.holdings
        },
    )


def _read(chain: Chain, like: Tensor, samples: int) -> list[_Reading]:
    readings: list[_Reading] = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        x = data = torch.empty((samples, *like.shape[1:]), dtype=like.dtype)
        for row in chain.layout.rows:
            outputs = [_ShapesOnly(chain[j]).call("body", x).detach() for j in row] if len(row) > 1 else []
            readings += [_read_stage(_ShapesOnly(chain[j]), chain, j, x, data, outputs) for j in row]
            x = join([readings[j].output for j in row])
    return readings


class _ShapesOnly:
    """A stage's modules run on fake weights; the stage itself is not touched."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.weights = {
            name: torch.empty(x.shape, dtype=x.dtype, requires_grad=x.requires_grad)
            for name, x in nn.Module.named_parameters(stage)
        }
        self.buffers = {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in nn.Module.named_buffers(stage)}

    def call(self, name: str, x: Tensor) -> Any:
        """The output of the stage's module `name` ("body" or "head")."""
        module = getattr(self.stage, name)
        given = {**self.weights, **self.buffers}
        inside = {key.removeprefix(f"{name}."): x for key, x in given.items() if key.startswith(f"{name}.")}
        return torch.func.functional_call(module, inside, (x,))

    def parts(self, x: Tensor) -> tuple[int, int]:
        """As "parts" of `_holdings`, read on the body."""
        given = {name: value for name, value in (self.weights | self.buffers).items() if name.startswith("body.")}
        return torch.func.functional_call(_Parts(self.stage.body, self.all()), given, (x,))

    def all(self) -> list[Tensor]:
        return [*self.weights.values(), *self.buffers.values()]


def _read_stage(shapes: _ShapesOnly, chain: Chain, j: int, x: Tensor, data: Tensor, outputs: list[Tensor]) -> _Reading:
    """`data`: what the network reads; `outputs`: of the groups side by side, if there are several."""
    stage, first, last = chain[j], chain.layout.depth(j) == 0, j == len(chain) - 1
    beside = stage.reads_siblings and outputs
    # the first stage's input needs no gradient, unless it is of a kind that could not have one
    x = x.detach() if first or not x.is_floating_point() else x.detach().requires_grad_()
    weights = [x for name, x in shapes.weights.items() if x.requires_grad and not name.startswith("head.")]
    counter = _Counter()
    with SavedBytes(ignore=shapes.all()) as meter:
        with counter.counting("forward"):
            h = shapes.call("body", x)
        kept, holdings = meter.live, _holdings(shapes, x, meter)
        copy = h.detach().requires_grad_(h.is_floating_point())
        with counter.counting("head-forward"):
            # a stage below the last without a head has no loss of its own
            seen = join([copy if k == j else h for k, h in zip(chain.layout.beside(j), outputs)]) if beside else copy
            loss = _loss(shapes, stage, seen, data) if last or stage.head is not None else None
        head_kept = meter.live - kept
        with counter.counting("head-backward"):
            if loss is not None and loss.requires_grad:
                loss.backward()
    with counter.counting("weight-backward"):
        if h.requires_grad and weights:
            torch.autograd.grad(h, weights, torch.empty_like(h), retain_graph=True, allow_unused=True)
    done = _Progress(shapes, counter)
    with counter.counting("input-backward"):
        if x.requires_grad and h.requires_grad:
            torch.autograd.grad(h, x, torch.empty_like(h), retain_graph=True)
    with counter.counting("backward"), done.watching():
        if h.requires_grad:
            h.backward(torch.empty_like(h))
    return _Reading(len(x), tuple(x.shape[1:]), h.detach(), counter.flops, kept, head_kept, done.curve(), holdings)


def _holdings(shapes: _ShapesOnly, x: Tensor, meter: SavedBytes) -> dict[str, tuple[int, int]]:
    """Bytes kept and needed again by everything that a rule may hold; `meter` has seen the forward on `x`."""
    graph, size = meter.live, _bytes([x])
    copied = graph + meter.passed(shapes.buffers.values())
    recomputed = (size, graph - size if meter.holds(x) else graph)
    return {
        "graph+buffers": (copied, 0),
        "graph+weights": (copied + meter.passed(shapes.weights.values()), 0),
        "input": recomputed,
        "parts": shapes.parts(x) if any(map(is_reversible, segments(shapes.stage.body))) else recomputed,
    }


class _Parts(nn.Module):
    """A body as in credit/reconstructing.py, forward and backward: bytes of the inputs kept, and of a part's largest graph."""

    def __init__(self, body: nn.Module, ignore: list[Tensor]) -> None:
        super().__init__()
        self.body, self._ignored = body, ignore

    def forward(self, x: Tensor) -> tuple[int, int]:
        parts, needed = segments(self.body), x.requires_grad
        kept: dict[int, Tensor] = {}
        with torch.no_grad():
            for position, part in enumerate(parts):
                if not is_reversible(part):
                    kept[position] = x.detach()
                x = part(x)
        again = 0
        for position, part in reversed(list(enumerate(parts))):
            with SavedBytes(ignore=[*self._ignored, *kept.values()]) as meter:
                if is_reversible(part):
                    x, _ = part.reverse(x, torch.empty_like(x))
                else:
                    x = kept[position].requires_grad_(needed or position > 0)
                    part(x)
            again = max(again, meter.peak)
        return _bytes(kept.values()), again


def _loss(shapes: _ShapesOnly, stage: Stage, h: Tensor, data: Tensor) -> Tensor | None:
    """The stage's loss on made-up targets; None if it wants others."""
    output = shapes.call("head", h) if stage.head is not None else h
    scores = logits(output)
    if not isinstance(scores, Tensor) or scores.dim() < 2:
        return None
    if isinstance(stage.loss, PairLoss):
        stage = Stage(stage.body, loss=stage.loss.by_itself())
    try:
        return stage.judge(output, Batch(data, torch.empty(scores.shape[:-1], dtype=torch.long)))
    except (RuntimeError, TypeError, ValueError, AssertionError):
        try:
            return stage.judge(output, Batch(data, torch.empty(scores.shape)))
        except (RuntimeError, TypeError, ValueError, AssertionError):
            return scores.sum()


class _Counter:
    """Counts operations by kind of work."""

    def __init__(self) -> None:
        self.flops: dict[Work, int] = {}
        self.mode = FlopCounterMode(display=False)

    def counting(self, part: Work) -> _Counting:
        return _Counting(self, part)


class _Counting:
    def __init__(self, counter: _Counter, part: Work) -> None:
        self._counter, self._part = counter, part

    def __enter__(self) -> None:
        self._counter.mode = FlopCounterMode(display=False)
        self._counter.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._counter.mode.__exit__(*error)
        self._counter.flops[self._part] = int(self._counter.mode.get_total_flops())


class _Progress:
    """Which share of the gradients' bytes is complete after which share of a backward's operations."""

    def __init__(self, shapes: _ShapesOnly, counter: _Counter) -> None:
        self._shapes, self._counter = shapes, counter
        self._seen: list[tuple[int, int]] = []

    def watching(self) -> _Progress:
        return self

    def __enter__(self) -> None:
        self._hooks = [
            x.register_post_accumulate_grad_hook(self._one_more)
            for name, x in self._shapes.weights.items()
            if x.requires_grad and not name.startswith("head.")
        ]

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _one_more(self, x: Tensor) -> None:
        self._seen.append((x.numel() * x.element_size(), int(self._counter.mode.get_total_flops())))

    def curve(self) -> list[tuple[float, float]]:
        size, flops = sum(size for size, _ in self._seen), self._counter.flops["backward"]
        if not size or not flops:
            return [(0.0, 0.0), (1.0, 1.0)]
        shares = accumulate(size for size, _ in self._seen)
        return [(0.0, 0.0), *((share / size, done / flops) for share, (_, done) in zip(shares, self._seen))]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
