"""Linear evaluation by the recipe of self-supervised learning: a linear layer trained on frozen features (Fournier, section
3.3.1; at every depth, after global average pooling: section 3.3.2).

    min over W, b of the mean cross-entropy of softmax(Wh + b) with y,
    Adam with learning rate 10⁻³ and weight decay 10⁻⁶ (added to the gradient), 200 epochs, batches of 256

h features (d,) of a training image, not augmented, computed once; y its class. The layer begins as PyTorch's linear layers do,
uniform in ±1/√d; every epoch has an order of its own, and its last batch may be smaller. What the thesis does not say is
chosen so: features are taken as they are, the learning rate is constant, and b decays as W does. A function of the seed.

The ridge regression of linear_probe.py reads the same features by another loss, in closed form, in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidChoice
from ..option_types import Typed
from ..rng import generator


class Layer(NamedTuple):
    """The trained layer: weight (classes, d), bias (classes,)."""

    weight: Tensor
    bias: Tensor

    def accuracy(self, h: Tensor, y: Tensor) -> float:
        """The share of rows (n, d) whose class is the largest output."""
        output = F.linear(h.to(self.weight.device), self.weight, self.bias)
        return float((output.argmax(1) == y.to(self.weight.device)).sum()) / len(y)


@dataclass(frozen=True)
class Recipe(Typed):
    """How the layer is trained; the default is the thesis'. Raises InvalidChoice for what cannot be."""

    epochs: int = 200
    lr: float = 1e-3
    weight_decay: float = 1e-6
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidChoice(f"{name}={value!r} is not possible in a recipe; give a whole number of at least 1.")
        for name, least in (("lr", "positive"), ("weight_decay", "of at least 0")):
            value = getattr(self, name)
            if not (value > 0 or (value == 0 and name == "weight_decay")):
                raise InvalidChoice(f"{name}={value!r} is not possible in a recipe; give a number {least}.")

    def train(
        self,
        h: Tensor,
        y: Tensor,
        classes: int,
        device: torch.device | str | None = None,
        told: Callable[[int], None] | None = None,
    ) -> Layer:
        """The layer for features h (n, d) with classes y (n,) int64 below `classes`.

        `device`: where to compute; default: where the features are. `told`: called after each epoch with its number of rows.
        Raises InvalidChoice for targets that are no classes.
        """
        if y.is_floating_point():
            raise InvalidChoice("The recipe trains a layer for classes, but the targets here are values; leave it out.")
        where = h.device if device is None else torch.device(device)
        h, y = h.to(where), y.to(where)
        numbers = generator(self.seed, "recipe")
        layer = [parameter.to(where).requires_grad_() for parameter in _first(h, classes, numbers)]
        optimizer = torch.optim.Adam(layer, lr=self.lr, weight_decay=self.weight_decay)
        for _ in range(self.epochs):
            for some in torch.randperm(len(h), generator=numbers).to(where).split(self.batch_size):
                with torch.enable_grad():
                    loss = F.cross_entropy(F.linear(h[some], *layer), y[some])
                    layer[0].grad, layer[1].grad = torch.autograd.grad(loss, layer)
                optimizer.step()
            if told is not None:
                told(len(h))
        return Layer(*(parameter.detach() for parameter in layer))


def _first(h: Tensor, classes: int, numbers: torch.Generator) -> list[Tensor]:
    bound = h.shape[1] ** -0.5
    shapes = ((classes, h.shape[1]), (classes,))
    return [
        (2 * torch.rand(shape, generator=numbers, dtype=torch.float64) - 1).mul_(bound).to(h.dtype) for shape in shapes
    ]
