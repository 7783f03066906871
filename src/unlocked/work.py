"""What a computation consists of, so that a world with a clock can charge for it, or do without doing it.

A method says nothing more than the kind of its acts, and that is enough for most: an F is the stage's forward, a B its
backward (to its weights and its input; `weight-backward` and `input-backward` are to one of them), an L its head, a U an
update. A function that does something else says so beside its definition:

    @work("head-forward", "head-backward", "weight-backward")
    def local_backward(worker, stage, h, batch): …

    @work("input-backward", gives=lambda h, x, gradient: x)
    def through(h, x, gradient): …

A function that runs a network that is no part of the stage gives that network with `network=`: what it was given → (the
network, an example of its input). Its forward is counted as a stage's is.

`gives` tells what comes out where nothing is computed (shapes only): there tensors are ghosts (simulation/ghosts.py), which
have a shape and a dtype and no values. Without it the answer is None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

F = TypeVar("F", bound=Callable[..., Any])

Work = Literal["forward", "backward", "weight-backward", "input-backward", "head-forward", "head-backward", "update"]
WORKS: tuple[Work, ...] = get_args(Work)

USUAL: dict[str, tuple[Work, ...]] = {
    "F": ("forward",),
    "B": ("backward",),
    "L": ("head-forward", "head-backward"),
    "U": ("update",),
}


def work(
    *parts: Work, gives: Callable[..., Any] | None = None, network: Callable[..., Any] | None = None
) -> Callable[[F], F]:
    """Declare what a function given to `worker.run` does, and what it gives where nothing is computed."""

    def declare(function: F) -> F:
        function.work = parts  # type: ignore[attr-defined]
        function.gives = gives  # type: ignore[attr-defined]
        function.network = network  # type: ignore[attr-defined]
        return function

    return declare
