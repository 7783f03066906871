"""AugLocal's heads: Ma, Su, Chen & Wu, Scaling Supervised Local Learning with Augmented Auxiliary Networks (2024; FACTS 1.5).

The head of a stage is a short version of what is above it. Let the network have L blocks, of which the stage's last one is
number ℓ (from 0; the classifier is none). Then the head has d_ℓ blocks, and its k-th one (k = 1 … d_ℓ) is like block

    round(ℓ + (L − ℓ − 1) k / d_ℓ)                                    so that the last is like the network's last
    d_ℓ = max(1, round(d (1 − τ s) + τ s)),   s = min(1, ℓ / (L − d − 2))

    d depth of the deepest head, at the first block; τ by how much depth shrinks on the way up: τ = 0 not at all, τ = 1 to 1.

"Like" is architecture alone: weights are the head's own, drawn anew, and nothing is shared with the stages above. A copied
block reads as many channels as the block before it gives. It halves maps if those are larger than the maps of the block it is
like, once a block; the rest is left to the next. In ResNets maps are halved where channels are doubled, which is the paper's
rule. After the blocks: mean over space, BatchNorm if there is one block only, fully connected layer.

Limits: a stage with nothing but the classifier above it has the mean and the fully connected layer. In the paper the last d
blocks are one stage, which learns from the network's own loss, so that no head is deeper than what it stands for; here d_ℓ is
at most L − ℓ − 1. A fully connected block reads the mean over the pixels of maps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..errors import InvalidChoice
from .copying import Block, adapted, blocks_of, copied, first_layer, shape_after, smaller
from .of_chain import OfChain
from .reading import channels_of, mean_row, read_out
from .spec import HeadSpec, Kind, at_least_one

if TYPE_CHECKING:
    from ..chain import Chain


def depth_of(block: int, blocks: int, d: int, tau: float) -> int:
    """d_ℓ for ℓ = `block` of L = `blocks`, at most as many blocks as there are above it."""
    last = blocks - d - 2  # of the paper's local stages
    share = min(1.0, block / last) if last > 0 else 0.0
    return min(max(1, round(d * (1 - tau * share) + tau * share)), blocks - block - 1)


def sampled(block: int, blocks: int, depth: int) -> list[int]:
    """Which blocks above ℓ = `block` the head's are like."""
    return [round(block + (blocks - block - 1) / depth * k) for k in range(1, depth + 1)]


@dataclass(frozen=True)
class AugLocalHead(OfChain):
    """Up to `d` blocks like some of the blocks above; `tau`: how much shallower heads get on the way up (see above).

    It has no width to shrink: give `budget=None`, or a budget of more than 1.
    """

    d: int = 6
    tau: float = 0.5

    def __post_init__(self) -> None:
        at_least_one(self.name, d=self.d)
        if not 0 <= self.tau <= 1:
            raise InvalidChoice(
                f"The head {self.name!r} shrinks its depth by a share tau; {self.tau} is not in [0, 1]."
            )

    @property
    def name(self) -> str:
        return "auglocal"

    def at(self, chain: Chain, stage: int) -> HeadSpec:
        """Raises InvalidChoice for a network with groups side by side: what is above a stage is then not one row of blocks."""
        if not chain.layout.plain:
            raise InvalidChoice(
                "The head 'auglocal' is made like the blocks above a stage, but this network has groups side by side, so that "
                "they are not one after the other; use another head, such as '1c2f'."
            )
        blocks = blocks_of(chain)[:-1]  # without the classifier
        block = sum(one.stage <= stage for one in blocks) - 1
        depth = depth_of(max(block, 0), len(blocks), self.d, self.tau) if blocks else 0
        return _LikeBlocks(tuple(blocks[k] for k in sampled(block, len(blocks), depth)))


@dataclass(frozen=True)
class _LikeBlocks(HeadSpec):
    """The same for one stage: which blocks the head's are like."""

    blocks: tuple[Block, ...] = field(repr=False)

    @property
    def name(self) -> str:
        return "auglocal"

    def layers(self, features: Tensor, kind: Kind, outputs: int, width: int) -> nn.Module:
        made: list[nn.Module] = []
        sample = tuple(features.shape[1:])
        for block in self.blocks:
            layer = _like(block, sample)
            sample = shape_after(layer, sample, block.module)
            made.append(layer)
        return nn.Sequential(*made, *read_out(sample, kind == "tokens", outputs, normalised=len(made) == 1))


def _like(block: Block, sample: tuple[int, ...]) -> nn.Module:
    """A block like `block` that reads samples of this shape."""
    if len(sample) == 3 and isinstance(first_layer(block.module), nn.Linear):  # a fully connected block
        return nn.Sequential(*mean_row("maps"), adapted(block, sample[0], halve=False))
    halve = len(sample) == len(block.after) == 3 and smaller(sample, block.after)
    same = len(sample) == len(block.before) and channels_of(sample) == channels_of(block.before)
    return copied(block.module) if same and halve == block.halves else adapted(block, channels_of(sample), halve)
