"""Two random views of every image, as contrastive learning wants them.

Chen et al., A Simple Framework for Contrastive Learning (SimCLR), 2020, section 2.1. An augmentation that begins with
`views` gives two images for one: each position of an epoch has two rows of parameters, drawn independently of each other,
and rows 2k and 2k + 1 of a batch are the views of its image k. The first one is what the same operations give without
`views`.

`simclr` is short for the augmentation of Fournier's thesis, Appendix A.1, and of Patel's, Figure A.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadData
from .order import Moment

SIMCLR = "views+resized-crop+flip+jitter+gray"


def parts(text: str | None) -> tuple[int, list[str]]:
    """How many views an augmentation gives of an image, and the names of the operations in it.

    Raises BadData for `views` or `simclr` anywhere but at the beginning.
    """
    names = [] if text is None else [name.strip() for name in text.split("+")]
    if names[:1] == ["simclr"]:
        names[:1] = SIMCLR.split("+")
    count = 1
    if names[:1] == ["views"]:
        count, names = 2, names[1:] if names[1:] != [""] else []
    for name in ("views", "simclr"):
        if name in names:
            raise BadData(
                f"The augmentation {text!r} names {name} in the middle; it comes once, at the beginning, as in "
                "'views+crop-flip' and 'simclr+cutout:8' ('simclr' has views in it already)."
            )
    return count, names


def check(count: int, operations: int, text: str | None) -> None:
    """BadData for views that nothing would tell apart."""
    if count > 1 and not operations:
        raise BadData(
            f"The augmentation {text!r} gives two views of every image but changes neither, so they would be equal; name "
            "what changes them, as in 'views+crop-flip', or write 'simclr'."
        )


def numbers(moment: Moment, name: str, view: int) -> torch.Generator:
    """The generator of one view's parameters of the operation `name`."""
    return moment.numbers(name if view == 0 else f"{name}/{view + 1}")


def interleaved(tables: list[Tensor]) -> Tensor:
    """(count · views, k): the rows of each view's table (count, k), those of one position one after the other."""
    return torch.stack(tables, dim=1).flatten(0, 1)
