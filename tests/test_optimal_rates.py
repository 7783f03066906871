"""Optimal rates: closed forms, certificates, agreement of the two solvers, constraints, symmetry, the cache."""

from __future__ import annotations

import itertools
import json
import sys

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from unlocked.errors import InvalidChoice, UnlockedError
from unlocked.graphs import Graph, chi1, chi2
from unlocked.graphs.optimal import Constraint, cache, optimal_rates, sdp
from unlocked.graphs.optimal.certificate import Dual, Point, on_edges
from unlocked.graphs.optimal.constraints import Region
from unlocked.graphs.optimal.smoothing import Smoothed

SEEDS = st.integers(0, 2**20)
FEW = settings(max_examples=8, deadline=None)


def solved(graph, **options):
    """Without the cache."""
    return optimal_rates(graph, **{"cache": False, "solver": "sdp"} | options)


def of(network, rates=1.0):
    """A networkx graph, nodes renumbered."""
    network = nx.convert_node_labels_to_integers(network)
    return Graph.make(len(network), list(network.edges), rates)


def drawn(seed, most=8):
    """A connected random graph with random rates: a random tree and some more edges."""
    source = np.random.default_rng(seed)
    n = int(source.integers(3, most + 1))
    edges = {(int(source.integers(0, k)), k) for k in range(1, n)}
    edges |= {pair for pair in itertools.combinations(range(n), 2) if source.random() < 0.3}
    return Graph.make(n, sorted(edges), source.uniform(0.1, 3.0, len(edges)))


def value_of(graph):
    """√(χ₁χ₂), where every edge has a rate."""
    return float(np.sqrt(chi1(graph) * chi2(graph)))


def uniform(graph):
    """All rates equal, the same trace."""
    return graph.with_rates(1.0).scaled(graph.trace / (2.0 * len(graph)))


def barbell(n):
    """Two complete graphs of n/2 nodes, one edge between them."""
    return of(nx.barbell_graph(n // 2, 0)).at(1.0)


# ---- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["sdp", "first-order"])
def test_the_diamond_by_hand(solver):
    """A ring of four (rates a) with a chord (rate c): χ₁ = 1/2a, R_chord = 1/(a+c), R_side = 1/2a + 1/4(a+c).

    At small c the chord's resistance counts, and less of c lowers χ₁ by less than it costs; the best is where R_chord = R_side:
    c = a/2. With Tr Λ = 8a + 2c = 9 so a = 1, c = ½: χ₁ = ½, χ₂ᴱ = ⅓, value 1/√6. Here χ₁ < R: u ≥ 1 without the ½ is wrong.
    """
    diamond = Graph.make(4, [(0, 2), (2, 1), (1, 3), (3, 0), (0, 1)])
    found = solved(diamond, constraint=Constraint(trace=9.0), solver=solver, tolerance=1e-4)
    exact = 1e-7 if solver == "sdp" else 1e-4
    assert found.value == pytest.approx(1.0 / np.sqrt(6.0), rel=exact)
    assert found.chi1 == pytest.approx(0.5, rel=100 * exact) and found.chi2 == pytest.approx(1 / 3, rel=100 * exact)
    assert found.graph.rate(0, 1) == pytest.approx(0.5, rel=100 * exact)
    assert found.graph.rate(0, 2) == pytest.approx(1.0, rel=100 * exact)


def test_two_triangles_and_a_bridge_by_formula():
    """Rates: bridge c, its neighbours a, far edges b; 4a + 2b + c = Tr Λ/2. χ's by symmetry and series-parallel, no matrix."""

    def value(a, b, total):
        c = total - 4 * a - 2 * b
        if min(a, b, c) <= 0:
            return np.inf
        swing = 3 * a + 2 * c
        second = min((swing - np.sqrt(swing**2 - 8 * a * c)) / 2, a + 2 * b, 3 * a)
        resistance = max(1 / c, 1 / (a + a * b / (a + b)), 1 / (b + a / 2))
        return np.sqrt(resistance / 2 / second)

    def best_over_b(a):
        return minimize_scalar(lambda b: value(a, b, 3.0), bounds=(0, 1.5 - 2 * a), options={"xatol": 1e-10}).fun

    best = minimize_scalar(best_over_b, bounds=(1e-3, 0.749), options={"xatol": 1e-10}).fun
    found = solved(of(nx.barbell_graph(3, 0)), constraint=Constraint(trace=6.0))
    assert found.value == pytest.approx(best, rel=1e-7)
    assert found.value < 0.99 * value(3 / 7, 3 / 7, 3.0)


EDGE_TRANSITIVE = {
    "ring": nx.cycle_graph(9),
    "complete": nx.complete_graph(7),
    "hypercube": nx.hypercube_graph(3),
    "star": nx.star_graph(6),
    "torus": nx.grid_2d_graph(3, 3, periodic=True),
    "bipartite": nx.complete_bipartite_graph(2, 4),
}


@pytest.mark.parametrize("solver", ["sdp", "first-order"])
@pytest.mark.parametrize("name", EDGE_TRANSITIVE)
def test_equal_rates_are_optimal_where_all_edges_are_alike(name, solver):
    graph = of(EDGE_TRANSITIVE[name]).at(1.0)
    found = solved(graph, solver=solver)
    assert found.value == pytest.approx(value_of(graph), rel=1e-6)
    np.testing.assert_allclose(found.graph.rates, graph.rates, rtol=1e-5)
    assert found.gap <= 1e-6 and found.dropped == 0


# ---- the certificate ------------------------------------------------------------------------------------------------


@FEW
@given(SEEDS)
def test_never_worse_than_uniform_and_certified(seed):
    graph = drawn(seed)
    found = solved(graph)
    assert found.value <= value_of(uniform(graph)) * (1 + 1e-7)
    assert found.value <= value_of(graph) * (1 + 1e-7)
    assert found.gap <= 1e-6
    assert found.graph.trace == pytest.approx(graph.trace, rel=1e-9)
    assert found.chi1 == pytest.approx(chi1(found.graph)) and found.chi2 == pytest.approx(chi2(found.graph))
    assert found.chi2 <= found.chi2_fixed * (1 + 1e-12)
    assert found.value == pytest.approx(np.sqrt(found.chi1 * found.chi2_fixed))


@FEW
@given(SEEDS)
def test_any_dual_bounds_any_rates(seed):
    """A bound from random w, S, M is below the best value there is; and so is the one that meets it."""
    graph, source = drawn(seed), np.random.default_rng(seed)
    constraint = Constraint(trace=graph.trace, per_node=float(np.median(graph.strengths)), caps=2.0)
    for given_constraint in (None, constraint):
        region = Region.of(graph, given_constraint)
        rates = source.exponential(size=len(graph)) ** 2
        point = Point.at(graph.n, graph.edges, rates / region.gauge(rates))
        found = sdp.solve(graph, region)
        best = Point.at(graph.n, graph.edges, found.rates).value
        assert best * (1 - 1e-6) <= found.bound <= best * (1 + 1e-9)
        subspace = source.normal(size=(graph.n, 2))
        subspace -= subspace.mean(axis=0)
        noise = point.inverse + 0.05 * source.normal(size=(graph.n, graph.n)) * np.abs(point.inverse).max()
        for fields in (None, noise):
            bound = point.bound(region, Dual(source.exponential(size=len(graph)), subspace, fields))
            assert bound <= best * (1 + 1e-9)


@FEW
@given(SEEDS)
def test_the_first_order_solver_agrees_with_the_sdp_within_its_gap(seed):
    graph = drawn(seed, 10)
    exact, found = solved(graph), solved(graph, solver="first-order")
    assert found.gap <= 1e-3
    assert exact.value * (1 - 1e-7) <= found.value <= exact.value / (1 - found.gap) * (1 + 1e-6)


def test_the_solvers_agree_on_a_small_world():
    graph = of(nx.connected_watts_strogatz_graph(18, 4, 0.5, seed=1)).at(1.0)
    exact, found = solved(graph), solved(graph, solver="first-order", tolerance=1e-4)
    assert exact.gap <= 1e-6 and found.gap <= 1e-4
    assert exact.value * (1 - 1e-6) <= found.value <= exact.value * (1 + 1.01e-4)
    assert found.value < 0.9 * value_of(graph)


@FEW
@given(SEEDS, st.sampled_from([3.0, 20.0]))
def test_the_support_function(seed, p):
    graph = drawn(seed)
    caps = np.random.default_rng(seed).uniform(0.5, 2.0, len(graph))
    weights = caps[::-1] ** p
    capped = Region.of(graph, Constraint(caps=caps))
    assert capped.support(weights) == pytest.approx(weights @ caps, rel=1e-9)
    both = Region.of(graph, Constraint(caps=caps, trace=1.0))
    assert both.support(weights) == pytest.approx(0.5 * weights.max(), rel=1e-9)


@FEW
@given(SEEDS, st.sampled_from([3.0, 20.0]))
def test_the_smoothed_gradient(seed, p):
    graph = drawn(seed)
    smoothed = Smoothed(graph, Region.of(graph, Constraint(trace=5.0, per_node=1.5)))
    x = smoothed.variables(graph.rates / graph.total)
    step = 1e-6 * np.random.default_rng(seed).normal(size=len(x))
    slope = smoothed(x, p)[1] @ step
    assert (smoothed(x + step, p)[0] - smoothed(x - step, p)[0]) / 2 == pytest.approx(slope, rel=1e-4, abs=1e-11)


# ---- constraints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["sdp", "first-order"])
@settings(max_examples=4, deadline=None)
@given(seed=SEEDS)
def test_constraints_are_kept_and_used(solver, seed):
    graph, source = drawn(seed), np.random.default_rng(seed + 1)
    nodes, caps = source.uniform(0.5, 2.0, graph.n), source.uniform(0.2, 1.0, len(graph))
    constraint = Constraint(trace=0.6 * graph.n, per_node=nodes, caps=caps)
    found = solved(graph, constraint=constraint, solver=solver)
    rates = np.array([found.graph.rate(i, j) for i, j in graph.edges])
    exact = 1 + 1e-9
    assert found.graph.trace <= constraint.trace * exact
    assert (found.graph.strengths <= nodes * exact).all() and (rates <= caps * exact).all()
    assert Region.of(graph, constraint).gauge(rates) == pytest.approx(1.0)
    assert found.gap <= (1e-6 if solver == "sdp" else 1e-3)


def test_caps_that_bind_and_caps_that_do_not():
    """On a tree under caps alone, all rates are at their caps; far caps change nothing."""
    line = of(nx.path_graph(5))
    caps = [0.3, 2.0, 0.7, 1.0]
    found = solved(line, constraint=Constraint(caps=caps))
    assert found.value == pytest.approx(value_of(line.with_rates(caps)), rel=1e-7)
    free, capped = solved(barbell(8)), solved(barbell(8), constraint=Constraint(trace=8.0, caps=50.0, per_node=50.0))
    assert capped.value == pytest.approx(free.value, rel=1e-6)


def test_a_cap_of_zero_takes_an_edge_away_but_its_resistance_counts():
    """The diamond without its chord: a = 9/8, R_chord = 1/a > R_side = 3/4a."""
    diamond = Graph.make(4, [(0, 2), (2, 1), (1, 3), (3, 0), (0, 1)])
    caps = [0.0 if edge == (0, 1) else np.inf for edge in map(tuple, diamond.edges.tolist())]
    for solver in ("sdp", "first-order"):
        found = solved(diamond, constraint=Constraint(trace=9.0, caps=caps), solver=solver, tolerance=1e-5)
        a = 9 / 8
        assert found.dropped == 1 and len(found.graph) == 4
        assert found.chi2_fixed == pytest.approx(0.5 / a, rel=1e-4) and found.chi2 == pytest.approx(0.375 / a, rel=1e-4)
        assert found.value == pytest.approx(np.sqrt(1 / (2 * a) * 0.5 / a), rel=1e-5)


def test_edges_that_are_not_worth_a_rate_are_dropped():
    """Two hubs with an edge between them and three nodes at both: the hubs' edge is not used."""
    hubs = of(nx.complete_bipartite_graph(2, 3))
    graph = Graph.make(5, [*hubs.edges.tolist(), (0, 1)])
    found = solved(graph, constraint=Constraint(trace=5.0))
    assert found.dropped == 1 and found.graph.rate(0, 1) == 0.0
    np.testing.assert_allclose(found.graph.rates, 5 / 12, rtol=1e-6)


# ---- symmetry -------------------------------------------------------------------------------------------------------


@FEW
@given(SEEDS)
def test_only_the_edges_count_and_scale_goes_with_the_constraint(seed):
    graph = drawn(seed)
    one = solved(graph, constraint=Constraint(trace=1.0))
    other = solved(graph.scaled(17.0), constraint=Constraint(trace=1.0))
    assert one.value == other.value and one.graph == other.graph
    double = solved(graph, constraint=Constraint(trace=2.0))
    assert double.value == pytest.approx(one.value / 2, rel=1e-7)


@FEW
@given(SEEDS)
def test_renumbering_the_nodes_renumbers_the_rates(seed):
    graph = drawn(seed)
    order = np.random.default_rng(seed).permutation(graph.n)
    nodes = np.random.default_rng(seed).uniform(0.5, 2.0, graph.n)
    moved = Graph.make(graph.n, order[graph.edges])
    found = solved(graph, constraint=Constraint(per_node=nodes))
    other = solved(moved, constraint=Constraint(per_node=nodes[np.argsort(order)]))
    assert other.value == pytest.approx(found.value, rel=1e-6)


def test_the_barbell_gains_more_the_larger_it_is():
    """Table 5.2: n^{5/2} → n communications, so √(χ₁χ₂) Tr Λ gains about n^{3/2}."""
    sizes, gains, values = (8, 16, 32, 64), [], []
    for n in sizes:
        graph = barbell(n)
        found = solved(graph, solver="first-order")
        assert found.value < value_of(graph) and found.gap < 1e-3
        gains.append(value_of(graph) / found.value)
        values.append(found.value)
    slopes = np.diff(np.log(gains)) / np.log(2)
    assert (np.diff(slopes) < 0.3).all() and 1.2 < slopes[-1] < 1.8, f"gains {gains}, exponents {slopes}"
    assert values[-1] < 4.0  # bounded: the optimal value times Tr Λ = n is the table's n


# ---- the cache and the front ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_the_cache_gives_the_same_and_mends_itself(folder, monkeypatch):
    graph = barbell(8)
    first = optimal_rates(graph, solver="first-order")
    (file,) = folder.iterdir()
    text = file.read_text()

    def never(*_):
        raise AssertionError("was solved again")

    with monkeypatch.context() as patch:
        patch.setattr("unlocked.graphs.optimal.first_order.solve", never)
        assert optimal_rates(graph, solver="first-order") == first
        with pytest.raises(AssertionError):
            optimal_rates(graph, solver="first-order", cache=False)
        with pytest.raises(AssertionError):
            optimal_rates(graph, solver="first-order", constraint=Constraint(trace=9.0))
    broken = json.loads(text) | {"rates": [1.0]}
    for damage in ("", "{", "[]", '{"rates": []}', json.dumps(broken), text.replace("[", "[null, ", 1)):
        file.write_text(damage)
        again = optimal_rates(graph, solver="first-order")
        assert again.graph == first.graph and again.value == first.value
        assert json.loads(file.read_text())["rates"] == json.loads(text)["rates"]
    assert list(folder.iterdir()) == [file]


def test_cached_rates_that_break_the_constraint_are_not_believed(folder):
    first = optimal_rates(barbell(8), solver="first-order")
    (file,) = folder.iterdir()
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"rates": [3.0 * rate for rate in content["rates"]]}))
    assert optimal_rates(barbell(8), solver="first-order").graph == first.graph


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "file" / "cache")
    assert optimal_rates(barbell(8), solver="first-order").gap < 1e-3


def test_auto_without_the_extra_and_the_sdp_without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "clarabel", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert solved(barbell(8), solver="auto").solver == "first-order"
    with pytest.raises(UnlockedError, match=r"unlocked\[graphs\]"):
        solved(barbell(8))


def test_auto_takes_the_sdp_when_it_is_small():
    assert solved(of(nx.path_graph(4)), solver="auto").solver == "sdp"
    assert solved(of(nx.path_graph(70)), solver="auto").solver == "first-order"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: solved(Graph.make(1, [])), "one node"),
        (lambda: solved(Graph.make(4, [(0, 1), (2, 3)])), "not connected"),
        (lambda: solved(barbell(8), solver="spd"), "did you mean 'sdp'"),
        (lambda: solved(of(nx.path_graph(64))), "at most 63 nodes"),
        (lambda: solved(barbell(8), tolerance=0.0), "between 0 and 1"),
        (lambda: solved(barbell(8), constraint=Constraint(trace=-1.0)), "positive number"),
        (lambda: solved(barbell(8), constraint=Constraint(per_node=[1.0, 2.0])), "or 8 of them"),
        (lambda: solved(barbell(8), constraint=Constraint(caps=-1.0)), "at least 0"),
        (lambda: solved(barbell(8), constraint=Constraint(caps=float("nan"))), "at least 0"),
        (lambda: solved(barbell(8), constraint=Constraint(per_node=[1.0] * 7 + [0.0])), "cut node 7 off"),
        (lambda: solved(barbell(8), constraint=Constraint(caps=[1.0] * 12 + [float("inf")])), "Nothing bounds"),
        (lambda: solved(barbell(8), constraint=Constraint(caps=0.0)), "No rates are possible"),
    ],
)
def test_errors_are_sentences(call, sentence):
    with pytest.raises(InvalidChoice, match=sentence) as caught:
        call()
    assert str(caught.value).endswith(".")


@FEW
@given(SEEDS)
def test_quadratic_forms_on_edges_need_no_symmetry(seed):
    graph, matrix = drawn(seed), np.random.default_rng(seed).normal(size=(8, 8))
    for (i, j), found in zip(graph.edges, on_edges(matrix, graph.edges)):
        side = np.eye(8)[i] - np.eye(8)[j]
        assert found == pytest.approx(side @ matrix @ side)
