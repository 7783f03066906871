"""Long curves made short."""

from __future__ import annotations

from collections.abc import Sequence

POINTS = 600  # more are thinned out: every bucket keeps its lowest and its highest


def thin(curve: Sequence[float]) -> list[int]:
    """Indices of at most 2 · POINTS + 2 points that keep the curve's outline, its peak above all."""
    if len(curve) <= 2 * POINTS:
        return list(range(len(curve)))
    kept = {0, len(curve) - 1}
    for k in range(POINTS):
        bucket = range(k * len(curve) // POINTS, (k + 1) * len(curve) // POINTS)
        kept |= {min(bucket, key=curve.__getitem__), max(bucket, key=curve.__getitem__)}
    return sorted(kept)
