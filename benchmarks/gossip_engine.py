"""How many pairwise exchanges per second the gossip engine computes, and how long 10,000 nodes take to agree.

    python benchmarks/gossip_engine.py                 all, one core
    python benchmarks/gossip_engine.py --quick         two of the speeds only
    python benchmarks/gossip_engine.py --consensus     the 10,000 nodes only

Speeds: S seeds of a ring of n nodes, values in R^d; a block of the clocks (2048 events of each seed, or n) is drawn and
played, as in a run. Median over the rounds, the first left out; by the wall clock and by the process' own CPU time, which
are the same on an idle machine. "drawing alone" is the first half of it. `naive` is one event after the other in Python.
Consensus: from normal values until ‖πx‖² is 10⁻⁶ of what it was, one seed, by both clocks.
Ends with one line RESULT {json}.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from unlocked.graphs import Graph
from unlocked.graphs.gossip import Accelerated, Engine, Momentum, Randomized, poisson_events
from unlocked.graphs.gossip.engine import rows_of
from unlocked.graphs.topologies import erdos_renyi, exponential, random_geometric, ring, torus

from common import machine, result

CASES = [  # seeds, n, d
    (1024, 64, 1),
    (1024, 512, 1),
    (64, 1024, 1),
    (1, 10_000, 1),
    (1024, 64, 16),
]
LARGE: dict[str, Callable[[], Graph]] = {
    "erdos-renyi": lambda: erdos_renyi(10_000),
    "exponential": lambda: exponential(10_000),
    "random geometric": lambda: random_geometric(10_000),
    "torus 100 × 100": lambda: torus((100, 100)),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the speeds of two cases only, 3 rounds")
    parser.add_argument("--consensus", action="store_true", help="the 10,000 nodes only")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def speed(rule_name: str, seeds: int, n: int, d: int, rounds: int) -> dict[str, Any]:
    """Millions of exchanges per second."""
    graph = ring(n)
    x = rows_of(np.random.default_rng(0).standard_normal((n, d)), n, seeds)
    rule = Randomized(x) if rule_name == "randomized" else Accelerated(x, Momentum.of(graph))
    engine = Engine(graph, rule, range(seeds))
    length = engine.block_length
    walls, cpus = [], []
    for k in range(rounds + 1):  # a whole block each, of which the engine draws the next one on its way
        before = engine.activations.sum()
        wall, cpu = timed(lambda end=(k + 1) * length: engine.advance(end))
        done = engine.activations.sum() - before
        walls.append(done / wall / 1e6)
        cpus.append(done / cpu / 1e6)
    draws = [timed(lambda number=number: engine.load(number)) for number in range(rounds)]
    expected = seeds * length * graph.total / 1e6
    return {
        "rule": rule_name,
        "seeds": seeds,
        "n": n,
        "d": d,
        "all": median(walls[1:]),
        "best": max(walls[1:]),
        "all cpu": median(cpus[1:]),
        "draw cpu": expected / median(cpu for _, cpu in draws),
    }


def naive(count: int = 20_000) -> float:
    """Millions of exchanges per second of the definition, in Python with floats."""
    graph = ring(64)
    _, edges = poisson_events(graph, 0.0, count / graph.total, 0)
    pairs, x = graph.edges[edges].tolist(), np.random.default_rng(0).standard_normal(64).tolist()

    def play() -> None:
        for i, j in pairs:
            moved = (x[i] - x[j]) * 0.5
            x[i] -= moved
            x[j] += moved

    return len(pairs) / median(timed(play)[0] for _ in range(5)) / 1e6


def consensus(name: str, rule_name: str, console: Console, limit: float = 300.0) -> dict[str, Any]:
    """Until ‖πx‖² is 10⁻⁶ of what it was, or the limit of seconds."""
    graph = LARGE[name]()
    first, second = (
        1 / (2 - 2 * np.cos(np.pi / 50)),
        (graph.n - 1) / (4 * graph.n),
    )  # χ₁, χ₂ of the torus, where they are used
    x = rows_of(np.random.default_rng(0).standard_normal(graph.n), graph.n, 1)
    rule = Randomized(x) if rule_name == "randomized" else Accelerated(x, Momentum.from_constants(first, second))
    begin, cpu = time.perf_counter(), time.process_time()
    engine = Engine(graph, rule, [0])
    start = engine.errors()[0]
    step = 20 * graph.n / graph.total  # exchanges between two looks at the error: 20 for each node
    while engine.errors()[0] > 1e-6 * start and time.perf_counter() - begin < limit:
        engine.advance(engine.now + step)
    seconds, cpu, events = time.perf_counter() - begin, time.process_time() - cpu, int(engine.activations[0])
    reached = bool(engine.errors()[0] <= 1e-6 * start)
    row = {"graph": name, "edges": len(graph), "rule": rule_name, "reached": reached}
    row |= {
        "time": engine.now,
        "events": events,
        "seconds": seconds,
        "CPU seconds": cpu,
        "M/s (CPU)": events / cpu / 1e6,
    }
    console.print(
        "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    )
    return row


def main() -> None:
    """Measure and print."""
    options, console = arguments(), Console(width=140)
    console.print(str(machine()))
    table = Table("rule", "seeds", "n", "d", "M/s (wall)", "best", "M/s (CPU)", "drawing alone (CPU)")
    rows = []
    cases = [] if options.consensus else CASES[:1] + CASES[3:4] if options.quick else CASES
    for seeds, n, d in cases:
        for rule in ("randomized", "accelerated"):
            row = speed(rule, seeds, n, d, 3 if options.quick else options.rounds)
            rows.append(row)
            table.add_row(
                rule, f"{seeds}", f"{n}", f"{d}", *(f"{row[key]:.2f}" for key in ("all", "best", "all cpu", "draw cpu"))
            )
    console.print(table)
    plain = naive()
    console.print(f"naive, one event after the other in Python, drawing left out: {plain:.2f} M/s")
    large = (
        []
        if options.quick
        else [consensus(name, "randomized", console) for name in LARGE]
        + [consensus("torus 100 × 100", "accelerated", console)]
    )
    result("gossip_engine", speeds=rows, naive=plain, consensus=large)


if __name__ == "__main__":
    main()
