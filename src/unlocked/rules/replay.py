"""A bounded buffer that one stage writes and the next one samples from (Belilovsky, Eickenberg & Oyallon, 2020, Algorithm 2).

    put     when M entries are there, the oldest is overwritten
    take    least-used    of the entries with the fewest uses the freshest (the paper's)
            fifo          of the entries with the fewest uses the oldest (in the order of their coming)
            uniform       any entry, each with the same probability
    spent   an entry that was used `reuse` times is dropped

M capacity. Uses are counted from 0 here; counted from 1 at the insertion, as in the authors' code, the order is the same.

Limits: M = 1 holds what came last, and all policies are one. With reuse = 1 nothing is used twice, and least-used is last in,
first out. When every entry is taken once before the next comes, all policies give what came, in its order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

from ..errors import InvalidChoice, choose

Policy = Literal["least-used", "fifo", "uniform"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
Kept = TypeVar("Kept")


@dataclass(eq=False)
class Entry(Generic[Kept]):
    """What is kept, its place in the order of coming, and how often it was taken."""

    what: Kept
    order: int
    uses: int = 0


class Replay(Generic[Kept]):
    """The buffer and its books.

    Args:
        capacity: M ≥ 1. policy: which entry is taken. reuse: times an entry may be taken, ≥ 1; None: as often as one likes.

    Attributes: `entries` (the oldest first), and the books: `received` (how many were put), `left` (number of uses → entries
    that have left with so many; those with 0 were overwritten before anybody took them). Raises InvalidChoice.
    """

    def __init__(self, capacity: int, policy: Policy = "least-used", reuse: int | None = None) -> None:
        check(capacity, policy, reuse)
        self.capacity, self.policy, self.reuse = capacity, policy, reuse
        self.entries: list[Entry[Kept]] = []
        self.received = 0
        self.left: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def fresh(self) -> int:
        """How many entries were never taken."""
        return sum(entry.uses == 0 for entry in self.entries)

    def put(self, what: Kept, uses: int = 0) -> None:
        """Keep it, in place of the oldest if there is no room. uses: how often it was taken already (from a checkpoint)."""
        if len(self.entries) >= self.capacity:
            self.left[self.entries.pop(0).uses] += 1
        order = self.entries[-1].order + 1 if self.entries else 0
        self.entries.append(Entry(what, order, uses))
        self.received += 1

    def take(self, draw: int = 0, *, fresh: bool = False) -> Kept | None:
        """One entry by the policy, with the use counted; None: there is none.

        draw: a random whole number ≥ 0, for "uniform". fresh: only of those that were never taken.
        """
        allowed = [entry for entry in self.entries if entry.uses == 0] if fresh else self.entries
        if not allowed:
            return None
        entry = self._chosen(allowed, draw)
        entry.uses += 1
        if entry.uses == self.reuse:
            self.entries.remove(entry)
            self.left[entry.uses] += 1
        return entry.what

    def drop_unused(self) -> None:
        """Let go of what was never taken."""
        self.left[0] += self.fresh
        self.entries = [entry for entry in self.entries if entry.uses]

    def _chosen(self, allowed: list[Entry[Kept]], draw: int) -> Entry[Kept]:
        if self.policy == "uniform":
            return allowed[draw % len(allowed)]
        sign = 1 if self.policy == "fifo" else -1
        return min(allowed, key=lambda entry: (entry.uses, sign * entry.order))

    def close_books(self) -> dict[str, Any]:
        """What came and went since the last time: received + entries before = Σ left + entries now."""
        left = {str(uses): count for uses, count in sorted(self.left.items()) if count}
        told: dict[str, Any] = {
            "received": self.received,
            "overwritten": self.left[0],
            "left": left,
            "kept": len(self.entries),
        }
        self.received, self.left = 0, Counter()
        return told


def check(capacity: Any, policy: Any, reuse: Any) -> None:
    """Raises InvalidChoice for what is no buffer."""
    choose("policy", policy, POLICIES)
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
        raise InvalidChoice(
            f"A buffer of {capacity!r} micro-batches is not possible; give a whole number of at least 1."
        )
    if reuse is not None and (isinstance(reuse, bool) or not isinstance(reuse, int) or reuse < 1):
        raise InvalidChoice(
            f"reuse={reuse!r} is no number of uses; give a whole number of at least 1, or None for any."
        )
