"""The 1797 handwritten digits of 8×8 pixels that scikit-learn contains (Alpaydin & Kaynak, UCI, 1998)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import BadData
from .split import Raw, split


def read(place: str, options: dict[str, str], size: int | None) -> Raw:
    """The digits: x uint8 (N, 1, 8, 8) with values 0 … 16; a fixed stratified split of 1438 and 359."""
    if place or options:
        raise BadData("The data set 'digits' takes nothing after its name; write just 'digits'.")
    rows = _rows().astype(np.uint8)  # 64 pixels and the label
    images = rows[:, :-1].reshape(-1, 8, 8)
    if size is not None:
        images = np.stack([_resized(image, size) for image in images])
    return split(torch.from_numpy(images)[:, None], torch.from_numpy(rows[:, -1]).long(), "digits")


def _rows() -> np.ndarray:
    """(1797, 65), out of scikit-learn's own file: importing scikit-learn takes a second of every start."""
    package = find_spec("sklearn")
    if package is not None and package.origin is not None:
        file = Path(package.origin).parent / "datasets/data/digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",", dtype=np.float64)
    from sklearn.datasets import load_digits  # of a release that keeps its file elsewhere

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
