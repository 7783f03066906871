"""Optimal rates: what they gain over equal rates, and what the two solvers take.

    OMP_NUM_THREADS=1 python benchmarks/optimal_rates.py             n = 8 to 128; the SDP up to 32
    python benchmarks/optimal_rates.py --quick                       n = 8 and 16

Per graph: √(χ₁χ₂ᴱ) at Tr Λ = n with equal rates and with the best of both solvers, each solver's proved gap, its CPU seconds
(median of --rounds; the first-order solver stops at a gap of 1e-3), evaluations, and edges that got no rate. A small program is
solved before, so that no import is timed. Exponents are of value · Tr Λ against n, fitted to the largest three n. Ends with one
line RESULT {json}.
"""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version
from statistics import median
from typing import Any

import networkx as nx
import numpy as np
from rich.console import Console
from rich.table import Table

from unlocked.graphs import Graph, chi1, chi2
from unlocked.graphs.optimal import Optimal, optimal_rates

from common import result

FAMILIES = ("ring", "star", "complete", "line", "barbell", "grid", "small world", "geometric")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--sdp-until", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="n = 8 and 16")
    return parser.parse_args()


def drawn(family: str, n: int) -> Graph:
    """A graph of about n nodes with Tr Λ = n; the random ones are the first connected of seeds 0, 1, …"""
    side = 2 ** (n.bit_length() // 2)
    makers: dict[str, Any] = {
        "ring": lambda _: nx.cycle_graph(n),
        "star": lambda _: nx.star_graph(n - 1),
        "complete": lambda _: nx.complete_graph(n),
        "line": lambda _: nx.path_graph(n),
        "barbell": lambda _: nx.barbell_graph(n // 2, 0),
        "grid": lambda _: nx.grid_2d_graph(side, n // side),
        "small world": lambda seed: nx.watts_strogatz_graph(n, 4, 0.5, seed=seed),
        "geometric": lambda seed: nx.random_geometric_graph(n, np.sqrt(1.2 * np.log(n) / n / np.pi * 1.5), seed=seed),
    }
    for seed in range(1000):
        network = nx.convert_node_labels_to_integers(makers[family](seed))
        if nx.is_connected(network):
            return Graph.make(n, list(network.edges), name=family).at(1.0)
    raise RuntimeError(f"no connected {family} graph of {n} nodes in 1000 draws")


def timed(graph: Graph, solver: Any, rounds: int) -> tuple[Optimal, float]:
    """What came out, and CPU seconds."""
    seconds = []
    for _ in range(rounds):
        begin = time.process_time()
        found = optimal_rates(graph, solver=solver, cache=False)
        seconds.append(time.process_time() - begin)
    return found, median(seconds)


def row(family: str, n: int, options: argparse.Namespace) -> dict[str, Any]:
    """One graph."""
    graph = drawn(family, n)
    values = {"family": family, "n": n, "edges": len(graph), "uniform": float(np.sqrt(chi1(graph) * chi2(graph)))}
    for solver in ("sdp", "first-order") if n <= options.sdp_until else ("first-order",):
        found, seconds = timed(graph, solver, options.rounds)
        values[solver] = {
            "value": found.value,
            "gap": found.gap,
            "seconds": seconds,
            "steps": found.steps,
            "dropped": found.dropped,
            "chi1": found.chi1,
            "chi2_fixed": found.chi2_fixed,
            "chi2": found.chi2,
        }
    values["optimal"] = min(values[solver]["value"] for solver in ("sdp", "first-order") if solver in values)
    return values


def exponents(rows: list[dict[str, Any]], family: str) -> dict[str, float]:
    """Of √(χ₁χ₂ᴱ) Tr Λ against n."""
    mine = [row for row in rows if row["family"] == family][-3:]
    sizes = np.log([row["n"] for row in mine])
    return {
        what: float(np.polyfit(sizes, np.log([row[what] * row["n"] for row in mine]), 1)[0])
        for what in ("uniform", "optimal")
    }


def cells(values: dict[str, Any]) -> list[str]:
    """A row of the table."""
    shown = [f"{values['family']} {values['n']}", str(values["edges"])]
    shown += [f"{values['uniform']:.3f}", f"{values['optimal']:.3f}", f"{values['uniform'] / values['optimal']:.2f}"]
    for solver in ("sdp", "first-order"):
        one = values.get(solver)
        shown += [f"{one['gap']:.0e}", f"{one['seconds']:.2f}"] if one else ["", ""]
    return [*shown, str(values["first-order"]["steps"]), str(values.get("sdp", values["first-order"])["dropped"])]


def main() -> None:
    """Print the table and the line RESULT."""
    options = arguments()
    sizes = [8, 16] if options.quick else options.sizes
    timed(drawn("line", 4), "sdp", 1)
    table = Table(
        "graph", "edges", "equal", "optimal", "gain", "SDP gap", "s", "first-order gap", "s", "evals", "dropped"
    )
    rows = []
    for family in options.families:
        for n in sizes:
            rows.append(row(family, n, options))
            table.add_row(*cells(rows[-1]))
    Console(width=120).print(table)
    fits = {family: exponents(rows, family) for family in options.families if len(sizes) > 1}
    for family, fit in fits.items():
        print(f"{family}: value · Tr Λ grows with n^{fit['uniform']:.2f} (equal), n^{fit['optimal']:.2f} (optimal)")
    versions = {name: version(name) for name in ("numpy", "scipy", "cvxpy", "clarabel")}
    result("optimal_rates", rows=rows, exponents=fits, rounds=options.rounds, versions=versions)


if __name__ == "__main__":
    main()
