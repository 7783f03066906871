"""What rules with an oracle share: which one it is, and when it is looked at."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from ..chain import Chain
from ..errors import InvalidChoice
from ..heads import HeadReport
from .contrasting import Contrasting
from .oracle import Oracle

if TYPE_CHECKING:
    from ..session import Trainer


class AskingOracle(Contrasting):
    """A rule that learns from pairs of views which another network judges. `oracle`: see oracle.py."""

    oracle: Any

    @functools.cached_property
    def _oracle(self) -> Oracle:
        return Oracle(self.oracle, self.name)

    def asks(self, stages: int) -> bool:
        """Whether so many stages cannot be trained without it."""
        return True

    def prepare(self, chain: Chain, seed: int) -> list[HeadReport]:
        reports = super().prepare(chain, seed)
        if self.asks(len(chain)):
            self._oracle.check_at_hand(chain.example())
            self._oracle.refuse_shared(chain)
        return reports

    def meet(self, trainer: Trainer, data: Any) -> None:
        super().meet(trainer, data)
        if not self.asks(trainer.stages):
            return
        digest = self._oracle.digest
        if trainer.oracle not in (None, digest):
            raise InvalidChoice(
                f"{self.name}'s oracle is not the one that this run was trained with: its weights are others now. Put the old "
                "ones back in its place, or begin a new run."
            )
        trainer.oracle = digest

    def check_data(self, data: Any, batch_size: int | None, accumulate: int) -> None:
        super().check_data(data, batch_size, accumulate)
        if self.oracle is not None and self.asks(2):  # none at all is for `prepare` to refuse
            self._oracle.check(torch.zeros(2, *data.input_shape))
