"""What replicas retain of activations when their gradients begin one after another, or all at once.

Fournier and Oyallon, "Cyclic Data Parallelism for Efficient Parallelism of Deep Neural Networks" (Fournier's thesis,
chapter 5, Figures 5.1 and 5.4, Table 5.1).

    F_j, B_j    seconds of the forward and backward of stage j of J (from 0);  T = sum of F_j + B_j
    a_j         bytes that stage j retains from the BEGIN of its forward to the END of its backward
    L_j         so long: T − (F_0 + … + F_(j−1)) − (B_0 + … + B_(j−1))
    s_n         when replica n of N (from 0) begins its gradients: n T / N under cyclic data parallelism (CDP), else 0 (DP)

In the steady state every replica begins its next gradient as it ends one, so the sum of all is a function of time
modulo T. At a moment when one activation is freed and another begins, the freed one goes first. With these two
conventions (the thesis' Lemma C.2.1: a stage is occupied while it computes, too) and N = J equal stages the sum is

    L_j / T = (N − j) / N

    CDP   a · N (N + 1) / 2 at every moment        DP   a · N · N at its peak        ratio (N + 1) / (2 N)

One device that runs the acts of a moment one after another, backwards first, needs less (`serial`): bytes are there
from the END of a forward, so with N = J equal stages it is at most a · N² / 2 for an even N, a · (N² + 1) / 2 for an
odd one.

Whatever the stages and the starts, the mean over time is N · sum of a_j L_j / T: no starts can bring the peak below it.
So N replicas together need at least mean / peak of what one needs by itself, and CDP comes near that as N grows. What
lowers it is another course of one replica's own curve: fewer bytes in the stages that retain them for long.

Limits: messages, gradients, and what a kernel takes while it runs are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import cast

from ..errors import InvalidChoice
from .costs import Costs
from .memory import Curve, together


@dataclass(frozen=True)
class StageMemory:
    """One stage and one micro-batch: seconds of its forward and its backward, and the bytes it retains.

    kept: from the begin of its forward to the end of its backward. again: besides, while its backward runs (what is
    made again from the kept input; 0 where the whole graph is kept).
    """

    forward: float
    backward: float
    kept: int
    again: int = 0

    def __post_init__(self) -> None:
        for value in (self.forward, self.backward, self.kept, self.again):
            if not 0 <= value < math.inf:
                raise InvalidChoice(f"{self} is not possible; seconds and bytes must be finite and at least 0.")

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Retained:
    """Bytes that all replicas retain together, in the steady state.

    period: T, seconds of a gradient. curve: (seconds, bytes from then on) over one period; it goes on as it began.
    peak, mean: of the curve over time.
    """

    period: float
    curve: Curve
    peak: int
    mean: float


Exact = list[tuple[Fraction, int]]  # a curve whose moments are not rounded


def retained(stages: Sequence[StageMemory], replicas: int, cyclic: bool = True, serial: bool = False) -> Retained:
    """What N replicas retain that begin evenly one after another (`cyclic`), or all at once. Exact.

    `serial`: one device computes for all of them, see above.

    Raises InvalidChoice (no replica, or stages that take no time at all).
    """
    if replicas < 1:
        raise InvalidChoice(f"{replicas} replicas are not possible; give at least 1.")
    return staggered(*one_gradient(stages, serial), even_starts(replicas) if cyclic else [Fraction(0)] * replicas)


def even_starts(replicas: int) -> list[Fraction]:
    """When each replica begins, in shares of a gradient's time: n / N."""
    return [Fraction(n, replicas) for n in range(replicas)]


def one_gradient(stages: Sequence[StageMemory], serial: bool = False) -> tuple[Exact, Fraction]:
    """(what one replica retains from the begin to the end of a gradient, its seconds). `serial`: as above."""
    forwards = list(accumulate((Fraction(stage.forward) for stage in stages), initial=Fraction(0)))
    backwards = list(accumulate((Fraction(stage.backward) for stage in stages), initial=Fraction(0)))
    period = forwards[-1] + backwards[-1]
    curves: list[Exact] = [[(Fraction(0), 0)]]
    for j, stage in enumerate(stages):
        end = period - backwards[j]
        curves.append([(forwards[j + serial], stage.kept), (end, 0)])
        curves.append([(period - backwards[j + 1], stage.again), (end, 0)])
    return _sum(curves), period


def staggered(
    curve: Sequence[tuple[float | Fraction, int]], period: float | Fraction, starts: Sequence[float | Fraction]
) -> Retained:
    """What replicas retain together that each retain `curve` over a gradient, and begin at `starts`.

    Args:
        curve: as `one_gradient` gives it, or as it was measured: (seconds, bytes from then on) from 0 on; what it says
            from `period` (seconds of a gradient) on is left out, as the next gradient begins there.
        starts: one for each replica, in shares of the period; whole gradients make no difference.

    Raises InvalidChoice (no replica, a period of 0).
    """
    if not period > 0 or not starts:
        raise InvalidChoice(
            f"{len(starts)} replicas and {float(period)} seconds for a gradient are not possible; give at least one replica "
            "and more than 0 seconds."
        )
    whole = Fraction(period)
    own = {Fraction(when): level for when, level in curve if when < period}
    summed = _sum([_shifted(own, Fraction(start) * whole, whole) for start in starts])
    lengths = [end - begin for (begin, _), (end, _) in pairwise([*summed, (whole, 0)])]
    area = sum(level * length for (_, level), length in zip(summed, lengths))
    levels = [(float(when), level) for when, level in summed]
    return Retained(float(whole), levels, max(level for _, level in levels), float(area / whole))


def _shifted(own: Mapping[Fraction, int], start: Fraction, period: Fraction) -> Exact:
    """A curve that begins later and goes on from its end at its begin."""
    later = sorted(((when + start) % period, level) for when, level in own.items())
    return later if later[0][0] == 0 else [(Fraction(0), later[-1][1]), *later]


def _sum(curves: list[Exact]) -> Exact:
    return cast(Exact, together(cast(list[Curve], curves)))  # it only compares and sorts moments


# ---- stages ----------------------------------------------------------------------------------------------------------


def stage_memories(costs: Costs, samples: int) -> list[StageMemory]:
    """The stages of a chain as a micro-batch of so many samples finds them, heads and losses included."""
    rows = []
    for stage in (costs[j] for j in range(len(costs))):
        forward = stage.of(("forward", "head-forward"), samples)
        backward = stage.of(("head-backward", "backward"), samples)
        kept = round(stage.profile.kept.at(samples)) + round(stage.profile.head_kept.at(samples))
        rows.append(StageMemory(forward, backward, kept))
    return rows


def in_rounds(stages: Sequence[StageMemory]) -> list[StageMemory]:
    """The same bytes where all replicas go on by one stage at a time: an act takes one round, however long that is."""
    return [StageMemory(1, 1, stage.kept, stage.again) for stage in stages]
