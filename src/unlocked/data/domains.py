"""A training set for each replica, as branch-train-merge wants it (Li et al., 2022): one domain per branch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import BadData
from .dataset import Batch, Data


class Domains:
    """N data sets, one for each of N replicas; an epoch is as many batches as the smallest has.

    Args:
        sets: `Data` of one sample shape, number of classes and number of views (`ul.data.load`, `ul.data.from_tensors`).

    Raises BadData: none, or sets that differ in shape, classes or views.
    """

    def __init__(self, sets: Sequence[Data]) -> None:
        self.sets = list(sets)
        if not self.sets or not all(isinstance(one, Data) for one in self.sets):
            raise BadData(
                "Domains takes a list of at least one Data; make them with ul.data.load or ul.data.from_tensors."
            )
        first = self.sets[0]
        for one in self.sets[1:]:
            if (one.input_shape, one.classes) != (first.input_shape, first.classes):
                raise BadData(
                    f"The domains {first.name!r} and {one.name!r} differ: samples of shape {first.input_shape} and "
                    f"{one.input_shape}, {first.classes} and {one.classes} classes; give all the same, with classes=…."
                )
            if one.views != first.views:
                raise BadData(
                    f"The domains {first.name!r} and {one.name!r} give {first.views} and {one.views} views of an image; "
                    "let augment begin with 'views+' for all of them, or for none."
                )
        self.views = first.views
        self.input_shape, self.classes = first.input_shape, first.classes

    @property
    def labelled(self) -> bool:
        """Whether every sample of every set has a label or a target."""
        return all(one.labelled for one in self.sets)

    def __len__(self) -> int:
        """Samples of the smallest."""
        return min(map(len, self.sets))

    def check(self, replicas: int) -> None:
        """Raises BadData if there is not one for each replica."""
        if len(self.sets) > replicas:
            raise BadData(f"There are {len(self.sets)} domains for {replicas} replicas; give one for each replica.")

    def batches(
        self, batch_size: int, *, replica: int = 0, shards: int = 1, start: int = 0, **when: Any
    ) -> Iterator[Batch]:
        """The batches of a replica's own domain; see `Data.batches`.

        Raises BadData: a replica without a domain, or a rule that splits one epoch among the replicas.
        """
        if shards > 1:
            raise BadData(
                "Each replica has a domain of its own, but this consensus rule splits one data set among them; take btm, papa, "
                "wash or independent, or give one data set."
            )
        if replica >= len(self.sets):
            raise BadData(
                f"There are {len(self.sets)} domains and a replica {replica} (from 0); give one for each replica."
            )
        count = min(one.steps(batch_size) for one in self.sets)
        return itertools.islice(
            self.sets[replica].batches(batch_size, replica=replica, start=start, **when), max(0, count - start)
        )

    def mixed(self, batch_size: int, **when: Any) -> Iterator[Batch]:
        """Batches of all domains in turn."""
        streams = [self.batches(batch_size, replica=n, **when) for n in range(len(self.sets))]
        return itertools.chain.from_iterable(zip(*streams))
