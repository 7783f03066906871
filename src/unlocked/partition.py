"""The best way to split a row of costs into J contiguous parts.

Best: the largest part is as small as it can be (exact, by dynamic programming over O(n² J) splits); among those, the sum of
squared parts is smallest, so that the parts below the largest are even too; among those, the earliest cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def partition(costs: Sequence[float], parts: int) -> list[int]:
    """How many items each of the `parts` contiguous, non-empty parts takes.

    Args: `costs` ≥ 0, n of them; 1 ≤ `parts` ≤ n. Returns `parts` positive integers that sum to n. Raises ValueError else.
    """
    n = len(costs)
    if not 1 <= parts <= n:
        raise ValueError(f"{n} item(s) cannot be split into {parts} non-empty part(s).")
    prefix = [0.0, *accumulate(costs)]
    bound = _min_max(prefix, parts)
    return _evenest(prefix, parts, bound)


def _min_max(prefix: list[float], parts: int) -> float:
    """The smallest possible largest part."""
    n = len(prefix) - 1
    best = [float("inf")] * (n + 1)
    best[0] = 0.0
    for _ in range(parts):
        best = [
            min((max(best[i], prefix[j] - prefix[i]) for i in range(j)), default=float("inf")) for j in range(n + 1)
        ]
    return best[n]


def _evenest(prefix: list[float], parts: int, bound: float) -> list[int]:
    """Among splits with no part above `bound`, one with the smallest sum of squares."""
    n = len(prefix) - 1
    inf = float("inf")
    best = [0.0] + [inf] * n
    choices: list[list[int]] = []
    for _ in range(parts):
        row, choice = [inf] * (n + 1), [0] * (n + 1)
        for j in range(1, n + 1):
            for i in range(j):
                size = prefix[j] - prefix[i]
                if size <= bound and best[i] + size * size < row[j]:
                    row[j], choice[j] = best[i] + size * size, i
        best = row
        choices.append(choice)
    sizes, j = [], n
    for choice in reversed(choices):
        sizes.append(j - choice[j])
        j = choice[j]
    return sizes[::-1]
