"""Micro-batches between their forward and their backward: what a delayed rule carries from one step to the next.

It lives beside a worker's weights (`Weights.flight`), so that a program may end with its step while the pipeline stays full. A
checkpoint saves it: `state` and `load`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .versions import Reading, Saved


class InFlight:
    """One micro-batch of one stage: its number and share (`weight`) of its update, the weights its forward saw, whether it
    came in a warm-up without delay (`plain`), and what is kept for its backward.

    x: the stage's input, or None if it is not kept. h: the output with its graph (the loss at the last stage), or None.
    saved: what that graph keeps. kept: inputs of the parts that cannot be inverted, by their position. random: states of
    the random numbers before the parts that draw some, by their position.
    """

    __slots__ = ("__weakref__", "h", "kept", "number", "plain", "random", "reading", "saved", "weight", "x")

    def __init__(self, number: int, reading: Reading, plain: bool, weight: float) -> None:
        self.number, self.reading, self.plain, self.weight = number, reading, plain, weight
        self.x: Tensor | None = None
        self.h: Tensor | None = None
        self.saved: Saved | None = None
        self.kept: dict[int, Tensor] = {}
        self.random: dict[int, Tensor] = {}

    def state(self) -> dict[str, Any]:
        """Everything but the graph, which `saved` lets one make again."""
        graph = None if self.saved is None or self.x is None else self.saved.kept(without=self.x)
        return {
            "number": self.number,
            "plain": self.plain,
            "weight": self.weight,
            "version": self.reading.version,
            "weights": self.reading.weights,
            "x": None if self.x is None else self.x.detach(),
            "graph": graph,
            "kept": {str(position): x for position, x in self.kept.items()},
            "random": {str(position): x for position, x in self.random.items()},
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> InFlight:
        """The inverse of `state`, without the graph."""
        entry = cls(state["number"], Reading(state["version"], state["weights"]), state["plain"], state["weight"])
        entry.x = state["x"]
        entry.kept = {int(position): x for position, x in state["kept"].items()}
        entry.random = {int(position): x for position, x in state["random"].items()}
        return entry


class Flight:
    """The micro-batches of a stage in flight, the oldest first, and messages taken before their turn."""

    def __init__(self) -> None:
        self.queue: deque[InFlight] = deque()
        self.received: deque[tuple[Tensor, ...]] = deque()
        self.standing: int | None = None  # a version of the weights that the next step asks for
        self.base = 0  # updates less steps, for rules that count on them
        self.segments: list[nn.Module] | None = None  # the body's, for rules that go through it part by part

    def __len__(self) -> int:
        return len(self.queue)
