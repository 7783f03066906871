"""What networks answer on data, kept as tensors so that one pass serves every number; and how good it is."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import Data, as_data
from ..errors import InvalidChoice
from ..evaluation import Score
from ..losses import Loss, cross_entropy, logits, mean_squared_error
from ..modes import modes_kept

Batch = tuple[Tensor, Tensor]


class Batches:
    """Batches (x, y) that can be gone through again and again.

    `source`: `Data` (unaugmented, in order), a pair of tensors, a torch Dataset, or any iterable of batches (x, y); of an
    iterator, which can be read once, the batches are kept. Raises InvalidChoice if there is none.
    """

    def __init__(self, source: Any, batch_size: int = 512) -> None:
        if isinstance(source, Batches):
            source = source.source
        if isinstance(source, (Data, Dataset)) or _is_pair(source):
            source = as_data(source)
        elif iter(source) is source:
            source = list(source)
        self.source: Data | Iterable[Batch] = source
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for x, y in self._rows():
            empty = False
            yield x, y
        if empty:
            raise InvalidChoice("There are no data to evaluate on; give at least one batch (x, y).")

    def _rows(self) -> Iterable[Batch]:
        if isinstance(self.source, Data):
            return self.source.batches(self._batch_size, epoch=0, seed=0, train=False)
        return self.source

    def sample(self, count: int, seed: int = 0) -> list[Batch]:
        """About `count` samples: of Data drawn at random, unaugmented; of batches the first ones, whole."""
        if isinstance(self.source, Data):
            size = min(self._batch_size, count, len(self.source))
            plain = dataclasses.replace(self.source, augment=None)
            rows: Iterable[Batch] = plain.batches(size, epoch=0, seed=seed, train=True)
            return list(itertools.islice(rows, max(1, count // size)))
        found: list[Batch] = []
        for batch in self:
            if sum(len(x) for x, _ in found) >= count:
                break
            found.append(batch)
        return found


def _is_pair(source: Any) -> bool:
    """A pair of tensors (x, y), and not two batches."""
    return isinstance(source, (tuple, list)) and [isinstance(x, (Tensor, np.ndarray)) for x in source] == [True, True]


class Predictions(NamedTuple):
    """A network's outputs on all data, (M, …), and the targets, on the CPU."""

    outputs: Tensor
    targets: Tensor

    @property
    def classes(self) -> bool:
        """Whether the targets are classes."""
        return not self.targets.is_floating_point()


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Batch]) -> Predictions:
    """The outputs in evaluation mode; modes are put back. Raises InvalidChoice for data that do not fit the network."""
    outputs, targets, device = [], [], device_of(model)
    with modes_kept(model):
        model.eval()
        for x, y in batches:
            outputs.append(_fitting(model, x.to(device), y).cpu())
            targets.append(y.cpu())
    return Predictions(torch.cat(outputs), torch.cat(targets))


def device_of(model: nn.Module) -> torch.device:
    """Where the network is."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _fitting(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    try:
        output = logits(model(x))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise InvalidChoice(
            f"The network cannot take samples of shape {tuple(x.shape[1:])} and type {x.dtype}: "
            f"{str(error).splitlines()[0].rstrip('.')}; give the data it was trained for."
        ) from error
    if not y.is_floating_point() and y.numel() and int(y.max()) >= output.shape[-1]:
        raise InvalidChoice(
            f"The data have a class {int(y.max())}, but the network has only {output.shape[-1]} outputs; give the data it was "
            "trained for."
        )
    if not y.is_floating_point() and y.numel() and int(y.min()) < 0:
        raise InvalidChoice("The data have no labels, so nothing can be scored on them; give labelled data.")
    return output


def default_loss(predictions: Predictions) -> Loss:
    """Cross-entropy for classes, mean squared error for other targets."""
    return cross_entropy if predictions.classes else mean_squared_error


def loss_and_accuracy(predictions: Predictions, loss: Loss | None = None) -> tuple[float, float | None]:
    """The mean loss, and the share of targets hit (None if they are no classes)."""
    score = Score()
    outputs, targets = predictions
    score.add(outputs, targets, (loss or default_loss(predictions))(outputs, targets))
    return score.loss, score.accuracy


def merit(predictions: Predictions, loss: Loss | None = None) -> float:
    """What is to be large: the accuracy, or the loss with a minus where there is none; −∞ if it is no number."""
    found, accuracy = loss_and_accuracy(predictions, loss)
    return number_or_worst(-found if accuracy is None else accuracy)


def number_or_worst(value: float) -> float:
    """−∞ for what is no number."""
    return float("-inf") if value != value else value
