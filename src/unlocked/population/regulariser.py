"""What makes the members of a population differ: a regulariser for each (F D.3, as in PAPA).

Jolicoeur-Martineau et al., PopulAtion Parameter Averaging (PAPA), 2024; Fournier's thesis, Appendix D.3: every member draws
each value from a list, uniformly and independently.

    mixup             α of Beta(α, α)                  Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018
    cutmix            α of Beta(α, α)                  Yun et al., CutMix, 2019
    label smoothing   s: (1 − s) onehot(y) + s/K       Szegedy et al., Rethinking the Inception Architecture, 2016
    random erasing    p: probability, for each image   Zhong et al., Random Erasing Data Augmentation, 2020

Limits: all values 0 change nothing, which is the homogeneous setting: members differ in the order of the data alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from ..errors import InvalidChoice, choose
from ..rng import generator

Choices = Mapping[str, Sequence[float]]
Setting = Literal["homogeneous", "heterogeneous", "heterogeneous-imagenet"]


@dataclass(frozen=True)
class Regulariser:
    """One member's. Each 0: left out.

    mixup, cutmix: α ≥ 0 of Beta(α, α), from which the share of a batch's own images is drawn. With both, one of them is
    drawn for every batch, each with probability 1/2. label_smoothing: in [0, 1). random_erasing: a probability.
    Raises InvalidChoice.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InvalidChoice(f"Regulariser({name}={value!r}) is not possible; give a number, 0 to leave it out.")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise InvalidChoice(
                    f"Regulariser({name}={getattr(self, name)}) is not possible: it is the α of Beta(α, α); give a number "
                    "greater than 0, or 0 to leave it out."
                )
        if not 0 <= self.label_smoothing < 1:
            raise InvalidChoice(
                f"Regulariser(label_smoothing={self.label_smoothing}) is not possible; give a share of at least 0 and below 1."
            )
        if not 0 <= self.random_erasing <= 1:
            raise InvalidChoice(
                f"Regulariser(random_erasing={self.random_erasing}) is not possible; give a probability from 0 to 1."
            )

    def __str__(self) -> str:
        """Those that are on: `mixup 0.5, random_erasing 0.15`."""
        on = [f"{name} {value:g}" for name, value in dataclasses.asdict(self).items() if value]
        return ", ".join(on) or "none"

    @property
    def mixes(self) -> bool:
        """Whether samples of a batch are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def softens(self) -> bool:
        """Whether targets become probabilities."""
        return self.mixes or self.label_smoothing > 0


CIFAR: Choices = MappingProxyType(
    {
        "mixup": (0.0, 0.5, 1.0),
        "label_smoothing": (0.0, 0.05, 0.1),
        "cutmix": (0.0, 0.5, 1.0),
        "random_erasing": (0.0, 0.15, 0.35),
    }
)
IMAGENET: Choices = MappingProxyType(
    {
        "mixup": (0.0, 0.2),
        "label_smoothing": (0.0, 0.1),
        "cutmix": (0.0, 1.0),
        "random_erasing": (0.0, 0.35),
    }
)
_LISTS = {"cifar": CIFAR, "imagenet": IMAGENET}


def draw(n: int, seed: int, choices: Literal["cifar", "imagenet"] | Choices = "cifar") -> tuple[Regulariser, ...]:
    """The regularisers of `n` members, each value drawn uniformly from its list.

    choices: "cifar" or "imagenet" (the thesis' lists), or lists by the names of Regulariser's fields; those left out are 0.
    A member's draw depends on (seed, member) alone, so a larger population begins with the members of a smaller one.
    Raises InvalidChoice.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InvalidChoice(f"A population of n={n!r} members is not possible; give a whole number of at least 1.")
    lists = _LISTS[choose("list of regularisers", choices, _LISTS)] if isinstance(choices, str) else choices
    fields = [field.name for field in dataclasses.fields(Regulariser)]
    for name, values in lists.items():
        if not len(values):
            raise InvalidChoice(
                f"The list of {choose('regulariser', name, fields)} is empty; give values, or leave it out."
            )
        for value in values:
            Regulariser(**{choose("regulariser", name, fields): value})  # refused whether it will be drawn or not
    return tuple(
        Regulariser(**{name: _one_of(lists[name], seed, member, name) for name in lists}) for member in range(n)
    )


def of_setting(setting: Setting, replicas: int, seed: int) -> tuple[Regulariser, ...] | None:
    """The regularisers that the command line's `--population` stands for; None: the homogeneous setting has none."""
    if setting == "homogeneous":
        return None
    return draw(replicas, seed, "imagenet" if setting == "heterogeneous-imagenet" else "cifar")


def _one_of(values: Sequence[float], seed: int, member: int, name: str) -> float:
    index = torch.randint(len(values), (), generator=generator(seed, "population", member, name))
    return values[int(index)]
