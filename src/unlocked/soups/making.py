"""Every network that a population can be made into, without looking at the data it will be judged by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..batchnorm import batchnorms, refresh_batchnorm
from ..data import Data
from ..data.split import stratified_order
from ..errors import InvalidChoice
from ..losses import Loss
from ..rng import generator
from . import repairing
from .averaging import averaged
from .greedy import GreedySoup, greedy_soup
from .predicting import Batches

SAMPLES = 2048  # training samples that statistics are estimated from


@dataclass(frozen=True)
class Soups:
    """averaged: the members' mean. refreshed: with its BatchNorm statistics estimated anew. repaired: by REPAIR.
    greedy: the greedy soup. None: not asked for, no data for it, or (refreshed) no BatchNorm."""

    averaged: nn.Module
    refreshed: nn.Module | None = None
    repaired: repairing.Repair | None = None
    greedy: GreedySoup | None = None


def make_soups(
    models: Sequence[nn.Module],
    *,
    validation: Any = None,
    train: Any = None,
    refresh: bool = True,
    repair: bool = True,
    greedy: bool = True,
    samples: int = SAMPLES,
    seed: int = 0,
    loss: Loss | None = None,
    batch_size: int = 512,
) -> Soups:
    """The networks made of the models. Data are anything `Batches` takes.

    validation: chooses the greedy soup. train: about `samples` of it, unaugmented, give the statistics for `refresh` and
    `repair`; with `refresh` the greedy soup's means have theirs estimated anew as well.
    """
    mean = averaged(models)
    rows = None if train is None else Batches(train, batch_size).sample(samples, seed)
    renew = rows if refresh and batchnorms(mean) else None
    refreshed = None
    if renew is not None:
        refreshed = averaged(models)
        refresh_batchnorm(refreshed, renew)
    return Soups(
        mean,
        refreshed,
        repairing.repair(mean, models, rows) if repair and rows is not None else None,
        greedy_soup(models, validation, refresh=renew, loss=loss, batch_size=batch_size)
        if greedy and validation is not None
        else None,
    )


def hold_out(train: Data, share: float = 0.1, seed: int = 0) -> tuple[Data, Data]:
    """The training data without a share of them, and that share, unaugmented, to select on.

    Classes keep their proportions; of a text it is the end. It is held apart from the test data, but not from a training that
    is over: networks trained on all of `train` have seen it, and those that overfit most look best on it.
    Raises InvalidChoice if either part would be empty.
    """
    count = round(share * (len(train.x) if train.y is None else len(train))) if 0 < share < 1 else 0
    if not 0 < count < len(train.x):
        raise InvalidChoice(f"A validation share of {share} of {len(train)} samples is not possible; give e.g. 0.1.")
    if train.y is None:
        cut = len(train.x) - count
        parts = dataclasses.replace(train, x=train.x[:cut]), dataclasses.replace(train, x=train.x[cut:], augment=None)
        if not all(len(part) for part in parts):
            raise InvalidChoice(
                f"A validation share of {share} of {len(train)} windows leaves one part without a whole window; give another "
                "share, or more text."
            )
        return parts
    if train.y.dim() == 1 and not train.y.is_floating_point():
        order = stratified_order(train.y.cpu(), "validation", seed)
    else:
        order = torch.randperm(len(train), generator=generator("validation", seed))
    kept, held = (index.to(train.x.device) for index in (order[count:], order[:count]))
    return (
        dataclasses.replace(train, x=train.x[kept], y=train.y[kept]),
        dataclasses.replace(train, x=train.x[held], y=train.y[held], augment=None),
    )
