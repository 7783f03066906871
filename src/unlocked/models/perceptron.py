"""The multilayer perceptron: Rumelhart, Hinton, Williams, "Learning representations by back-propagating errors" (1986).

BatchNorm, if asked for, stands between the linear layer and the activation: Ioffe, Szegedy (2015), section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from .blocks import DenseBlock
from .pieces import Layered
from .recipe import require_positive, with_recipe


class Perceptron(Layered):
    """`depth` hidden layers of `width` units, then a linear classifier; every layer is a piece."""

    def __init__(self, inputs: int, classes: int, width: int, depth: int, activation: str, norm: bool) -> None:
        super().__init__()
        sizes = [inputs] + [width] * depth
        self.layers = nn.ModuleList(DenseBlock(a, b, activation, norm) for a, b in pairwise(sizes))
        self.classifier = nn.Linear(width, classes)


@with_recipe
def mlp(
    input_shape: Sequence[int],
    classes: int,
    width: int = 64,
    depth: int = 4,
    activation: str = "relu",
    norm: bool = False,
) -> Perceptron:
    """A multilayer perceptron, (B, *input_shape) → (B, classes); it flattens its input.

    `depth` hidden layers of `width` units with `activation` (relu, leaky_relu, gelu, tanh), with BatchNorm if `norm`.
    Raises InvalidChoice for a bad option.
    """
    require_positive("mlp", width=width, depth=depth)
    return Perceptron(math.prod(input_shape), classes, width, depth, activation, norm)
