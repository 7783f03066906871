"""Heads sized under a share of their stage's FLOPs (Fournier's thesis, B.1.2: at most 10 %)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..chain import Chain
from ..costs import flops, run_once
from ..errors import HeadTooLarge, InvalidChoice, choose
from ..losses import Loss, cross_entropy, logits
from .auglocal import AugLocalHead
from .dgl import DGLCNNHead, DGLMLPHead
from .fournier import CNNHead, LinearHead, MLPHead
from .infopro import ConvolutionsAndDenseHead
from .man import MANHead
from .predsim import PredSimHead
from .projectors import ProjectorHead
from .spec import HeadSpec, kind_of
from .unembedding import SharedUnembeddingHead, UnembeddingHead

HeadLike = str | HeadSpec | Callable[[Tensor, int], nn.Module]

HEADS: dict[str, HeadSpec] = {
    head.name: head
    for head in (
        LinearHead(),
        MLPHead(),
        CNNHead(),
        DGLMLPHead(),
        DGLMLPHead(reductions=3),
        DGLCNNHead(),
        PredSimHead(),
        UnembeddingHead(),
        SharedUnembeddingHead(),
        ConvolutionsAndDenseHead(),
        ConvolutionsAndDenseHead(convolutions=0, dense=1),
        AugLocalHead(),
        MANHead(),
        ProjectorHead(),
        ProjectorHead(convolutions=0),
    )
}


@dataclass(frozen=True)
class HeadReport:
    """What a head costs: FLOPs of one forward on the example, beside its stage's. width: None if it has no choice."""

    name: str
    width: int | None
    flops: int
    stage_flops: int

    @property
    def share(self) -> float:
        """flops / stage_flops; infinite beside a stage without countable FLOPs."""
        if self.stage_flops:
            return self.flops / self.stage_flops
        return math.inf if self.flops else 0.0

    def __str__(self) -> str:
        width = "" if self.width is None else f" of width {self.width}"
        if not self.stage_flops:
            return f"The head {self.name!r}{width} takes {self.flops:,} FLOPs, its stage none that can be counted."
        return f"The head {self.name!r}{width} takes {self.flops:,} FLOPs, {_percent(self.share)} of its stage's."


class _Task(NamedTuple):
    """What a head is built for."""

    features: Tensor
    outputs: int
    per_token: bool
    stage_flops: int
    budget: float | None
    where: str
    loss: Loss
    shape: tuple[int, ...]

    @property
    def allowed(self) -> float:
        return math.inf if self.budget is None else self.budget * self.stage_flops


def spec_at(spec: HeadLike, chain: Chain, stage: int) -> HeadLike:
    """What to build the head of a stage from: a recipe may depend on the stage, and on the network above it."""
    if isinstance(spec, str):
        spec = HEADS[choose("head", spec, HEADS)]
    return spec.at(chain, stage) if isinstance(spec, HeadSpec) else spec


def build(
    spec: HeadLike,
    features: Tensor,
    outputs: int,
    *,
    per_token: bool,
    stage_flops: int,
    budget: float | None = 0.10,
    where: str = "this stage",
    loss: Loss = cross_entropy,
    shape: tuple[int, ...] | None = None,
) -> tuple[nn.Module, Loss, HeadReport]:
    """A head for a stage, its local loss, and what it costs.

    spec: a name of HEADS, a recipe such as MLPHead(hidden=256), or a function (features, outputs) -> module.
    features: an example of the stage's output: (B, C, H, W), (B, D) or (B, T, D).
    outputs: number of classes, or of words in the vocabulary.
    per_token: whether (B, T, D) has one label per position (language modelling) or one per sample.
    stage_flops: FLOPs of the stage's forward on the input that gave `features` (costs.flops).
    budget: largest share of `stage_flops` the head may take; None for no limit. A named head or a recipe gets the
        largest hidden width that fits, at most the paper's; a function's module is taken as it is, or refused.
    where: the stage's name in error messages.
    loss: the network's own, which the head gets too unless it has one of its own.
    shape: of what a function's module must give; None: one row of `outputs` for each sample, or for each position.

    Raises HeadTooLarge, or InvalidChoice for what no head can be built from.
    """
    given = shape or (*features.shape[: 2 if per_token else 1], outputs)
    task = _Task(features.detach(), outputs, per_token, stage_flops, budget, where, loss, given)
    _check(task)
    if isinstance(spec, str):
        spec = HEADS[choose("head", spec, HEADS)]
    if isinstance(spec, HeadSpec):
        return _build_recipe(spec, task)
    if isinstance(spec, nn.Module) or not callable(spec):
        raise InvalidChoice(
            f"A head is a name ({', '.join(HEADS)}), a recipe such as MLPHead(), or a function (features, outputs) -> "
            f"module, because every stage needs a head of its own; got {type(spec).__name__}."
        )
    return _build_custom(spec, task)


def widest(cost: Callable[[int], int], smallest: int, largest: int, allowed: float) -> int | None:
    """The largest width in [smallest, largest] whose cost is allowed, by bisection (the cost grows with the width);
    None if there is none. Counts the cost log₂(largest - smallest) + 2 times at most."""
    if cost(largest) <= allowed:
        return largest
    if cost(smallest) > allowed:
        return None
    while largest - smallest > 1:
        middle = (smallest + largest) // 2
        smallest, largest = (middle, largest) if cost(middle) <= allowed else (smallest, middle)
    return smallest


def _build_recipe(spec: HeadSpec, task: _Task) -> tuple[nn.Module, Loss, HeadReport]:
    fits, width = _fit(spec, task)
    cost = _cost(spec, task, width)
    report = HeadReport(spec.name, width, cost, task.stage_flops)
    if not fits:
        _refuse(report, spec.make(_shape_only(task.features), task.outputs, task.per_token, width), task)
    return spec.make(task.features, task.outputs, task.per_token, width), spec.loss() or task.loss, report


def _build_custom(function: Callable[[Tensor, int], nn.Module], task: _Task) -> tuple[nn.Module, Loss, HeadReport]:
    name = getattr(function, "__name__", type(function).__name__)
    head = function(task.features, task.outputs)
    if not isinstance(head, nn.Module):
        raise InvalidChoice(f"The head function {name!r} must return a torch.nn.Module, got {type(head).__name__}.")
    head = head.to(task.features.device, task.features.dtype)
    report = HeadReport(name, None, flops(head, task.features), task.stage_flops)
    got = tuple(logits(run_once(head, task.features)).shape)
    if got != task.shape:
        raise InvalidChoice(
            f"The head {name!r} of {task.where} gives logits of shape {got}; they must have {task.shape}."
        )
    if report.flops > task.allowed:
        _refuse(report, head, task)
    return head, task.loss, report


def _fit(spec: HeadSpec, task: _Task) -> tuple[bool, int | None]:
    """Whether the recipe fits the budget, and its widest width that does (the smallest if none does)."""
    largest = spec.paper_width(task.features)
    if largest is None:
        return _cost(spec, task, None) <= task.allowed, None
    smallest = min(spec.smallest, largest)
    width = widest(lambda width: _cost(spec, task, width), smallest, largest, task.allowed)
    return width is not None, smallest if width is None else width


def _cost(spec: HeadSpec, task: _Task, width: int | None) -> int:
    shape = _shape_only(task.features)
    return flops(spec.make(shape, task.outputs, task.per_token, width), shape)


def _shape_only(features: Tensor) -> Tensor:
    """Features without values: counting on them computes nothing, and draws no random number."""
    return torch.empty_like(features, device="meta")


def _check(task: _Task) -> None:
    kind_of(task.features, task.per_token)
    if task.outputs < 1:
        raise InvalidChoice(f"A head needs at least one output, got outputs={task.outputs}.")
    if task.stage_flops < 0:
        raise InvalidChoice(f"A stage cannot take stage_flops={task.stage_flops}; count them with costs.flops.")
    if task.budget is not None and not task.budget > 0:
        raise InvalidChoice(
            f"A head's budget is a positive share of its stage's FLOPs, got {task.budget}; 0.10 is the thesis' value, "
            "None switches the limit off."
        )


def _refuse(report: HeadReport, head: nn.Module, task: _Task) -> NoReturn:
    """Raises HeadTooLarge: what it costs, the budget, and what would help."""
    if task.stage_flops:
        width = "" if report.width is None else f" even at its smallest width, {report.width}"
        found = f"costs {_percent(report.share)} of the stage's FLOPs{width}"
        raise_it = f"raise budget= to {(math.floor(report.share * 1000) + 1) / 1000:.3f} or more"
    else:
        found = f"costs {report.flops:,} FLOPs, but the stage has none that can be counted"
        raise_it = "give budget=None"
    fitting = [name for name, other in HEADS.items() if name != report.name and _would_fit(other, task)]
    smaller = f", use a smaller head ({', '.join(map(repr, fitting))} would fit)," if fitting else ""
    raise HeadTooLarge(
        f"The head {report.name!r} of {task.where} {found}; the budget is {_percent(task.budget or 0)}."
        f"{_projection(head, task)} Either {raise_it}{smaller} or cut the model into fewer, "
        f"larger stages.{'' if fitting else ' No named head would fit.'}"
    )


def _would_fit(spec: HeadSpec, task: _Task) -> bool:
    if not spec.reads(kind_of(task.features, task.per_token)):
        return False
    width = spec.paper_width(task.features)
    return _cost(spec, task, None if width is None else min(spec.smallest, width)) <= task.allowed


def _projection(head: nn.Module, task: _Task) -> str:
    """A sentence if the projection to the outputs alone is over the budget, as with a large vocabulary; else ''."""
    weights = [getattr(part, "weight", None) for part in head.modules()]
    found = [x.shape[1] for x in weights if isinstance(x, Tensor) and x.dim() == 2 and len(x) == task.outputs]
    if not found:
        return ""
    rows = math.prod(task.features.shape[: 2 if task.per_token else 1])
    cost = 2 * rows * found[-1] * task.outputs
    if cost <= task.allowed:
        return ""
    share = f", {_percent(cost / task.stage_flops)}," if task.stage_flops else ""
    return f" The output projection alone ({found[-1]} → {task.outputs}){share} exceeds it."


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
