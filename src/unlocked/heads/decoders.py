"""Decoders of InfoPro (Wang et al., 2021): from a stage's output back to the network's input, as logits of values in [0, 1].

maps        bilinear to the input's size, 3×3 convolution → 12, BatchNorm, ReLU, 3×3 convolution → the input's channels
vectors     a linear map to all entries of the input
sequences   a linear map of each token to the pixels of its patch
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InvalidChoice


def decoder(features: Tensor, sample: tuple[int, ...], hidden: int) -> nn.Module:
    """The decoder from `features` (an example) to inputs of shape (B, *sample); `hidden`: channels inside it, for maps.

    Raises InvalidChoice for features that cannot be brought back to such an input.
    """
    if features.dim() == 2:
        return nn.Sequential(nn.Linear(features.shape[1], math.prod(sample)), nn.Unflatten(1, sample))
    if features.dim() == 4 and len(sample) == 3:
        return MapDecoder(features.shape[1], sample, hidden)
    if features.dim() == 3 and len(sample) == 3 and (grid := grid_of(features.shape[1], sample)):
        return PatchDecoder(features.shape[2], sample, grid)
    raise InvalidChoice(
        f"InfoPro reconstructs inputs of shape {sample} from vectors (B, D), from maps (B, C, H, W) if the input is an image, "
        f"and from tokens (B, T, D) if they are its patches and nothing else; this stage gives {tuple(features.shape)}. "
        "Use another local rule, such as dgl, or reconstruct nothing: lambda1=0, lambda2=1."
    )


class MapDecoder(nn.Module):
    """(B, C', h, w) → (B, C, H, W)."""

    def __init__(self, inputs: int, sample: tuple[int, ...], hidden: int) -> None:
        super().__init__()
        self.size = sample[1:]
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, sample[0], 3, padding=1),
        )

    def forward(self, h: Tensor) -> Tensor:
        if h.shape[2:] != self.size:
            h = F.interpolate(h, self.size, mode="bilinear", align_corners=True)
        return self.layers(h)


class PatchDecoder(nn.Module):
    """(B, T, D) → (B, C, H, W): token t becomes the pixels of patch t, patches row by row."""

    def __init__(self, width: int, sample: tuple[int, ...], grid: tuple[int, int]) -> None:
        super().__init__()
        channels, height, breadth = sample
        self.grid, self.patch = grid, (channels, height // grid[0], breadth // grid[1])
        self.pixels = nn.Linear(width, math.prod(self.patch))

    def forward(self, h: Tensor) -> Tensor:
        patches = self.pixels(h).unflatten(1, self.grid).unflatten(-1, self.patch)  # (B, rows, columns, C, a, b)
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def grid_of(tokens: int, sample: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of the square patches that `tokens` tokens are of an image (C, H, W); None if they are not."""
    _, height, breadth = sample
    side = math.isqrt(height * breadth // tokens)
    if side and height % side == 0 and breadth % side == 0 and (height // side) * (breadth // side) == tokens:
        return height // side, breadth // side
    return None
