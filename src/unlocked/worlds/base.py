"""What every world offers: workers, and the running of their programs."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from ..chain import Chain
from ..cluster import Crew
from ..timeline import Timeline
from ..worker import Worker

Program = Coroutine[Any, Any, None]


class World(Protocol):
    """Where workers live and what waiting means there.

    `crossing`: channels whose messages may be left over when a run ends, to be taken in a later one.
    """

    crossing: frozenset[str]

    @property
    def crew(self) -> Crew:
        """The processes the workers are spread over."""

    def mesh(
        self,
        replicas: int | Sequence[int],
        stages: int,
        seed: int = 0,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
        device: torch.device | None = None,
        chain: Chain | None = None,
    ) -> list[Worker]:
        """The workers of a mesh of N replicas × J stages that live in this process.

        Args:
            replicas: N for every stage, or one number for each.
            seed: of all their random numbers. context: entered around every computation (autocast), or None.
            device: where they compute. chain: the network; a world with a clock reads its costs off it.
        """

    def run(self, programs: Iterable[tuple[Worker, Program]], charged: bool = True) -> Timeline:
        """Run the programs of those workers to their ends; returns what they did. See in_process.py for what it raises.

        `charged`: whether it takes time where the clock is not the wall's; an evaluation does not.
        """

    def clock(self) -> float:
        """Seconds since some moment, of the clock that training takes its time from."""

    def close(self) -> None:
        """Let go of connections and processes."""
