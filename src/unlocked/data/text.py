"""A text file for byte-level language modelling: the first 90 % train, the last 10 % test."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import BadData
from .dataset import Data


def read(place: str, context: int, subset: int | None) -> tuple[Data, Data]:
    """Training and test windows of `context` bytes.

    The training text is cut to a whole number of contexts, so that each epoch's offset takes any value below
    `context` (see `windows.offset`). `subset=n` keeps its first n windows.
    """
    if context < 1:
        raise BadData(f"context is {context}, but a window needs at least 1 byte.")
    file = Path(place).expanduser()
    if not file.is_file():
        what = "is a directory" if file.is_dir() else "does not exist"
        raise BadData(f"{str(file)!r} {what}; give an existing text file as text:FILE.")
    try:
        content = bytearray(file.read_bytes())
    except OSError as error:
        raise BadData(f"{str(file)!r} cannot be read ({error.strerror}); check its permissions.") from error
    cut = len(content) * 9 // 10
    for part, length in (("training (the first 90 %)", cut), ("test (the last 10 %)", len(content) - cut)):
        if length < context + 1:
            raise BadData(
                f"{str(file)!r} leaves {length} bytes for {part}, but a window of context {context} needs "
                f"{context + 1}; give a longer text or a smaller context."
            )
    text = torch.frombuffer(content, dtype=torch.uint8)
    return _data(_training_part(text[:cut], context, subset), context, file.name), _data(text[cut:], context, file.name)


def _training_part(text: Tensor, context: int, subset: int | None) -> Tensor:
    contexts = len(text) // context
    if contexts > 1:  # below two contexts, cutting would leave no window
        text = text[: contexts * context]
    if subset is None:
        return text
    available = max(1, contexts - 1)
    if not 1 <= subset <= available:
        raise BadData(f"subset is {subset}, but the training text has {available} windows; give 1 to {available}.")
    return text[: (subset + 1) * context]


def _data(text: Tensor, context: int, name: str) -> Data:
    return Data(text.contiguous(), None, 256, name, (context,))
