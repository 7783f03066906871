"""A stage by itself, without messages: its forwards, backwards and update in a plain loop, by what is kept in between.

    graph     forward, backward                              what autograd saves waits for the backward
    input     forward without graph, forward, backward       only the input waits, the forward is run again
    reverse   forward without graph, fused reverse           reversible parts keep nothing, the others their input (PETRA)

The last stage has its loss at once and always keeps its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unlocked.chain import Stage
from unlocked.credit.reconstructing import segments
from unlocked.reversible import is_reversible

from .tasks import sgd

Way = Literal["graph", "input", "reverse"]


def step_alone(
    stage: Stage, x: Tensor, y: Tensor, first: bool, last: bool, way: Way = "graph", parts: int = 1
) -> Callable[[], None]:
    """Forward, backward of a gradient from above (of the loss, in the last stage) down to the input, for each of `parts`
    micro-batches of x (B, …); then one update."""
    optimizer = sgd(list(stage.parameters()))
    train = _WAYS[way](stage.body, first)
    rows = [(part.clone(), target) for part, target in zip(x.tensor_split(parts), y.tensor_split(parts))]

    def step() -> None:
        for part, target in rows:
            if last:
                loss = stage.loss(stage.body(part if first else part.detach().requires_grad_()), target) / parts
                loss.backward()
                loss.item()  # read where it arises, as everywhere
            else:
                train(part)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _graph(body: nn.Module, first: bool) -> Callable[[Tensor], None]:
    def train(x: Tensor) -> None:
        h = body(x if first else x.detach().requires_grad_())
        torch.autograd.backward(h, torch.zeros_like(h))

    return train


def _input(body: nn.Module, first: bool) -> Callable[[Tensor], None]:
    freeze = _Statistics(body)

    def train(x: Tensor) -> None:
        with torch.no_grad():
            body(x)
        with freeze:
            h = body(x if first else x.detach().requires_grad_())
            torch.autograd.backward(h, torch.zeros_like(h))

    return train


def _reverse(body: nn.Module, first: bool) -> Callable[[Tensor], None]:
    row, freeze = list(enumerate(segments(body))), _Statistics(body)

    def train(x: Tensor) -> None:
        kept: dict[int, Tensor] = {}
        with torch.no_grad():
            for k, part in row:
                if not is_reversible(part):
                    kept[k] = x
                x = part(x)
        z, gradient = x, torch.zeros_like(x)
        with freeze:
            for k, part in reversed(row):
                if is_reversible(part):
                    z, gradient = part.reverse(z, gradient)
                else:
                    z = kept[k] if first and k == 0 else kept[k].detach().requires_grad_()
                    torch.autograd.backward(part(z), gradient)
                    gradient = z.grad

    return train


_WAYS: dict[Way, Callable[[nn.Module, bool], Callable[[Tensor], None]]] = {
    "graph": _graph,
    "input": _input,
    "reverse": _reverse,
}


class _Statistics:
    """Context: BatchNorms leave their running statistics alone, as a forward that is run again should."""

    def __init__(self, body: nn.Module) -> None:
        self._norms = [part for part in body.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]

    def __enter__(self) -> None:
        for part in self._norms:
            part.track_running_stats = False

    def __exit__(self, *error: Any) -> None:
        for part in self._norms:
            part.track_running_stats = True
