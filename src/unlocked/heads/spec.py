"""What a head (auxiliary network) is: a recipe that becomes a module once the stage's output is known.

Features, the output of a stage, come in four kinds:

    maps        (B, C, H, W)   one label per sample
    vectors     (B, D)         one label per sample
    sequences   (B, T, D)      one label per sample (vision transformers): averaged over T, then vectors
    tokens      (B, T, D)      one label per position (language models): nothing mixes positions, so heads are causal
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..chain import Chain
from ..errors import InvalidChoice
from ..losses import Loss

Kind = Literal["maps", "vectors", "sequences", "tokens"]

ANYWHERE = "'linear', 'mlp', 'dgl-mlp' and 'predsim'"  # they read every kind of features
POOLED = 2  # side of the maps a head flattens (Fournier's thesis, B.1.2)


class HeadSpec(ABC):
    """A head's recipe; subclasses are frozen dataclasses whose defaults are the paper's values."""

    smallest: ClassVar[int] = 1  # the narrowest width worth training
    needs: ClassVar[str] = "maps (B, C, H, W)"  # where `reads` refuses other kinds

    @property
    @abstractmethod
    def name(self) -> str:
        """The head's name in messages and reports."""

    def at(self, chain: Chain, stage: int) -> HeadSpec:
        """The recipe for this stage of a chain: another one, where it depends on the depth or on the network above."""
        return self

    def paper_width(self, features: Tensor) -> int | None:
        """The hidden width the paper uses on these features; None if there is no hidden layer."""
        return None

    def reads(self, kind: Kind) -> bool:
        """Whether the head makes sense on this kind of features."""
        return True

    def loss(self) -> Loss | None:
        """The loss that this head is always trained with; None: it takes the network's own."""
        return None

    def make(self, features: Tensor, outputs: int, per_token: bool, width: int | None = None) -> nn.Module:
        """The head for `features` (an example) with `outputs` logits and hidden width `width` (None: the paper's).

        Its parameters have the features' type and device. They are drawn once, on the CPU and in float32, from torch's
        global generator, so that a seed gives the same head on every device. Raises InvalidChoice.
        """
        kind = kind_of(features, per_token)
        if not self.reads(kind):
            raise InvalidChoice(
                f"The head {self.name!r} needs {self.needs}, but this stage gives {kind} of shape "
                f"{tuple(features.shape)}; the heads {ANYWHERE} work there."
            )
        width = self.paper_width(features) if width is None else width
        with torch.device("meta" if features.is_meta else "cpu"):
            head = self.layers(features, kind, outputs, width or 0)
        return head.to(features.device, features.dtype)

    @abstractmethod
    def layers(self, features: Tensor, kind: Kind, outputs: int, width: int) -> nn.Module:
        """The head's layers, on torch's current device; `width` is 0 for a head without a hidden layer."""


class MeanOverTokens(nn.Module):
    """(B, T, D) -> (B, D)."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.mean(1)


def kind_of(features: Tensor, per_token: bool) -> Kind:
    """The kind of features; raises InvalidChoice if a head can read none of it."""
    shape = tuple(features.shape)
    if not features.is_floating_point():
        raise InvalidChoice(f"A head reads floating-point features, got {features.dtype} of shape {shape}.")
    if per_token:
        if len(shape) != 3:
            raise InvalidChoice(
                f"One label per token needs features (B, T, D), got shape {shape}; with one label per sample, "
                "give per_token=False."
            )
        return "tokens"
    kinds: dict[int, Kind] = {2: "vectors", 3: "sequences", 4: "maps"}
    if len(shape) not in kinds:
        raise InvalidChoice(f"A head reads features (B, D), (B, T, D) or (B, C, H, W), got shape {shape}.")
    return kinds[len(shape)]


def channels(features: Tensor) -> int:
    """C of maps, D of anything else."""
    return features.shape[1] if features.dim() == 4 else features.shape[-1]


def norm(kind: Kind, width: int) -> nn.Module:
    """Normalisation of rows: BatchNorm, or LayerNorm on tokens, where batch statistics would leak the future."""
    return nn.LayerNorm(width) if kind == "tokens" else nn.BatchNorm1d(width)


def to_rows(kind: Kind, width: int) -> tuple[list[nn.Module], int]:
    """Layers that turn features of `width` channels into one row per label, and the length of a row."""
    if kind == "maps":
        return [nn.AdaptiveAvgPool2d(POOLED), nn.Flatten()], width * POOLED**2
    return ([MeanOverTokens()] if kind == "sequences" else []), width


def perceptron(kind: Kind, inputs: int, hidden: int, depth: int, outputs: int, bias: bool) -> list[nn.Module]:
    """`depth` times [fully connected, normalisation, ReLU], then a projection to the logits."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(inputs, hidden, bias=bias), norm(kind, hidden), nn.ReLU()]
        inputs = hidden
    return [*layers, nn.Linear(inputs, outputs)]


def convolution(inputs: int, width: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """[convolution, BatchNorm, ReLU], padded to keep the side; no bias, which the normalisation would subtract."""
    conv = nn.Conv2d(inputs, width, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(width), nn.ReLU()]


def at_least_one(head: str, **sizes: int) -> None:
    """Raises InvalidChoice if a head's size is not positive."""
    for name, size in sizes.items():
        if size < 1:
            raise InvalidChoice(f"The head {head!r} was given {name}={size}; it must be at least 1.")
