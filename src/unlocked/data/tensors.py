"""`Data` from what a user already has: tensors, or a map-style torch Dataset; with labels or without."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadData
from .dataset import Data, statistics

_ARRAYS = (Tensor, np.ndarray)
_NO_LABEL = -1


def from_tensors(
    x: Any,
    y: Any = None,
    *,
    classes: int | None = None,
    name: str = "tensors",
    augment: str | None = None,
    like: Data | None = None,
) -> Data:
    """Data from N samples x (N, …) and their targets y (N, …), both tensors (or NumPy arrays); None: there are no labels.

    - x uint8: normalised by its own statistics (per channel if it is (N, C, H, W)). For a test set give the training
      set as `like`: its statistics and classes are used instead.
    - x of a float type: given out as it is, with its type; no normalisation. Other integers (token ids): as int64.
    - y integer: labels 0 … classes − 1; `classes=None` counts up to the largest label.
    - y of a float type: regression targets, kept as they are; `classes=None` is their number of columns.
    - y None, or -1 throughout: no labels. They are -1 then, and `classes=None` is 1, for the classifier that a network may
      have until `ul.models.encoder` takes it away.

    Raises BadData for empty, unequally long, non-finite or wrongly labelled tensors.
    """
    x = _samples(x, name)
    y = no_labels(len(x)) if y is None else _targets(y, name)
    if len(x) != len(y) or len(x) == 0:
        raise BadData(
            f"The data set {name!r} has {len(x)} samples and {len(y)} targets; give one target for each sample."
        )
    if like is not None and like.input_shape != tuple(x.shape[1:]):
        raise BadData(
            f"A sample of {name!r} has the shape {tuple(x.shape[1:])}, but one of {like.name!r} has "
            f"{like.input_shape}; make them equal."
        )
    classes = like.classes if like is not None and classes is None else classes
    mean = std = None
    if x.dtype == torch.uint8:
        mean, std = statistics(x) if like is None else (like.mean, like.std)
    return Data(x, y, _classes(y, classes, name), name, tuple(x.shape[1:]), mean, std, augment)


def as_data(source: Any) -> Data:
    """`source` as Data: a Data itself, a pair of tensors (x, y), or a map-style Dataset of pairs (x, y), which is read
    and stacked once, now. Without labels: a tensor x, a pair (x, None), or a Dataset of tensors x or of (x,).

    BadData for anything else and for samples that cannot be stacked.
    """
    if isinstance(source, Data):
        return source
    if isinstance(source, _ARRAYS):
        return from_tensors(source)
    if isinstance(source, (tuple, list)) and [isinstance(part, _ARRAYS) for part in source] == [True, True]:
        return from_tensors(source[0], source[1])
    if isinstance(source, (tuple, list)) and len(source) == 2 and isinstance(source[0], _ARRAYS) and source[1] is None:
        return from_tensors(source[0])
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise BadData(
            f"Data cannot be made from a {type(source).__name__}; give a Data, a tensor x, a pair of tensors (x, y), or a "
            "dataset with __len__ and __getitem__ (of a DataLoader: its .dataset)."
        )
    return _stacked(source, type(source).__name__)


def _stacked(dataset: Any, name: str) -> Data:
    if len(dataset) == 0:
        raise BadData(f"The data set {name!r} is empty.")
    samples: list[list[Tensor]] = []
    for number in range(len(dataset)):
        sample = _parts(dataset[number], number, name)
        if samples and [part.shape for part in sample] != [part.shape for part in samples[0]]:
            raise BadData(
                f"The data set {name!r} cannot be stacked: {_shapes(sample, number)}, {_shapes(samples[0], 0)}; make them "
                "equal."
            )
        samples.append(sample)
    return from_tensors(*(torch.stack(parts) for parts in zip(*samples)), name=name)


def _parts(sample: Any, number: int, name: str) -> list[Tensor]:
    """x and y, or x alone."""
    parts = [sample] if isinstance(sample, _ARRAYS) else sample
    if not isinstance(parts, (tuple, list)) or len(parts) not in (1, 2):
        raise BadData(
            f"Sample {number} of the data set {name!r} is a {type(sample).__name__}, but must be a pair (x, y), or x alone."
        )
    return [_tensor(part, f"Sample {number} of the data set {name!r}") for part in parts]


def _shapes(sample: list[Tensor], number: int) -> str:
    listed = " and ".join(str(tuple(part.shape)) for part in sample)
    return f"{'x and y' if len(sample) == 2 else 'x alone'} of sample {number} have the shapes {listed}"


def _tensor(value: Any, what: str) -> Tensor:
    try:
        return torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadData(
            f"{what} holds a {type(value).__name__}, which is not a tensor; convert it first, for example with "
            "torch.from_numpy(numpy.array(image))."
        ) from error


def _samples(values: Any, name: str) -> Tensor:
    x = _tensor(values, f"The data set {name!r}")
    if x.dim() == 0 or x.dtype == torch.bool or x.is_complex():
        raise BadData(
            f"The samples of {name!r} have the type {x.dtype} and {x.dim()} dimensions; give numbers, (N, …)."
        )
    if x.is_floating_point():
        return _finite(x, f"The samples of {name!r}")
    return x if x.dtype == torch.uint8 else x.long()


def _targets(values: Any, name: str) -> Tensor:
    y = _tensor(values, f"The data set {name!r}")
    if y.dim() == 0 or y.is_complex():
        raise BadData(
            f"The targets of {name!r} have the type {y.dtype} and {y.dim()} dimensions; give numbers, (N, …)."
        )
    return _finite(y, f"The targets of {name!r}") if y.is_floating_point() else y.long()


def _finite(values: Tensor, what: str) -> Tensor:
    if not values.isfinite().all():
        raise BadData(f"{what} contain a value that is not finite; remove it, or replace it by a number.")
    return values


def no_labels(count: int) -> Tensor:
    """(count,) int64: the labels of samples that have none."""
    return torch.full((count,), _NO_LABEL)


def _classes(y: Tensor, classes: int | None, name: str) -> int:
    if y.is_floating_point():
        return classes if classes is not None else (y.shape[1] if y.dim() > 1 else 1)
    least, most = int(y.min()), int(y.max())
    if least == most == _NO_LABEL:
        return 1 if classes is None else classes
    if least < 0:
        raise BadData(
            f"The labels of {name!r} contain {least}; labels are whole numbers from 0, or -1 throughout, for no labels."
        )
    if classes is not None and most >= classes:
        raise BadData(
            f"The labels of {name!r} contain {most}, but with {classes} classes the largest is {classes - 1}."
        )
    return classes if classes is not None else most + 1
