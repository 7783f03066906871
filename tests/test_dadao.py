"""DADAO: the theorem's bound, exact second moments, conservation, the flow, independence of the two kinds of events."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm

from unlocked.errors import InvalidChoice
from unlocked.graphs import Graph, chi1, chi2
from unlocked.graphs.dadao import Ridge, Simulation, run, simulate, synthetic_logistic, synthetic_ridge
from unlocked.graphs.dadao.constants import Constants, bound, least_factor, rate
from unlocked.graphs.dadao.dadao import initial, saddle
from unlocked.graphs.dadao.events import Clocks, Events
from unlocked.graphs.dadao.moments import decay, errors, generator
from unlocked.graphs.topologies import complete, line, ring, star
from unlocked.graphs.varying import Varying

GRAPHS = [ring(4), line(4), star(4), complete(4), Graph.make(4, [(0, 1), (1, 2), (2, 3), (0, 2)], [1.0, 0.3, 2.0, 5.0])]
names = pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: f"{graph.name}{graph.n}")


def normalised(graph: Graph, factor: float = 1.0) -> Graph:
    return graph.scaled(factor * least_factor(chi1(graph), chi2(graph)))


# ---- the flow --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(L=st.floats(1.0, 1e4), mu=st.floats(1e-2, 1.0), time=st.floats(0.0, 50.0), more=st.floats(0.0, 50.0))
def test_flow_is_the_exponential_of_the_drift(L: float, mu: float, time: float, more: float) -> None:
    constants = Constants(mu, L, 1.0)
    scale = np.sqrt(L / mu)  # θ, the largest entry
    both = constants.flow(np.array([time, more, time + more]))
    assert np.abs(both[0] - expm(constants.drift * time)).max() <= 1e-11 * scale
    assert np.abs(both[0] @ both[1] - both[2]).max() <= 1e-11 * scale
    kept = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 2]])  # x + x̃ and α̃z + αz̃ do not flow
    np.testing.assert_allclose(kept @ both[0], kept, atol=1e-13)


def test_flow_is_what_small_steps_give() -> None:
    constants = Constants(0.7, 9.0, 2.0)
    r, nu, steps = sqrt(0.35 / 9), 0.35, 200_000
    x, x2, y, y2, z, z2 = begin = np.random.default_rng(0).normal(size=6)
    for _ in range(steps):
        h = 3.0 / steps
        x, x2, y, y2, z, z2 = (
            x + h * r / 8 * (x2 - x),
            x2 + h * r / 8 * (x - x2),
            y + h * r / 4 * (y2 - y),
            y2 - h / (2 * r) * (y + z + nu * x2),
            z + h * r / 4 * (z2 - z),
            z2 + h * r / 8 * (z - z2),
        )
    np.testing.assert_allclose(constants.flow(np.array(3.0)) @ begin, [x, x2, y, y2, z, z2], atol=1e-4)


# ---- what happens at events ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [Graph.make(1, []), line(4), star(5)], ids=["one node", "line", "star"])
def test_batches_are_the_events_one_by_one(graph: Graph) -> None:
    """Against all six variables carried along by scipy's exponential, event by event, jumps written out."""
    problem, end = synthetic_ridge(graph.n, d=2, condition=4.0), 12.0
    simulation = Simulation(problem, graph, [3])
    L, nu, r = problem.L, problem.mu / 2, sqrt(problem.mu / 2 / problem.L)
    state, now, clocks = initial(problem, np.zeros(2), nu), 0.0, Clocks(3)
    chi = chi1(graph) / simulation.factor
    for time, (i, j) in zip(*vars(drawn(clocks, graph, simulation.factor, end)).values()):
        state, now = expm(simulation.constants.drift * (time - now)) @ state, time
        if i == j:
            g = problem.hessian[i] @ state[i, 0] - problem.linear[i] - nu * state[i, 0] - state[i, 3]
            state[i, 0] -= g / (4 * L)
            state[i, 1] -= g / (4 * sqrt(L * nu))
            state[i, 3] += (1 + r / 4) * g
        else:
            m = state[i, 2] + state[i, 4] - state[j, 2] - state[j, 4]
            for node, sign in ((i, -1), (j, 1)):
                state[node, 4] += sign * m / 2
                state[node, 5] += sign * 2 * chi / r * m
    simulation.advance(5.0)
    simulation.advance(end)
    expected = expm(simulation.constants.drift * (end - now)) @ state
    np.testing.assert_allclose(simulation.state[0], expected, atol=1e-9 * np.abs(expected).max())
    if graph.n == 1:
        assert not simulation.communications[0] and not np.abs(simulation.state[0, :, 4:]).any()


def drawn(clocks: Clocks, graph: Graph, factor: float, end: float) -> Events:
    return Events.merged([clocks.gradients(graph.n, end), clocks.communications(graph, factor, 0.0, end)])


@pytest.mark.parametrize("problem", [synthetic_ridge(5), synthetic_logistic(5)], ids=["ridge", "logistic"])
def test_nothing_moves_at_the_saddle_point(problem: Ridge) -> None:
    begin = saddle(problem, problem.mu / 2)
    simulation = Simulation(problem, ring(5), [0, 1], state=begin)
    simulation.advance(100.0)
    assert simulation.gradients.min() > 300 and simulation.communications.min() > 100
    np.testing.assert_allclose(simulation.state, np.stack([begin, begin]), atol=1e-11)


@names
def test_z_sums_to_zero(graph: Graph) -> None:
    simulation = Simulation(synthetic_logistic(graph.n), graph, [0, 1])
    simulation.advance(200.0)
    np.testing.assert_allclose(simulation.state[:, :, 4:].sum(axis=1), 0.0, atol=1e-10)


# ---- the theorem -----------------------------------------------------------------------------------------------------


@names
@pytest.mark.parametrize("L", [1.0, 30.0, 1000.0])
def test_second_moment_decays_faster_than_the_theorem_says(graph: Graph, L: float) -> None:
    graph = normalised(graph)
    constants = Constants(1.0, L, chi1(graph))
    cases = [np.full(graph.n, L), np.geomspace(1.0, L, graph.n)]
    slowest = min(decay(h, graph, constants) for h in cases)
    assert slowest >= rate(L)
    assert slowest <= 4 * rate(L)  # the bound is not far off


@pytest.mark.parametrize("L", [3.0, 30.0])
def test_exact_second_moment_stays_below_the_bound(L: float) -> None:
    """From the theorem's start, f_i = h_i x²/2 − b_i x, x_0 = 0."""
    graph, h, b = normalised(line(3)), np.array([1.0, sqrt(L), L]), np.array([3.0, -2.0, 5.0])
    constants = Constants(1.0, L, chi1(graph))
    times = np.linspace(0.0, 300.0 * sqrt(L), 60)
    found = errors(generator(h, graph, constants), distance(h, b, constants.nu), times)
    scale = 3 * (b.sum() / h.sum()) ** 2
    assert found[0] == pytest.approx(scale)
    assert (found <= scale * np.array([bound(L, t) for t in times])).all()
    assert found[-1] < 1e-12 * found[0]


def distance(h: np.ndarray, b: np.ndarray, nu: float) -> np.ndarray:
    """S_0 (6n,): the theorem's start at x_0 = 0 less the saddle point."""
    optimum, pi = b.sum() / h.sum(), np.eye(len(h)) - 1 / len(h)
    ends = h * optimum - b
    y, z = -b - (ends - nu * optimum), pi @ b + ends
    x = np.full(len(h), -optimum)
    return np.concatenate([x, x, y, y, z, z])


def test_simulation_has_the_exact_second_moment() -> None:
    """200 seeds against the linear equation of E[S Sᵀ]: times, rates, jumps and flow at once."""
    graph, h, b = star(3), np.array([1.0, 4.0, 2.0]), np.array([3.0, -2.0, 5.0])
    problem = Ridge(np.sqrt(h)[:, None, None], (b / np.sqrt(h))[:, None], 0.0)
    runs = simulate(problem, graph, seeds=range(200), horizon=40.0, record=8.0)
    graph = normalised(graph)
    constants = Constants(1.0, 4.0, chi1(graph))
    expected = errors(generator(h, graph, constants), distance(h, b, constants.nu), runs[0].time) / 3
    measured = np.array([one.errors for one in runs])
    error_bar = measured.std(axis=0, ddof=1) / sqrt(len(runs))
    assert (np.abs(measured.mean(axis=0) - expected) <= 4 * error_bar + 1e-12).all()
    assert (error_bar[1:] < 0.2 * expected[1:]).all()


@pytest.mark.parametrize("make", [synthetic_ridge, synthetic_logistic])
def test_mean_error_is_below_the_bound(make) -> None:  # type: ignore[no-untyped-def]
    problem = make(5, d=3, condition=8.0)
    runs = simulate(problem, line(5), seeds=range(20), horizon=200.0, record=20.0)
    relative = np.array([one.relative for one in runs])
    error_bar = relative.std(axis=0, ddof=1) / sqrt(len(runs))
    bounds = np.array([bound(problem.condition, t) for t in runs[0].time])
    assert (relative.mean(axis=0) + 4 * error_bar <= bounds).all()


def test_convergence_is_linear_to_rounding() -> None:
    """Between 1e-2 and 1e-24 the logarithm of the error falls on a line."""
    found = run("dadao", synthetic_logistic(5, condition=4.0), ring(5), tolerance=1e-24, horizon=2000, record=5.0)
    assert found.relative[-1] <= 1e-24
    part = (found.relative < 1e-2) & (found.relative > 1e-24)
    assert np.corrcoef(found.time[part], np.log(found.relative[part]))[0, 1] < -0.99
    assert found.averaged[-1] < found.averaged[1]


def test_fewer_communications_diverge_and_more_are_no_faster() -> None:
    """These constants need 2χ₁χ₂ ≤ 1, not 2; and the rate does not go as 1/√(χ₁χ₂) beyond it."""
    graph, h, L = complete(4), np.geomspace(1.0, 30.0, 4), 30.0
    at = {f: normalised(graph, f) for f in (0.7, 1.0, 4.0)}
    found = {f: decay(h, one, Constants(1.0, L, chi1(one))) for f, one in at.items()}
    assert found[0.7] < 0 < found[1.0]
    assert found[4.0] < 4 * rate(L) and found[4.0] == pytest.approx(found[1.0], rel=0.02)


# ---- rates -----------------------------------------------------------------------------------------------------------


def test_gradients_do_not_depend_on_communications() -> None:
    problem = synthetic_ridge(8)
    once, twice = (Simulation(problem, ring(8), [0, 1, 2], communications=k) for k in (1.0, 2.0))
    for simulation in (once, twice):
        simulation.advance(200.0)
    np.testing.assert_array_equal(once.gradients, twice.gradients)
    expected = 8 * 200 * 3
    assert abs(once.gradients.sum() - expected) < 4 * sqrt(expected)
    one = ring(8).scaled(1 / 8)  # rates that sum to one: √(2χ₁χ₂) communications per unit of time
    for simulation, factor in ((once, 1.0), (twice, 2.0)):
        expected = factor * sqrt(2 * chi1(one) * chi2(one)) * 200 * 3
        assert abs(simulation.communications.sum() - expected) < 4 * sqrt(expected)


def test_the_clocks_of_gradients_know_nothing_of_the_others() -> None:
    """Also when more is drawn than the streams hold at a time, and in whatever windows."""
    alone, beside = Clocks(5), Clocks(5)
    expected = alone.gradients(8, 3000.0)
    parts = []
    for k in range(30):
        parts.append(beside.gradients(8, 100.0 * (k + 1)))
        beside.communications(ring(8), 3.0, 100.0 * k, 100.0 * (k + 1))
    found = Events.merged(parts)
    np.testing.assert_array_equal(found.time, expected.time)
    np.testing.assert_array_equal(found.ends, expected.ends)


def test_rates_are_shares() -> None:
    """A given rate counts against the others only, and each edge gets its share of the events."""
    graph = GRAPHS[4]
    events = Clocks(0).communications(graph, 2.0, 0.0, 500.0)
    for (i, j), given_rate in zip(graph.edges, graph.rates):
        expected = 2.0 * given_rate * 500.0
        assert abs((events.ends == [i, j]).all(axis=1).sum() - expected) < 4 * sqrt(expected)
    problem = synthetic_ridge(4)
    one, other = (Simulation(problem, g) for g in (graph, graph.scaled(7.0)))
    assert one.factor == pytest.approx(7 * other.factor)
    assert one.constants.chi1 == pytest.approx(other.constants.chi1)


def test_seeds_together_are_the_seeds_alone() -> None:
    problem = synthetic_logistic(5)
    together = simulate(problem, ring(5), seeds=[4, 9], horizon=40.0, record=4.0)
    for seed, one in zip([4, 9], together):
        (alone,) = simulate(problem, ring(5), seeds=[seed], horizon=40.0, record=4.0)
        np.testing.assert_allclose(one.errors, alone.errors, rtol=1e-9)
        np.testing.assert_array_equal(one.communications, alone.communications)


# ---- graphs that change ----------------------------------------------------------------------------------------------


def test_a_graph_that_stays_is_a_graph() -> None:
    problem = synthetic_ridge(5)
    one = run("dadao", problem, ring(5), tolerance=0.0, horizon=30)
    other = run("dadao", problem, Varying.sequence([ring(5), ring(5)], [1.3, 0.4]), tolerance=0.0, horizon=30)
    np.testing.assert_allclose(one.errors, other.errors, rtol=1e-8)
    np.testing.assert_array_equal(one.communications, other.communications)


def test_changing_graphs_converge_at_the_worst_ones_bound() -> None:
    problem = synthetic_logistic(6, condition=5.0)
    graphs = Varying.sequence([line(6), star(6), ring(6)], 2.5)
    simulation = Simulation(problem, graphs, [0])
    worst1, worst2 = max(map(chi1, [line(6), star(6), ring(6)])), max(map(chi2, [line(6), star(6), ring(6)]))
    assert simulation.factor == pytest.approx(sqrt(2 * worst1 * worst2))
    runs = simulate(problem, graphs, seeds=range(6), horizon=300.0, record=20.0)
    mean = np.mean([one.relative for one in runs], axis=0)
    assert (mean <= [bound(problem.condition, t) for t in runs[0].time]).all()
    assert mean[-1] < 1e-5


def test_events_follow_the_graph_of_the_time() -> None:
    """Three units of the ring's 6 rates, then one of the complete graph's 15; counts as many as rates say."""
    graphs = Varying.sequence([ring(6), complete(6)], [3.0, 1.0])
    simulation = Simulation(synthetic_ridge(6), graphs, range(20))
    simulation.advance(8.0)
    expected = 20 * simulation.factor * 2 * (3 * 6 + 15)
    assert abs(simulation.communications.sum() - expected) < 4 * sqrt(expected)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"graph": ring(4)}, "has 4 nodes"),
        ({"graph": Graph.make(5, [(0, 1), (2, 3), (3, 4)])}, "not connected"),
        ({"communications": 0.5}, "least rates"),
        ({"record": 0.0}, "record=0"),
        ({"horizon": float("inf")}, "horizon=inf"),
    ],
)
def test_sentences(options: dict, sentence: str) -> None:
    with pytest.raises(InvalidChoice, match=sentence):
        simulate(synthetic_ridge(5), **{"graph": ring(5), "horizon": 5.0} | options)
