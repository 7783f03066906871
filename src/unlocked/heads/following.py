"""The head that follows the first block of the next stage (its recipe: man.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..chain import Stage
from ..credit.lending import Borrower
from .man import first_block


class Following(Borrower):
    """h → read(trained(h) + average(h)); `average`: E ← m E + (1 − m) B whenever the block B of stage `source` comes.

    E's weights are buffers: no optimizer has them, no gradient reaches them, checkpoints keep them.
    """

    needs_news: ClassVar[bool] = False

    def __init__(
        self,
        trained: nn.Module,
        average: nn.Module,
        read: nn.Module,
        momentum: float,
        source: int,
        period: int,
    ) -> None:
        super().__init__()
        self.source, self.period, self.momentum = source, period, momentum
        self.trained, self.average, self.read = trained, average, read
        self.followed = weights_to_buffers(average)

    def forward(self, h: Tensor) -> Tensor:
        """Class scores (B, K), or (B, T, V) with one label per position."""
        return self.read(self.trained(h) + self.average(h))

    def wanted(self, source: Stage) -> list[str]:
        """The parameters of the first block of the source's body."""
        names = {id(x): name for name, x in source.named_parameters()}
        block = dict(first_block(source.body).named_parameters(remove_duplicate=False))
        return [names[id(block[name])] for name in self.followed]

    @torch.no_grad()
    def receive(self, lent: Sequence[Tensor]) -> None:
        """One step of the average."""
        done: set[int] = set()  # a tied weight has several names
        for name, new in zip(self.followed, lent, strict=True):
            average = self.average.get_buffer(name)
            if id(average) not in done:
                average.mul_(self.momentum).add_(new, alpha=1 - self.momentum)
            done.add(id(average))


def weights_to_buffers(module: nn.Module) -> list[str]:
    """Make every parameter inside a buffer of the same name; gives the names."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    made: dict[int, Tensor] = {}  # a tied weight stays one
    for name in names:
        owner, _, last = name.rpartition(".")
        part = module.get_submodule(owner)
        values = part._parameters.pop(last)
        assert values is not None
        part.register_buffer(last, made.setdefault(id(values), values.detach()))
    return names
