"""Linear probes: how well a linear map reads the target from frozen features (Alain & Bengio, Understanding intermediate layers
using linear classifier probes, 2016), here fitted by ridge regression in closed form.

    z = (h − μ) / σ                                                 a feature that never changes counts as 0
    W = argmin 1/n Σ ‖y − ȳ − Wᵀz‖² + λ ‖W‖² = (ZᵀZ/n + λI)⁻¹ Zᵀ(Y − ȳ)/n,      ŷ = Wᵀz + ȳ

h features (n, d); μ, σ their means and standard deviations; y targets (n, p), for classes their one-hot rows, of which the
largest ŷ is the answer; λ strength of the ridge; n rows of training data.

λ is the one of RIDGES with the least squared error on a part of the training rows after fitting to the rest; W is then fitted
to all of them. Both need sums over rows only, so each batch is seen once and none is kept. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidChoice

RIDGES = tuple(10.0**k for k in range(-6, 2))

HELD = 0.2  # of the training samples, to choose λ

_CONSTANT = 1e-14  # of the mean's square: a smaller variance is what float32 rounds


class Moments:
    """Sums over rows (h, y) and their products, counted from an origin near the data so that few digits are lost.

    `origins`: of h (d,) and of y (p,), float64. y are classes (n,), int64, or values (n, p).
    """

    def __init__(self, origins: tuple[Tensor, Tensor]) -> None:
        self.origins = origins
        d, p = len(origins[0]), len(origins[1])
        self.count = 0
        self.h, self.y = torch.zeros_like(origins[0]), torch.zeros_like(origins[1])
        self.hh, self.hy = self.h.new_zeros(d, d), self.h.new_zeros(d, p)
        self.yy = self.h.new_zeros(())

    def add(self, h: Tensor, y: Tensor) -> None:
        """Some more rows."""
        z = h.double() - self.origins[0]
        self.count += len(z)
        self.h += z.sum(0)
        self.hh += z.T @ z
        if y.is_floating_point():
            values = y.double() - self.origins[1]
            self.y += values.sum(0)
            self.hy += z.T @ values
            self.yy += values.square().sum()
        else:  # as if of one-hot rows, which a vocabulary would make large
            self.y += torch.bincount(y, minlength=len(self.y))
            self.hy.T.index_put_((y,), z, accumulate=True)
            self.yy += len(y)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(self.origins)
        total.count = self.count + other.count
        for name in ("h", "y", "hh", "hy", "yy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def about(self, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Σ (h−a)(h−a)ᵀ, Σ (h−a)(y−b)ᵀ and Σ ‖y−b‖², a and b counted from the origins."""
        hh = self.hh - torch.outer(self.h, h) - torch.outer(h, self.h) + self.count * torch.outer(h, h)
        hy = self.hy - torch.outer(self.h, y) - torch.outer(h, self.y) + self.count * torch.outer(h, y)
        return hh, hy, self.yy - 2 * (y @ self.y) + self.count * (y @ y)

    @property
    def covariance(self) -> Tensor:
        """Of h, (d, d)."""
        return self.about(self.h / self.count, self.y / self.count)[0] / self.count


@dataclass(frozen=True)
class LinearProbe:
    """ŷ = (h − mean) weight + bias; weight (d, p) is for features as they are; ridge: the λ it was fitted with."""

    weight: Tensor
    mean: Tensor
    bias: Tensor
    ridge: float

    def predict(self, h: Tensor) -> Tensor:
        """(n, p), float64."""
        return (h.double() - self.mean) @ self.weight + self.bias


class _Ridge:
    """The solutions for all λ at once: the standardised features' correlation matrix is diagonalised once."""

    def __init__(self, moments: Moments) -> None:
        self.h, self.y = moments.h / moments.count, moments.y / moments.count
        hh, hy, _ = moments.about(self.h, self.y)
        variance = hh.diagonal() / moments.count
        level = (self.h + moments.origins[0]).square()
        self.scale = torch.where(variance > _CONSTANT * level, variance.clamp(min=0).rsqrt(), 0.0)
        self.values, self.vectors = torch.linalg.eigh(self.scale[:, None] * hh * self.scale / moments.count)
        self.goal = self.vectors.T @ (self.scale[:, None] * hy / moments.count)

    def weight(self, ridge: float) -> Tensor:
        return self.scale[:, None] * (self.vectors @ (self.goal / (self.values.clamp(min=0) + ridge)[:, None]))

    def error(self, ridge: float, held: Moments) -> float:
        """Squared error on other rows, summed."""
        weight = self.weight(ridge)
        hh, hy, yy = held.about(self.h, self.y)
        return float(yy - 2 * (weight * hy).sum() + (weight * (hh @ weight)).sum())


def fit(moments: Moments, ridge: float) -> LinearProbe:
    """The probe fitted to these rows with this λ."""
    solved = _Ridge(moments)
    h, y = moments.origins
    return LinearProbe(solved.weight(ridge), h + solved.h, y + solved.y, ridge)


def chosen(part: Moments, held: Moments) -> LinearProbe:
    """The probe fitted to all rows, with the λ that suits the held-out ones best (of equals the largest)."""
    solved = _Ridge(part)
    return fit(part + held, min(reversed(RIDGES), key=lambda ridge: solved.error(ridge, held)))


def held_out(samples: int, generator: torch.Generator) -> Tensor:
    """(samples,) bool: which of the next samples choose λ. One generator for all batches makes it the same in any batches."""
    return torch.rand(samples, generator=generator) < HELD


class TrainingRows:
    """The rows that a probe learns from, as sums: of those that are fitted to, and of those that choose λ.

    `columns`: of the targets (classes, or values).
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._sums: tuple[Moments, Moments] | None = None

    def add(self, h: Tensor, y: Tensor, held: Tensor) -> None:
        """Some more rows (n, d) and their targets; held: what `held_out` gave, of samples with equally many rows each."""
        if self._sums is None:  # the origin is at the mean of some rows
            zero = h.new_zeros(self._columns, dtype=torch.float64)
            origins = (h.double().mean(0), y.double().mean(0) if y.is_floating_point() else zero)
            self._sums = Moments(origins), Moments(origins)
        held = held.to(h.device).repeat_interleave(len(y) // len(held))
        part, other = self._sums
        part.add(h[~held], y[~held])
        other.add(h[held], y[held])

    @property
    def all(self) -> Moments:
        """Of all rows."""
        part, held = self._known()
        return part + held

    def probe(self) -> LinearProbe:
        """Fitted to all rows, λ chosen. Raises InvalidChoice if they are too few."""
        return chosen(*self._known())

    def _known(self) -> tuple[Moments, Moments]:
        counts = (0, 0) if self._sums is None else (self._sums[0].count, self._sums[1].count)
        if self._sums is None or counts[0] < 2 or counts[1] < 1:
            raise InvalidChoice(f"{sum(counts)} training samples are too few for a probe; give some dozens.")
        return self._sums


class ProbeScore:
    """What a probe is worth on rows it has not seen: the share of classes hit, or R² of values, all columns together."""

    def __init__(self, probe: LinearProbe) -> None:
        self.probe = probe
        self.rows = 0
        self._hits = self._missed = probe.bias.new_zeros(())
        self._sum = torch.zeros_like(probe.bias)
        self._squares = probe.bias.new_zeros(())
        self._classes = True

    def add(self, h: Tensor, y: Tensor) -> None:
        """Some more rows."""
        answer = self.probe.predict(h)
        self.rows += len(y)
        self._classes = not y.is_floating_point()
        if self._classes:
            self._hits = self._hits + (answer.argmax(1) == y).sum()
            return
        self._missed = self._missed + (answer - y).square().sum()
        apart = y.double() - self.probe.bias
        self._sum = self._sum + apart.sum(0)
        self._squares = self._squares + apart.square().sum()

    @property
    def value(self) -> float | None:
        """The accuracy or R² = 1 − Σ‖y − ŷ‖² / Σ‖y − mean y‖²; None if the values never change."""
        if self._classes:
            return float(self._hits) / self.rows
        total = float(self._squares - self._sum.square().sum() / self.rows)
        return 1 - float(self._missed) / total if total > 0 else None
