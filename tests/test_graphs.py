"""Graphs: closed forms, theorems, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked import graphs
from unlocked.errors import InvalidChoice
from unlocked.graphs import Graph, Varying, chi1, chi2, named, selected_inverse, spectra
from unlocked.graphs.random_graphs import points

CLOSED: list[tuple[str, list[int], Callable[[int], float], Callable[[int], float]]] = [
    ("star", [3, 8, 41], lambda n: 1.0, lambda n: 0.5),
    ("line", [2, 7, 50], lambda n: 1 / (2 - 2 * math.cos(math.pi / n)), lambda n: 0.5),
    ("ring", [3, 8, 51], lambda n: 1 / (2 - 2 * math.cos(2 * math.pi / n)), lambda n: (n - 1) / (2 * n)),
    ("complete", [2, 9, 30], lambda n: 1 / n, lambda n: 1 / n),
    ("hypercube", [2, 16, 64], lambda n: 0.5, lambda n: (n - 1) / (n * math.log2(n))),
    ("torus", [9, 16, 49], lambda n: 1 / (2 - 2 * math.cos(2 * math.pi / n**0.5)), lambda n: (n - 1) / (4 * n)),
    ("torus(3)", [27, 64], lambda n: 1 / (2 - 2 * math.cos(2 * math.pi / n ** (1 / 3))), lambda n: (n - 1) / (6 * n)),
]


@st.composite
def connected(draw: st.DrawFn, least: int = 2) -> Graph:
    """A random tree and some more edges, at rates over four decades."""
    n = draw(st.integers(least, 14))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    edges = {(i, j) for i, j, _ in graphs.random_tree(n, generator).pairs()}
    extra = [
        (i, j) for i in range(n) for j in range(i + 1, n) if generator.random() < draw(st.sampled_from([0.0, 0.3, 1.0]))
    ]
    edges |= set(extra)
    return Graph.make(n, sorted(edges), 10.0 ** generator.uniform(-2, 2, len(edges)))


# ---- spectra ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sizes", "first", "second"), CLOSED, ids=[row[0] for row in CLOSED])
def test_closed_forms(
    name: str, sizes: list[int], first: Callable[[int], float], second: Callable[[int], float]
) -> None:
    for n in sizes:
        graph = named(name, n)
        assert graph.n == n and graph.connected
        assert chi1(graph) == pytest.approx(first(n), rel=1e-9)
        assert chi2(graph) == pytest.approx(second(n), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(connected())
def test_resistance_inequalities(graph: Graph) -> None:
    shares = graph.rates * graphs.edge_resistances(graph)
    assert chi2(graph) <= chi1(graph) * (1 + 1e-9)  # Eq. 5.11
    assert shares.max() <= 1 + 1e-9
    assert shares.sum() == pytest.approx(graph.n - 1, rel=1e-9)  # Foster
    assert graphs.spectral_gap(graph) >= 1 - 1e-9
    i, j = graph.edges.T
    assert graphs.resistances(graph)[i, j] == pytest.approx(graphs.edge_resistances(graph), rel=1e-7)


@settings(max_examples=30, deadline=None)
@given(connected(), st.floats(1e-3, 1e3))
def test_both_are_times_and_the_gap_is_a_number(graph: Graph, factor: float) -> None:
    faster = graph.scaled(factor)
    assert chi1(faster) == pytest.approx(chi1(graph) / factor, rel=1e-7)
    assert chi2(faster) == pytest.approx(chi2(graph) / factor, rel=1e-7)
    assert graphs.spectral_gap(faster) == pytest.approx(graphs.spectral_gap(graph), rel=1e-7)


@settings(max_examples=30, deadline=None)
@given(connected())
def test_against_plain_linear_algebra(graph: Graph) -> None:
    matrix = sum(rate * np.outer(v := np.eye(graph.n)[i] - np.eye(graph.n)[j], v) for i, j, rate in graph.pairs())
    values, pseudo = np.linalg.eigvalsh(matrix), np.linalg.pinv(matrix, hermitian=True)
    assert chi1(graph) == pytest.approx(1 / values[1], rel=1e-6)
    assert graphs.largest_eigenvalue(graph) == pytest.approx(values[-1], rel=1e-9)
    assert spectra.pseudo_inverse(graph) == pytest.approx(pseudo, rel=1e-6, abs=1e-7 * np.abs(pseudo).max())


@pytest.mark.parametrize(
    "text",
    ["line", "ring", "star", "grid", "barbell", "random-geometric(seed=3)", "erdos-renyi", "complete", "random-tree"],
)
def test_sparse_is_dense(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From entries of the inverse, or by nodes (complete); the largest eigenvalue from above."""
    graph = named(text, 144)
    monkeypatch.setattr(selected_inverse, "FILL", 0.45)
    graph = graph.with_rates(np.random.default_rng(0).uniform(0.5, 2.0, len(graph)))
    dense = graphs.constants(graph), graphs.edge_resistances(graph)
    monkeypatch.setattr(spectra, "DENSE", 10)
    monkeypatch.setattr(spectra, "RESTARTS", 1)
    sparse = graphs.constants(graph), graphs.edge_resistances(graph)
    assert sparse[1] == pytest.approx(dense[1], rel=1e-9)
    for key, value in vars(dense[0]).items():
        assert getattr(sparse[0], key) == pytest.approx(value, rel=1e-9), key


def test_large_graphs_keep_their_digits() -> None:
    n = 5000
    ring, line = graphs.ring(n), graphs.line(n)
    assert chi1(ring) == pytest.approx(1 / (4 * math.sin(math.pi / n) ** 2), rel=1e-9)
    assert chi1(line) == pytest.approx(1 / (4 * math.sin(math.pi / (2 * n)) ** 2), rel=1e-9)
    assert graphs.largest_eigenvalue(ring) == pytest.approx(4.0, rel=1e-9)
    assert graphs.largest_eigenvalue(line) == pytest.approx(2 + 2 * math.cos(math.pi / n), rel=1e-9)
    assert chi2(ring) == pytest.approx((n - 1) / (2 * n), rel=1e-9) and chi2(line) == pytest.approx(0.5, rel=1e-9)
    grid = graphs.grid((40, 60))
    assert graphs.edge_resistances(grid).sum() == pytest.approx(grid.n - 1, rel=1e-9)


def test_a_graph_in_parts() -> None:
    graph = Graph.make(5, [(0, 1), (2, 3)], [2.0, 4.0])
    found = graphs.constants(graph)
    assert math.isinf(found.chi1) and math.isinf(found.chi2) and math.isinf(found.gap) and found.lambda2 == 0
    assert graphs.edge_resistances(graph) == pytest.approx([0.5, 0.25])
    assert found.foster == pytest.approx(2.0) and found.norm == pytest.approx(8.0)
    assert math.isinf(graphs.resistances(graph)[0, 4]) and graphs.resistances(graph)[4, 4] == 0
    with pytest.raises(InvalidChoice, match="not connected"):
        spectra.grounded(graph)


def test_communications_do_not_depend_on_the_unit_of_time() -> None:
    graph = named("barbell", 12)
    before = graphs.communications(graphs.constants(graph), 1e-3)
    after = graphs.communications(graphs.constants(graph.at(0.3)), 1e-3)
    assert after == pytest.approx(before, rel=1e-9)
    gap, log = graphs.spectral_gap(graph), math.log(1000)
    assert before == pytest.approx(
        {
            "synchronous": len(graph) * gap * log,
            "accelerated synchronous": len(graph) * gap**0.5 * log,
            "randomized": graph.trace * chi1(graph) * log,
            "accelerated randomized": graph.trace * (chi1(graph) * chi2(graph)) ** 0.5 * log,
        },
        rel=1e-9,
    )
    assert before["accelerated randomized"] < before["randomized"] < before["synchronous"]
    with pytest.raises(InvalidChoice, match="between 0 and 1"):
        graphs.communications(graphs.constants(graph), 1.0)


# ---- walks -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(connected())
def test_commute_times_are_resistances(graph: Graph) -> None:
    """The constant is Tr Λ, not 2 Tr Λ: Eq. 5.12 solved as it stands."""
    hitting = graphs.hitting_times(graph)
    assert hitting + hitting.T == pytest.approx(graphs.commute_times(graph), rel=1e-6, abs=1e-9)


@settings(max_examples=10, deadline=None)
@given(connected())
def test_hitting_times_satisfy_their_recursion(graph: Graph) -> None:
    step = -graph.laplacian() / graph.strengths[:, None]
    np.fill_diagonal(step, 0.0)
    found = graphs.hitting_times(graph)
    away = ~np.eye(graph.n, dtype=bool)
    assert (1 + step @ found)[away] == pytest.approx(found[away], rel=1e-6)


def test_walks_take_as_long_as_the_formula_says() -> None:
    graph = graphs.random_geometric(12, seed=1)
    graph = graph.with_rates(np.random.default_rng(0).uniform(0.2, 2.0, len(graph)))
    found = graphs.simulated_commute_time(graph, 0, 5, walks=4000, seed=0)
    assert abs(found.mean - graphs.commute_times(graph)[0, 5]) < 4 * found.error
    assert found.error < 0.03 * found.mean
    assert graphs.simulated_commute_time(graph, 0, 5, walks=50, seed=7) == graphs.simulated_commute_time(
        graph, 0, 5, walks=50, seed=7
    )
    assert graphs.simulated_commute_time(graphs.line(2), 0, 1, walks=5) == graphs.walks.Simulated(2.0, 0.0, 5)
    for wrong in ({"j": 12}, {"j": 3, "walks": 1}):
        with pytest.raises(InvalidChoice):
            graphs.simulated_commute_time(graph, 0, **wrong)
    with pytest.raises(InvalidChoice, match="No walk"):
        graphs.simulated_commute_time(Graph.make(3, [(0, 1)]), 0, 2)


# ---- topologies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "n", "same"),
    [
        ("star", 9, lambda: networkx.star_graph(8)),
        ("line", 9, lambda: networkx.path_graph(9)),
        ("ring", 9, lambda: networkx.cycle_graph(9)),
        ("ring", 2, lambda: networkx.path_graph(2)),
        ("complete", 9, lambda: networkx.complete_graph(9)),
        ("grid(3x4)", 12, lambda: networkx.grid_2d_graph(3, 4)),
        ("grid(3)", 27, lambda: networkx.grid_graph([3, 3, 3])),
        ("torus(3x4)", 12, lambda: networkx.grid_2d_graph(3, 4, periodic=True)),
        ("barbell", 12, lambda: networkx.barbell_graph(6, 0)),
        ("barbell(path=2)", 12, lambda: networkx.barbell_graph(5, 2)),
        ("hypercube", 16, lambda: networkx.hypercube_graph(4)),
        ("exponential", 2, lambda: networkx.path_graph(2)),
        ("exponential", 16, lambda: networkx.circulant_graph(16, [1, 2, 4, 8])),
        ("exponential", 11, lambda: networkx.circulant_graph(11, [1, 2, 4, 8])),
    ],
)
def test_topologies_are_those_of_networkx(text: str, n: int, same: Callable[[], networkx.Graph]) -> None:
    graph = named(text, n)
    assert graph.n == n and (graph.rates == 1).all()
    assert networkx.is_isomorphic(graphs.to_networkx(graph), same())


@pytest.mark.parametrize("name", sorted(graphs.TOPOLOGIES))
def test_every_topology_is_connected_from_one_node_on(name: str) -> None:
    for n in (1, 4, 16, 64) if name != "barbell" else (2, 3, 64):
        assert named(name, n).connected and named(name, n).n == n


def test_random_graphs_come_from_their_law_and_their_seed() -> None:
    assert graphs.erdos_renyi(30, seed=3) == graphs.erdos_renyi(30, seed=3) != graphs.erdos_renyi(30, seed=4)
    where, graph = points(20, np.random.default_rng(5)), graphs.random_geometric(20, radius=0.6, seed=5)
    near = {(i, j) for i in range(20) for j in range(i + 1, 20) if np.linalg.norm(where[i] - where[j]) <= 0.6}
    assert {(i, j) for i, j, _ in graph.pairs()} == near  # the first draw was connected
    counts = [len(graphs.erdos_renyi(40, 0.3, seed)) for seed in range(60)]
    assert abs(np.mean(counts) - 234) < 4 * (780 * 0.3 * 0.7 / 60) ** 0.5
    thin = [graphs.erdos_renyi(10, 0.15, seed) for seed in range(20)]
    assert all(graph.connected for graph in thin)
    trees = [graphs.random_tree(4, seed).edges.tobytes() for seed in range(3200)]
    counted = np.unique(trees, return_counts=True)[1]
    assert len(counted) == 16 and ((counted - 200) ** 2 / 200).sum() < 37.7  # χ² of 15 degrees of freedom, 0.1 %


def test_rates_by_degree() -> None:
    graph = named("random-geometric(seed=2)", 15)
    degrees = graph.degrees
    assert graphs.by_degree(graph).trace == pytest.approx(15, rel=1e-12)
    i, j = graph.edges.T
    assert graphs.by_degree(graph).rates == pytest.approx((1 / degrees[i] + 1 / degrees[j]) / 2, rel=1e-12)
    assert graphs.by_largest_degree(graph).strengths.max() == pytest.approx(1, rel=1e-12)
    assert graphs.metropolis(graph).rates == pytest.approx(1 / (1 + np.maximum(degrees[i], degrees[j])), rel=1e-12)
    mixing = np.eye(15) - graphs.metropolis(graph).laplacian()
    assert mixing.min() >= 0 and np.diag(mixing).min() > 0 and mixing.sum(axis=0) == pytest.approx(np.ones(15))
    assert graphs.by_degree(graphs.ring(6)) == graphs.by_largest_degree(graphs.ring(6))
    assert len(graphs.metropolis(graphs.ring(1))) == len(graphs.by_degree(graphs.ring(1))) == 0


@pytest.mark.parametrize(
    ("text", "n", "said"),
    [
        ("rng", 4, "did you mean 'ring'"),
        ("ring", 0, "at least 1"),
        ("ring", -3, "at least 1"),
        ("ring", None, "give n"),
        ("ring", 10**9, "at most"),
        ("ring(3)", 3, "not clear"),
        ("ring(path=3)", 3, "no options"),
        ("barbell(pth=3)", 9, "did you mean 'path'"),
        ("barbell(path=8)", 9, "leave 2"),
        ("barbell", 1, "leave 2"),
        ("hypercube", 12, "8 or 16"),
        ("grid", 8, "take 9"),
        ("grid(3)", 9, "take 8"),
        ("grid(0)", 9, "at least 1"),
        ("grid(2x5)", 9, "10 nodes, not 9"),
        ("torus(0x5)", None, "whole numbers from 1"),
        ("torus(d=2.5)", 9, "whole number"),
        ("torus(shape=5)", 9, "no sides"),
        ("torus(", 9, "cannot be read"),
        ("erdos-renyi(p=0)", 9, "above 0"),
        ("erdos-renyi(p=x)", 9, "must be a number"),
        ("erdos-renyi(p=0.0001)", 9, "not connected in 200 draws"),
        ("erdos-renyi", 0, "at least 1"),
        ("random-geometric(radius=-1)", 9, "positive"),
        ("random-geometric(seed=0.5)", 9, "whole number"),
        ("random-tree", 0, "at least 1"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_what_is_no_topology(text: str, n: int | None, said: str) -> None:
    with pytest.raises(InvalidChoice, match=said):
        named(text, n)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_graphs_from_elsewhere(tmp_path: Path) -> None:
    wanted = Graph.make(4, [(0, 1), (1, 2), (2, 3)], [2.0, 1.0, 0.5])
    file = tmp_path / "My.edges"
    file.write_text("# i j rate\n1 0 2.0\n\n1, 2  # rate 1\n2,3,5e-1\n")
    assert graphs.read_edges(file) == named(str(file)) == wanted
    assert graphs.read_edges(file, 6).n == 6
    assert graphs.from_edges([(0, 1, 2), (2, 1), (3, 2, 0.5)]) == wanted
    made = networkx.Graph([("a", "b", {"rate": 2.0, "weight": 9.0}), ("b", "c"), ("c", "d", {"weight": 0.5})])
    assert graphs.from_networkx(made) == wanted
    assert graphs.from_networkx(graphs.to_networkx(wanted)) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 1\n1 x", r"Line 2 of .*BAD.txt"),
        ("0", "Line 1"),
        ("0 1 2 3", "Line 1"),
        ("0 1.5", "Line 1"),
        ("0 1\n1 0", "given twice"),
        ("0 -1", "numbered"),
        ("2 2", "to itself"),
        ("0 1 -2", "positive"),
        ("0 1 nan", "positive"),
        ("", "no edge"),
        ("0 999999999999", "without gaps"),
    ],
)
def test_what_is_no_file_of_edges(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "BAD.txt"
    file.write_text(text)
    with pytest.raises(InvalidChoice, match=said):
        graphs.read_edges(file)


def test_what_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidChoice, match="is no text"):
        graphs.read_edges(tmp_path / "noise")
    with pytest.raises(InvalidChoice, match="both ways"):
        graphs.from_networkx(networkx.DiGraph([(0, 1)]))
    with pytest.raises(InvalidChoice, match="both ways"):
        graphs.from_networkx(networkx.MultiGraph([(0, 1), (0, 1)]))
    with pytest.raises(InvalidChoice, match="no edge"):
        graphs.from_edges([(0, 1.5)])


# ---- graphs that change ----------------------------------------------------------------------------------------------


def test_a_sequence_of_graphs() -> None:
    ring, star = graphs.ring(6), graphs.star(6)
    turns = Varying.sequence([ring, star], [2.0, 0.5])
    assert [turns.at_time(t) for t in (0, 1.99, 2, 2.49, 2.5, 5, 27.2)] == [ring, ring, star, star, ring, ring, star]
    assert [turns.until(t) for t in (0, 2, 2.4, 2.5)] == [2, 2.5, 2.5, 4.5]
    assert turns.changes(0, 5) == [2, 2.5, 4.5, 5] and turns.changes(2, 2.4) == []
    assert turns.period == 2.5 and [time for time, _ in turns.pieces(1, 3)] == [1, 0.5, 0.5]
    once = Varying.sequence([ring, star], [2.0, 0.5], periodic=False)
    assert once.at_time(1e9) == star and math.isinf(once.until(2)) and once.changes(0, math.inf) == [2]
    assert once.chi1() == turns.chi1() == max(chi1(ring), chi1(star)) and once.chi1(end=2.0) == chi1(ring)
    assert turns.chi2() == max(chi2(ring), chi2(star))
    held = Varying.constant(ring)
    assert held.mean() == ring and held.changes(0, 100) == [] and held.chi1() == chi1(ring)


@settings(max_examples=40, deadline=None)
@given(st.lists(connected(least=6), min_size=1, max_size=3), st.lists(st.floats(0.05, 3), min_size=3, max_size=3))
def test_the_mean_graph_mixes_at_least_as_fast(found: list[Graph], lasts: list[float]) -> None:
    """λ₂ is concave; and Λ̄ is the mean of Λ(t)."""
    found = [graph.among(range(6)) for graph in found]
    turns = Varying.sequence(found, lasts[: len(found)])
    mean = turns.mean()
    assert chi1(mean) <= turns.chi1() * (1 + 1e-7)
    weights = np.array(lasts[: len(found)]) / sum(lasts[: len(found)])
    wanted = sum(share * graph.laplacian() for share, graph in zip(weights, found))
    assert mean.laplacian() == pytest.approx(wanted, rel=1e-9, abs=1e-12 * np.abs(wanted).max())
    assert turns.at(2.0).mean().trace == pytest.approx(12.0) or any(not len(graph) for graph in found)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 10), st.integers(0, 10**6), st.integers(1, 4))
def test_a_change_is_where_it_is_said_to_be(every: float, k: int, pieces: int) -> None:
    """Also where the time is a rounded multiple: until(t) > t, and the piece changes there and nowhere before."""
    turns = Varying.sequence([graphs.line(2).with_rates(1.0 + piece) for piece in range(pieces)], every)
    t = k * every
    after = turns.until(t)
    assert t < after <= t + every * (1 + 1e-6)
    before = np.nextafter(after, 0)
    assert turns.at_time(before) == turns.at_time(t)
    assert turns.until(before) == after < turns.until(after)


def test_graphs_drawn_anew() -> None:
    drawn = Varying.drawn(8, lambda generator: graphs.random_tree(8, generator), every=0.5, seed=1)
    late = drawn.at_time(700.2)
    again = Varying.drawn(8, lambda generator: graphs.random_tree(8, generator), every=0.5, seed=1)
    assert [again.at_time(t) for t in (0, 0.6)] == [drawn.at_time(t) for t in (0.4, 0.99)]
    assert again.at_time(700.4) == late and drawn.at_time(0) != drawn.at_time(0.5)
    assert math.isinf(drawn.period) and drawn.until(0.7) == 1.0
    assert drawn.chi1(end=2.0) == max(chi1(drawn.at_time(t)) for t in (0, 0.5, 1, 1.5))
    assert drawn.at(3.0).at_time(4).trace == pytest.approx(24)
    with pytest.raises(InvalidChoice, match="never come again"):
        drawn.chi1()
    with pytest.raises(InvalidChoice, match="keep the nodes"):
        Varying.drawn(9, lambda generator: graphs.random_tree(8, generator)).at_time(0)


def test_one_peer_exponential_averages_exactly() -> None:
    turns = graphs.one_peer_exponential(16, every=0.25)
    x = np.random.default_rng(0).standard_normal(16)
    mean = x.mean()
    for _, graph in turns.pieces(0, turns.period):
        assert (graph.degrees == 1).all()
        for i, j, _ in graph.pairs():
            x[i] = x[j] = (x[i] + x[j]) / 2
    assert x == pytest.approx(np.full(16, mean), abs=1e-14)
    assert math.isinf(turns.chi1()) and turns.mean() == graphs.hypercube(16).with_rates(0.25)
    with pytest.raises(InvalidChoice, match="power of two"):
        graphs.one_peer_exponential(12)


def test_what_is_no_varying_graph() -> None:
    ring = graphs.ring(5)
    for wrong in (
        lambda: Varying.sequence([]),
        lambda: Varying.sequence([ring, graphs.ring(6)]),
        lambda: Varying.sequence([ring, ring], [1.0]),
        lambda: Varying.sequence([ring], [0.0]),
        lambda: Varying.sequence([ring, ring], [math.inf, 1.0]),
        lambda: Varying.sequence([ring, ring], [math.nan, 1.0]),
        lambda: Varying.constant(ring).at_time(-1),
        lambda: Varying.constant(ring).at_time(math.nan),
        lambda: Varying.constant(ring).chi1(end=0),
        lambda: Varying.sequence([ring, ring], periodic=False).mean(),
    ):
        with pytest.raises(InvalidChoice):
            wrong()
