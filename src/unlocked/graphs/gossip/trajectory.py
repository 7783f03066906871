"""What a gossip process gives: its error against time and against communications, seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import InvalidChoice
from ..graph import Floats, Integers
from .engine import Engine

_TOGETHER = 1024  # seeds that run side by side; more would only need more memory

Begin = Callable[[Floats, Sequence[int]], Engine]


@dataclass(frozen=True)
class Trajectory:
    """Measured at T times (of synchronous processes: rounds), for S seeds (of synchronous processes: 1).

    Args:
        times: (T,).
        activations: (S, T), edges that were activated up to each time, each exchange counted once.
        errors: (S, T), ‖πx‖², the squared distance of all values to their mean.
        values: (S, n, d), x at the last time.
        momentum: (S, n, d), x̃ at the last time; None where there is none.
    """

    times: Floats
    activations: Integers
    errors: Floats
    values: Floats
    momentum: Floats | None = None

    def mean_error(self) -> Floats:
        """(T,): the mean over the seeds, the estimate of E‖πx‖²."""
        return self.errors.mean(axis=0)

    def standard_error(self) -> Floats:
        """(T,): of that mean; needs two seeds or more."""
        return self.errors.std(axis=0, ddof=1) / np.sqrt(len(self.errors))


def follow(begin: Begin, values: Floats, n: int, times: Sequence[float] | Floats, seeds: Sequence[int]) -> Trajectory:
    """Run an engine to each of the times, ascending from 0 on, and measure. Raises InvalidChoice."""
    grid = np.asarray(times, dtype=np.float64)
    if not len(grid) or not np.isfinite(grid).all() or grid[0] < 0 or (np.diff(grid) < 0).any() or not len(seeds):
        raise InvalidChoice("Give at least one seed and one time; times are finite, not below 0 and ascending.")
    each = np.ndim(values) == 3
    if each and len(values) != len(seeds):
        raise InvalidChoice(f"There are values for {len(values)} seeds, but {len(seeds)} seeds; give as many of both.")
    parts = []
    for k in range(0, len(seeds), _TOGETHER):
        group = seeds[k : k + _TOGETHER]
        parts.append(_follow(begin(values[k : k + _TOGETHER] if each else values, group), n, grid))
    activations, errors, x, momentum = (list(part) for part in zip(*parts))
    return Trajectory(
        grid,
        np.concatenate(activations),
        np.concatenate(errors),
        np.concatenate(x),
        None if momentum[0] is None else np.concatenate(momentum),
    )


def _follow(engine: Engine, n: int, grid: Floats) -> tuple[Integers, Floats, Floats, Floats | None]:
    activations, errors = [], []
    for time in grid:
        engine.advance(float(time))
        activations.append(engine.activations.copy())
        errors.append(engine.errors())
    shape = len(engine.seeds), n, -1
    momentum = getattr(engine.rule, "x_tilde", None)
    last = None if momentum is None else momentum.reshape(shape)
    return np.stack(activations, axis=1), np.stack(errors, axis=1), engine.rule.x.reshape(shape), last
