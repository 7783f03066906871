"""From features to one row per label, by the mean over space, and from there to the outputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .spec import Kind, MeanOverTokens, norm

_KINDS: dict[int, Kind] = {1: "vectors", 2: "sequences", 3: "maps"}


def mean_row(kind: Kind) -> list[nn.Module]:
    """Layers that turn features into one row per label, of as many entries as there are channels: the mean over space."""
    if kind == "maps":
        return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return [MeanOverTokens()] if kind == "sequences" else []


def channels_of(sample: Sequence[int]) -> int:
    """Channels of a sample's shape: C of (C, H, W), D of (D,) and (T, D)."""
    return sample[0] if len(sample) == 3 else sample[-1]


def read_out(sample: Sequence[int], per_token: bool, outputs: int, normalised: bool = False) -> list[nn.Module]:
    """Mean over space, normalisation if asked for, fully connected layer, for features of this shape per sample."""
    kind: Kind = "tokens" if per_token else _KINDS[len(sample)]
    rows = [*mean_row(kind), *([norm(kind, channels_of(sample))] if normalised else [])]
    return [*rows, nn.Linear(channels_of(sample), outputs)]
