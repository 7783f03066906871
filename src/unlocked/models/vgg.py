"""VGG networks of the local-learning papers.

Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2014); the variants 6a and 8b
are those of Nøkland, Eidnes, "Training Neural Networks with Local Error Signals" (2019), with BatchNorm and ReLU after
each layer but the last. VGG6a is also that of Patel's thesis, section 3.3.1 (channels 128, 256, 512, 512, then 8192 and
1024 features for 32×32 images).

VGG16a and VGG19a are those of Patel's section 4.3.1, trained layer by layer in 14 and 17 modules. The thesis gives no list of
their layers. Here they are the 13 and 16 convolutions of the first paper's configurations D and E (its table 1), and, as in the
variants above, one hidden dense block of 1024 features where the paper has two of 4096: 14 and 17 layers below the classifier.

A difference: in the first of these two a local loss sees a layer before its max-pooling; here the pooling is the
end of that layer's piece, so a stage passes on (and its loss sees) the pooled maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from .blocks import ConvBlock, DenseBlock, scaled
from .pieces import Layered
from .recipe import require_image, require_positive, require_probability, with_recipe

# (channels, followed by 2×2 max-pooling?) of each convolution
VGG6A = ((128, True), (256, True), (512, True), (512, False))
VGG8B = ((128, False), (256, True), (256, False), (512, True), (512, True), (512, True))
FEATURES = 1024


def _groups(*convolutions: int) -> tuple[tuple[int, bool], ...]:
    """Groups of so many convolutions with 64, 128, 256, 512, 512 channels, max-pooling after the last of each."""
    channels = (64, 128, 256, 512, 512)
    return tuple((c, k == n - 1) for n, c in zip(convolutions, channels, strict=True) for k in range(n))


VGG16A = _groups(2, 2, 3, 3, 3)
VGG19A = _groups(2, 2, 4, 4, 4)


class VGG(Layered):
    """Convolutional blocks, one hidden dense block, a linear classifier; each is a piece."""

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        layers: Sequence[tuple[int, bool]],
        width: float,
        activation: str,
        dropout: float,
    ) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        sizes = [channels, *(scaled(outputs, width) for outputs, _ in layers)]
        shrink = 2 ** sum(pool for _, pool in layers)
        flat, features = sizes[-1] * (height // shrink) * (breadth // shrink), scaled(FEATURES, width)
        self.blocks = nn.ModuleList(
            ConvBlock(inputs, outputs, activation=activation, dropout=dropout, pool=pool)
            for (inputs, outputs), (_, pool) in zip(pairwise(sizes), layers)
        )
        self.hidden = DenseBlock(flat, features, activation, norm=True, dropout=dropout)
        self.classifier = nn.Linear(features, classes)


@with_recipe
def vgg6a(
    input_shape: Sequence[int], classes: int, width: float = 1.0, activation: str = "relu", dropout: float = 0.0
) -> VGG:
    """VGG6a: convolutions 128, M, 256, M, 512, M, 512, then 1024 features; images of at least 8×8 pixels.

    (B, *input_shape) → (B, classes). `width` multiplies every hidden size (rounded, at least 1). `dropout` follows each
    activation. Raises InvalidChoice for a bad option or input shape.
    """
    return _vgg("vgg6a", VGG6A, input_shape, classes, width, activation, dropout)


@with_recipe
def vgg8b(
    input_shape: Sequence[int], classes: int, width: float = 1.0, activation: str = "relu", dropout: float = 0.0
) -> VGG:
    """VGG8b: convolutions 128, 256, M, 256, 512, M, 512, M, 512, M, then 1024 features; images of at least 16×16.

    (B, *input_shape) → (B, classes). `width` multiplies every hidden size (rounded, at least 1). `dropout` follows each
    activation. Raises InvalidChoice for a bad option or input shape.
    """
    return _vgg("vgg8b", VGG8B, input_shape, classes, width, activation, dropout)


@with_recipe
def vgg16a(
    input_shape: Sequence[int], classes: int, width: float = 1.0, activation: str = "relu", dropout: float = 0.0
) -> VGG:
    """VGG16a: convolutions 2 × 64, M, 2 × 128, M, 3 × 256, M, 3 × 512, M, 3 × 512, M, then 1024 features; images of at least
    32×32.

    (B, *input_shape) → (B, classes). `width` multiplies every hidden size (rounded, at least 1). `dropout` follows each
    activation. Raises InvalidChoice for a bad option or input shape.
    """
    return _vgg("vgg16a", VGG16A, input_shape, classes, width, activation, dropout)


@with_recipe
def vgg19a(
    input_shape: Sequence[int], classes: int, width: float = 1.0, activation: str = "relu", dropout: float = 0.0
) -> VGG:
    """VGG19a: as `vgg16a` with four convolutions of 256 and of 512 channels in a group instead of three."""
    return _vgg("vgg19a", VGG19A, input_shape, classes, width, activation, dropout)


def _vgg(
    name: str,
    layers: Sequence[tuple[int, bool]],
    input_shape: Sequence[int],
    classes: int,
    width: float,
    activation: str,
    dropout: float,
) -> VGG:
    require_image(name, input_shape, smallest=2 ** sum(pool for _, pool in layers))
    require_positive(name, width=width)
    require_probability(name, "dropout", dropout)
    return VGG(input_shape, classes, layers, width, activation, dropout)
