"""Where to cut a network so that staggered replicas retain little: the bytes of a stage times the time it retains them.

Under cyclic data parallelism with N = J (cyclic.py), if all replicas go on by one stage at a time, there are always
J − j micro-batches between the forward and the backward of stage j. So, with a_j the bytes of stage j:

    one device for all            sum over j of (J − j) a_j     equal a_j give (N + 1) / (2 N) of what DP needs
    a device for every stage      max over j of (J − j) a_j     the pipeline form; 1F1B and PipeDream-2BW hold as many

On one device the acts run one after another anyway, and uneven stages cost nothing. Where replicas wait for each other
a round is as long as its slowest act: there the cut is a choice between bytes and seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from ..errors import InvalidChoice, choose
from .cyclic import StageMemory

Holder = Literal["together", "each"]


def best_sizes(pieces: Sequence[StageMemory], stages: int, holder: Holder, slowest: float = math.inf) -> list[int]:
    """How many pieces each of J contiguous stages takes, so that N = J replicas in rounds retain the least. Exact.

    Args:
        pieces: what is not cut, in order; of their bytes only `kept` counts. stages: J, 1 to their number.
        holder: "together": one device holds all stages, so the sum counts; "each": a device for each, so the largest
            does.
        slowest: a factor of at least 1: how much longer than possible the slowest stage's forward and backward may take.
            Unbounded, "together" leaves almost everything to the last stage: that is one replica after another.

    Among the best, the slowest stage is as fast as it can be. O(pieces² J log pieces). Raises InvalidChoice.
    """
    choose("holder", holder, ("together", "each"))
    if not 1 <= stages <= len(pieces) or not slowest >= 1:
        raise InvalidChoice(
            f"{stages} stages of {len(pieces)} pieces with slowest={slowest} are not possible; give 1 to {len(pieces)} stages, "
            "and at least 1 for the slowest."
        )
    seconds = list(accumulate((piece.seconds for piece in pieces), initial=0.0))
    kept = list(accumulate((piece.kept for piece in pieces), initial=0))
    bounds = sorted({end - begin for k, end in enumerate(seconds) for begin in seconds[:k]})

    def size(bound: float) -> float:
        found = _sizes(seconds, kept, stages, holder, bound)
        return math.inf if found is None else found[0]

    least = bounds[bisect_left(bounds, True, key=lambda bound: size(bound) < math.inf)]
    allowed = [bound for bound in bounds if bound <= least * slowest]
    best = size(allowed[-1])
    fast = allowed[bisect_left(allowed, True, key=lambda bound: size(bound) <= best)]
    return _sizes(seconds, kept, stages, holder, fast)[1]  # type: ignore[index]  # just found


def _sizes(
    seconds: list[float], kept: list[int], stages: int, holder: Holder, bound: float
) -> tuple[int, list[int]] | None:
    """(bytes, sizes) of the best cut with no stage above `bound` seconds, from the prefix sums of the pieces; None:
    there is none."""
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for j in range(stages):
        longer: dict[int, tuple[int, list[int]]] = {}
        for end in range(1, len(kept)):
            for begin, (size, sizes) in best.items():
                if begin < end and seconds[end] - seconds[begin] <= bound:
                    mine = (stages - j) * (kept[end] - kept[begin])
                    total = size + mine if holder == "together" else max(size, mine)
                    if end not in longer or total < longer[end][0]:
                        longer[end] = (total, [*sizes, end - begin])
        best = longer
    return best.get(len(kept) - 1)
