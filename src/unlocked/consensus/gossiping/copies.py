"""A worker's weights as gossip sees them, while a gradient is computed with what they were when it began.

x      the weights as exchanges have made them
x̃      their momentum (A²CiD²), or None: plain gossip; beginning at x
time   up to which both have flowed, in gradients
moved  whether anything but a gradient has changed x since the last one

The gradient's own displacement is added when it is there (rules/gossip.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...flat import flat
from ...rules.gossip import meet, mix, mixed_share

Rows = list[Tensor]


class Copies:
    """Rows, one for each dtype. `eta`, `alpha_tilde`: η and α̃; η = 0 keeps no momentum."""

    def __init__(self, eta: float, alpha_tilde: float) -> None:
        self.eta, self.alpha_tilde = eta, alpha_tilde
        self.x: Rows = []
        self.tilde: Rows | None = None
        self.time = 0.0
        self.moved = False

    def begin(self, tensors: Sequence[Tensor], time: float) -> None:
        """A gradient begins: x is what the tensors are now."""
        self.x, self.time, self.moved = flat(tensors), time, False
        if self.tilde is None and self.eta > 0.0:
            self.tilde = [row.clone() for row in self.x]

    @torch.no_grad()
    def flow(self, time: float) -> None:
        """Let x and x̃ mix until this moment; a moment that has passed changes nothing."""
        if time <= self.time:
            return
        share = mixed_share(self.eta, time - self.time)
        self.time = time
        self.moved = self.moved or bool(self.tilde and share)
        for x, tilde in zip(self.x, self.tilde or []):
            mix(x, tilde, share)

    def sent(self, time: float) -> Rows:
        """What is sent at this moment: x, mixed before; copies."""
        self.flow(time)
        return [row.clone() for row in self.x]

    @torch.no_grad()
    def meet(self, mine: Rows, theirs: Rows, time: float) -> None:
        """An exchange of `mine` for `theirs` that happened at `time`, be it now or before."""
        self.flow(time)
        share = mixed_share(self.eta, self.time - time)
        self.moved = True
        for k, (own, other) in enumerate(zip(mine, theirs)):
            tilde = None if self.tilde is None else self.tilde[k]
            meet(self.x[k], tilde, own - other, self.alpha_tilde, share)

    @torch.no_grad()
    def displace(self, before: Rows, after: Rows, time: float) -> None:
        """A gradient has made `after` of `before`: the same displacement on x and x̃."""
        self.flow(time)
        for k, (old, new) in enumerate(zip(before, after)):
            if self.tilde is not None:
                self.tilde[k].add_(new - old)
            if self.moved:
                self.x[k].add_(new - old)
            else:  # not even a rounding
                self.x[k].copy_(new)
        self.moved = False
