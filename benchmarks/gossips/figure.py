"""Figure 5.1 of Oyallon's habilitation: two gossips, each with uniform and with optimal rates, on random geometric graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unlocked.graphs import Graph
from unlocked.graphs.gossip import Trajectory, accelerated_gossip, randomized_gossip
from unlocked.graphs.optimal import optimal_rates
from unlocked.graphs.topologies import random_geometric

from populations.drawing import curves, figure

NODES = 12
COMMUNICATIONS = np.linspace(0, 400, 41)


def figure_5_1(file: Path, runs: int) -> dict[str, Any]:
    """Draw it; gives the curves and their slopes over the second half, in decades per 100 communications."""
    errors: dict[str, list[np.ndarray]] = {}
    gains = []
    for seed in range(runs):
        uniform = random_geometric(NODES, seed=seed).at(1.0)
        best = optimal_rates(uniform)
        gains.append(_value(uniform) / _value(best.graph))
        for rates, graph in (("uniform", uniform), ("SDP", best.graph)):
            for name, run in (("randomized", randomized_gossip), ("accelerated", accelerated_gossip)):
                errors.setdefault(f"{name}, {rates} rates", []).append(_one(graph, run, seed))
    means = {name: np.mean(rows, axis=0) for name, rows in errors.items()}

    def fill(panels: Sequence[Any]) -> None:
        rows = {name: (COMMUNICATIONS.tolist(), values.tolist()) for name, values in means.items()}
        curves(panels[0], rows, "communications", "log₁₀ ‖πx‖² / ‖πx₀‖²")
        panels[0].legend(frameon=False, fontsize=8.5)

    figure(file, 1, fill, width=5.6)
    half = len(COMMUNICATIONS) // 2
    slopes = {
        name: -100 * float(np.polyfit(COMMUNICATIONS[half:], values[half:], 1)[0]) for name, values in means.items()
    }
    return {
        "runs": runs,
        "n": NODES,
        "slopes": slopes,
        "last": {name: float(values[-1]) for name, values in means.items()},
        "spread": {name: float(np.std([row[-1] for row in rows])) for name, rows in errors.items()},
        "gain of √(χ₁χ₂) by the SDP": [float(np.median(gains)), float(np.min(gains)), float(np.max(gains))],
        "communications": COMMUNICATIONS.tolist(),
        "curves": {name: values.tolist() for name, values in means.items()},
    }


def _value(graph: Graph) -> float:
    from unlocked.graphs import chi1, chi2

    return float(graph.trace * np.sqrt(chi1(graph) * chi2(graph)))


def _one(graph: Graph, run: Any, seed: int) -> np.ndarray:
    """log₁₀ of the error at each number of communications, in expectation: a run's clocks ring as often as they do."""
    x = np.random.default_rng(1000 + seed).standard_normal(NODES)
    found: Trajectory = run(graph, x, COMMUNICATIONS / graph.total, [seed])
    return np.asarray(np.log10(np.maximum(found.errors[0] / found.errors[0, 0], 1e-30)))
