"""The small parts that several models share: dense and convolutional layers, a pooled classifier.

Shapes: B samples, C channels, H×W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..errors import choose

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}


def activation_of(name: str) -> nn.Module:
    """A new activation module; InvalidChoice if the name is unknown."""
    return ACTIVATIONS[choose("activation", name, ACTIVATIONS)]()


def dropout_of(probability: float) -> nn.Module:
    """Dropout, or the identity when the probability is 0 (so that no random number is drawn)."""
    return nn.Dropout(probability) if probability else nn.Identity()


def scaled(channels: int, width: float) -> int:
    """`channels · width`, rounded to the nearest whole number (halves to even), at least 1."""
    return max(1, round(channels * width))


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """A k×k convolution without bias that keeps the size at stride 1: (B, inputs, H, W) → (B, outputs, ⌈H/s⌉, ⌈W/s⌉).

    Its weights are normal with variance 2 / (outputs · k²): He et al., "Delving Deep into Rectifiers" (2015), eq. 14.
    """
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class ConvBlock(nn.Module):
    """Convolution, BatchNorm, activation, then dropout and 2×2 max-pooling if asked for."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        activation: str = "relu",
        dropout: float = 0.0,
        pool: bool = False,
    ) -> None:
        super().__init__()
        self.conv = convolution(inputs, outputs, kernel, stride)
        self.norm = nn.BatchNorm2d(outputs)
        self.activation = activation_of(activation)
        self.dropout = dropout_of(dropout)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H', W')."""
        return self.pool(self.dropout(self.activation(self.norm(self.conv(x)))))


class DenseBlock(nn.Module):
    """Flatten, linear layer, BatchNorm if asked for, activation, dropout if asked for."""

    def __init__(
        self, inputs: int, outputs: int, activation: str = "relu", norm: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=not norm)  # BatchNorm's own bias replaces it
        self.norm = nn.BatchNorm1d(outputs) if norm else nn.Identity()
        self.activation = activation_of(activation)
        self.dropout = dropout_of(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) with `inputs` numbers a sample → (B, outputs)."""
        return self.dropout(self.activation(self.norm(self.linear(x.flatten(1)))))


class PooledClassifier(nn.Linear):
    """The mean over all pixels, then a linear layer: (B, C, H, W) → (B, classes)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, classes)."""
        return super().forward(x.mean((2, 3)))
