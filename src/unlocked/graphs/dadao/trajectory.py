"""What a method did: its error against time, gradients and communications."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..graph import Floats


@dataclass(frozen=True)
class Trajectory:
    """One run of one method, at T times that grow.

    Args:
        method: its pretty name.
        time: (T,) expected gradients of a node so far for DADAO, rounds for the synchronous methods.
        gradients: (T,) calls ∇f_i of single nodes, all nodes together.
        communications: (T,) activations of an edge, each a vector of d numbers in both directions.
        errors: (T,) mean over the nodes of ‖x_i − x*‖².
        averaged: (T,) the same for the mean over the records so far of each node's x.
        scale: ‖x_0 − x*‖², of the start common to all methods, mean over the nodes.
    """

    method: str
    time: Floats
    gradients: Floats
    communications: Floats
    errors: Floats
    averaged: Floats
    scale: float

    @property
    def relative(self) -> Floats:
        """(T,): errors over `scale`."""
        return self.errors / self.scale

    def reached(self, tolerance: float) -> tuple[float, float] | None:
        """(gradients, communications) when the relative error first is at most `tolerance`; None if it never is."""
        found = np.nonzero(self.relative <= tolerance)[0]
        return (float(self.gradients[found[0]]), float(self.communications[found[0]])) if len(found) else None


class Recorder:
    """Collects a trajectory: at every record the counts and the x of all nodes, (n, d)."""

    def __init__(self, method: str, optimum: Floats, start: Floats) -> None:
        self.method, self.optimum = method, optimum
        self.scale = mean_distance(start, optimum)
        self._rows: list[tuple[float, float, float, float, float]] = []
        self._sum = np.zeros_like(start)

    def relative(self, x: Floats) -> float:
        """The relative error, without a record; the error itself where the start is the optimum."""
        return mean_distance(x, self.optimum) / (self.scale or 1.0)

    def add(self, time: float, gradients: float, communications: float, x: Floats) -> float:
        """Returns the relative error."""
        self._sum += x
        error = mean_distance(x, self.optimum)
        averaged = mean_distance(self._sum / (len(self._rows) + 1), self.optimum)
        self._rows.append((time, gradients, communications, error, averaged))
        return error / (self.scale or 1.0)

    def trajectory(self) -> Trajectory:
        """All that was added."""
        time, gradients, communications, errors, averaged = np.array(self._rows, dtype=np.float64).reshape(-1, 5).T
        return Trajectory(self.method, time, gradients, communications, errors, averaged, self.scale)


def mean_distance(x: Floats, optimum: Floats) -> float:
    """(1/n) Σ_i ‖x_i − x*‖²."""
    return float(((x - optimum) ** 2).sum() / len(x))
