"""The gossip processes (Oyallon §5.1): clocks, exact order, conservation, the four rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import expm
from scipy.stats import chi2 as chi_square
from scipy.stats import kstest

from unlocked.errors import InvalidChoice
from unlocked.graphs import Graph, chi1, chi2
from unlocked.graphs.gossip import (
    Accelerated,
    Engine,
    Momentum,
    Randomized,
    accelerated_gossip,
    accelerated_rate,
    chebyshev_gossip,
    expected_errors,
    poisson_events,
    randomized_gossip,
    randomized_rate,
    second_moment_rate,
    synchronous_gossip,
)
from unlocked.graphs.gossip import synchronous as sync
from unlocked.graphs.gossip.engine import rows_of
from unlocked.graphs.gossip.events import Clocks, EdgeTable, first_events, windows
from unlocked.graphs.gossip.schedule import disjoint_batches
from unlocked.graphs.spectra import spectral_gap
from unlocked.graphs.topologies import barbell, complete, line, ring, star
from unlocked.graphs.varying import Varying

Floats = NDArray[np.float64]
SMALL = {"ring": ring(6), "star": star(5), "complete": complete(5), "barbell": barbell(8), "line": line(4)}


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape)


@st.composite
def graphs(draw: st.DrawFn, most: int = 12) -> Graph:
    """Connected, with rates of very different size: a random tree and some further edges."""
    n = draw(st.integers(2, most))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    edges = {(int(generator.integers(k)), k) for k in range(1, n)}
    edges |= {(i, j) for i in range(n) for j in range(i + 1, n) if generator.random() < 0.3}
    return Graph.make(n, sorted(edges), generator.exponential(1.0, len(edges)) + 0.05)


def one_by_one(
    graph: Graph, x: Floats, times: Floats, edges: NDArray[np.int64], until: float, momentum: Momentum | None
) -> tuple[Floats, Floats]:
    """The definition: one event after the other, each node mixed before it exchanges. x: (n, d)."""
    x, x_tilde, last = x.copy(), x.copy(), np.zeros(len(x))

    def mix(node: int, time: float) -> None:
        if momentum is not None:
            share = np.expm1((time - last[node]) * (-2.0 * momentum.eta)) * -0.5
            moved = (x_tilde[node] - x[node]) * share
            x[node], x_tilde[node] = x[node] + moved, x_tilde[node] - moved
            last[node] = time

    for time, (i, j) in zip(times, graph.edges[edges]):
        mix(i, time)
        mix(j, time)
        difference = x[i] - x[j]
        x[i], x[j] = x[i] - difference * 0.5, x[j] + difference * 0.5
        if momentum is not None:
            moved = difference * momentum.alpha_tilde
            x_tilde[i], x_tilde[j] = x_tilde[i] - moved, x_tilde[j] + moved
    for node in range(len(x)):
        mix(node, until)
    return x, x_tilde


# ---- clocks ----------------------------------------------------------------------------------------------------------


def test_the_clocks_of_the_edges_are_independent_poisson_processes_of_their_rates() -> None:
    graph = Graph.make(5, [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)], [0.1, 3.0, 1.0, 0.7, 2.0])
    length, seeds = 40.0, 300
    runs = [poisson_events(graph, 0.0, length, seed) for seed in range(seeds)]
    counts = np.array([np.bincount(edges, minlength=5) for _, edges in runs])
    expected = graph.rates * length
    variances = ((counts - expected) ** 2 / expected).sum(axis=0)  # of Poisson counts: chi-square, 300 degrees
    low, high = chi_square.ppf([1e-4, 1 - 1e-4], seeds)
    assert ((variances > low) & (variances < high)).all()
    totals = counts.sum(axis=0)
    assert (np.abs(totals - seeds * expected) < 4 * np.sqrt(seeds * expected)).all()
    correlations = np.corrcoef(counts.T) - np.eye(5)
    assert np.abs(correlations).max() < 4.5 / math.sqrt(seeds)
    times, edges = poisson_events(graph, 0.0, 4000.0, 0)  # over many blocks
    for edge, rate in enumerate(graph.rates):
        assert kstest(np.diff(times[edges == edge]) * rate, "expon").pvalue > 1e-3


@settings(max_examples=30, deadline=None)
@given(graphs(), st.integers(0, 100), st.floats(0, 3), st.floats(0, 3))
def test_windows_of_events_fit_together(graph: Graph, seed: int, one: float, more: float) -> None:
    scale = 2048 / graph.total  # a block or so
    middle, end = one * scale, (one + more) * scale
    times, edges = poisson_events(graph, 0.0, end, seed)
    first, second = poisson_events(graph, 0.0, middle, seed), poisson_events(graph, middle, end, seed)
    assert np.array_equal(times, np.concatenate([first[0], second[0]]))
    assert np.array_equal(edges, np.concatenate([first[1], second[1]]))
    assert (np.diff(times) >= 0).all() and (times < end).all() and (second[0] >= middle).all()
    early = first_events(graph, 50, seed)
    assert np.array_equal(early[0], poisson_events(graph, 0.0, scale * 3, seed)[0][:50])


@settings(max_examples=30, deadline=None)
@given(graphs())
def test_the_table_holds_each_edge_with_its_share(graph: Graph) -> None:
    table, size = EdgeTable(graph), len(graph)
    if table._uniform:
        return
    mass = (
        np.bincount(table._other, weights=1 - table._own, minlength=size)
        + np.bincount(np.arange(size), weights=table._own)
    ) / size
    assert np.allclose(mass, graph.rates / graph.total, atol=1e-12)


def test_a_block_begins_where_the_one_before_it_ends() -> None:
    for total in (0.3, 7.0, 11.1):
        clocks = Clocks(Graph.make(2, [(0, 1)], total))
        assert all(clocks.block_of(k * clocks.length) == k for k in range(500))


def test_a_graph_that_changes_rings_at_the_rates_of_the_moment() -> None:
    first, second = Graph.make(3, [(0, 1)], 5.0), Graph.make(3, [(1, 2)], 50.0)
    changing = Varying.sequence([first, second], [2.0, 1.0])
    pieces = [piece for seed in range(15) for piece in windows(changing, 0.0, 60.0, seed)]
    for graph, mean in ((first, 5.0 * 40), (second, 50.0 * 20)):
        count = sum(len(piece.times) for piece in pieces if piece.graph == graph) / 15
        assert abs(count - mean) < 4 * math.sqrt(mean / 15)
    for piece in pieces:
        inside = np.floor(piece.times / 3) * 3 + np.where(piece.graph == first, 0.0, 2.0)
        assert (piece.times >= inside).all() and (piece.times < inside + 2.0).all()
    alone = windows(Varying.constant(first), 0.0, 30.0, 4)
    assert np.array_equal(np.concatenate([p.times for p in alone]), poisson_events(first, 0.0, 30.0, 4)[0])


def test_events_of_another_seed_are_others_and_wrong_windows_are_refused() -> None:
    graph = ring(5)
    assert np.array_equal(poisson_events(graph, 0, 9, 1)[0], poisson_events(graph, 0, 9, 1)[0])
    assert not np.array_equal(poisson_events(graph, 0, 9, 1)[0][:9], poisson_events(graph, 0, 9, 2)[0][:9])
    for begin, end in ((-1.0, 1.0), (2.0, 1.0), (0.0, math.inf)):
        with pytest.raises(InvalidChoice, match="0 ≤ begin ≤ end"):
            poisson_events(graph, begin, end, 0)
    with pytest.raises(InvalidChoice, match="no edge"):
        first_events(Graph.make(3, []), 5, 0)


# ---- exact order -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(0, 1000), st.integers(0, 60))
def test_batches_hold_disjoint_nodes_and_keep_the_order_of_each_node(graph: Graph, seed: int, count: int) -> None:
    _, edges = first_events(graph, count, seed)
    i, j = graph.edges[edges].T
    batches = list(disjoint_batches(i, j, np.zeros(graph.n, dtype=np.int64)))
    order = np.concatenate([np.empty(0, dtype=np.int64), *batches])
    assert sorted(order) == list(range(count))
    for batch in batches:
        ends = np.concatenate([i[batch], j[batch]])
        assert len(set(ends.tolist())) == len(ends)
    for node in range(graph.n):
        own = [k for k in order if node in (i[k], j[k])]
        assert own == sorted(own)


@pytest.mark.parametrize("seeds", [1, 3, 600], ids=["one seed", "few seeds", "many seeds"])
@pytest.mark.parametrize("accelerate", [False, True], ids=["randomized", "accelerated"])
@pytest.mark.parametrize("d", [1, 3])
def test_the_engine_gives_bit_for_bit_what_one_event_after_the_other_gives(
    seeds: int, accelerate: bool, d: int
) -> None:
    graph = Graph.make(40, [*ring(40).edges, (0, 20), (5, 31)], normal(42) ** 2 + 0.1)
    momentum = Momentum(0.3, 0.5, 1.7) if accelerate else None
    x, end = normal(seeds, 40, d), 4.0
    if momentum is None:
        found = randomized_gossip(graph, x, [1.3, end], range(seeds))
    else:
        found = accelerated_gossip(graph, x, [end], range(seeds), momentum)
    for seed in {0, seeds // 2, seeds - 1}:
        times, edges = poisson_events(graph, 0.0, end, seed)
        assert found.activations[seed, -1] == len(times) > 100
        values, tilde = one_by_one(graph, x[seed], times, edges, end, momentum)
        assert np.array_equal(found.values[seed], values)
        if momentum is not None:
            assert found.momentum is not None and np.array_equal(found.momentum[seed], tilde)


def test_a_long_run_over_many_blocks_is_in_order_too() -> None:
    graph, end = complete(8), 300.0
    times, edges = poisson_events(graph, 0.0, end, 3)
    assert len(times) > 3 * 2048
    values, _ = one_by_one(graph, normal(8, 2), times, edges, end, None)
    assert np.array_equal(randomized_gossip(graph, normal(8, 2), [end], [3]).values[0], values)


def test_a_graph_that_changes_is_followed_in_order() -> None:
    changing = Varying.sequence([ring(6), star(6), complete(6)], [0.3, 0.2, 0.7])
    momentum, x, end = Momentum(0.4, 0.5, 0.9), normal(6, 1), 9.1
    pieces = windows(changing, 0.0, end, 5)
    pairs = np.concatenate([piece.graph.edges[piece.edges] for piece in pieces])
    times = np.concatenate([piece.times for piece in pieces])
    listed = complete(6)
    rows = np.array([int(np.nonzero((listed.edges == pair).all(axis=1))[0][0]) for pair in pairs])
    values, _ = one_by_one(listed, x, times, rows, end, momentum)
    found = accelerated_gossip(changing, x, [end], [5], momentum)
    assert np.array_equal(found.values[0], values)
    with pytest.raises(InvalidChoice, match="give the momentum"):
        accelerated_gossip(changing, x, [end])


@settings(max_examples=25, deadline=None)
@given(graphs(), st.integers(0, 50))
def test_without_mixing_the_accelerated_process_is_the_randomized_one_bit_for_bit(graph: Graph, seed: int) -> None:
    x = normal(graph.n, 2, seed=seed)
    plain = randomized_gossip(graph, x, [2.0, 5.0], [seed, seed + 1])
    still = accelerated_gossip(graph, x, [2.0, 5.0], [seed, seed + 1], Momentum(0.0, 0.5, 3.0))
    assert np.array_equal(plain.values, still.values)
    assert np.array_equal(plain.errors, still.errors)


def test_a_seed_gives_the_same_whatever_runs_beside_it_and_whenever_it_is_measured() -> None:
    graph, x = barbell(10), normal(10)
    alone = accelerated_gossip(graph, x, [7.0], [5])
    beside = accelerated_gossip(graph, x, [7.0], [3, 5, 8])
    many = accelerated_gossip(graph, x, [7.0], range(1100))  # two groups of seeds
    assert np.array_equal(alone.values[0], beside.values[1])
    assert np.array_equal(alone.values[0], many.values[5])
    assert not np.array_equal(beside.values[0], beside.values[1])
    plain = randomized_gossip(graph, x, np.linspace(0, 7, 30), [5])
    assert np.array_equal(plain.values, randomized_gossip(graph, x, [7.0], [5]).values)


# ---- conservation and symmetry ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(graphs(), st.integers(0, 50))
def test_the_means_of_x_and_of_its_momentum_never_change(graph: Graph, seed: int) -> None:
    x = normal(graph.n, 3, seed=seed) + 1.0
    runs = [
        randomized_gossip(graph, x, [20.0], [seed]),
        accelerated_gossip(graph, x, [20.0], [seed]),
        synchronous_gossip(graph, x, 40),
        chebyshev_gossip(graph, x, 40),
    ]
    for run in runs:
        assert np.abs(run.values[0].mean(axis=0) - x.mean(axis=0)).max() < 1e-12
    assert runs[1].momentum is not None
    assert np.abs(runs[1].momentum[0].mean(axis=0) - x.mean(axis=0)).max() < 1e-12


@pytest.mark.parametrize("graph", SMALL.values(), ids=SMALL)
def test_equal_values_stay_and_all_processes_are_linear(graph: Graph) -> None:
    x, y, matrix = normal(graph.n, 2), normal(graph.n, 2, seed=1), normal(2, 4, seed=2)

    def all_four(values: Floats) -> list[Floats]:
        randomized = randomized_gossip(graph, values, [3.0], [7]).values[0]
        accelerated = accelerated_gossip(graph, values, [3.0], [7]).values[0]
        return [
            randomized,
            accelerated,
            synchronous_gossip(graph, values, 4).values[0],
            chebyshev_gossip(graph, values, 4).values[0],
        ]

    constant = np.full((graph.n, 2), 0.7)
    for still in all_four(constant):
        assert np.abs(still - constant).max() < 1e-15
    for of_x, of_y, both, mapped in zip(all_four(x), all_four(y), all_four(3 * x - 2 * y), all_four(x @ matrix)):
        assert np.allclose(both, 3 * of_x - 2 * of_y, atol=1e-13)
        assert np.allclose(mapped, of_x @ matrix, atol=1e-13)


# ---- rates -----------------------------------------------------------------------------------------------------------


def equation(graph: Graph, momentum: Momentum | None) -> Floats:
    """From the definition: an event multiplies z = (x, x̃) by a matrix J, so d/dt E z⊗z = (F⊕F + Σ λ (J⊗J − 1)) E z⊗z."""
    n, copies = graph.n, 1 if momentum is None else 2
    eye, flow = np.eye(copies * n), np.zeros((copies * n, copies * n))
    if momentum is not None:
        flow = momentum.eta * np.block([[-np.eye(n), np.eye(n)], [np.eye(n), -np.eye(n)]])
    generator = np.kron(flow, eye) + np.kron(eye, flow)
    for i, j, rate in graph.pairs():
        b = np.zeros(n)
        b[i], b[j] = 1.0, -1.0
        steps = [0.5] if momentum is None else [momentum.alpha, momentum.alpha_tilde]
        jump = eye.copy()
        jump[:, :n] -= np.kron(np.array(steps)[:, None], np.outer(b, b))
        generator += rate * (np.kron(jump, jump) - np.eye(len(eye) ** 2))
    return generator


def moments_by_expm(graph: Graph, x: Floats, times: Sequence[float], momentum: Momentum | None) -> Floats:
    n, copies = graph.n, 1 if momentum is None else 2
    z = np.tile(x - x.mean(), copies)
    matrix = equation(graph, momentum)
    found = [(expm(matrix * time) @ np.kron(z, z)).reshape(copies * n, -1) for time in times]
    return np.array([np.trace(moments[:n, :n]) for moments in found])


@pytest.mark.parametrize("accelerate", [False, True], ids=["randomized", "accelerated"])
@pytest.mark.parametrize("graph", SMALL.values(), ids=SMALL)
def test_the_engine_follows_the_exact_second_moments(graph: Graph, accelerate: bool) -> None:
    momentum = Momentum.of(graph) if accelerate else None
    x, times = normal(graph.n, seed=4), [0.0, 0.5, 1.5, 3.0]
    exact = expected_errors(graph, x, times, momentum)
    assert np.allclose(exact, moments_by_expm(graph, x, times, momentum), rtol=1e-9)
    run = accelerated_gossip if accelerate else randomized_gossip
    found = run(graph, x, times, range(1000))
    assert np.allclose(found.errors[:, 0], exact[0])
    assert (np.abs(found.mean_error() - exact)[1:] < 4.5 * found.standard_error()[1:]).all()
    expected = graph.total * np.array(times)
    assert (np.abs(found.activations.mean(axis=0) - expected) <= 4.5 * np.sqrt(expected / 1000)).all()


@settings(max_examples=8, deadline=None)
@given(graphs(most=5), st.booleans())
def test_the_second_moment_rate_is_that_of_the_equation(graph: Graph, accelerate: bool) -> None:
    assert_rate(graph, accelerate)


def test_the_second_moment_rate_of_many_edges_is_that_of_the_equation() -> None:
    assert_rate(complete(9).with_rates(normal(36) ** 2 + 0.05), accelerate=True)  # 4n edges or more: other matrices
    assert_rate(barbell(8).with_rates(normal(13) ** 2 + 0.05), accelerate=False)  # more than 8 edges: Lanczos


def assert_rate(graph: Graph, accelerate: bool) -> None:
    momentum = Momentum.of(graph) if accelerate else None
    centred = np.kron(np.eye(1 + accelerate), np.eye(graph.n) - 1 / graph.n)
    both = np.kron(centred, centred)  # on which the equation acts; the rest is moved out of the way
    values = np.linalg.eigvals(equation(graph, momentum) - 1e3 * graph.total * (np.eye(len(both)) - both))
    assert second_moment_rate(graph, momentum) == pytest.approx(-values.real.max(), rel=1e-4)


@settings(max_examples=10, deadline=None)
@given(graphs(most=7))
def test_no_graph_mixes_slower_than_its_bound(graph: Graph) -> None:
    momentum, eta = Momentum.of(graph), accelerated_rate(graph)
    assert second_moment_rate(graph) >= randomized_rate(graph) * (1 - 1e-6)
    assert second_moment_rate(graph, momentum) >= eta * (1 - 1e-6)
    x, times = normal(graph.n, seed=graph.n), np.array([0.3, 1.0, 4.0, 16.0]) * math.sqrt(chi1(graph) * chi2(graph))
    start = float(np.square(x - x.mean()).sum())
    assert (expected_errors(graph, x, times) <= start * np.exp(-times * randomized_rate(graph)) * (1 + 1e-6)).all()
    bound = 2 * start * np.exp(-times * eta)
    assert (expected_errors(graph, x, times, momentum) <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("graph", [ring(24), barbell(16), star(12)], ids=["ring", "barbell", "star"])
def test_the_measured_decay_keeps_within_the_predicted_rates(graph: Graph) -> None:
    times = np.array([1.0, 2.0, 3.0]) * chi1(graph)
    x = np.linalg.eigh(graph.laplacian())[1][:, 1]  # the slowest start
    plain = randomized_gossip(graph, x, times, range(600))
    fast = accelerated_gossip(graph, x, times, range(600))
    error = 3 * plain.standard_error(), 3 * fast.standard_error()
    assert (plain.mean_error() - error[0] <= np.exp(-times * randomized_rate(graph))).all()
    assert (fast.mean_error() - error[1] <= 2 * np.exp(-times * accelerated_rate(graph))).all()


def test_momentum_accelerates_the_ring_and_not_the_complete_graph() -> None:
    for n in (16, 64):
        gain = second_moment_rate(ring(n), Momentum.of(ring(n))) / second_moment_rate(ring(n))
        assert gain > 0.14 * n / 2  # √(χ₁/χ₂) ≈ 0.22 n, and bounds are not rates
        full = complete(n)
        assert second_moment_rate(full, Momentum.of(full)) == pytest.approx(second_moment_rate(full), rel=1e-6)
        assert Momentum.of(full).alpha_tilde == pytest.approx(0.5)
    graph, times = ring(32), [0.0, 100.0]
    plain = randomized_gossip(graph, normal(32), times, range(40)).errors[:, 1]
    fast = accelerated_gossip(graph, normal(32), times, range(40)).errors[:, 1]
    assert np.median(fast) < 1e-3 * np.median(plain)


def test_every_rate_grows_with_the_clocks() -> None:
    graph = barbell(8)
    for factor in (0.1, 7.0):
        faster = graph.scaled(factor)
        assert second_moment_rate(faster) == pytest.approx(factor * second_moment_rate(graph), rel=1e-5)
        rate = second_moment_rate(faster, Momentum.of(faster))
        assert rate == pytest.approx(factor * second_moment_rate(graph, Momentum.of(graph)), rel=1e-5)


# ---- synchronous -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", SMALL.values(), ids=SMALL)
def test_synchronous_gossip_and_chebyshev_reach_their_bounds_on_the_slowest_start(graph: Graph) -> None:
    slowest = np.linalg.eigh(graph.laplacian())[1][:, 1]
    kappa = spectral_gap(graph)
    for k in range(12):
        plain, fast = synchronous_gossip(graph, slowest, k), chebyshev_gossip(graph, slowest, k)
        assert math.sqrt(plain.errors[0, -1]) == pytest.approx(sync.synchronous_bound(kappa, k), rel=1e-9, abs=1e-14)
        assert math.sqrt(fast.errors[0, -1]) == pytest.approx(sync.chebyshev_bound(kappa, k), rel=1e-9, abs=1e-14)
        assert plain.activations[0, -1] == k * len(graph)


@settings(max_examples=30, deadline=None)
@given(graphs(), st.integers(0, 25))
def test_chebyshev_is_its_polynomial_and_never_worse_than_its_bound(graph: Graph, k: int) -> None:
    x, values = normal(graph.n, 2), np.linalg.eigvalsh(graph.laplacian())
    kappa = values[-1] / values[1]
    found = chebyshev_gossip(graph, x, k)
    start = found.errors[0, 0]
    left = np.sqrt(found.errors[0] / start)
    assert (left <= [sync.chebyshev_bound(kappa, m) * (1 + 1e-7) + 1e-12 for m in range(k + 1)]).all()
    if kappa > 1 + 1e-6:
        rho = (kappa - 1) / (kappa + 1)
        spectrum, vectors = np.linalg.eigh(graph.laplacian())
        z = (1 - 2 * spectrum / (values[1] + values[-1])) / rho
        polynomial = np.polynomial.Chebyshev.basis(k)
        closed = vectors @ ((polynomial(z) / polynomial(1 / rho))[:, None] * (vectors.T @ x))
        assert np.allclose(found.values[0], closed, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.floats(1.01, 1e6), st.floats(1e-10, 0.5))
def test_the_numbers_of_rounds_are_the_smallest_that_keep_the_bounds(kappa: float, epsilon: float) -> None:
    for rounds, bound in (
        (sync.synchronous_rounds, sync.synchronous_bound),
        (sync.chebyshev_rounds, sync.chebyshev_bound),
    ):
        k = rounds(kappa, epsilon)
        assert bound(kappa, k) ** 2 <= epsilon * (1 + 1e-6)
        assert k == 1 or bound(kappa, k - 1) ** 2 >= epsilon * (1 - 1e-6)
    assert sync.chebyshev_rounds(kappa, epsilon) <= sync.synchronous_rounds(kappa, epsilon)


def test_on_a_complete_graph_one_round_is_enough() -> None:
    for run in (synchronous_gossip, chebyshev_gossip):
        assert run(complete(7), normal(7), 1).errors[0, 1] < 1e-28
    assert sync.chebyshev_rounds(1.0, 1e-9) == sync.synchronous_rounds(1.0, 1e-9) == 1


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    graph, split = ring(4), Graph.make(4, [(0, 1), (2, 3)])
    with pytest.raises(InvalidChoice, match=r"do not fit 4 nodes and 2 seeds"):
        randomized_gossip(graph, normal(5), [1.0], [0, 1])
    with pytest.raises(InvalidChoice, match="ascending"):
        randomized_gossip(graph, normal(4), [2.0, 1.0])
    with pytest.raises(InvalidChoice, match="connected"):
        accelerated_gossip(split, normal(4), [1.0])
    with pytest.raises(InvalidChoice, match="connected"):
        chebyshev_gossip(split, normal(4), 3)
    with pytest.raises(InvalidChoice, match="connected"):
        second_moment_rate(split)
    engine = Engine(graph, Randomized(rows_of(normal(4), 4, 1)), [0])
    engine.advance(2.0)
    with pytest.raises(InvalidChoice, match="already"):
        engine.advance(1.0)
    assert randomized_rate(split) == 0.0 and accelerated_rate(split) == 0.0


def test_parts_that_are_not_connected_reach_their_own_means() -> None:
    split, x = Graph.make(4, [(0, 1), (2, 3)]), np.array([0.0, 2.0, 10.0, 14.0])
    assert np.allclose(randomized_gossip(split, x, [50.0]).values[0, :, 0], [1.0, 1.0, 12.0, 12.0])


def test_every_seed_may_begin_at_values_of_its_own() -> None:
    x = normal(1100, 2, 1)  # more seeds than run side by side
    found = randomized_gossip(Graph.make(2, [(0, 1)]), x, [60.0], range(1100)).values
    assert np.allclose(found, x.mean(axis=1, keepdims=True), atol=1e-12)


def test_flushing_twice_or_in_two_steps_is_flushing_once() -> None:
    one, two = (Accelerated(normal(6), Momentum(0.7, 0.5, 1.0)) for _ in range(2))
    for rule in (one, two):
        rule.x_tilde += normal(6, seed=1)
    one.flush(2.0)
    for time in (0.5, 2.0, 2.0):
        two.flush(time)
    assert np.allclose(one.x, two.x, atol=1e-14) and np.allclose(one.x_tilde, two.x_tilde, atol=1e-14)
