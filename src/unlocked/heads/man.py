"""MAN's head: Su et al., Momentum Auxiliary Network for Supervised Local Learning (2024; FACTS 1.6).

    ℓ^j = CE(fc(mean(P(h) + E(h))), y)          h = x^{j+1}, the output of stage j
    E ← m E + (1 − m) B                         before every update of stage j

    B the first block of stage j + 1, as stage j + 1 has it now; E its exponential moving average, m the momentum, which no
    gradient changes; P a block like B that is trained with the head; mean over space, fc fully connected.

So a stage is told, slowly, what the next one makes of its output. The gradient goes through both blocks to h, and no further
up. B comes as a message (credit/lending.py), at the start of every `period`-th step.

P and E are drawn anew after they are copied, as in the authors' code: E does not start at B, and comes near it in 1 / (1 − m)
steps. With `fresh=False` both start with B's weights. Only weights are averaged: E's BatchNorm has statistics of its own, as
every BatchNorm has, of what E itself computes, because it is E's and not B's activations that they are to normalise.

Limits: m = 1 leaves E as it was drawn, a fixed random block. m = 0 makes E a copy of B in every step. In greedy learning, where
stage j + 1 is not trained yet, nothing is lent, and E stays as it was drawn, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..errors import InvalidChoice
from .copying import copied, has_matrix, modules_of, shape_after
from .of_chain import OfChain
from .reading import read_out
from .spec import HeadSpec, Kind, at_least_one

if TYPE_CHECKING:
    from ..chain import Chain


@dataclass(frozen=True)
class MANHead(OfChain):
    """A trained block plus a moving average of the next stage's first block, mean, fully connected layer.

    Args:
        momentum: m in [0, 1]; the paper's are 0.995 to 0.999.
        period: steps from one averaging to the next. 1, the paper's, makes each step wait until the next stage has ended the
            one before; P > 1 waits once in P steps (and an average over so many steps as before needs the momentum m^P).
        fresh: whether both blocks are drawn anew, or start as the next stage's.

    It has no width to shrink: give `budget=None`, or a budget of more than 1.
    """

    momentum: float = 0.995
    period: int = 1
    fresh: bool = True

    def __post_init__(self) -> None:
        at_least_one(self.name, period=self.period)
        if not 0 <= self.momentum <= 1:
            raise InvalidChoice(f"The head {self.name!r} averages with a momentum in [0, 1]; given {self.momentum}.")

    @property
    def name(self) -> str:
        return "man"

    def at(self, chain: Chain, stage: int) -> HeadSpec:
        """Raises InvalidChoice where the stage above is not one, or begins with nothing to average."""
        depth = chain.layout.depth(stage)
        if len(chain.layout.row(depth)) > 1 or len(chain.layout.row(depth + 1)) > 1:
            raise InvalidChoice(
                "The head 'man' follows the first block of the next stage, but here several stages stand side by side; use "
                "another head, such as '1c2f'."
            )
        block = first_block(chain[stage + 1].body)
        if not has_matrix(block):
            raise InvalidChoice(
                f"The head 'man' follows the first block of the next stage, but stage {stage + 1} has no weights; cut the "
                "network elsewhere, or use another head, such as '1c2f'."
            )
        return _Following(self.momentum, self.period, self.fresh, stage + 1, block)


def first_block(body: nn.Module) -> nn.Sequential:
    """The first block of a stage's body: its own modules, in a new sequence."""
    return modules_of(body)[0]


@dataclass(frozen=True)
class _Following(HeadSpec):
    """The same for one stage: the block that it follows, and where that is."""

    momentum: float
    period: int
    fresh: bool
    source: int
    block: nn.Sequential = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return "man"

    def layers(self, features: Tensor, kind: Kind, outputs: int, width: int) -> nn.Module:
        from .following import Following  # what it is, a Borrower, is defined beside the rules, which need heads

        after = shape_after(self.block, features.shape[1:], self.block)
        read = nn.Sequential(*read_out(after, kind == "tokens", outputs))
        trained, average = (copied(self.block, self.fresh) for _ in range(2))
        return Following(trained, average, read, self.momentum, self.source, self.period)
