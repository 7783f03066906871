"""Table 5.2 of Oyallon's habilitation: how many communications gossip needs as a graph grows; and its Figure 5.1.

    python benchmarks/gossip_rates.py                  n up to 512; many minutes on one core
    python benchmarks/gossip_rates.py --quick          n up to 64
    python benchmarks/gossip_rates.py --figure docs/figures/gossip_random_geometric.png   Figure 5.1 alone

A communication is one edge that is activated: a synchronous round costs |E|, an event of a Poisson clock 1. Counted until
‖πx‖² is 10⁻⁶ of what it was.

    synchronous, Chebyshev      rounds from the exact worst start (eigenvalues of Λ), times |E|
    randomized, accelerated     Σ λ · log(10⁶)/r, r the exact decay rate of E‖πx‖² (`second_moment_rate`); no simulation
    simulated                   at the sizes of --simulate, from the slowest eigenvector, mean over --seeds runs: a check
    bound                       what the text proves: Tr Λ χ₁ and Tr Λ √(χ₁χ₂)

Rates: by the degree, λ_ij = ½(1/d_i + 1/d_j); or optimal. Optimal is the SDP's of §5.2 on the grid (unlocked.graphs.optimal),
on the barbell the same problem in its three classes of edges (compared with the SDP where both are affordable), and on the
others the uniform rates (star, complete: by symmetry; line: compared with the SDP). Exponents: least squares of log C against
log n over the sizes from --from on, and the slope between the two largest. Ends with one line RESULT {json}.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from unlocked.graphs import Graph, chi1, chi2
from unlocked.graphs.degrees import by_degree
from unlocked.graphs.gossip import Momentum, accelerated_gossip, randomized_gossip, second_moment_rate
from unlocked.graphs.gossip.synchronous import chebyshev_rounds, synchronous_rounds
from unlocked.graphs.optimal import optimal_rates
from unlocked.graphs.spectra import spectral_gap
from unlocked.graphs.topologies import barbell, complete, grid, line, star

from common import result
from gossips.barbells import double_star, fastest_synchronous, optimal_barbell
from gossips.figure import figure_5_1

EPSILON = 1e-6
GOSSIPS = ("synchronous", "Chebyshev", "randomized", "accelerated")
GRAPHS: dict[str, Callable[[int], Graph]] = {
    "star": star,
    "line": line,
    "complete": complete,
    "2-grid": lambda n: grid((math.isqrt(n), math.isqrt(n))),
    "barbell": barbell,
}
TABLE = {  # Table 5.2: by the degree, optimal
    "star": ((2, 1.5, 1, 1), (2, 1.5, 1, 1)),
    "line": ((3, 2, 3, 2), (3, 2, 3, 2)),
    "complete": ((2, 2, 1, 1), (2, 2, 1, 1)),
    "2-grid": ((2, 1.5, 2, 1.5), (2, 1.5, 2, 1.5)),
    "barbell": ((4, 3, 3, 2.5), (2, 2, 1, 1)),
}
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="n up to 64, few seeds")
    parser.add_argument("--most", type=int, default=512, help="largest n")
    parser.add_argument("--most-optimal", type=int, default=256, help="largest n of the grid with optimal rates")
    parser.add_argument("--from", dest="first", type=int, default=64, help="smallest n in the least squares")
    parser.add_argument("--simulate", type=int, nargs="*", default=[16, 36, 64], help="sizes that are also simulated")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--graphs", nargs="+", choices=GRAPHS, default=list(GRAPHS))
    parser.add_argument("--figure", type=Path, help="draw Figure 5.1 into this file instead")
    parser.add_argument("--runs", type=int, default=50, help="graphs of Figure 5.1")
    return parser.parse_args()


# ---- counting --------------------------------------------------------------------------------------------------------


def counts(graph: Graph) -> Row:
    """Communications of the four, and of the bounds."""
    kappa, needed = max(1.0, spectral_gap(graph)), math.log(1 / EPSILON)
    first, second = chi1(graph), chi2(graph)
    fast = second_moment_rate(graph, Momentum.from_constants(first, second), tolerance=1e-4)
    return {
        "synchronous": len(graph) * synchronous_rounds(kappa, EPSILON),
        "Chebyshev": len(graph) * chebyshev_rounds(kappa, EPSILON),
        "randomized": graph.total * needed / second_moment_rate(graph, tolerance=1e-4),
        "accelerated": graph.total * needed / fast,
        "bound randomized": graph.trace * first * needed,
        "bound accelerated": graph.trace * math.sqrt(first * second) * needed,
    }


def simulated(graph: Graph, seeds: int) -> Row:
    """Communications until the mean over the seeds of ‖πx‖² is ε, interpolated between 60 times."""
    slowest = np.linalg.eigh(graph.laplacian())[1][:, 1]
    momentum, found = Momentum.of(graph), {}
    for name in GOSSIPS[2:]:
        chosen = momentum if name == "accelerated" else None
        grid_of_times = np.linspace(0, 1.6 * math.log(1 / EPSILON) / second_moment_rate(graph, chosen), 61)
        if chosen is None:
            run = randomized_gossip(graph, slowest, grid_of_times, range(seeds))
        else:
            run = accelerated_gossip(graph, slowest, grid_of_times, range(seeds), chosen)
        error, spent = np.log(run.mean_error()), run.activations.mean(axis=0)
        below = np.nonzero(error <= math.log(EPSILON))[0]
        k = int(below[0]) if len(below) else 0
        reached = np.interp(-math.log(EPSILON), -error[k - 1 : k + 1], spent[k - 1 : k + 1]) if k else math.nan
        found[f"simulated {name}"] = float(reached)
    return found


def exponents(rows: Sequence[Row], name: str, first: int) -> tuple[float, float]:
    """(least squares over n ≥ first, slope between the two largest) of log C against log n."""
    used = [row for row in rows if row["n"] >= first] if sum(row["n"] >= first for row in rows) > 1 else rows[-2:]
    fitted = np.polyfit(np.log([row["n"] for row in used]), np.log([row[name] for row in used]), 1)[0]
    last, before = rows[-1], rows[-2]
    return float(fitted), math.log(last[name] / before[name]) / math.log(last["n"] / before["n"])


# ---- the table -------------------------------------------------------------------------------------------------------


def sizes_of(name: str, most: int) -> list[int]:
    """Powers of two, squares for the grid."""
    sides = (3, 4, 6, 8, 11, 16, 22)
    return [n for n in ([side**2 for side in sides] if name == "2-grid" else [8 << k for k in range(8)]) if n <= most]


def optimal(name: str, n: int) -> Graph:
    """The graph with optimal rates."""
    if name == "barbell":
        return optimal_barbell(n)
    made = GRAPHS[name](n)
    return optimal_rates(made, tolerance=1e-2).graph if name == "2-grid" else made


def agreement(console: Console) -> Row:
    """How far the rates of the line and the barbell used here are from the SDP's: value over the SDP's, less 1."""
    found = {}
    for name, sizes in {"line": (8, 16), "barbell": (8, 16)}.items():
        for n in sizes:
            used = optimal(name, n)
            value = used.trace * math.sqrt(chi1(used) * chi2(used))
            best = optimal_rates(GRAPHS[name](n))
            by_sdp = best.value * GRAPHS[name](n).trace
            found[f"{name} {n}"] = value / by_sdp - 1
            console.print(
                f"{name}, n = {n}: rates used here / SDP ({best.solver}, gap {best.gap:.1e}) − 1 = {value / by_sdp - 1:.1e}"
            )
    return found


def column(name: str, rates: str, options: argparse.Namespace, console: Console) -> list[Row]:
    """One graph at all sizes."""
    most = options.most_optimal if rates == "optimal" and name == "2-grid" else options.most
    rows: list[Row] = []
    for n in sizes_of(name, most):
        begin = time.perf_counter()
        graph = by_degree(GRAPHS[name](n)) if rates == "degree" else optimal(name, n)
        row: Row = {"n": n, **counts(graph)}
        if n in options.simulate:
            row |= simulated(graph, options.seeds)
        rows.append(row)
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "n")
        console.print(
            f"{name:9s} {rates:8s} n={n:4d}  {numbers}  ({time.perf_counter() - begin:.0f} s)",
            highlight=False,
            soft_wrap=True,
        )
    return rows


def show(fits: Mapping[str, Row], rates: str, console: Console) -> None:
    """Fitted exponents against the table's."""
    title = {"degree": "Renormalization by the degree", "optimal": "Optimal rates"}[rates]
    table = Table("gossip", *(f"{name}" for name in fits), title=f"{title}: table | fitted | last two sizes")
    for k, gossip in enumerate(GOSSIPS):
        cells = []
        for name, fit in fits.items():
            told = TABLE[name][rates == "optimal"][k]
            far = abs(fit[gossip][0] - told) > 0.15
            cells.append(f"{told:g} | {fit[gossip][0]:.2f} | {fit[gossip][1]:.2f}{' *' if far else ''}")
        table.add_row(gossip, *cells)
    console.print(table)
    console.print("* further than 0.15 from the table")


def barbell_alone(options: argparse.Namespace, console: Console) -> Row:
    """The barbell's optimal synchronous exponents: what weights can and cannot reach."""
    rows = []
    for n in sizes_of("barbell", options.most):
        kept, tree = fastest_synchronous(n), double_star(n)
        row: Row = {"n": n}
        for name, graph in (("all edges", kept), ("double star", tree)):
            kappa = spectral_gap(graph)
            row[f"{name} synchronous"] = len(graph) * synchronous_rounds(kappa, EPSILON)
            row[f"{name} Chebyshev"] = len(graph) * chebyshev_rounds(kappa, EPSILON)
            row[f"{name} κ/n"] = kappa / n
        rows.append(row)
        console.print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), highlight=False, soft_wrap=True)
    fits = {key: exponents(rows, key, options.first) for key in rows[0] if key not in ("n",) and "κ" not in key}
    for key, (fitted, last) in fits.items():
        console.print(
            f"barbell, weights for the fewest rounds, {key}: exponent {fitted:.2f}, last two sizes {last:.2f}"
        )
    return {"rows": rows, "exponents": fits}


def main() -> None:
    """Compute and print."""
    options, console = arguments(), Console(width=160)
    if options.figure:
        found = figure_5_1(options.figure, options.runs)
        for name, values in found["slopes"].items():
            console.print(f"{name}: decades per 100 communications {values:.3f}")
        result("gossip_figure_5_1", **found)
        return
    if options.quick:
        options.most, options.first, options.simulate, options.seeds = min(64, options.most), 16, [16], 10
    rows: dict[str, dict[str, list[Row]]] = {"degree": {}, "optimal": {}}
    fits: dict[str, dict[str, Row]] = {"degree": {}, "optimal": {}}
    agreed = agreement(console)
    for rates in rows:
        for name in options.graphs:
            same = rates == "optimal" and name in (
                "star",
                "complete",
            )  # all edges alike: the rates differ in scale at most
            rows[rates][name] = rows["degree"][name] if same else column(name, rates, options, console)
            keys = (*GOSSIPS, "bound randomized", "bound accelerated")
            fits[rates][name] = {key: exponents(rows[rates][name], key, options.first) for key in keys}
        show(fits[rates], rates, console)
    sync = barbell_alone(options, console) if "barbell" in options.graphs else {}
    result(
        "gossip_rates",
        epsilon=EPSILON,
        first=options.first,
        seeds=options.seeds,
        agreement=agreed,
        rows=rows,
        exponents=fits,
        barbell=sync,
    )


if __name__ == "__main__":
    main()
