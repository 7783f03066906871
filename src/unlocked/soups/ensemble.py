"""Several networks that answer together: the mean of their predictions, at the cost of all of them.

    probabilities    p̄ = 1/N Σ_n softmax(f_n(x))     what comes out is log p̄, of which softmax is p̄ again
    outputs          1/N Σ_n f_n(x)                   mean of logits; for targets that are no classes

Hansen and Salamon, "Neural Network Ensembles" (1990); Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty
Estimation using Deep Ensembles" (2017), take the mean of probabilities, as does this library unless told otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import InvalidChoice, choose
from ..losses import logits

Mean = Literal["probabilities", "outputs"]


class Ensemble(nn.Module):
    """The members' mean prediction as one module; its forward costs N forwards.

    Args:
        models: the members, at least one; they are held, not copied.
        mean: "probabilities" gives log p̄ over the last dimension, "outputs" the mean of the outputs themselves.
    """

    def __init__(self, models: Sequence[nn.Module], mean: Mean = "probabilities") -> None:
        super().__init__()
        choose("mean of an ensemble", mean, ("probabilities", "outputs"))
        if len(models) == 0:
            raise InvalidChoice("An ensemble needs at least one model; none was given.")
        self.members = nn.ModuleList(models)
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        """(B, …, K) log-probabilities of the mean prediction, or the mean of the outputs."""
        return mean_prediction([logits(member(x)) for member in self.members], self.mean)


def mean_prediction(outputs: Sequence[Tensor], mean: Mean = "probabilities") -> Tensor:
    """The ensemble's output from those of its members, each (B, …, K)."""
    rows = torch.stack(list(outputs))
    if mean == "outputs":
        return rows.mean(0)
    return rows.log_softmax(-1).logsumexp(0) - math.log(len(rows))
