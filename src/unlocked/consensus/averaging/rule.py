"""The parameters of every rule that averages now and then, and what is refused of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...errors import InvalidChoice
from ..base import Consensus
from .codecs import codec


@dataclass(frozen=True, kw_only=True)
class Averaging(Consensus):
    """What these rules share.

    Args:
        period: updates from one averaging to the next, H; or one for each stage.
        staggered: stage j of J averages jH/J updates later than stage 0, so that the stages' exchanges come one by one.
        overlap: updates τ from the beginning of an exchange to its end, during which training goes on, 0 ≤ τ < H.
        compression: how values travel: "none", "bf16", "int8" or "int8:BLOCK", "topk:SHARE"; what is left out is not lost
            (exchange.py).
    """

    period: int | tuple[int, ...] = 8
    staggered: bool = False
    overlap: int = 0
    compression: str = "none"

    counts_updates: ClassVar[bool] = True
    planned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        periods = self.periods
        if not periods or not all(isinstance(h, int) and h >= 1 for h in periods):
            raise InvalidChoice(
                f"period={self.period!r} is not possible; give a whole number of updates of at least 1, or a tuple of one for "
                "each stage."
            )
        if not (isinstance(self.overlap, int) and 0 <= self.overlap < min(periods)):
            raise InvalidChoice(
                f"overlap={self.overlap} is not possible with a period of {min(periods)}: an exchange ends before the next one "
                f"begins; give a number from 0 to {min(periods) - 1}."
            )
        codec(self.compression)

    @property
    def periods(self) -> tuple[int, ...]:
        """All that there are."""
        return self.period if isinstance(self.period, tuple) else (self.period,)

    def period_of(self, stage: int, stages: int) -> int:
        """H of a stage. Raises InvalidChoice if there are not as many periods as stages."""
        if isinstance(self.period, int):
            return self.period
        if len(self.period) != stages:
            raise InvalidChoice(
                f"period={self.period} is for {len(self.period)} stages, but there are {stages}; give one number for each, or "
                "one for all."
            )
        return self.period[stage]

    def offset_of(self, stage: int, stages: int) -> int:
        """By how many updates a stage is later than stage 0."""
        return stage * self.period_of(stage, stages) // stages if self.staggered else 0

    def cycle(self, stages: int) -> int:
        return math.lcm(*self.periods)

    @property
    def crossing(self) -> frozenset[str]:
        """What is exchanged beside the training may be under way between two steps."""
        return frozenset(self.channels) if self.overlap else frozenset()

    @property
    def channels(self) -> list[str]:
        """Of exchanges that may be under way."""
        return [f"{self.name}/parts", f"{self.name}/means"]
