"""Keep nothing of a micro-batch: what is reversible is reconstructed, from the top of the stage down (PETRA; FACTS 1.12, 2.7).

    the stage's units    u_1, …, u_n; reversible ones stand alone, the others are kept together in runs
    forward              z_i = u_i(z_{i−1}); the input z_{i−1} of a run that is not reversible is kept
    backward             from (z_n, δ_n):  reversible      z_{i−1}, δ_{i−1} = reverse(u_i; z_i, δ_i)        one evaluation of F
                                           not reversible  δ_{i−1} by running u_i again on the kept z_{i−1}

The weights are today's (`current`: then z_{i−1} is an approximation, exact if nothing was updated) or those of the forward
(`stash`). A unit that draws random numbers (dropout) draws the same again: the state before it is kept, some kilobytes.
Buffers are left alone by the second run, so BatchNorm statistics count a micro-batch once, when it comes by for the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..batch import own_memory
from ..chain import Stage
from ..consensus.base import Weights
from ..flight import InFlight
from ..modes import statistics_kept
from ..probes.memory import count_saved
from ..reversible import is_reversible, units
from ..versions import Reading
from ..work import work
from ..worker import Worker
from .base import What
from .keeping import Messages, compensated, ghost, settle, unchanged


def segments(body: nn.Module) -> list[nn.Module]:
    """The units of a body in order, those in a row that are not reversible as one."""
    parts: list[nn.Module] = []
    for reversible, group in groupby(units(body), is_reversible):
        row = list(group)
        parts += row if reversible else [_together(row)]
    return parts


def _together(row: list[nn.Module]) -> nn.Module:
    return row[0] if len(row) == 1 else nn.Sequential(*row)


class Reconstruct:
    """Nothing but the inputs of what cannot be reversed. `semantics`: whose weights reconstruct and differentiate."""

    what: What = "parts"

    def __init__(self, semantics: Literal["stash", "current"]) -> None:
        self.semantics = semantics

    @work("forward", gives=lambda self, worker, stage, weights, entry, x: ghost(stage, entry, x))
    def forward(self, worker: Worker, stage: Stage, weights: Weights, entry: InFlight, x: Tensor) -> Tensor:
        settle(weights, entry)
        with torch.no_grad(), weights.versions.in_place(entry.reading):
            return upwards(worker, _segments(weights, stage), entry, x)

    @work("forward", "backward", gives=lambda self, worker, stage, weights, entry, messages: (entry.x, entry.x))
    def backward(self, worker: Worker, stage: Stage, weights: Weights, entry: InFlight, messages: Messages) -> Messages:
        seen = entry.reading if self.semantics == "stash" else Reading(worker.version)
        below: list[Tensor] = []

        def backward() -> None:
            with weights.versions.in_place(seen):
                below.extend(downwards(worker, _segments(weights, stage), entry, *messages))

        with statistics_kept(weights.versions.parts):
            compensated(weights, entry, backward)
        return tuple(below)

    def revive(self, worker: Worker, stage: Stage, weights: Weights, entry: InFlight, graph: Any) -> None:
        """Everything is there."""


def _segments(weights: Weights, stage: Stage) -> list[nn.Module]:
    """Those of the stage's body, found once."""
    flight = weights.flight
    if flight.segments is None:
        flight.segments = segments(stage.body)
    return flight.segments


def upwards(worker: Worker, parts: Sequence[nn.Module], entry: InFlight, x: Tensor) -> Tensor:
    """The body's output; notes in `entry` what going down again needs."""
    before = worker.random_state()
    for position, part in enumerate(parts):
        if not is_reversible(part):
            entry.kept[position] = x = own_memory(x.detach())
            count_saved(x, entry)
        with unchanged(worker, x):
            x = part(x)
        after = worker.random_state()
        if not torch.equal(before, after):
            entry.random[position] = before
        before = after  # nothing is drawn between two parts
    return x


def downwards(worker: Worker, parts: Sequence[nn.Module], entry: InFlight, z: Tensor, gradient: Tensor) -> Messages:
    """From the body's output and its gradient to its input and its gradient; nothing from the first stage's input."""
    for position, part in reversed(list(enumerate(parts))):
        if position in entry.random:
            worker.set_random_state(entry.random[position])
        if is_reversible(part):
            z, gradient = part.reverse(z, gradient)
        else:
            z = entry.kept.pop(position).detach()
            found = _again(part, z, gradient, needed=position > 0 or not worker.first)
            if found is None:
                return ()
            gradient = found
    return z, gradient


def _again(part: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor, needed: bool) -> Tensor | None:
    """Run a part again and differentiate it; the gradient of its input, if that is needed."""
    x = x.requires_grad_() if needed else x
    with torch.enable_grad():
        h = part(x)
    if h.requires_grad:  # the first stage may begin with parts that have nothing to train
        torch.autograd.backward(h, gradient)
    return x.grad
