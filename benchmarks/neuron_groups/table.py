"""Patel's Tables 3.4 and 3.5 (ResNet-32 on 32×32 images) from the multiply-accumulates of our own modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked.chain import Chain
from unlocked.grouping.cost import ModuleCost, inference_speedup, macs, module_costs, training_speedup
from unlocked.heads.decoders import MapDecoder

SIZES = {1: [16], 2: [8, 8], 4: [4] * 4, 8: [2] * 8, 16: [1] * 16}  # of stem and 15 blocks
PATEL_GROUPS = {  # (K, G): training speed-up, inference speed-up
    (1, 2): (3.674, 1.961), (2, 2): (6.304, 1.899), (4, 2): (10.667, 1.785), (8, 2): (16.426, 1.612), (16, 2): (23.072, 1.338),
    (1, 4): (11.982, 3.777), (2, 4): (17.445, 3.448), (4, 4): (24.522, 2.936), (8, 4): (30.47, 2.324),
    (1, 8): (28.531, 7.03), (2, 8): (33.736, 5.824), (4, 8): (39.333, 4.336),
}  # fmt: skip
PATEL_DGL = {2: 1.894, 4: 3.622, 8: 6.456, 16: 11.609}
PATEL_INFOPRO = {2: 1.833, 4: 2.625, 8: 3.856, 16: 5.218}


class Row(NamedTuple):
    """One entry: a method at (K, G), what we count and what Patel prints. inference: None where it is 1 by definition."""

    method: str
    stages: int
    groups: int
    training: float
    patel: float
    inference: tuple[float, float] | None
    slowest: int

    def __str__(self) -> str:
        told = f"| {self.method} | {self.stages} | {self.groups} | {self.training:.3f} | {self.patel} | "
        told += f"{self.training / self.patel - 1:+.2%} | "
        if self.inference is None:
            return told + "| | |"
        ours, theirs = self.inference
        return told + f"{ours:.3f} | {theirs} | {ours / theirs - 1:+.2%} |"


HEADING = (
    "| method | K | G | training speed-up | Patel | | inference speed-up | Patel | |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def head(features: Tensor, outputs: int) -> nn.Module:
    """Patel's '1c2f': 3×3 convolution of stride 2 to twice the channels at every depth, mean over pixels, 128 hidden units."""
    channels = features.shape[1]
    return nn.Sequential(
        nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 128),
        nn.ReLU(),
        nn.Linear(128, outputs),
    )


class Both(nn.Module):
    """Two networks on the same features: InfoPro's head and its decoder."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) → (scores, image)."""
        return self.one(h), self.other(h)


def with_decoder(features: Tensor, outputs: int) -> nn.Module:
    """InfoPro's: the head, and a decoder to the 32×32 image with 12 hidden channels."""
    return Both(head(features, outputs), MapDecoder(features.shape[1], (3, 32, 32), 12))


def table(elementwise: bool = True, stem: str = "split") -> Iterator[Row]:
    """All entries of both tables. `stem`: as in ul.cut; a shared one has no head, it learns from the groups."""
    torch.manual_seed(0)
    model, x = ul.models.resnet32((3, 32, 32), 10), torch.zeros(1, 3, 32, 32)
    whole = macs(model, x, elementwise)
    for (stages, groups), (training, inference) in PATEL_GROUPS.items():
        own = int(stem == "shared")
        sizes = [size for size in (SIZES[stages][0] - own, *SIZES[stages][1:]) if size]
        chain = ul.cut(model, like=x, groups=groups, sizes=sizes, stem=stem)
        costs = _costs(chain, head, elementwise, own)
        ours = inference_speedup(whole, costs)
        yield _row("GN-DGL", stages, groups, whole, costs, training, (ours, inference))
    depthwise = (("DGL", PATEL_DGL, head), ("InfoPro", PATEL_INFOPRO, with_decoder))
    for name, entries, kind in depthwise if stem == "split" else ():
        for stages, training in entries.items():
            sizes = [*SIZES[stages][:-1], SIZES[stages][-1] + 1]
            yield _row(
                name, stages, 1, whole, _costs(ul.cut(model, like=x, sizes=sizes), kind, elementwise), training, None
            )


def _row(
    method: str, stages: int, groups: int, whole: float, costs: list[ModuleCost], patel: float, inference: Any
) -> Row:
    slowest = max(costs, key=lambda cost: cost.total).depth
    return Row(method, stages, groups, training_speedup(whole, costs), patel, inference, slowest)


def _costs(
    chain: Chain, kind: Callable[[Tensor, int], nn.Module], elementwise: bool, keep: int = 0
) -> list[ModuleCost]:
    """Of every stage with a head of this kind on all channels of its depth; the first `keep` and the last have none."""
    heads: list[nn.Module | None] = []
    for j, _, h in chain.walk(chain.example()):
        width = h.shape[1] * len(chain.layout.beside(j))
        heads.append(kind(h.new_zeros(1, width, 1, 1), 10) if keep <= j < len(chain) - 1 else None)
    return module_costs(chain, heads, joined=True, elementwise=elementwise)
