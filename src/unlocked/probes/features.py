"""What a network puts out depth by depth: what heads read of it, and the rows of features that a probe gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..chain import Chain, join
from ..errors import InvalidChoice

if TYPE_CHECKING:
    from ..credit import Credit


class Row(NamedTuple):
    """One depth: its stages, what each puts out, what each one's head reads (of other groups without gradient)."""

    stages: range
    outputs: list[Tensor]
    seen: list[Tensor]

    @property
    def joined(self) -> Tensor:
        """What the depth above reads."""
        return join(self.outputs)


def by_depth(
    chain: Chain, x: Tensor, credit: Credit | None, call: Callable[[int, Tensor], Tensor] | None = None
) -> Iterator[Row]:
    """The depths of a forward, each before the one above it begins, which may work in place. `call`: as in `Chain.walk`."""
    from ..credit.gn_dgl import GNDGL, filled_up, pooled  # late: rules import much

    side = credit.pool if isinstance(credit, GNDGL) else 1
    outputs: list[Tensor] = []
    for j, _, h in chain.walk(x, call):
        outputs.append(h)
        row = chain.layout.beside(j)
        if j < row[-1]:
            continue
        others = [filled_up(pooled(h.detach(), side), h) for h in outputs] if len(outputs) > 1 else []
        yield Row(
            row,
            outputs,
            [
                join([*others[:k], h, *others[k + 1 :]]) if chain[row[k]].reads_siblings and others else h
                for k, h in enumerate(outputs)
            ],
        )
        outputs = []


def to_rows(h: Tensor, y: Tensor, pool: int, depth: int) -> Tensor:
    """Features (n, d) of a stage's output, one row for each label. Raises InvalidChoice for what has no such rows."""
    if h.is_floating_point() and len(h) == len(y):
        if per_token(h, y):
            return h.flatten(0, 1)
        if y.is_floating_point() or y.dim() == 1:
            if h.dim() == 2:
                return h
            if h.dim() == 3:
                return h.mean(1)
            if h.dim() == 4:
                return F.adaptive_avg_pool2d(h, (min(pool, h.shape[2]), min(pool, h.shape[3]))).flatten(1)
    raise InvalidChoice(
        f"The output of depth {depth}, {h.dtype} of shape {tuple(h.shape)}, does not fit labels of shape {tuple(y.shape)}; a "
        "probe needs (B, D), (B, T, D) or (B, C, H, W) with one label per sample, or (B, T, D) with one per position."
    )


def per_token(h: Tensor, y: Tensor) -> bool:
    """Whether every position of (B, T, D) has a label: a class, or a row of values."""
    return h.dim() == 3 and h.shape[:2] == y.shape[:2] and y.dim() == (3 if y.is_floating_point() else 2)
