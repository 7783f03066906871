"""The contrast that all variants of NT-Xent have in common, of the similarities of all rows with all rows.

    ℓ_i = −β_i log( exp(s_ip / τ) / Σ_{l ∈ A_i} exp(s_il / τ) )          p = i XOR 1, the other view of i's image
    L   = Σ_i ℓ_i / 2B                        or / number of rows that have a term at all

    s cosine similarity, τ temperature, β_i whether row i's positive pair is kept, A_i the rows of i's denominator.
    A row whose positive is not kept, or whose denominator is empty, has no term: it adds 0 and has no gradient.

Masks are indicators, so no gradient passes through them. A similarity that is not a number is always kept: it must show in the
loss, where training looks for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InvalidChoice
from ..losses import WrongTarget
from .base import check_pairs, partners

MEANS = ("all", "kept")


def cosines(z: Tensor) -> Tensor:
    """(N, N) cosine similarities of the rows of z (N, D), in at least float32, whatever autocast says.

    A row of zeros has no direction: its similarity with every row, itself too, is 0, and it gets no gradient. All others are
    divided by their largest entry first, so that no length is too small or too large.
    """
    with torch.autocast(z.device.type, enabled=False):  # 1/τ makes bfloat16's few digits fewer
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        largest = wide.detach().abs().amax(1, keepdim=True)
        scaled = wide / torch.where(largest == 0, math.inf, largest)
        rows = scaled / scaled.norm(dim=1, keepdim=True).clamp_min(1)  # with an entry ±1 no row is shorter than 1
        return rows @ rows.T


def at_least(similar: Tensor, threshold: float) -> Tensor:
    """Where the similarity is not below the threshold; -1 keeps all, whatever rounding did."""
    return ~(similar < threshold) if threshold > -1 else torch.ones_like(similar, dtype=torch.bool)


def at_most(similar: Tensor, threshold: float) -> Tensor:
    """Where the similarity is not above the threshold; 1 keeps all, whatever rounding did."""
    return ~(similar > threshold) if threshold < 1 else torch.ones_like(similar, dtype=torch.bool)


def of_partners(square: Tensor) -> Tensor:
    """(N,): of every row of (N, N) the entry of the other view of its image."""
    return square.gather(1, partners(len(square), square.device)[:, None]).squeeze(1)


def positives(rows: int, device: torch.device) -> Tensor:
    """(N, N) bool: the two views of one image."""
    other = partners(rows, device)
    return other[:, None] == torch.arange(rows, device=device)


def negatives(rows: int, device: torch.device) -> Tensor:
    """(N, N) bool: views of different images."""
    image = torch.arange(rows, device=device) // 2
    return image[:, None] != image


def contrast(similar: Tensor, temperature: float, kept: Tensor, among: Tensor, mean: str = "all") -> Tensor:
    """L above, a scalar. similar (N, N); kept (N,) bool: β; among (N, N) bool: A, without i itself; mean: 'all' or 'kept'."""
    with torch.autocast(similar.device.type, enabled=False):
        logits = similar / temperature
        has_term = kept & among.any(1)
        left = logits.masked_fill(~among & has_term[:, None], -math.inf)  # rows without a term stay finite
        terms = torch.where(has_term, left.logsumexp(1) - of_partners(logits), 0.0)
        return terms.sum() / (has_term.sum().clamp_min(1) if mean == "kept" else len(terms))


def shares(kept: Tensor, among: Tensor) -> dict[str, Tensor]:
    """The notes: which part of all positive pairs, and of all negative pairs, is kept. 1 if there are no negatives at all."""
    rows = len(kept)
    others = among & negatives(rows, kept.device)
    share = others.sum() / (rows * (rows - 2)) if rows > 2 else torch.ones((), device=kept.device)
    return {"positives kept": kept.float().mean(), "negatives kept": share}


def judged_by(loss: str, oracle: Tensor | None, z: Tensor) -> Tensor:
    """(N, N) similarities of the oracle's projections, without gradient. Raises WrongTarget if there is no oracle."""
    if oracle is None:
        raise WrongTarget(
            f"{loss} chooses the pairs by the projections of an oracle, and got none. Use a credit rule that has an oracle "
            "(oracle-simclr, dgssl-llm), or call loss.judge(z, y, oracle) with its projections."
        )
    check_pairs(f"{loss} (the oracle)", oracle)
    if len(oracle) != len(z):
        raise WrongTarget(
            f"{loss} got {len(z)} projections and {len(oracle)} of the oracle; the oracle has to see the same rows."
        )
    with torch.no_grad():
        return cosines(oracle)


def unless_lost(loss: Tensor, compared: Tensor) -> Tensor:
    """The loss; not a number if what the pairs were chosen by is not, which must not go on unseen."""
    return torch.where(compared.sum().isfinite(), loss, torch.nan)


def check_temperature(loss: str, temperature: float) -> None:
    """Raises InvalidChoice unless 0 < τ < ∞."""
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise InvalidChoice(
            f"{loss} divides similarities by its temperature, which must be a finite number above 0; given {temperature}. "
            "The usual one is 0.5."
        )


def check_cosine(loss: str, name: str, value: float) -> None:
    """Raises InvalidChoice unless a threshold is in [-1, 1]."""
    if not isinstance(value, (int, float)) or not -1 <= value <= 1:
        raise InvalidChoice(
            f"{loss} compares cosine similarities with {name}, which must be in [-1, 1]; given {value}."
        )
