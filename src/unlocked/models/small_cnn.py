"""A small convolutional network whose blocks cost about the same, so that stages of it are easy to balance.

After LeCun et al., "Gradient-Based Learning Applied to Document Recognition" (1998), with BatchNorm (Ioffe, Szegedy,
2015) and global average pooling (Lin, Chen, Yan, "Network In Network", 2013, section 3.2). Channels double where the
image is halved, as in He et al. (2015), "Deep Residual Learning", section 3.3: this keeps the FLOPs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .blocks import ConvBlock, PooledClassifier
from .pieces import Layered
from .recipe import require_image, require_positive, with_recipe


class SmallCNN(Layered):
    """A cheap stem, `depth` blocks of 3×3 convolution, BatchNorm, ReLU, and a pooled classifier; each is a piece."""

    def __init__(self, channels: int, classes: int, width: int, depth: int) -> None:
        super().__init__()
        middle = depth // 2
        sizes = [width] * (middle + 1) + [2 * width] * (depth - middle)
        self.stem = ConvBlock(channels, width)
        self.blocks = nn.ModuleList(
            ConvBlock(sizes[i], sizes[i + 1], stride=2 if i == middle else 1) for i in range(depth)
        )
        self.classifier = PooledClassifier(2 * width, classes)


@with_recipe
def cnn(input_shape: Sequence[int], classes: int, width: int = 32, depth: int = 4) -> SmallCNN:
    """A small CNN, (B, *input_shape) → (B, classes), for images of at least 2×2 pixels.

    `depth` blocks; block ⌊depth/2⌋ halves the image and doubles the `width` channels. All blocks have the same FLOPs
    but that one, which has half of them (even image sides). Raises InvalidChoice for a bad option or input shape.
    """
    require_image("cnn", input_shape, smallest=2)
    require_positive("cnn", width=width, depth=depth)
    return SmallCNN(input_shape[0], classes, width, depth)
