"""How different the members of a population are: in what they answer, and in their weights.

    disagreement(n, m)      share of samples on which the answers (argmax) of members n and m differ
    distance to consensus   1/N Σ_n ‖θ_n − θ̄‖₂, θ̄ the mean of the members, parameters only

Fort, Hu, Lakshminarayanan, "Deep Ensembles: A Loss Landscape Perspective" (2019); Fournier's thesis, 6.3 and Figures 6.4, D.2.
Limits: equal members have 0 everywhere; both are symmetric in the members.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..flat import bounds
from .averaging import network_parameters, refuse_unlike

QUARTERS = 4


class Distances(NamedTuple):
    """whole: mean over the members of ‖θ_n − θ̄‖₂. quarters: the same of each quarter of the parameters, in the order of the
    modules; a quarter is a fourth of all scalars, cut within a tensor where it falls so."""

    whole: float
    quarters: tuple[float, ...]


def disagreement(outputs: Sequence[Tensor]) -> Tensor:
    """(N, N) float64 shares, from the members' outputs (…, K) on the same samples; the diagonal is 0."""
    answers = torch.stack([output.argmax(-1).flatten() for output in outputs])
    return torch.stack([(answers != row).double().mean(1) for row in answers])


def mean_over_pairs(matrix: Tensor) -> float:
    """The mean of an (N, N) matrix over its N(N−1) entries beside the diagonal; 0 for N = 1."""
    count = len(matrix) * (len(matrix) - 1)
    return float(matrix.sum() - matrix.diagonal().sum()) / count if count else 0.0


def distance_to_consensus(models: Sequence[nn.Module]) -> Distances:
    """Of the members to their mean, whole and per quarter of depth. Raises InvalidChoice for models that differ in shape.

    Over members, ‖·‖² of the quarters sum up to that of the whole; their means do so only if all members are equally far.
    """
    refuse_unlike(models)
    rows = [torch.cat([x.double().flatten().cpu() for x in network_parameters(model)]) for model in models]
    consensus = sum(rows[1:], rows[0]) / len(rows)
    cuts = bounds(len(consensus), QUARTERS)
    parts = torch.tensor(
        [[float((row - consensus)[begin:end].norm()) for begin, end in [(0, None), *pairwise(cuts)]] for row in rows],
        dtype=torch.float64,
    ).mean(0)
    return Distances(float(parts[0]), tuple(parts[1:].tolist()))
