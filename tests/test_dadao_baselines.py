"""The problems of `graphs.dadao` and what DADAO is compared with: optima, constants, fixed points, rates, counts."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.errors import InvalidChoice
from unlocked.graphs import Graph
from unlocked.graphs.dadao import (
    NAMES,
    Logistic,
    Problem,
    Ridge,
    diabetes,
    digits,
    run,
    synthetic_logistic,
    synthetic_ridge,
)
from unlocked.graphs.dadao.baselines import Mixing, dgd, dgd_step, extra, tracking, tracking_radius
from unlocked.graphs.dadao.centralised import gradient_descent
from unlocked.graphs.dadao.dual import _contrast
from unlocked.graphs.topologies import complete, line, ring, star
from unlocked.graphs.varying import Varying

PROBLEMS = [synthetic_ridge(6), synthetic_logistic(6), diabetes(6), digits(6, components=5), digits(6, digit=3)]
each = pytest.mark.parametrize("problem", PROBLEMS, ids=[f"{k} {one.name}" for k, one in enumerate(PROBLEMS)])


# ---- problems --------------------------------------------------------------------------------------------------------


@each
def test_derivatives_are_those_of_the_values(problem: Problem) -> None:
    x, h = np.random.default_rng(0).normal(size=(6, problem.d)), 1e-5
    for k in range(problem.d):
        move = h * np.eye(problem.d)[k]
        slope = (problem.values(x + move) - problem.values(x - move)) / (2 * h)
        np.testing.assert_allclose(slope, problem.gradients(x)[:, k], rtol=1e-6, atol=1e-7)
        bend = (problem.gradients(x + move) - problem.gradients(x - move)) / (2 * h)
        np.testing.assert_allclose(bend, problem.hessians(x)[:, k], rtol=1e-6, atol=1e-7)
    some = np.array([4, 1, 4])
    np.testing.assert_allclose(problem.gradient(some, x[some]), problem.gradients(x)[some], rtol=1e-12)


@each
def test_constants_bound_all_curvatures_and_give_the_condition(problem: Problem) -> None:
    for seed in range(3):
        x = np.random.default_rng(seed).normal(size=(6, problem.d)) * 3 * seed
        spectrum = np.linalg.eigvalsh(problem.hessians(x))
        assert problem.mu * (1 - 1e-12) <= spectrum.min() and spectrum.max() <= problem.L * (1 + 1e-12)
    at_zero = np.linalg.eigvalsh(problem.hessians(np.zeros((6, problem.d))))
    assert at_zero.max() == pytest.approx(problem.L)  # and is reached: L is no larger than it has to be
    assert problem.condition == pytest.approx(10.0 if "synthetic" in problem.name else 50.0)


def test_ridge_optimum_is_that_of_the_normal_equations() -> None:
    generator = np.random.default_rng(1)
    A, b = generator.normal(size=(4, 7, 3)), generator.normal(size=(4, 7))
    rows, targets = A.reshape(-1, 3), b.ravel()
    expected = np.linalg.solve(rows.T @ rows / 7 + 4 * 0.3 * np.eye(3), rows.T @ targets / 7)
    np.testing.assert_allclose(Ridge(A, b, 0.3).optimum, expected, rtol=1e-12)


@each
def test_optimum_has_no_gradient(problem: Problem) -> None:
    terms = problem.gradients(problem.optimum)
    np.testing.assert_allclose(terms.sum(axis=0), 0.0, atol=1e-13 * (1 + np.abs(terms).sum()))


@each
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(0.01, 3.0))
def test_conjugate_gradient_inverts_the_gradient(problem: Problem, seed: int, size: float) -> None:
    x = np.random.default_rng(seed).normal(size=(6, problem.d)) * size
    y = problem.gradients(x)
    np.testing.assert_allclose(problem.conjugate(y), x, atol=1e-10 * (1 + np.abs(x).max()))
    np.testing.assert_allclose(problem.conjugate(y, x + 0.1), x, atol=1e-10 * (1 + np.abs(x).max()))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: diabetes(443), "442 samples"),
        (lambda: diabetes(4, condition=1.0), "above 1"),
        (lambda: diabetes(1, condition=1e6), "at most"),
        (lambda: digits(4, digit=10), "digit 0 to 9"),
        (lambda: Ridge(np.ones((2, 3)), np.ones((2, 3)), 1.0), "do not fit"),
        (lambda: Ridge(np.ones((2, 3, 2)), np.ones((2, 3)), 0.0), "larger ridge"),
        (lambda: Logistic(np.ones((2, 3, 2)), np.zeros((2, 3)), 1.0), "labels"),
    ],
)
def test_sentences_of_problems(make, sentence: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidChoice, match=sentence):
        make()


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [ring(6), line(6), star(6), complete(6)], ids=lambda graph: graph.name)
@pytest.mark.parametrize("method", ["extra", "tracking", "msda", "centralised", "nesterov"])
@pytest.mark.parametrize("problem", PROBLEMS[:2], ids=["ridge", "logistic"])
def test_baselines_find_the_optimum(method: str, problem: Problem, graph: Graph) -> None:
    step = 1 / (8 * problem.L) if method == "tracking" else None
    found = run(method, problem, graph, tolerance=1e-20, horizon=3000, step=step)
    assert found.relative[-1] <= 1e-20
    assert found.method == NAMES[method]


def test_dgd_stops_at_its_bias() -> None:
    """At the x of (I − W) x + a ∇f(x) = 0, which is not x* and comes closer to it with the step."""
    problem, graph = synthetic_ridge(5, d=2), line(5)
    mixing = Mixing(graph)
    distances = []
    for step in (dgd_step(problem, mixing), dgd_step(problem, mixing) / 10):
        system = np.kron(np.eye(5) - mixing.matrix, np.eye(2))
        for i in range(5):
            system[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] += step * problem.hessian[i]
        expected = np.linalg.solve(system, step * problem.linear.ravel()).reshape(5, 2)
        *_, last = islice(dgd(problem, graph, np.zeros((5, 2)), step), 3000)
        np.testing.assert_allclose(last.x, expected, atol=1e-10)
        distances.append(float(((expected - problem.optimum) ** 2).sum()))
    assert 1e-8 < distances[1] < distances[0] / 4
    found = run("dgd", problem, graph, horizon=3000)
    assert found.errors[-1] == pytest.approx(distances[0] / 5, rel=1e-6)


def test_tracking_on_a_complete_graph_is_gradient_descent() -> None:
    problem, start = synthetic_logistic(6), np.zeros((6, 5))
    pairs = zip(tracking(problem, complete(6), start), gradient_descent(problem, complete(6), start))
    for one, other in islice(pairs, 30):
        np.testing.assert_allclose(one.x, other.x, atol=1e-13)


def test_tracking_mixes_what_it_tracks() -> None:
    """From y_0 = ∇f(x_0), y_1 = W ∇f(x_1): the adapt-then-combine form."""
    problem, start, step = synthetic_ridge(6), np.zeros((6, 5)), 0.1
    one, two = (now.x for now in islice(tracking(problem, line(6), start, step), 2))
    W = Mixing(line(6)).matrix
    np.testing.assert_allclose(one, -step * W @ problem.gradients(start), atol=1e-13)
    np.testing.assert_allclose(two, W @ (one - step * W @ problem.gradients(one)), atol=1e-13)


@pytest.mark.parametrize("graph", [ring(6), star(6)], ids=["ring", "star"])
@pytest.mark.parametrize("share", [1.0, 0.1, 0.003])
def test_tracking_contracts_at_least_as_its_bound_says(graph: Graph, share: float) -> None:
    """The spectral radius of the true map, of ridge regression, is at most that of the 3 × 3 matrix."""
    problem = synthetic_ridge(6, d=2)
    mixing, step = Mixing(graph), share / problem.L
    mix, hessian = np.kron(mixing.matrix, np.eye(2)), np.zeros((12, 12))
    for i in range(6):
        hessian[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = problem.hessian[i]
    move = np.concatenate([mix, -step * mix], axis=1)  # x⁺ of (x, y)
    turn = mix @ (np.eye(12, 24, 12) + hessian @ (move - np.eye(12, 24)))
    eigenvalues = np.sort(np.abs(np.linalg.eigvals(np.concatenate([move, turn]))))
    # y − ∇f(x) keeps its mean, which costs d eigenvalues 1 that no start reaches
    np.testing.assert_allclose(eigenvalues[-2:], 1.0, atol=1e-6) if eigenvalues[-1] <= 1 + 1e-9 else None
    reached = eigenvalues[:-2].max()
    assert reached <= tracking_radius(problem, mixing.sigma, step) + 1e-9


def test_extra_takes_back_what_dgd_errs() -> None:
    """Its first round is DGD's; its second is x_2 = (I+W) x_1 − (I+W)/2 x_0 − a (∇f(x_1) − ∇f(x_0))."""
    problem, start, step = synthetic_ridge(6), np.random.default_rng(0).normal(size=(6, 5)), 0.01
    one, two = (now.x for now in islice(extra(problem, ring(6), start, step), 2))
    np.testing.assert_allclose(one, next(dgd(problem, ring(6), start, step)).x, atol=1e-14)
    both = np.eye(6) + Mixing(ring(6)).matrix
    change = problem.gradients(one) - problem.gradients(start)
    np.testing.assert_allclose(two, both @ one - both @ start / 2 - step * change, atol=1e-13)


@pytest.mark.parametrize("graph", [ring(12), line(9), star(8), complete(5)], ids=lambda graph: graph.name)
def test_chebyshev_contrast_has_the_spectrum_of_the_paper(graph: Graph) -> None:
    values = np.linalg.eigvalsh(graph.laplacian())
    root = np.sqrt(values[1] / values[-1])
    rounds = int(1 / root + 1e-12)
    q = ((1 - root) / (1 + root)) ** rounds
    found = np.linalg.eigvalsh(_contrast(graph, np.eye(graph.n), rounds))
    assert abs(found[0]) < 1e-9
    assert np.abs(found[1:] - 1).max() <= 2 * q / (1 + q**2) + 1e-9


def test_msda_takes_as_many_rounds_on_any_graph() -> None:
    problem = synthetic_ridge(12, condition=30.0)
    rounds = [run("msda", problem, graph).time[-1] for graph in (ring(12), line(12), star(12), complete(12))]
    assert max(rounds) <= 2 * min(rounds)  # (1+q)/(1−q) ≤ 2, and 1 on the complete graph


def test_msda_is_accelerated() -> None:
    """Nesterov's rate on the dual: errors fall at least as κ (1 − 1/√κ)^k, here at P = I − 11ᵀ/n."""
    problem = synthetic_ridge(6, condition=300.0)
    found = run("msda", problem, complete(6), horizon=1000)
    bounds = 4 * 300.0 * (1 - 300.0**-0.5) ** found.time
    assert found.reached(1e-8) and (found.relative <= bounds).all()


@pytest.mark.parametrize(
    ("method", "gradients", "communications"),
    [
        ("dgd", 8, 7),
        ("extra", 8, 7),
        ("tracking", 8, 14),
        ("msda", 8, 7 * 2),  # star: γ = 1/n, K = ⌊√8⌋
        ("centralised", 8, 14),
        ("nesterov", 8, 14),
    ],
)
def test_counts_of_a_round(method: str, gradients: int, communications: int) -> None:
    found = run(method, synthetic_ridge(8), star(8), tolerance=0.0, horizon=6)
    np.testing.assert_array_equal(np.diff(found.gradients), gradients)
    np.testing.assert_array_equal(np.diff(found.communications)[1:], communications)


@each
def test_gradient_descent_keeps_its_theorem(problem: Problem) -> None:
    found = run("centralised", problem, complete(6), tolerance=1e-18, horizon=500)
    factor = (problem.condition - 1) / (problem.condition + 1)
    assert (found.relative <= factor ** (2 * found.time) * (1 + 1e-9) + 1e-25).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "extr"}, "did you mean 'extra'"),
        ({"graph": ring(5)}, "connected graph of 6 nodes"),
        ({"graph": Graph.make(6, [(0, 1)])}, "connected graph"),
        ({"graph": Varying.constant(ring(6))}, "for one graph"),
        ({"method": "dadao", "step": 0.1}, "leave out step"),
    ],
)
def test_sentences_of_run(options: dict, sentence: str) -> None:
    with pytest.raises(InvalidChoice, match=sentence):
        run(**{"method": "extra", "problem": PROBLEMS[0], "graph": ring(6)} | options)
