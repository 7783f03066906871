"""Reversible transformers: the GPT of transformer.py and the ViT of vit.py with two streams, each D wide.

Mangalam et al., "Reversible Vision Transformers" (2022), after Kitaev, Kaiser, Levskaya, "Reformer: The
Efficient Transformer" (2020), section 3, and Gomez et al. (2017):

    block   y₁ = x₁ + attention(norm(x₂)),   y₂ = x₂ + mlp(norm(y₁))        two couplings, see `reversible.pair`

x₁, x₂: the streams, equal at first; each attention and each MLP is a piece of its own, so the network can be cut between
them. The output layer sees both streams, 2·D features. A block has as many weights as one of the plain network.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from torch import nn

from ..reversible import Split, pair
from .blocks import dropout_of
from .pieces import Layered
from .recipe import with_recipe
from .transformer import Attention, Embedding, Output, initialise, require_text, require_transformer
from .vit import MeanClassifier, PatchEmbedding, require_patches


class RevGPT(Layered):
    """Embedding with the split into two streams, attention and MLP of each block, output; each is a piece."""

    def __init__(self, context: int, vocabulary: int, layers: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Sequential(Embedding(vocabulary, context, width, dropout), Split(-1))
        self.blocks = nn.ModuleList(_couplings(layers, width, heads, dropout, causal=True))
        self.output = Output(2 * width, vocabulary)
        initialise(self, layers)


class RevViT(Layered):
    """Patch embedding with the split into two streams, attention and MLP of each block, classifier; each is a piece."""

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        patch: int,
        layers: int,
        width: int,
        heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Sequential(PatchEmbedding(input_shape, patch, width, dropout), Split(-1))
        self.blocks = nn.ModuleList(_couplings(layers, width, heads, dropout, causal=False))
        self.classifier = MeanClassifier(2 * width, classes)
        initialise(self, layers)


@with_recipe
def revgpt(
    input_shape: Sequence[int] = (128,),
    classes: int = 256,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    dropout: float = 0.0,
) -> RevGPT:
    """A reversible GPT over bytes: int64 (B, t ≤ T) with input_shape (T,) → (B, t, classes), the scores of each next byte.

    `width` is that of one stream. `dropout` acts on the embedding, the attention weights and each coupled branch.
    Raises InvalidChoice for a bad option or an input shape that is not one length.
    """
    require_text("revgpt", input_shape)
    require_transformer("revgpt", layers, width, heads, dropout)
    return RevGPT(input_shape[0], classes, layers, width, heads, dropout)


@with_recipe
def revvit(
    input_shape: Sequence[int],
    classes: int,
    patch: int = 4,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    dropout: float = 0.0,
) -> RevViT:
    """A reversible vision transformer, (B, *input_shape) → (B, classes), for sides that are multiples of `patch` pixels.

    `width` is that of one stream. `dropout` acts on the embedding, the attention weights and each coupled branch.
    Raises InvalidChoice for a bad option or input shape.
    """
    require_patches("revvit", input_shape, patch)
    require_transformer("revvit", layers, width, heads, dropout)
    return RevViT(input_shape, classes, patch, layers, width, heads, dropout)


def attention_branch(width: int, heads: int, dropout: float, causal: bool) -> nn.Sequential:
    """dropout(attention(norm(x))): (B, t, D) → (B, t, D)."""
    return nn.Sequential(
        OrderedDict(
            norm=nn.LayerNorm(width),
            attention=Attention(width, heads, dropout, causal),
            dropout=dropout_of(dropout),
        )
    )


def mlp_branch(width: int, dropout: float) -> nn.Sequential:
    """dropout(mlp(norm(x))), the MLP four times as wide: (B, t, D) → (B, t, D)."""
    return nn.Sequential(
        OrderedDict(
            norm=nn.LayerNorm(width),
            widen=nn.Linear(width, 4 * width),
            gelu=nn.GELU(approximate="tanh"),
            narrow=nn.Linear(4 * width, width),
            dropout=dropout_of(dropout),
        )
    )


def _couplings(layers: int, width: int, heads: int, dropout: float, causal: bool) -> Iterator[nn.Module]:
    for _ in range(layers):
        yield from pair(attention_branch(width, heads, dropout, causal), mlp_branch(width, dropout), dim=-1)
