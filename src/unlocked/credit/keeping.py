"""What a stage keeps of a micro-batch between its forward and its backward, when updates may come between.

    graph    the forward's graph, with what it saved. The backward is the ordinary one; which weights it sees is said by the
             semantics (versions.py): stash, current or snapshot.
    input    the stage's input. The backward runs the forward again, with the weights of the forward (stash) or with
             today's (current).

A second forward draws the same random numbers and leaves buffers alone (BatchNorm statistics count a micro-batch once).
The last stage has no delay and always keeps its graph.

torch.utils.checkpoint inside a stage runs parts of the forward again by itself, with whatever weights are there then; under a
delay that would be a fourth semantics nobody chose, so it is refused: keep the input instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..batch import own_memory
from ..chain import Stage
from ..consensus.base import Weights
from ..errors import InvalidChoice, UnlockedError
from ..flight import InFlight
from ..modes import buffers_kept, statistics_kept
from ..probes.memory import count_saved
from ..versions import Reading, Semantics
from ..work import work
from ..worker import Worker
from .base import What, backward, leaf

Messages = tuple[Tensor, ...]


class Keeping(Protocol):
    """How a stage is run forward and backward. `messages` come from the stage above; the result goes to the one below.

    what: see `Held`.
    """

    @property
    def what(self) -> What: ...

    def forward(self, worker: Worker, stage: Stage, weights: Weights, entry: InFlight, x: Tensor) -> Tensor: ...

    def backward(
        self, worker: Worker, stage: Stage, weights: Weights, entry: InFlight, messages: Messages
    ) -> Messages: ...

    def revive(self, worker: Worker, stage: Stage, weights: Weights, entry: InFlight, graph: Any) -> None:
        """After a resume: make what `entry` does not hold as plain tensors."""


def settle(weights: Weights, entry: InFlight) -> None:
    """Which weights a forward sees: those of its version, or predicted ones."""
    mitigating = weights.mitigating
    if mitigating is None or entry.reading.version != weights.worker.version:
        return
    ahead = (weights.pending + len(weights.flight) - 1) // weights.store.accumulate
    entry.reading.weights = mitigating.predict(ahead)


def compensated(weights: Weights, entry: InFlight, backward: Callable[[], None]) -> None:
    """Run a backward; its gradients are mitigated by themselves before they join those that are there."""
    mitigating = weights.mitigating
    if mitigating is None or not mitigating.compensates:
        backward()
        return
    parameters = weights.parameters
    before = [x.grad for x in parameters]
    for x in parameters:
        x.grad = None
    backward()
    tau = weights.worker.version - entry.reading.version
    with torch.no_grad():
        fresh = mitigating.compensate([x.grad for x in parameters], entry.reading, tau, entry.weight)
        for x, old, new in zip(parameters, before, fresh):
            x.grad = new if old is None else old if new is None else old + new


class KeepGraph:
    """The forward's graph, its weights by `semantics`.

    shrink: factor on the gradient that goes down (but in a warm-up). with_input: the stage's input goes down, too.
    """

    def __init__(self, semantics: Semantics, shrink: float = 1.0, with_input: bool = False) -> None:
        self.semantics, self.shrink, self.with_input = semantics, shrink, with_input
        self.what: What = "graph+weights" if semantics == "snapshot" else "graph+buffers"

    @work("forward", gives=lambda self, worker, stage, weights, entry, x: ghost(stage, entry, x))
    def forward(self, worker: Worker, stage: Stage, weights: Weights, entry: InFlight, x: Tensor) -> Tensor:
        settle(weights, entry)
        entry.x = leaf(worker, own_memory(x))
        self._graph(worker, stage, weights, entry, None)
        assert entry.h is not None
        return entry.h

    def _graph(self, worker: Worker, stage: Stage, weights: Weights, entry: InFlight, again: Any) -> None:
        versions, reading = weights.versions, entry.reading
        assert entry.x is not None
        if worker.last:  # nothing is updated before its backward, so what it sees stays in place
            versions.put(reading)
            entry.h = stage.body(entry.x)
            return
        with versions.saving(reading, self.semantics, again) as entry.saved, versions.in_place(reading):
            entry.h = stage.body(entry.x)

    @work("backward", gives=lambda self, worker, stage, weights, entry, messages: (entry.x,) * (1 + self.with_input))
    def backward(self, worker: Worker, stage: Stage, weights: Weights, entry: InFlight, messages: Messages) -> Messages:
        assert entry.h is not None and entry.x is not None
        h, (gradient,) = entry.h, messages or (None,)
        entry.h = None  # the graph goes as the backward goes
        with _NoRecomputation(
            weights.versions.parts, worker, not (worker.last or weights.versions.is_today(entry.reading))
        ):
            compensated(weights, entry, lambda: backward(worker, stage, h, gradient))
        weights.versions.put_back()
        down = _down(entry, entry.x, self.shrink)
        return (entry.x.detach(), *down) if self.with_input and down else down

    def revive(self, worker: Worker, stage: Stage, weights: Weights, entry: InFlight, graph: Any) -> None:
        """Run the forward again; the activations it would keep are replaced by those it had kept."""
        assert entry.x is not None
        entry.x = leaf(worker, entry.x)
        saw = entry.reading
        if self.semantics != "stash" and saw.weights is None:
            entry.reading = Reading(worker.version)  # the old weights are gone; what the graph kept of them is in it
        with buffers_kept(weights.versions.parts):  # as the first time: a graph of the same make keeps the same tensors
            self._graph(worker, stage, weights, entry, graph)
        entry.reading = saw


class KeepInput:
    """The stage's input; the forward is run again with the weights it saw (`stash`) or today's (`current`).

    `shrink`: as above. Raises InvalidChoice for `snapshot`, which is a graph's.
    """

    what: What = "input"

    def __init__(self, semantics: Semantics, shrink: float = 1.0) -> None:
        if semantics == "snapshot":
            raise InvalidChoice(
                "Without a graph there is nothing that could keep a snapshot of the weights; take stash (the same "
                "numbers) or current."
            )
        self.semantics, self.shrink = semantics, shrink

    @work("forward", gives=lambda self, worker, stage, weights, entry, x: ghost(stage, entry, x))
    def forward(self, worker: Worker, stage: Stage, weights: Weights, entry: InFlight, x: Tensor) -> Tensor:
        settle(weights, entry)
        entry.x = own_memory(x.detach())
        count_saved(entry.x, entry)
        with torch.no_grad(), weights.versions.in_place(entry.reading), unchanged(worker, entry.x):
            return stage.body(entry.x)

    @work("forward", "backward", gives=lambda self, worker, stage, weights, entry, messages: (entry.x,))
    def backward(self, worker: Worker, stage: Stage, weights: Weights, entry: InFlight, messages: Messages) -> Messages:
        assert entry.x is not None
        x = leaf(worker, entry.x)
        seen = entry.reading if self.semantics == "stash" else Reading(worker.version)

        def again() -> None:
            with weights.versions.in_place(seen):  # around both: what runs again in the backward sees them, too
                backward(worker, stage, stage.body(x), messages[0])

        with statistics_kept(weights.versions.parts):
            compensated(weights, entry, again)
        return _down(entry, x, self.shrink)

    def revive(self, worker: Worker, stage: Stage, weights: Weights, entry: InFlight, graph: Any) -> None:
        """Everything is there."""


@contextlib.contextmanager
def unchanged(worker: Worker, x: Tensor) -> Iterator[None]:
    """Raises UnlockedError if what is done inside writes into `x`, which is kept for later."""
    before = x._version
    yield
    if x._version != before:
        raise UnlockedError(
            f"Stage {worker.stage} changes its input in place, but the input is kept to run the forward again; use operations "
            "that are not in place (inplace=False) there."
        )


def _down(entry: InFlight, x: Tensor, shrink: float) -> Messages:
    """The message to the stage below; none from the first stage, whose input has no gradient."""
    if x.grad is None:
        if x.requires_grad:
            raise UnlockedError("A stage's output does not depend on its input, so the stages below it cannot learn.")
        return ()
    return (x.grad if shrink == 1.0 or entry.plain else x.grad * shrink,)


def ghost(stage: Any, entry: InFlight, x: Any) -> Any:
    """Where nothing is computed: input and output have shapes."""
    entry.x = x
    entry.h = stage.body(x)
    return entry.h


class _NoRecomputation:
    """Context: refuses, in a sentence, whoever looks up a weight of the stage in its backward, if the weights are others now.

    A backward needs none: its graph has names in their place. Only a part of the forward that is run again does.
    """

    def __init__(self, parts: Iterable[nn.Module], worker: Worker, moved: bool) -> None:
        self._parts = [part for part in parts if part._parameters] if moved else []
        self._worker = worker

    def __enter__(self) -> None:
        self._before = [part._parameters for part in self._parts]
        for part in self._parts:
            part.__dict__["_parameters"] = _Watched(part, self._worker)  # past nn.Module's own bookkeeping

    def __exit__(self, *error: object) -> None:
        for part, before in zip(self._parts, self._before):
            part.__dict__["_parameters"] = before


class _Watched(dict):
    """A module's weights by name, not to be looked up."""

    def __init__(self, module: nn.Module, worker: Worker) -> None:
        super().__init__(module._parameters)
        self._module, self._worker = module, worker

    def __getitem__(self, name: str) -> Any:
        raise InvalidChoice(
            f"Stage {self._worker.stage} runs a part of its forward again in its backward ({type(self._module).__name__}; "
            "torch.utils.checkpoint?), but its weights have been updated since. Take the checkpointing out and let the "
            "method keep the input instead (keep='input'), which says with which weights it recomputes."
        )
