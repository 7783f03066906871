"""Stratified orders: every beginning of one holds the classes nearly in the proportions of the whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BadData
from ..rng import generator

_SPLIT_SEED = 0  # fixed: the test set must not change with a run's seed


class Raw(NamedTuple):
    """An image set as read: x uint8 (N, C, H, W), y int64 (N,), of training and of test; labels are -1 where there are none."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    name: str


def stratified_order(y: Tensor, *parts: int | str) -> Tensor:
    """(N,) int64 shuffle of the samples with labels y (N,), drawn from the seed `parts`.

    The k-th of the m members of a class stands at about (k − ½)/m of the order. So among the first n samples, a class
    of share p has about n·p members; with equally large classes their numbers differ by at most one.
    """
    shuffled = torch.randperm(len(y), generator=generator("stratified", *parts))
    place = torch.empty(len(y), dtype=torch.float64)
    for label in y.unique():
        members = (y[shuffled] == label).nonzero().flatten()
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return shuffled[place.argsort(stable=True)]  # stable: equal places keep the shuffle's order


def split(x: Tensor, y: Tensor, name: str) -> Raw:
    """80 % of the samples for training and 20 % for test, stratified, always the same."""
    order = stratified_order(y, "split", _SPLIT_SEED)
    cut = round(0.8 * len(y))
    if cut == len(y):
        raise BadData(
            f"The data set {name!r} has only {len(y)} sample(s), too few for a test set of 20 %; give a split."
        )
    train, test = order[:cut], order[cut:]
    return Raw(x[train], y[train], x[test], y[test], name)
