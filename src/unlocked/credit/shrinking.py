"""Gradients that shrink at every hop: what DDG, features replay and FDG have in common (FACTS 1.13).

    δ^j ← β δ^j  on its way from stage j to stage j − 1, so that stage j learns from β^{J−1−j} of its gradient

j stage of J (from 0), β shrinking factor. In a warm-up without delay nothing shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidChoice
from .delayed import Delayed
from .keeping import KeepGraph, Keeping


@dataclass(frozen=True)
class Shrinking(Delayed):
    """A delayed rule with a factor on the gradient.

    Args:
        shrink: β > 0, factor on the gradient at every hop; 1: none.
        drain, warm_up: see `Delayed`.
    """

    shrink: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.shrink < float("inf"):
            raise InvalidChoice(
                f"shrink={self.shrink} is not possible; give a number above 0 (1: none; the papers: 0.2 to 1)."
            )

    @property
    def last(self) -> Keeping:
        return KeepGraph("stash", self.shrink)
