"""Gradients and communications to 1e-8 of DADAO and of what it is compared with.

    python benchmarks/dadao.py                             ring, line, random geometric, star; n = 10, 50, 150
    python benchmarks/dadao.py --quick                     n = 10 and 20, ring and line
    python benchmarks/dadao.py --figure docs/results/dadao.png
    python benchmarks/dadao.py --moments                   the exact rate of E‖x − x*‖² instead, against the theorem's

Ridge regression on diabetes (d = 11) and logistic regression on digits, odd against even (d = 17), condition number 50 unless
given, shuffled over the nodes. Counted until mean_i ‖x_i − x*‖² ≤ 1e-8 ‖x_0 − x*‖², x_0 = 0: calls of one node's gradient, per
node; activations of an edge, in all. DADAO as in Theorem 5.3.1: no constant is tuned; mean of three seeds (one from n = 50 on).
The baselines take the theory's step, and once more ("tuned") the best of a grid on the very problem: times 1, 1.5, 2, 2.5 the
theory's for EXTRA; 1/L times 1/2, 1/4, … 1/64 for gradient tracking. MSDA's gradients are those of the conjugate, which are
dearer. Nothing is timed: the counts do not depend on the machine. "> 5000 (1e-02)": not within 5000 rounds, and the error then.
Ends with one line RESULT {json}.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from unlocked.graphs import Graph, chi1, chi2
from unlocked.graphs.dadao import NAMES, Problem, Trajectory, diabetes, digits, run, simulate
from unlocked.graphs.dadao.baselines import Mixing, extra_step
from unlocked.graphs.dadao.constants import Constants, least_factor
from unlocked.graphs.dadao.moments import decay
from unlocked.graphs.random_graphs import random_geometric
from unlocked.graphs.topologies import complete, line, ring, star

from common import result

TOLERANCE = 1e-8
GRAPHS: dict[str, Callable[[int], Graph]] = {
    "ring": ring,
    "line": line,
    "random geometric": lambda n: random_geometric(n, seed=0),
    "star": star,
}
PROBLEMS: dict[str, Callable[[int, float], Problem]] = {"ridge": diabetes, "logistic": digits}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 50, 150])
    parser.add_argument("--graphs", nargs="+", choices=list(GRAPHS), default=list(GRAPHS))
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--condition", type=float, default=50.0)
    parser.add_argument("--rounds", type=int, default=5_000, help="a synchronous method that needs more is given up")
    parser.add_argument("--moments", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--figure", type=Path, help="write the curves of the middle n, logistic regression")
    options = parser.parse_args()
    if options.quick:
        options.nodes, options.graphs = [10, 20], ["ring", "line"]
    return options


def best(runs: Iterable[Callable[[int], Trajectory]], rounds: int) -> Trajectory:
    """The one that is there first; a later one is given up when it has used as many rounds."""
    kept: Trajectory | None = None
    for one in runs:
        found = one(rounds)
        if kept is None or (found.reached(TOLERANCE) and found.time[-1] < kept.time[-1]):
            kept = found
            rounds = int(found.time[-1]) if found.reached(TOLERANCE) else rounds
    assert kept is not None
    return kept


def tuned(method: str, problem: Problem, graph: Graph, rounds: int) -> Trajectory:
    """With the best step of the grid."""
    if method == "extra":
        steps = [extra_step(problem, Mixing(graph)) * factor for factor in (2.0, 1.5, 2.5, 1.0)]
    else:
        steps = [0.5**k / problem.L for k in (3, 2, 4, 1, 5, 6)]
    return best((lambda cap, a=a: run(method, problem, graph, step=a, horizon=cap) for a in steps), rounds)


def measured(problem: Problem, graph: Graph, rounds: int) -> dict[str, list[Trajectory]]:
    """Every method's trajectories; DADAO's one for each seed."""
    seeds = range(3) if graph.n < 50 else range(1)
    found = {"dadao": simulate(problem, graph, seeds=seeds, horizon=20_000.0, tolerance=TOLERANCE)}
    for method in NAMES:
        if method != "dadao":
            found[method] = [run(method, problem, graph, horizon=2_000 if method == "dgd" else rounds)]
    for method in ("tracking", "extra"):
        found[method + " tuned"] = [tuned(method, problem, graph, rounds)]
    return found


def counts(trajectories: list[Trajectory], n: int) -> dict[str, float | None]:
    """Means over the seeds; None where one is not there."""
    reached = [one.reached(TOLERANCE) for one in trajectories]
    last = float(np.mean([one.relative[-1] for one in trajectories]))
    if any(one is None for one in reached):
        return {"gradients": None, "communications": None, "rounds": float(trajectories[0].time[-1]), "error": last}
    gradients, communications = np.mean(reached, axis=0)
    return {"gradients": gradients / n, "communications": float(communications), "error": last}


def title(method: str) -> str:
    """For tables and figures."""
    return NAMES[method.removesuffix(" tuned")] + (", tuned" if method.endswith("tuned") else "")


def printed(console: Console, name: str, cases: dict[int, dict[str, Any]]) -> None:
    """One table for a problem and a topology."""
    table = Table("", *(f"n = {n}" for n in cases), title=name)
    for method in next(iter(cases.values())):
        cells = []
        for case in (cases[n][method] for n in cases):
            if case["gradients"] is None:
                cells.append(f"> {case['rounds']:.0f} ({case['error']:.0e})")
            else:
                cells.append(f"{case['gradients']:,.0f} | {case['communications']:,.0f}")
        table.add_row(title(method), *cells)
    console.print(table)


def drawn(path: Path, curves: dict[str, dict[str, list[Trajectory]]], heading: str) -> None:
    """Error against gradients of a node (above) and communications (below), a column for each graph."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(curves), 6.4), layout="constrained")
    axes = figure.subplots(2, len(curves), sharey=True, squeeze=False)
    for column, (name, methods) in enumerate(curves.items()):
        n = int(name.split("n = ")[1])
        for k, (method, trajectories) in enumerate(methods.items()):
            one = trajectories[0]
            style = {"label": title(method), "color": f"C{k}", "lw": 2.2 if method == "dadao" else 1.2}
            axes[0, column].loglog(one.gradients[1:] / n, one.relative[1:], **style)
            axes[1, column].loglog(one.communications[1:], one.relative[1:], **style)
        axes[0, column].set_title(name)
        axes[0, column].set_xlabel("gradients of a node")
        axes[1, column].set_xlabel("communications")
    for row in axes:
        row[0].set_ylabel("mean ‖x − x*‖² / ‖x₀ − x*‖²")
        row[0].set_ylim(TOLERANCE / 2, 10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(heading)
    figure.savefig(path, dpi=110)


def moments(console: Console) -> dict[str, dict[float, float]]:
    """Exact decay of the second moment times √κ, least over kinds of curvatures; rows graphs, columns times the least rates."""
    factors, found = (0.5, 0.7, 1.0, 4.0), {}
    table = Table("4 nodes, h_i from 1 to κ", *(f"× {factor:g}" for factor in factors))
    for one in (line(4), complete(4)):
        for condition in (10.0, 1000.0):
            rates = {}
            for factor in factors:
                graph = one.scaled(factor * least_factor(chi1(one), chi2(one)))
                constants = Constants(1.0, condition, chi1(graph))
                kinds = (np.full(4, condition), np.geomspace(1.0, condition, 4))
                rates[factor] = min(decay(h, graph, constants) for h in kinds) * condition**0.5
            found[f"{one.name}, {condition:g}"] = rates
            table.add_row(f"{one.name}, κ = {condition:g}", *(f"{value:.4f}" for value in rates.values()))
    console.print(table)
    print("decay of E‖x − x*‖² per unit of time, times √κ; the theorem: 1/16 = 0.0625 from × 1 on; below 0: it grows")
    return found


def main() -> None:
    """Measure and print."""
    options, console, begin = arguments(), Console(width=128), time.process_time()
    if options.moments:
        return result("dadao", moments=moments(console))
    rows: dict[str, Any] = {}
    curves: dict[str, dict[str, list[Trajectory]]] = {}
    shown = sorted(options.nodes)[len(options.nodes) // 2]
    for kind in options.problems:
        for topology in options.graphs:
            cases: dict[int, dict[str, Any]] = {}
            for n in options.nodes:
                problem, graph = PROBLEMS[kind](n, options.condition), GRAPHS[topology](n)
                found = measured(problem, graph, options.rounds)
                cases[n] = {method: counts(trajectories, n) for method, trajectories in found.items()}
                one = graph.scaled(1 / graph.total)
                a_unit = (2 * chi1(one) * chi2(one)) ** 0.5
                console.print(f"{problem.name}, {graph.name}, n = {n}: |E| = {len(graph)}, √(2χ₁χ₂) = {a_unit:.1f}")
                rows[f"{kind}, {topology}, {n}"] = {"edges": len(graph), "a_unit": a_unit, **cases[n]}
                if kind == options.problems[-1] and n == shown:
                    curves[f"{topology}, n = {n}"] = found
            printed(console, f"{kind}, {topology}: gradients of a node | communications, to {TOLERANCE:g}", cases)
    if options.figure:
        drawn(options.figure, curves, f"{options.problems[-1]} regression, condition number {options.condition:g}")
    print(
        f"{time.process_time() - begin:.0f} s of processor time; 1 thread is enough; MSDA: gradients of the conjugate"
    )
    result("dadao", condition=options.condition, tolerance=TOLERANCE, rows=rows)


if __name__ == "__main__":
    main()
