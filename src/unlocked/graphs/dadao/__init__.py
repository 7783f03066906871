"""Decentralised optimisation of strongly convex finite sums: DADAO and what it is compared with (Oyallon §5.3).

found = run("dadao", digits(16), ring(16))
found.reached(1e-8)          # (gradients, communications), or None
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from ...errors import InvalidChoice, choose
from ..graph import Floats, Graph
from ..varying import Varying
from .baselines import Round, dgd, extra, tracking
from .centralised import gradient_descent, nesterov
from .dadao import Simulation, simulate
from .data import diabetes, digits, synthetic_logistic, synthetic_ridge
from .dual import msda
from .problems import Logistic, Problem, Ridge
from .trajectory import Recorder, Trajectory

Synchronous = Callable[[Problem, Graph, Floats, float | None], Iterator[Round]]

SYNCHRONOUS: dict[str, tuple[str, Synchronous]] = {
    "dgd": ("Decentralised gradient descent", dgd),
    "tracking": ("Gradient tracking", tracking),
    "extra": ("EXTRA", extra),
    "msda": ("MSDA", msda),
    "centralised": ("Gradient descent", gradient_descent),
    "nesterov": ("Nesterov", nesterov),
}
NAMES = {"dadao": "DADAO"} | {key: name for key, (name, _) in SYNCHRONOUS.items()}


def run(
    method: str,
    problem: Problem,
    graph: Graph | Varying,
    *,
    tolerance: float = 1e-8,
    horizon: int = 10_000,
    step: float | None = None,
    seed: int = 0,
    start: Floats | None = None,
    communications: float = 1.0,
    record: float = 1.0,
) -> Trajectory:
    """Run until the relative error is at most `tolerance`, or to the horizon.

    Args:
        method: a key of NAMES.
        problem: n functions of d variables.
        graph: n nodes; one that changes only for dadao. Only dadao uses the rates.
        tolerance: of mean_i ‖x_i − x*‖² / ‖x_0 − x*‖²; 0 to go on to the horizon.
        horizon: gradients of a node: rounds, or for dadao the time.
        step: a synchronous method's step (msda: the dual's); None: the theory's, see the method's module.
        seed: of DADAO's clocks.
        start: (d,) x_0; None: 0.
        communications, record: dadao only; see `simulate`. Synchronous methods keep the first rounds, then one in a hundred.

    Raises InvalidChoice: an unknown method; a graph of another size, that changes, or is not connected, where it must not be.
    """
    if choose("method", method, NAMES) == "dadao":
        if step is not None:
            raise InvalidChoice("DADAO's steps follow from μ, L and the graph; leave out step.")
        found = simulate(
            problem,
            graph,
            horizon=horizon,
            seeds=(seed,),
            tolerance=tolerance,
            record=record,
            start=start,
            communications=communications,
        )
        return found[0]
    if isinstance(graph, Varying):
        raise InvalidChoice(f"{NAMES[method]} is for one graph; give the graph of one time, or take dadao.")
    if graph.n != problem.n or not graph.connected:
        raise InvalidChoice(f"Give a connected graph of {problem.n} nodes, as many as the problem has.")
    x = np.tile(np.zeros(problem.d) if start is None else start, (problem.n, 1))
    name, rounds = SYNCHRONOUS[method]
    return _follow(Recorder(name, problem.optimum, x), rounds(problem, graph, x, step), x, tolerance, horizon)


def _follow(recorder: Recorder, rounds: Iterator[Round], x: Floats, tolerance: float, horizon: int) -> Trajectory:
    error, following = recorder.add(0.0, 0.0, 0.0, x), 1
    if error <= tolerance:
        return recorder.trajectory()
    for k, now in enumerate(islice(rounds, horizon), start=1):
        error = recorder.relative(now.x)
        done = error <= tolerance or k == horizon or not error < 1e12
        if k >= following or done:
            recorder.add(float(k), float(now.gradients), float(now.communications), now.x)
            following = max(k + 1, int(1.01 * k))
        if done:
            break
    return recorder.trajectory()


__all__ = [
    "NAMES",
    "Logistic",
    "Problem",
    "Ridge",
    "Simulation",
    "Trajectory",
    "diabetes",
    "digits",
    "run",
    "simulate",
    "synthetic_logistic",
    "synthetic_ridge",
]
