"""Heads that depend on the network: built for a stage of a chain only, not from an example of its output alone."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..errors import InvalidChoice
from .spec import HeadSpec, Kind

if TYPE_CHECKING:
    from ..chain import Chain


class OfChain(HeadSpec):
    """A recipe that `at` makes complete; by itself it can build nothing."""

    @abstractmethod
    def at(self, chain: Chain, stage: int) -> HeadSpec:
        """The complete recipe for this stage. Raises InvalidChoice if the network gives no such head."""

    def reads(self, kind: Kind) -> bool:
        return False  # so that it is never named as a head that would fit instead

    def layers(self, features: Tensor, kind: Kind, outputs: int, width: int) -> nn.Module:
        raise NotImplementedError

    def make(self, features: Tensor, outputs: int, per_token: bool, width: int | None = None) -> nn.Module:
        raise InvalidChoice(
            f"The head {self.name!r} depends on the network, so it is built for a stage of a chain only: give it to a credit "
            f"rule, for example DGL(head={self.name!r}, budget=None)."
        )
