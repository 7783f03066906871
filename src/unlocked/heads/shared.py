"""The head that reads the last stage's projection (its recipe: unembedding.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..chain import Stage
from ..credit.lending import Borrower


class SharedUnembedding(Borrower):
    """h (B, T, D) -> sg[W] norm(h) (B, T, V), W a copy of the layer `inside` of the body of stage `source`.

    The copy is a buffer: no optimizer has it, no gradient reaches it, checkpoints keep it. `rows`: what turns normed features
    into one row per label.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, rows: Sequence[nn.Module], source: int, inside: str, period: int) -> None:
        super().__init__()
        self.source, self.inside, self.period = source, inside, period
        self.norm = nn.LayerNorm(linear.in_features)
        self.rows = nn.Sequential(*rows)
        self.register_buffer("weight", linear.weight.detach().clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, h: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V), or (B, V) with one label per sample."""
        return F.linear(self.rows(self.norm(h)), self.weight, self.bias)

    def wanted(self, source: Stage) -> list[str]:
        """The projection's weight, and its bias if it has one."""
        return [f"body.{self.inside}.{name}" if self.inside else f"body.{name}" for name in self._kept()]

    @torch.no_grad()
    def receive(self, lent: Sequence[Tensor]) -> None:
        """Copy the projection as it is now."""
        for kept, new in zip(self._kept().values(), lent, strict=True):
            kept.copy_(new)

    def _kept(self) -> dict[str, Tensor]:
        return {"weight": self.weight, **({} if self.bias is None else {"bias": self.bias})}
