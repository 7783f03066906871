"""The weighted k-nearest-neighbour classifier on frozen features (Wu, Xiong, Yu & Lin, Unsupervised feature learning via
non-parametric instance discrimination, 2018, section 3.4).

    s_i = ⟨h, h_i⟩ / (‖h‖ ‖h_i‖),      vote for class c = Σ_{i ∈ N_k, y_i = c} exp(s_i / τ)

h features of a new sample, h_i of training sample i with class y_i; N_k the k training samples with the largest s_i; τ
temperature. The class with the largest vote is the answer; of equal ones the first.

Exact: every new sample is compared with every training sample, n · m · d multiplications for n training rows, m new rows and
d features. k is at most n. Which of several equally near rows are among the k is not said.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidChoice

NEIGHBOURS = 200
TEMPERATURE = 0.07

_ENTRIES = 2**24  # similarities that are in memory at a time


def knn_accuracy(
    train: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    device: torch.device | str | None = None,
) -> float:
    """The share of new rows whose class the vote finds.

    Args:
        train, new: features (n, d) and classes (n,) int64, from 0.
        device: where to compute; default: where the features are.

    Raises InvalidChoice for a k or temperature that is not positive, and for targets that are no classes.
    """
    check_neighbours(k)
    if not temperature > 0:
        raise InvalidChoice(f"temperature={temperature} is not possible; give a positive number.")
    (h, y), (rows, answers) = train, new
    if y.is_floating_point() or answers.is_floating_point():
        raise InvalidChoice("Neighbours vote for classes, but the targets here are values; leave out knn.")
    where = h.device if device is None else torch.device(device)
    h, y, classes = F.normalize(h.to(where)), y.to(where), int(y.max()) + 1
    hits, some = 0, max(1, _ENTRIES // len(h))
    for part, labels in zip(rows.split(some), answers.split(some), strict=True):
        near = (F.normalize(part.to(where)) @ h.T).topk(min(k, len(h)), dim=1)
        votes = torch.zeros(len(part), classes, dtype=torch.float64, device=where)
        apart = (near.values - near.values[:, :1]).double()  # from the nearest: what all share changes no vote
        votes.scatter_add_(1, y[near.indices], (apart / temperature).exp())
        hits += int((votes.argmax(1) == labels.to(where)).sum())
    return hits / len(rows)


def check_neighbours(k: int) -> None:
    """Raises InvalidChoice unless k can be a number of neighbours."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InvalidChoice(f"knn={k!r} is not possible; give a whole number of at least 1.")
