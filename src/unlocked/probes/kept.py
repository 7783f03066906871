"""Features kept in memory for what goes through them again and again: a vote of neighbours, a layer that is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import InvalidChoice
from .knn import knn_accuracy
from .recipe import Recipe


class Rows:
    """All rows of every depth and their classes, on the CPU."""

    def __init__(self) -> None:
        self._features: list[list[Tensor]] = []
        self._labels: list[Tensor] = []

    def add(self, rows: Sequence[Tensor], labels: Tensor) -> None:
        """A batch: for every depth its rows (n, d); their classes. Raises InvalidChoice for targets that are none."""
        if labels.is_floating_point():
            raise InvalidChoice(
                "Neighbours and the recipe find classes, but the targets here are values; leave them out."
            )
        self._features.append([h.cpu() for h in rows])
        self._labels.append(labels.cpu())

    def at(self, depth: int) -> tuple[Tensor, Tensor]:
        """All rows of a depth and their classes."""
        return torch.cat([rows[depth] for rows in self._features]), torch.cat(self._labels)


class Kept:
    """Training and held-out rows, kept only if asked for. knn: how many neighbours vote, recipe: how a layer is trained."""

    def __init__(self, knn: int | None, recipe: Recipe | None) -> None:
        self._knn, self._recipe = knn, recipe
        self._train, self._test = Rows(), Rows()

    @property
    def wanted(self) -> bool:
        """Whether anything was asked for."""
        return self._knn is not None or self._recipe is not None

    def add(self, rows: Sequence[Tensor], labels: Tensor, train: bool) -> None:
        """A batch, if it is wanted."""
        if self.wanted:
            (self._train if train else self._test).add(rows, labels)

    def accuracies(
        self, depth: int, classes: int, device: torch.device, told: Callable[[int], None]
    ) -> tuple[float | None, float | None]:
        """Of the neighbours' vote and of the trained layer at this depth; None: not asked for."""
        if not self.wanted:
            return None, None
        train, test = self._train.at(depth), self._test.at(depth)
        knn = None if self._knn is None else knn_accuracy(train, test, self._knn, device=device)
        if self._recipe is None:
            return knn, None
        return knn, self._recipe.train(*train, classes, device, told).accuracy(*test)
