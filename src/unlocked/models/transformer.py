"""A byte-level GPT: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019, GPT-2), section 2.3.

Vaswani et al., "Attention Is All You Need" (2017) without the encoder, LayerNorm before each part, learned positions,
GELU. Differences: the output projection is not tied to the token embedding (stages must not share weights) and
has no bias; the tokens are bytes.

Shapes: B sequences, T tokens of context, D = width, V = classes (the vocabulary).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import dropout_of
from .pieces import Layered
from .recipe import require, require_positive, require_probability, with_recipe

STANDARD_DEVIATION = 0.02


class Embedding(nn.Module):
    """Token plus position embedding, then dropout: int (B, t ≤ T) → (B, t, D)."""

    def __init__(self, vocabulary: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = dropout_of(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """int (B, t) → (B, t, D); InvalidChoice if the input is no batch of token sequences of at most T."""
        context = self.positions.num_embeddings
        require(
            ids.dim() == 2 and not ids.is_floating_point() and ids.shape[1] <= context,
            f"gpt takes whole-number tokens of shape (batch, length) with a length of at most {context}; "
            f"given {tuple(ids.shape)} of {ids.dtype}. Cut the text into windows of {context} tokens.",
        )
        return self.dropout(self.tokens(ids) + self.positions.weight[: ids.shape[1]])


class Attention(nn.Module):
    """Multi-head attention, (B, t, D) → (B, t, D); if `causal`, a position sees itself and the past only."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """softmax(q kᵀ / √(D/heads)) v in each head, then the projection (Vaswani et al., eq. 1)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        drop = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=self.causal)
        return self.projection(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the MLP is four times as wide: (B, t, D) → (B, t, D)."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, causal)
        self.norm2 = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.dropout = dropout_of(dropout)
        self.residual: nn.Module = nn.Identity()  # a neuron group's first block takes its slice

    def forward(self, x: Tensor) -> Tensor:
        """(B, t, D) → (B, t, D)."""
        x = self.residual(x) + self.dropout(self.attention(self.norm1(x)))
        hidden = F.gelu(self.widen(self.norm2(x)), approximate="tanh")
        return x + self.dropout(self.narrow(hidden))


class Output(nn.Module):
    """Final LayerNorm and projection to the vocabulary: (B, t, D) → (B, t, V)."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, t, D) → (B, t, V)."""
        return self.projection(self.norm(x))


class GPT(Layered):
    """Embedding, blocks, output; each is a piece."""

    def __init__(self, context: int, vocabulary: int, layers: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, context, width, dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.output = Output(width, vocabulary)
        initialise(self, layers)


def initialise(model: nn.Module, layers: int) -> None:
    """Weights normal(0, 0.02), biases 0; projections onto the residual stream divided by √(2 · layers)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            continue  # LayerNorm starts at 1 and 0; biases follow below
        onto_stream = name.endswith(("attention.projection.weight", "narrow.weight"))
        scale = 1 / math.sqrt(2 * layers) if onto_stream else 1.0
        nn.init.normal_(parameter, std=STANDARD_DEVIATION * scale)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)


@with_recipe
def gpt(
    input_shape: Sequence[int] = (128,),
    classes: int = 256,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    dropout: float = 0.0,
) -> GPT:
    """A GPT over bytes: int64 (B, t ≤ T) with input_shape (T,) → (B, t, classes), the scores of each next byte.

    `dropout` acts on the embedding, the attention weights and each residual branch.
    Raises InvalidChoice for a bad option or an input shape that is not one length.
    """
    require_text("gpt", input_shape)
    require_transformer("gpt", layers, width, heads, dropout)
    return GPT(input_shape[0], classes, layers, width, heads, dropout)


def require_text(name: str, input_shape: Sequence[int]) -> None:
    """Refuse an input shape that is not one length."""
    require(
        len(input_shape) == 1,
        f"{name} takes text, input_shape (length,) in tokens; given {tuple(input_shape)}. Use a CNN for images.",
    )


def require_transformer(name: str, layers: int, width: int, heads: int, dropout: float) -> None:
    """Refuse sizes that are not positive, a dropout that is no probability, and heads that do not divide the width."""
    require_positive(name, layers=layers, width=width, heads=heads)
    require_probability(name, "dropout", dropout)
    require(
        width % heads == 0, f"{name}'s width must be a multiple of its heads; given width {width} and {heads} heads."
    )
