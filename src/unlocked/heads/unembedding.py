"""The output layer of a language model as a local head: with weights of its own, or reading the network's.

    unembedding           a^j(h) = W^j N^j(h)
    shared-unembedding    a^j(h) = sg[W] N^j(h)

    h output of stage j (B, T, D), N^j its own LayerNorm with gain and shift, W^j (V, D) its own projection without a bias, W
    the projection that ends the last stage (with its bias, if it has one), sg stop-gradient.

The norm stands where GPT-2 has it: between the residual stream and the projection. Each position is read alone, so a head is as
causal as the blocks below it. With one label per sample, tokens are averaged after the norm, as in this library's ViT.

W comes from the last stage by messages (credit/lending.py), at the start of every `period`-th step. Limits: the shared head's
only parameters are 2 D of the norm; with a last stage that is never updated it is a fixed random projection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from ..costs import run_once
from ..errors import InvalidChoice
from ..models.transformer import STANDARD_DEVIATION
from .of_chain import OfChain
from .spec import HeadSpec, Kind, at_least_one, channels, to_rows

if TYPE_CHECKING:
    from ..chain import Chain

NEEDS = "tokens (B, T, D) or vectors (B, D)"


@dataclass(frozen=True)
class UnembeddingHead(HeadSpec):
    """LayerNorm, projection without a bias; its weights start as a GPT's do, normal(0, 0.02)."""

    needs: ClassVar[str] = NEEDS

    @property
    def name(self) -> str:
        return "unembedding"

    def reads(self, kind: Kind) -> bool:
        return kind != "maps"

    def layers(self, features: Tensor, kind: Kind, outputs: int, width: int) -> nn.Module:
        rows, length = to_rows(kind, channels(features))
        projection = nn.Linear(length, outputs, bias=False)
        nn.init.normal_(projection.weight, std=STANDARD_DEVIATION)
        return nn.Sequential(nn.LayerNorm(length), *rows, projection)


@dataclass(frozen=True)
class SharedUnembeddingHead(OfChain):
    """LayerNorm of its own, then the last stage's projection, which it reads and never changes.

    Args:
        period: steps from one copy of the projection to the next. 1: always the newest, and each step waits for the last stage
            to have ended the one before. P > 1: it waits once in P steps, and reads a projection up to P − 1 updates old.
    """

    period: int = 1

    def __post_init__(self) -> None:
        at_least_one(self.name, period=self.period)

    @property
    def name(self) -> str:
        return "shared-unembedding"

    def at(self, chain: Chain, stage: int) -> HeadSpec:
        """Raises InvalidChoice if the last stage does not end in a linear layer."""
        inside, linear = output_projection(chain)
        return _Reading(self.period, len(chain) - 1, inside, linear)


@dataclass(frozen=True)
class _Reading(HeadSpec):
    """The same, once it is known what is read: the linear layer called `inside` in the body of stage `source`."""

    period: int
    source: int
    inside: str
    linear: nn.Linear = field(repr=False, compare=False)

    needs: ClassVar[str] = NEEDS

    @property
    def name(self) -> str:
        return "shared-unembedding"

    def reads(self, kind: Kind) -> bool:
        return kind != "maps"

    def layers(self, features: Tensor, kind: Kind, outputs: int, width: int) -> nn.Module:
        from .shared import SharedUnembedding  # what it is, a Borrower, is defined beside the rules, which need heads

        rows, length = to_rows(kind, channels(features))
        if length != self.linear.in_features:
            raise InvalidChoice(
                f"The head {self.name!r} reads features of the width of the last stage's projection, "
                f"{self.linear.in_features}; this stage gives {length}. Take 'unembedding', which has a projection of its own, "
                "or one width for all stages."
            )
        return SharedUnembedding(self.linear, rows, self.source, self.inside, self.period)


def output_projection(chain: Chain) -> tuple[str, nn.Linear]:
    """The linear layer whose output is the network's own, and its name in the last stage's body. Raises InvalidChoice."""
    body, given = chain[-1].body, {}
    layers = {name: part for name, part in body.named_modules() if isinstance(part, nn.Linear)}
    hooks = [
        part.register_forward_hook(lambda part, x, y, name=name: given.update({name: y}))
        for name, part in layers.items()
    ]
    try:
        *_, (_, _, output) = chain.walk(chain.example(), lambda j, x: run_once(chain[j].body, x))
    finally:
        for hook in hooks:
            hook.remove()
    found = [name for name, y in given.items() if y is output]
    if not found:
        raise InvalidChoice(
            "The head 'shared-unembedding' reads the projection that ends the network, but the last stage does not end in an "
            f"nn.Linear ({type(body).__name__}); take 'unembedding', which has a projection of its own."
        )
    return found[0], layers[found[0]]
