"""What every world offers: workers, and the running of their programs."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from ..cluster import Crew
from ..timeline import Timeline
from ..worker import Worker

Program = Coroutine[Any, Any, None]


class World(Protocol):
    """Where workers live and what waiting means there."""

    @property
    def crew(self) -> Crew:
        """The processes the workers are spread over."""

    def mesh(
        self,
        replicas: int,
        stages: int,
        seed: int = 0,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
        device: torch.device | None = None,
    ) -> list[Worker]:
        """The workers of a mesh of N replicas × J stages that live in this process.

        Args:
            seed: of all their random numbers. context: entered around every computation (autocast), or None.
            device: where they compute.
        """

    def run(self, programs: Iterable[tuple[Worker, Program]]) -> Timeline:
        """Run the programs of those workers to their ends; returns what they did. See in_process.py for what it raises."""

    def close(self) -> None:
        """Let go of connections and processes."""
