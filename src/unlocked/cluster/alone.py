"""A crew of one: the run has this process only."""

from __future__ import annotations

from typing import Any

from ..pool import LocalPool, Pool
from .base import Wish


class Alone:
    """One process agrees with itself."""

    rank, size, chief = 0, 1, True

    def __init__(self) -> None:
        self.stopped_by: Wish | None = None
        self._wished: Wish | None = None

    def share(self, value: Any) -> list[Any]:
        """A list of one."""
        return [value]

    def broadcast(self, value: Any = None) -> Any:
        """The value itself."""
        return value

    def barrier(self) -> None:
        """Nobody to wait for."""

    def agree(self, facts: dict[str, Any], where: str) -> None:
        """Nobody to differ from."""

    def fail(self, error: BaseException) -> None:
        """Nobody to tell."""

    def wish(self, kind: Wish) -> None:
        """Stop before the next step."""
        self._wished = kind

    @property
    def stopping(self) -> bool:
        """Whether somebody has wished to stop."""
        return self._wished is not None

    @property
    def changing(self) -> bool:
        """Never."""
        return False

    def pool(self, begin: int, end: int, size: int) -> Pool:
        """For the workers of this process."""
        return LocalPool(begin, end, size)

    def enter(self, step: int) -> bool:
        """True once after somebody wished to stop."""
        if self._wished is None:
            return False
        self.stopped_by, self._wished = self._wished, None
        return True
