"""Random changes of a batch of images, drawn by epoch position and applied without a loop over samples.

An `Operation` draws its parameters for all positions of an epoch at once and applies a slice of them to a batch. So the
sample at position q is changed in the same way whatever the batch size and the number of shards are.

`crop`, `flip`: the usual augmentation of CIFAR images (Lee et al., Deeply-Supervised Nets, 2015; He et al., Deep
Residual Learning, 2016, section 4.2): zero padding, a random window of the first size, mirrored with probability 1/2.
`resized-crop`, `jitter`, `gray`: see resized_crop.py and colour.py. `views+…`, `simclr`: see views.py.
`cutout:K`: DeVries & Taylor, Improved Regularization of Convolutional Neural Networks with Cutout, 2017, section 3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadData, choose
from . import views
from .colour import Gray, Jitter
from .operation import Operation
from .order import Moment
from .resized_crop import ResizedCrop

NAMES = ("crop", "crop-flip", "cutout:K", "flip", "gray", "jitter", "none", "resized-crop", "simclr", "views+…")


class Crop(Operation):
    """Pad each side with zeros by an eighth of the image (at least one pixel), then cut a window of the old size."""

    name = "crop"

    def draw(self, count: int, height: int, width: int, numbers: torch.Generator) -> Tensor:
        top = torch.randint(2 * padding(height) + 1, (count,), generator=numbers)
        left = torch.randint(2 * padding(width) + 1, (count,), generator=numbers)
        return torch.stack([top, left], dim=1)

    def apply(self, x_BCHW: Tensor, drawn_Bk: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        vertical, horizontal = padding(height), padding(width)
        padded = F.pad(x_BCHW, (horizontal, horizontal, vertical, vertical))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (B, C, top, left, H, W): copies nothing
        samples = torch.arange(len(x_BCHW), device=x_BCHW.device)
        return windows[samples, :, drawn_Bk[:, 0], drawn_Bk[:, 1]]


class Flip(Operation):
    """Mirror left and right with probability 1/2."""

    name = "flip"

    def draw(self, count: int, height: int, width: int, numbers: torch.Generator) -> Tensor:
        return torch.randint(2, (count, 1), generator=numbers)

    def apply(self, x_BCHW: Tensor, drawn_Bk: Tensor) -> Tensor:
        return torch.where(drawn_Bk.bool()[:, :, None, None], x_BCHW.flip(-1), x_BCHW)


@dataclass(frozen=True)
class Cutout(Operation):
    """Fill a square of K×K pixels with 0, the mean of normalised data. Its centre is uniform over the image and the
    square is clipped at the borders. An even square reaches one pixel further to the top left of its centre."""

    size: int
    name = "cutout"
    normalised = True

    def draw(self, count: int, height: int, width: int, numbers: torch.Generator) -> Tensor:
        row = torch.randint(height, (count,), generator=numbers)
        column = torch.randint(width, (count,), generator=numbers)
        return torch.stack([row, column], dim=1)

    def apply(self, x_BCHW: Tensor, drawn_Bk: Tensor) -> Tensor:
        rows = self._covered(drawn_Bk[:, 0], x_BCHW.shape[-2])
        columns = self._covered(drawn_Bk[:, 1], x_BCHW.shape[-1])
        return x_BCHW.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)

    def check(self, input_shape: tuple[int, ...], dtype: torch.dtype, text: str) -> None:
        if self.size > min(input_shape[1:]):
            raise BadData(
                f"The augmentation {text!r} cuts a square of {self.size} pixels out of images of "
                f"{input_shape[1]}×{input_shape[2]} pixels; use a smaller square."
            )

    def _covered(self, centre_B: Tensor, length: int) -> Tensor:
        begin = (centre_B - self.size // 2)[:, None]
        pixels = torch.arange(length, device=centre_B.device)
        return (pixels >= begin) & (pixels < begin + self.size)


def padding(length: int) -> int:
    """Pixels that `crop` pads to each side of an image side of `length` pixels: 4 for 32, 1 for 8."""
    return max(1, length // 8)


def parse(text: str | None) -> tuple[Operation, ...]:
    """The operations named in e.g. 'crop+flip+cutout:8', in that order; none for None and 'none'. `views+` may stand before
    them, which `views.parts` reads.

    Raises InvalidChoice (a ValueError) for an unknown name, and for an operation whose extra is not installed; BadData for a
    repeated name, a wrong cut-out size, and views that nothing changes.
    """
    count, given = views.parts(text)
    operations = [operation for name in given for operation in _named(name)]
    names = [operation.name for operation in operations]
    for name in names:
        if names.count(name) > 1:
            raise BadData(f"The augmentation {text!r} names {name} {names.count(name)} times; name it once.")
    views.check(count, len(operations), text)
    return tuple(operations)


def check(operations: Sequence[Operation], input_shape: tuple[int, ...], dtype: torch.dtype, text: str | None) -> None:
    """BadData unless the operations can work on samples of this shape and type."""
    if operations and len(input_shape) != 3:
        raise BadData(
            f"The augmentation {text!r} needs images (channels, height, width), but a sample has the shape "
            f"{input_shape}; use augment=None."
        )
    for operation in operations:
        operation.check(input_shape, dtype, text or "")


def draw(
    operations: Sequence[Operation], count: int, input_shape: tuple[int, ...], moment: Moment, of_each: int = 1
) -> list[Tensor]:
    """The parameters (count · of_each, k) of each operation for all `count` positions of an epoch, with `of_each` views of
    the image at each. Operations and views draw independently, so adding one leaves the numbers of the others as they are."""
    if not operations:
        return []  # samples that are not images have no height
    height, width = input_shape[-2:]
    return [
        views.interleaved(
            [
                operation.draw(count, height, width, views.numbers(moment, operation.name, view))
                for view in range(of_each)
            ]
        )
        for operation in operations
    ]


@functools.lru_cache(maxsize=1)
def drawn(text: str | None, count: int, input_shape: tuple[int, ...], moment: Moment) -> tuple[Tensor, ...]:
    """What `draw` gives for the operations and views of `text`. The last epoch's is kept, not to be changed: replicas that run
    freely begin anew in the epoch for each of their batches."""
    return tuple(draw(parse(text), count, input_shape, moment, views.parts(text)[0]))


def apply(operations: Sequence[Operation], x_BCHW: Tensor, drawn: Sequence[Tensor], *, normalised: bool) -> Tensor:
    """The batch after those operations that work on normalised (or on raw) images; `drawn` holds the batch's rows."""
    for operation, drawn_Bk in zip(operations, drawn):
        if operation.normalised == normalised:
            x_BCHW = operation.apply(x_BCHW, drawn_Bk.to(x_BCHW.device))
    return x_BCHW


def _named(name: str) -> list[Operation]:
    head, _, size = name.partition(":")
    if head == "cutout":
        if not size.isdecimal() or int(size) < 1:
            raise BadData(f"The augmentation {name!r} lacks the size of its square; write for example 'cutout:8'.")
        return [Cutout(int(size))]
    if name not in _MADE:
        choose("augmentation", name, NAMES)
    return [made() for made in _MADE[name]]


_MADE: dict[str, tuple[type[Operation], ...]] = {
    "crop": (Crop,),
    "crop-flip": (Crop, Flip),
    "flip": (Flip,),
    "gray": (Gray,),
    "jitter": (Jitter,),
    "none": (),
    "resized-crop": (ResizedCrop,),
}
