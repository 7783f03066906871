"""The greedy soup: members are taken into the mean one by one, if that helps on held-out data.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference
time" (2022), recipe 1; Rame et al., DiWA (2022).

    order the members by held-out accuracy, best first;  soup ← {first}
    for each other member n:  soup ← soup ∪ {n}  if accuracy(mean of soup ∪ {n}) > accuracy(mean of soup)

The paper accepts at equal accuracy, too; here it must be strictly better, so that a member that changes nothing is left out.
Limits: one member gives itself; on the data it was chosen by the soup is never worse than the best member, as it begins with
that one. Those data must not be the ones it is judged by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ..batchnorm import refresh_batchnorm
from ..losses import Loss
from .averaging import averaged, refuse_unlike
from .predicting import Batches, merit, predict


class GreedySoup(NamedTuple):
    """model: the mean of `members` (in the order in which they were taken). score: held-out accuracy of the soup; alone: of
    every model (a loss with a minus, where targets are no classes)."""

    model: nn.Module
    members: tuple[int, ...]
    score: float
    alone: tuple[float, ...]


def greedy_soup(
    models: Sequence[nn.Module],
    validation: Any,
    *,
    refresh: Any = None,
    loss: Loss | None = None,
    batch_size: int = 512,
) -> GreedySoup:
    """The greedy soup of the models, chosen on `validation` (anything `Batches` takes).

    refresh: batches for the BatchNorm statistics of every mean of two or more members; None: the mean of the members' own.
    Raises InvalidChoice for models of different architectures and data that do not fit.
    """
    refuse_unlike(models)
    held_out = Batches(validation, batch_size)
    sources = None if refresh is None else Batches(refresh, batch_size)
    alone = tuple(merit(predict(model, held_out), loss) for model in models)
    order = sorted(range(len(models)), key=lambda n: -alone[n])  # stable: the earlier one of equals
    members, soup, score = order[:1], averaged([models[order[0]]]), alone[order[0]]
    for n in order[1:]:
        candidate = averaged([models[m] for m in [*members, n]])
        if sources is not None:
            refresh_batchnorm(candidate, sources)
        found = merit(predict(candidate, held_out), loss)
        if found > score:
            members, soup, score = [*members, n], candidate, found
    return GreedySoup(soup, tuple(members), score, alone)
