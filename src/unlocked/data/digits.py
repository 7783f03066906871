"""The 1797 handwritten digits of 8×8 pixels that scikit-learn contains (Alpaydin & Kaynak, UCI, 1998)."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ..errors import BadData
from .split import Raw, split


def read(place: str, options: dict[str, str], size: int | None) -> Raw:
    """The digits: x uint8 (N, 1, 8, 8) with values 0 … 16; a fixed stratified split of 1438 and 359."""
    if place or options:
        raise BadData("The data set 'digits' takes nothing after its name; write just 'digits'.")
    from sklearn.datasets import load_digits  # late: importing scikit-learn takes a second

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)
    if size is not None:
        images = np.stack([_resized(image, size) for image in images])
    return split(torch.from_numpy(images)[:, None], torch.from_numpy(bunch.target).long(), "digits")


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
