"""A vision transformer: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020), section 3.1.

    tokens of the image = convolution with kernel and stride `patch` (one linear map of each patch) + learned positions
    blocks as in transformer.py, but each token sees all others; LayerNorm, mean over the tokens, linear layer

Differences from the paper: the mean over the tokens instead of a class token (their appendix D.3: as good, at another learning
rate), GELU by its tanh approximation and the initialisation of transformer.py.

Shapes: B images, (C, H, W) each, t = (H / patch) · (W / patch) tokens, D = width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blocks import dropout_of
from .pieces import Layered
from .recipe import require, require_image, require_positive, with_recipe
from .transformer import Block, initialise, require_transformer


class PatchEmbedding(nn.Module):
    """A linear map of each patch plus its position, then dropout: (B, C, H, W) → (B, t, D)."""

    def __init__(self, input_shape: Sequence[int], patch: int, width: int, dropout: float) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        self.input_shape = tuple(input_shape)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty((height // patch) * (breadth // patch), width))
        self.dropout = dropout_of(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, t, D), patches row by row; InvalidChoice for images of another shape."""
        require(
            tuple(x.shape[1:]) == self.input_shape,
            f"This network has positions for images of shape {self.input_shape}; given {tuple(x.shape)}. "
            "Resize the images, or build it for theirs.",
        )
        return self.dropout(self.patches(x).flatten(2).transpose(1, 2) + self.positions)


class MeanClassifier(nn.Module):
    """LayerNorm, mean over the tokens, linear layer: (B, t, D) → (B, classes)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, t, D) → (B, classes)."""
        return self.linear(self.norm(x).mean(1))


class ViT(Layered):
    """Patch embedding, blocks, classifier; each is a piece."""

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
        self.embedding = PatchEmbedding(input_shape, patch, width, dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, causal=False) for _ in range(layers))
        self.classifier = MeanClassifier(width, classes)
        initialise(self, layers)


@with_recipe
def vit(
    input_shape: Sequence[int],
    classes: int,
    patch: int = 4,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    dropout: float = 0.0,
) -> ViT:
    """A vision transformer, (B, *input_shape) → (B, classes), for images whose sides are multiples of `patch` pixels.

    `dropout` acts on the embedding, the attention weights and each residual branch.
    Raises InvalidChoice for a bad option or input shape.
    """
    require_patches("vit", input_shape, patch)
    require_transformer("vit", layers, width, heads, dropout)
    return ViT(input_shape, classes, patch, layers, width, heads, dropout)


def require_patches(name: str, input_shape: Sequence[int], patch: int) -> None:
    """Refuse what is no image, and an image that cannot be cut into whole patches."""
    require_positive(name, patch=patch)
    require_image(name, input_shape, smallest=1)
    require(
        all(side % patch == 0 for side in input_shape[1:]),
        f"{name} cuts images into patches of {patch}×{patch} pixels, so both sides must be multiples of {patch}; given "
        f"{input_shape[1]}×{input_shape[2]}. Resize or crop the images, or choose another 'patch'.",
    )
