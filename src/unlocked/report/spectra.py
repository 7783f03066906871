"""The spectrum of the features at some depths: a chart for each depth, a line for each method (Fournier, Figure 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .curves import Axis, Curve, Points, over_runs
from .records import Record

DEPTHS = 4  # charts at most
LEAST = 1e-12  # of the largest: smaller ones are rounding, and end the line

AXIS = Axis("number of the singular value", "over the largest", log=True, whole=True)


def chosen(depths: int) -> list[int]:
    """Up to DEPTHS of so many depths, evenly spaced, the last one among them."""
    return sorted({-(-(k + 1) * depths // DEPTHS) - 1 for k in range(DEPTHS)} - {-1})


def spectra(named: Mapping[str, Sequence[Record]]) -> list[tuple[str, list[Curve]]]:
    """Titles and lines: singular values of the features' covariance over the largest, mean over a method's networks."""
    most = max((len(record.rows("depths")) for records in named.values() for record in records), default=0)
    charts = []
    for depth in chosen(most):
        curves = [over_runs(name, [_points(record, depth) for record in records]) for name, records in named.items()]
        known = [replace(curve, spread=[0.0] * len(curve.y)) for curve in curves if curve is not None]
        charts += [(f"Spectrum of the features at depth {depth}", known)] if known else []
    return charts


def _points(record: Record, depth: int) -> Points:
    """Of the features' covariance: the squares of the features' own."""
    rows = record.rows("depths")
    if depth >= len(rows):
        return []
    values = [value for value in Record(rows[depth], record.where).numbers("spectrum") if value is not None]
    return [(float(k), value**2) for k, value in enumerate(values, start=1) if value**2 > LEAST]
