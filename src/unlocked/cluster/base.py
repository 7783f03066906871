"""What a session asks of the processes it runs on, be they one or many."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from ..pool import Pool

Wish = Literal["interrupt", "terminate"]  # Ctrl-C, SIGTERM


class Crew(Protocol):
    """The processes of a run. All of them make the same calls in the same order."""

    rank: int
    size: int

    @property
    def chief(self) -> bool:
        """Whether this process writes the files of the run that are written once: rank 0."""

    @property
    def stopped_by(self) -> Wish | None:
        """Why `enter` said stop."""

    def share(self, value: Any) -> list[Any]:
        """Everybody's value (JSON), in the order of the ranks; waits for all of them."""

    def broadcast(self, value: Any = None) -> Any:
        """The value of rank 0 (JSON)."""

    def barrier(self) -> None:
        """Wait for all of them."""

    def agree(self, facts: dict[str, Any], where: str) -> None:
        """Check that all were told the same. Raises CannotJoin naming the first fact that differs, and on whom."""

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process cannot go on, and why."""

    def wish(self, kind: Wish) -> None:
        """Ask all of them to stop after a whole step. Safe in a signal handler."""

    @property
    def stopping(self) -> bool:
        """Whether somebody has wished to stop."""

    @property
    def changing(self) -> bool:
        """Whether members are lost or want to join, so that all should come to a roll call soon."""

    def pool(self, begin: int, end: int, size: int) -> Pool:
        """The batches `begin` … `end` − 1 for all of them to take from, `size` to a round."""

    def enter(self, step: int) -> bool:
        """Called before each step: False to go on, True to stop now, at the same step on every process."""
