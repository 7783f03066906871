"""What theory says without gradients: the exact rates at which E‖πx‖² decays on the ring, per gradient, and when it does not.

A²CiD²'s η and α̃ belong to the nominal rates. `delivered`: the least share of the nominal exchanges, in steps of 0.05, with
which E‖πx‖² still decays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unlocked.graphs.gossip import Momentum, second_moment_rate
from unlocked.graphs.topologies import ring

Row = dict[str, Any]
_TOLERANCE = 1e-3


def measure(sizes: Sequence[int]) -> list[Row]:
    """A row for each N; printed."""
    rows = []
    print(
        "\nDecay of E‖πx‖² per gradient on the ring, without gradients (exact); gossip at rates 1 and 2, A²CiD² at rate 1"
    )
    for n in sorted(sizes):
        graph = ring(n).with_rates(1.0).at(1.0)
        momentum = Momentum.of(graph)
        row: Row = {
            "workers": n,
            "gossip 1": second_moment_rate(graph, tolerance=_TOLERANCE),
            "gossip 2": second_moment_rate(graph.at(2.0), tolerance=_TOLERANCE),
            "A²CiD² 1": second_moment_rate(graph, momentum, tolerance=_TOLERANCE),
        }
        shares = [k / 20 for k in range(20, 0, -1)]
        unstable = [share for share in shares if not _decays(graph.at(share), momentum)]
        row["delivered"] = min(share for share in shares if not unstable or share > unstable[0])
        rows.append(row)
        print(
            f"  N = {n:2d}   {row['gossip 1']:.4f}   {row['gossip 2']:.4f}   {row['A²CiD² 1']:.4f} = × "
            f"{row['A²CiD² 1'] / row['gossip 2']:.2f} of gossip at rate 2;   decays down to "
            f"{row['delivered']:.2f} of the exchanges"
        )
    return rows


def _decays(graph: Any, momentum: Momentum) -> bool:
    try:
        return second_moment_rate(graph, momentum, tolerance=_TOLERANCE) > 0
    except ValueError:  # no rate above 0
        return False
