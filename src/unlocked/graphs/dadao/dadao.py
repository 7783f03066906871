"""DADAO: decoupled accelerated decentralised asynchronous optimisation (Nabli & Oyallon 2023; Oyallon §5.3, Eq. 5.21).

    min_x Σ_i f_i(x)  as the saddle point of  Σ_i f_i(x_i) − ν/2 ‖x‖² − ⟨x, y⟩ − 1/(2ν) ‖πz + y‖²            Eq. 5.20

    flow:      dx = η(x̃−x)dt   dx̃ = η(x−x̃)dt   dy = α(ỹ−y)dt   dỹ = −θ(y+z+νx̃)dt   dz = α(z̃−z)dt   dz̃ = α̃(z−z̃)dt
    gradient:  g = ∇f_i(x_i) − νx_i − ỹ_i:    x_i −= γg,   x̃_i −= γ̃g,   ỹ_i += (δ+δ̃)g               at rate 1 for each node
    edge ij:   m = (y+z)_i − (y+z)_j:         z_i −= βm,   z̃_i −= β̃m,   and at j the opposite               at rate λ_ij

π takes off the mean over the nodes; constants: `constants.py`. The saddle point: x = x̃ = x*, y = ỹ = ∇f(x*) − νx*,
z = z̃ = −∇f(x*). Start as Theorem 5.3.1 asks: x the same at all nodes, y = ỹ = ∇f(x_0) − νx_0, z = z̃ = −πy.

The flow between two events of a node is exact (its 6 × 6 exponential), applied when the node's next event comes. Rates: the
given graph's, all multiplied by the same factor, so that a node computes one gradient per unit of time and 2χ₁*χ₂* = 1.
A graph that changes is followed in this unit of time; χ₁* and χ₂* are the worst that occur.

Conserved: Σ_i z_i = Σ_i z̃_i = 0 (z stays in the image of π). Limits: one node has no communications and z = 0; the clocks of
gradients and of communications do not know of each other, so more communications change no gradient's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np

from ...errors import InvalidChoice
from ..graph import Floats, Graph
from ..varying import Varying
from .constants import Y_TILDE, Z_TILDE, Constants, X, Y, Z, least_factor
from .events import Batch, Clocks, Events, batches
from .problems import Problem
from .trajectory import Recorder, Trajectory

_EVENTS_AT_ONCE = 2_048  # more would make the search for batches slower


def initial(problem: Problem, start: Floats, nu: float) -> Floats:
    """(n, 6, d): the theorem's start from one point (d,) for all nodes."""
    y = problem.gradients(start) - nu * start
    z = y.mean(axis=0) - y
    x = np.broadcast_to(start, y.shape)
    return np.stack([x, x, y, y, z, z], axis=1)


def saddle(problem: Problem, nu: float) -> Floats:
    """(n, 6, d): the saddle point of Eq. 5.20, where nothing moves."""
    return initial(problem, problem.optimum, nu)


class Simulation:
    """Some independent runs, one for each seed, carried out together; the k-th is what its seed alone would give.

    Args:
        problem: n functions.
        graph: n nodes; one graph, or one for every time.
        seeds: of the clocks, one run each.
        start: (d,) x_0; None: 0.
        state: (n, 6, d) to begin with, in place of the theorem's start.
        communications: how many times the theorem's least rates, at least 1.
        until: χ₁*, χ₂* of a graph that changes for ever are the worst up to this time.

    Raises InvalidChoice: another number of nodes, a graph that is not connected, fewer communications than the theorem needs.
    """

    def __init__(
        self,
        problem: Problem,
        graph: Graph | Varying,
        seeds: Sequence[int] = (0,),
        *,
        start: Floats | None = None,
        state: Floats | None = None,
        communications: float = 1.0,
        until: float | None = None,
    ) -> None:
        self.problem = problem
        self.graph = Varying.constant(graph) if isinstance(graph, Graph) else graph
        self.factor, chi1 = _needed(problem, self.graph, communications, until)
        self.constants = Constants(problem.mu, problem.L, chi1)
        if state is None:
            state = initial(problem, np.zeros(problem.d) if start is None else start, self.constants.nu)
        self.time, self.copies = 0.0, len(seeds)
        self._state = np.tile(state, (self.copies, 1, 1))
        self._last = np.zeros(len(self._state))
        self._clocks = [Clocks(seed) for seed in seeds]
        self.gradients, self.communications = (np.zeros(self.copies, dtype=np.int64) for _ in range(2))

    @property
    def state(self) -> Floats:
        """(seeds, n, 6, d): x, x̃, y, ỹ, z, z̃ of every node now."""
        return self._state.reshape(self.copies, self.problem.n, *self._state.shape[1:])

    @property
    def x(self) -> Floats:
        """(seeds, n, d)."""
        return self.state[:, :, X]

    def advance(self, end: float) -> None:
        """All events up to a time, and every node's flow to it."""
        while self.time < end:
            graph = self.graph.at_time(self.time)
            busy = self.copies * (self.problem.n + self.factor * graph.total)
            stop = min(end, self.graph.until(self.time), self.time + max(_EVENTS_AT_ONCE / busy, 1e-9 * end))
            for batch in batches(self._draw(graph, stop), self._last):
                self._carry_out(batch)
            self.time = stop
        self._state = self.constants.flow(self.time - self._last) @ self._state
        self._last[:] = self.time

    def _draw(self, graph: Graph, stop: float) -> Events:
        parts, n = [], self.problem.n
        for k, clocks in enumerate(self._clocks):
            gradients = clocks.gradients(n, stop)
            exchanges = clocks.communications(graph, self.factor, self.time, stop)
            self.gradients[k] += len(gradients.time)
            self.communications[k] += len(exchanges.time)
            parts += [Events(part.time, part.ends + k * n) for part in (gradients, exchanges)]
        return Events.merged(parts)

    def _carry_out(self, batch: Batch) -> None:
        constants, state = self.constants, self._state
        if len(batch.node):
            own = constants.flow(batch.node_waited) @ state[batch.node]
            g = (
                self.problem.gradient(batch.node % self.problem.n, own[:, X])
                - constants.nu * own[:, X]
                - own[:, Y_TILDE]
            )
            state[batch.node] = own + constants.gradient_jump[:, None] * g[:, None]
        if len(batch.edge):
            both = constants.flow(batch.edge_waited) @ state[batch.edge]
            sums = both[:, :, Y] + both[:, :, Z]
            m = (sums[:, 0] - sums[:, 1])[:, None]
            jump = constants.edge_jump[Z : Z_TILDE + 1, None]
            both[:, 0, Z:] += jump * m
            both[:, 1, Z:] -= jump * m
            state[batch.edge] = both


def simulate(
    problem: Problem,
    graph: Graph | Varying,
    *,
    horizon: float,
    seeds: Sequence[int] = (0,),
    tolerance: float = 0.0,
    record: float = 1.0,
    start: Floats | None = None,
    communications: float = 1.0,
) -> list[Trajectory]:
    """Run until all seeds' relative errors are at most `tolerance`, or to `horizon`; a record every `record` units of time.

    Other arguments and errors: `Simulation`. Returns one trajectory for each seed.
    """
    if not (record > 0 and 0 < horizon < inf):
        raise InvalidChoice(f"record={record:g}, horizon={horizon:g} are not possible; give times above 0.")
    run = Simulation(problem, graph, seeds, start=start, communications=communications, until=horizon)
    recorders = [Recorder("DADAO", problem.optimum, run.x[k].copy()) for k in range(run.copies)]

    def note() -> float:
        counts = zip(recorders, run.gradients, run.communications, run.x)
        return max(one.add(run.time, float(g), float(c), x) for one, g, c, x in counts)

    worst, count = note(), 0
    while worst > tolerance and run.time < horizon:
        count += 1
        run.advance(min(count * record, horizon))
        worst = note()
    return [one.trajectory() for one in recorders]


def _needed(problem: Problem, graph: Varying, communications: float, until: float | None) -> tuple[float, float]:
    """(what the rates are multiplied by, χ₁* then)."""
    if graph.n != problem.n:
        raise InvalidChoice(f"The graph has {graph.n} nodes and the problem {problem.n}; give as many of both.")
    if not 1.0 <= communications < inf:
        raise InvalidChoice(
            f"communications={communications:g} is not possible: the theorem needs at least 1 times its least rates."
        )
    end = until if graph.drawn_anew else None
    chi1, chi2 = graph.chi1(end), graph.chi2(end)
    if chi1 == inf:
        raise InvalidChoice("The graph is not connected at all times, so DADAO's constants do not exist; add edges.")
    factor = communications * least_factor(chi1, chi2)
    return factor, chi1 / factor
