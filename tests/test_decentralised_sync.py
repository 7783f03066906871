"""D-PSGD and SGP: against plain loops in float64, at their limits, in every world, through failures and resumes."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unlocked as ul
from averaging_reference import vector, write
from test_averaging import (
    OPTIMIZERS,
    apart,
    batches_of,
    cosine,
    poisoned,
    session,
    statistics,
    still,
    train,
    weights_of,
)
from test_distributed import here
from unlocked.errors import InvalidChoice
from unlocked.graphs import Graph
from unlocked.simulation import Device, Hardware, costs_of, profile, simulate, uniform, unit
from unlocked.simulation.simulating import seconds_per_update
from unlocked.worlds import Distributed, Simulated

from methods import assert_same, batch, data, mlp, state
from processes import run_processes

DPSGD, SGP, rules = ul.consensus.DPSGD, ul.consensus.SGP, ul.consensus
BULL = ((0, 1), (1, 2), (0, 2), (1, 3), (2, 4))  # an irregular graph of 5
WEBS = ((0, 1), (1, 2), (2, 0), (0, 2), (2, 3), (3, 0), (1, 3))  # an irregular directed graph of 4


# ---- plain loops -----------------------------------------------------------------------------------------------------


def metropolis(n, edges):
    """W of a graph, entry by entry."""
    degree = [sum(k in edge for edge in edges) for k in range(n)]
    w = torch.zeros(n, n, dtype=torch.float64)
    for i, j in edges:
        w[i, j] = w[j, i] = 1 / (1 + max(degree[i], degree[j]))
    return w + torch.diag(1 - w.sum(1))


def ring(n):
    return [(k, (k + 1) % n) for k in range(n)] if n > 2 else [(0, 1)]


def pushing(n, arcs):
    """P of arcs, column-stochastic: P_ji is what j gets of i."""
    out = [1 + sum(i == k for i, _ in arcs) for k in range(n)]
    p = torch.diag(torch.tensor([1 / k for k in out], dtype=torch.float64))
    for i, j in arcs:
        p[j, i] = 1 / out[i]
    return p


def one_peer(n):
    """P of every round."""
    hops = [2**k for k in range(int(np.ceil(np.log2(n))))]
    return [pushing(n, [(i, (i + hop) % n) for i in range(n)]) for hop in hops]


class Plain:
    """N models that train by themselves; `mix(update, before, after)`: rows (N, k) of weights."""

    def __init__(self, replicas, optimizer, schedule=cosine):
        self.models = [mlp() for _ in range(replicas)]
        self.optimizers = [OPTIMIZERS[optimizer](list(model.parameters())) for model in self.models]
        self.schedules = [schedule(one) for one in self.optimizers]
        self.update = 0

    def rows(self):
        return torch.stack([vector(list(model.parameters())) for model in self.models])

    def step(self, batches):
        before = self.rows()
        for model, optimizer, schedule, (x, y) in zip(self.models, self.optimizers, self.schedules, batches):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
        self.update += 1
        for row, model in zip(self.mix(before, self.rows()), self.models):
            write(row, list(model.parameters()))


class PlainDPSGD(Plain):
    def __init__(self, w, order, period, optimizer):
        super().__init__(len(w), optimizer)
        self.w, self.order, self.period = w, order, period

    def mix(self, before, after):
        if self.update % self.period:
            return after
        return self.w @ after if self.order == "adapt-then-combine" else self.w @ before + (after - before)


class PushSum:
    """x, w and what is under way: [(update at which it is taken, x, w)]."""

    def __init__(self, x, rounds, overlap, period):
        self.x, self.w, self.rounds = x, torch.ones(len(x), 1, dtype=torch.float64), rounds
        self.overlap, self.period, self.sent = overlap, period, []

    def mix(self, update, displacement):
        self.x = self.x + displacement
        if update % self.period == 0:
            p = self.rounds[(update // self.period - 1) % len(self.rounds)]
            own, others = torch.diag(torch.diag(p)), p - torch.diag(torch.diag(p))
            self.sent.append((update + self.overlap, others @ self.x, others @ self.w))
            self.x, self.w = own @ self.x, own @ self.w
        for due, x, w in self.sent:
            if due == update:
                self.x, self.w = self.x + x, self.w + w
        self.sent = [one for one in self.sent if one[0] > update]
        return self.x / self.w


class PlainSGP(Plain):
    def __init__(self, rounds, overlap, period, optimizer):
        super().__init__(len(rounds[0]), optimizer)
        self.sums = PushSum(self.rows(), rounds, overlap, period)

    def mix(self, before, after):
        return self.sums.mix(self.update, after - before)


def compare(rule, reference, *, stages, optimizer, steps=8):
    made = session(rule, replicas=len(reference.models), stages=stages, optimizer=optimizer, schedule=cosine)
    for k in range(steps):
        train(made, k, k + 1)
        reference.step(batches_of(k, made.replicas))
        torch.testing.assert_close(torch.stack(weights_of(made)), reference.rows(), rtol=1e-9, atol=1e-10)
    assert torch.stack(weights_of(made)).std(0).max() > 1e-3  # they differ


@pytest.mark.covering
@pytest.mark.parametrize("order", ["combine-then-adapt", "adapt-then-combine"])
@pytest.mark.parametrize(
    ("graph", "n", "edges", "period", "optimizer", "stages"),
    [
        ("ring", 2, ring(2), 3, "momentum", 3),
        ("ring", 5, ring(5), 1, "sgd", 1),
        ("star", 4, [(0, 1), (0, 2), (0, 3)], 2, "adam", 2),
        (BULL, 5, BULL, 1, "momentum", 1),
    ],
    ids=str,
)
def test_d_psgd_is_its_formula(graph, n, edges, period, order, optimizer, stages):
    reference = PlainDPSGD(metropolis(n, edges), order, period, optimizer)
    compare(DPSGD(graph=graph, order=order, period=period), reference, stages=stages, optimizer=optimizer)


def test_d_psgd_mixes_with_the_weights_it_is_given():
    given_w = ((0, 1, 0.5), (1, 2, 0.3), (0, 2, 0.1))
    w = torch.tensor([[0.4, 0.5, 0.1], [0.5, 0.2, 0.3], [0.1, 0.3, 0.6]], dtype=torch.float64)
    for graph in (given_w, Graph.make(3, [e[:2] for e in given_w], [e[2] for e in given_w])):
        compare(
            DPSGD(graph=graph, mixing="given"),
            PlainDPSGD(w, "combine-then-adapt", 1, "adam"),
            stages=1,
            optimizer="adam",
        )
    matrix = np.eye(5) - DPSGD(graph="star", mixing="uniform").weighted(5).laplacian()
    assert matrix == pytest.approx(np.eye(5) - Graph.make(5, [(0, k) for k in range(1, 5)], 0.2).laplacian())


STAR = [(i, j) for i in range(4) for j in range(4) if i != j and 0 in (i, j)]
SGPS = [
    ("exponential-one-peer", one_peer(2), 1, 1),
    ("exponential-one-peer", one_peer(3), 0, 2),
    ("exponential-one-peer", one_peer(4), 1, 1),
    ("exponential-one-peer", one_peer(5), 2, 3),
    (WEBS, [pushing(4, WEBS)], 0, 1),
    (WEBS, [pushing(4, WEBS)], 2, 2),
    ("star", [pushing(4, STAR)], 1, 2),
]


@pytest.mark.parametrize("case", range(len(SGPS)))
def test_sgp_is_its_formula(case):
    graph, rounds, overlap, period = SGPS[case]
    optimizer, stages = [("sgd", 1), ("momentum", 2), ("adam", 3)][case % 3]
    reference = PlainSGP(rounds, overlap, period, optimizer)
    compare(SGP(graph=graph, overlap=overlap, period=period), reference, stages=stages, optimizer=optimizer)


# ---- limits ----------------------------------------------------------------------------------------------------------

EVERY = [
    DPSGD(),
    DPSGD(graph="star", order="adapt-then-combine", period=2),
    SGP(),
    SGP(graph="ring", overlap=1, period=2),
    SGP(overlap=1),
]


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_one_replica_is_ordinary_training(rule):
    one, other = (
        train(session(given, replicas=1, stages=2, optimizer="adam", schedule=cosine, model=mlp(norm=True)), 0, 7)
        for given in (rule, rules.Independent())
    )
    assert_same(state(one), state(other))
    assert not one.bytes_sent.get(rule.name)


@pytest.mark.parametrize(
    ("rule", "other", "replicas"),
    [
        (DPSGD(graph="complete", order="adapt-then-combine"), rules.LocalSGD(period=1), 4),
        (DPSGD(graph="complete", mixing="uniform", order="adapt-then-combine", period=3), rules.LocalSGD(period=3), 5),
        (SGP(graph="complete", period=2), rules.LocalSGD(period=2), 3),
        (SGP(), rules.LocalSGD(period=1), 2),
    ],
    ids=repr,
)
def test_on_the_complete_graph_it_is_local_sgd(rule, other, replicas):
    made = [train(session(one, replicas=replicas, stages=2, optimizer="adam"), 0, 6) for one in (rule, other)]
    torch.testing.assert_close(*(torch.stack(weights_of(one)) for one in made), rtol=1e-12, atol=1e-12)


def test_on_the_complete_graph_with_plain_sgd_it_is_all_reduce():
    for rule in (DPSGD(graph="complete", order="adapt-then-combine"), SGP(graph="complete")):
        made = [train(session(one, replicas=4, optimizer="sgd"), 0, 6) for one in (rule, rules.AllReduce())]
        torch.testing.assert_close(*(torch.stack(weights_of(one)) for one in made), rtol=1e-12, atol=1e-12)


def test_the_mean_moves_by_the_mean_displacement_alone():
    """Gradients are taken at each replica's own weights: after one update from different weights the mean is that of
    replicas that do not meet."""
    for rule in (DPSGD(graph=BULL), DPSGD(graph=BULL, order="adapt-then-combine"), SGP()):
        made, alone = (apart(session(one, replicas=5, optimizer="sgd")) for one in (rule, rules.Independent()))
        train(made, 0, 1), train(alone, 0, 1)
        means = [torch.stack(weights_of(one)).mean(0) for one in (made, alone)]
        torch.testing.assert_close(*means, rtol=1e-13, atol=1e-14)


# ---- without training ------------------------------------------------------------------------------------------------


@st.composite
def graphs(draw):
    """A connected graph: a random tree and some more edges."""
    n = draw(st.integers(2, 6))
    edges = {(draw(st.integers(0, k - 1)), k) for k in range(1, n)}
    pairs = [pair for pair in itertools.combinations(range(n), 2) if pair not in edges]
    more = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    return n, tuple(sorted(edges | set(more)))


@settings(max_examples=15, deadline=None)
@given(graph=graphs(), order=st.sampled_from(["combine-then-adapt", "adapt-then-combine"]), period=st.integers(1, 2))
def test_without_steps_d_psgd_is_powers_of_w(graph, order, period):
    n, edges = graph
    w = metropolis(n, edges)
    made = apart(session(DPSGD(graph=edges, order=order, period=period), replicas=n, optimizer=still, model=mlp(1)))
    first = torch.stack(weights_of(made))
    middle = first.mean(0)
    second = torch.linalg.eigvalsh(w).abs().sort().values[-2].item()
    for k in range(8):
        train(made, k, k + 1)
        rows = torch.stack(weights_of(made))
        power = (k + 1) // period
        torch.testing.assert_close(rows, torch.linalg.matrix_power(w, power) @ first, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(rows.mean(0), middle, rtol=1e-13, atol=1e-14)
        assert (rows - middle).norm() <= second**power * (first - middle).norm() * (1 + 1e-12) + 1e-12


def test_the_distance_to_the_mean_shrinks_by_the_second_eigenvalue():
    """Exactly so along its eigenvector: on a ring of 6 with W_ij = 1/3 it is 2/3."""
    made = session(DPSGD(graph="ring"), replicas=6, optimizer=still)
    wave = torch.cos(2 * torch.pi * torch.arange(6, dtype=torch.float64) / 6)
    start = weights_of(made)[0]
    for chain, height in zip(made.chains, wave):
        write(start + height, list(chain.parameters()))
    train(made, 0, 9)
    for row, height in zip(weights_of(made), wave):
        torch.testing.assert_close(row, start + (2 / 3) ** 9 * height, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_one_peer_exponential_reaches_the_mean_exactly_after_log2_n_rounds(n):
    """Whole numbers, so that nothing is rounded."""
    made = session(SGP(), replicas=n, optimizer=still, model=mlp(1))
    source = torch.Generator().manual_seed(0)
    for chain in made.chains:
        count = sum(x.numel() for x in chain.parameters())
        write(torch.randint(-100, 100, (count,), generator=source).double(), list(chain.parameters()))
    middle = torch.stack(weights_of(made)).mean(0)
    rounds = n.bit_length() - 1
    train(made, 0, rounds - 1)
    assert not any(torch.equal(row, middle) for row in weights_of(made))
    train(made, rounds - 1, rounds)
    assert all(torch.equal(row, middle) for row in weights_of(made))
    assert all(weights.x is None for weights in made.weights)  # w = 1: no second copy


def sums(made):
    """Σ x and Σ w, what is under way included."""
    x = sum(torch.cat(weights.numerators()) for weights in made.weights)
    w = sum(weights.weight for weights in made.weights)
    for weights in made.weights:
        for message in weights._early.values():
            values = message.clone().view(torch.float64)
            w, x = w + values[0].item(), x + values[1:]
    return x, w


@pytest.mark.parametrize(("graph", "rounds", "overlap", "period"), SGPS, ids=range(len(SGPS)))
def test_push_sum_conserves_its_sums_and_finds_the_mean(graph, rounds, overlap, period):
    n = len(rounds[0])
    rule = SGP(graph=graph, overlap=overlap, period=period)
    made = apart(session(rule, replicas=n, optimizer=still, model=mlp(1)))
    first = torch.stack(weights_of(made))
    plain = PushSum(first, rounds, overlap, period)
    for k in range(24 * period):
        train(made, k, k + 1)
        expected = plain.mix(k + 1, 0.0)
        x, w = sums(made)
        torch.testing.assert_close(x, first.sum(0), rtol=1e-12, atol=1e-12)
        assert w == pytest.approx(n, rel=1e-13)
        torch.testing.assert_close(torch.stack(weights_of(made)), expected, rtol=1e-11, atol=1e-12)
    middle = first.mean(0)
    assert (torch.stack(weights_of(made)) - middle).norm() < 0.01 * (first - middle).norm()


def test_on_an_irregular_directed_graph_the_numerators_do_not_find_the_mean():
    made = apart(session(SGP(graph=WEBS), replicas=4, optimizer=still, model=mlp(1)))
    first = torch.stack(weights_of(made))
    train(made, 0, 60)
    values, vectors = np.linalg.eig(pushing(4, WEBS).numpy())
    limit = np.real(vectors[:, values.real.argmax()])
    limit = 4 * limit / limit.sum()  # of the weights w
    for weights, share in zip(made.weights, limit):
        assert weights.weight == pytest.approx(share, rel=1e-10)
        torch.testing.assert_close(torch.cat(weights.numerators()), share * first.mean(0), rtol=1e-9, atol=1e-9)
    assert max(abs(limit - 1)) > 0.3


@pytest.mark.parametrize(
    ("rule", "degrees"),
    [
        (DPSGD(graph=BULL, period=2), (2, 3, 3, 1, 1)),
        (SGP(period=2), (1, 1, 1, 1, 1)),
        (SGP(graph=Graph.make(5, BULL), period=2), (2, 3, 3, 1, 1)),
    ],
    ids=repr,
)
def test_bytes_are_those_of_the_neighbours(rule, degrees):
    made = train(session(rule, replicas=5, stages=2), 0, 6)
    size = 8 * sum(x.numel() for x in made.chains[0].parameters())
    size += 2 * 8 if rule.name == "sgp" else 0  # w, of each stage
    sent = [
        sum(act.bytes for act in made.timeline if act[:2] == ("S", n) and act.channel == rule.name) for n in range(5)
    ]
    assert sent == [degree * size for degree in degrees]  # in the sixth update
    assert made.bytes_sent[rule.name] == 3 * sum(sent)


# ---- BatchNorm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [DPSGD(), DPSGD(order="adapt-then-combine"), SGP(), SGP(overlap=1)], ids=repr)
def test_batchnorms_statistics_are_mixed_as_weights_under_the_policy_average(rule):
    """Without steps: s ← 0.9 s + 0.1 b in a forward, b of the batch alone, then as the weights."""
    made, local = (
        session(rule, replicas=4, batchnorm=policy, model=mlp(2, norm=True), optimizer=still)
        for policy in ("average", "local")
    )
    own = s = torch.stack(statistics(made))
    pushed = PushSum(s, one_peer(4), getattr(rule, "overlap", 0), 1)
    w = metropolis(4, ring(4))
    for k in range(5):
        train(made, k, k + 1), train(local, k, k + 1)
        before, own = own, torch.stack(statistics(local))
        moved = 0.1 * ((own - 0.9 * before) / 0.1 - s)  # 0.1 (b − s)
        if rule.name == "sgp":
            s = pushed.mix(k + 1, moved)
        else:
            s = w @ (s + moved) if rule.order == "adapt-then-combine" else w @ s + moved
        torch.testing.assert_close(torch.stack(statistics(made)), s, rtol=1e-10, atol=1e-11)
    assert torch.stack(statistics(made)).std(0).max() > 1e-4
    assert not made.bytes_sent.get("batchnorm")


# ---- resumed, under a clock, after failures --------------------------------------------------------------------------

STATES = [
    DPSGD(graph=(*BULL[:3], (1, 3)), period=2),
    DPSGD(order="adapt-then-combine"),
    SGP(),
    SGP(graph=WEBS),
    SGP(overlap=1),
    SGP(graph=WEBS, overlap=2, period=3),
]
CREDITS = {
    "dgl": lambda: ul.credit.DGL(head="linear", budget=None),
    "pipedream": ul.credit.PipeDream,
    "fdg": ul.credit.FDG,  # ends a step with the forward of the next update
}
PAIRS = [(rule, credit) for rule, credit in zip(STATES, itertools.cycle(["fdg", "dgl", "pipedream"]))]
PAIRS += [(DPSGD(), "fdg"), (DPSGD(period=2), "dgl")]


def blank(stages=2):
    return ul.cut(mlp(2, norm=True), stages, like=batch()[0])


def mixed_session(rule, credit, world=None):
    return session(
        rule,
        replicas=4,
        stages=2,
        optimizer="adam",
        schedule=cosine,
        model=mlp(2, norm=True),
        credit=CREDITS[credit](),
        batchnorm="average",
        accumulate=2,
        world=world,
    )


@pytest.mark.covering
@pytest.mark.parametrize(("rule", "credit"), PAIRS)
def test_resumed_is_not_stopped_and_a_clock_changes_no_number(rule, credit, tmp_path):
    stops = range(3, 6) if getattr(rule, "overlap", 0) == 2 else (3, 4)  # each in another part of a period
    whole = mixed_session(rule, credit)
    for k in range(6):
        if k in stops:
            whole.save(tmp_path / str(k))
        train(whole, k, k + 1)
    expected = state(whole)
    for k in stops:
        assert_same(state(train(ul.Trainer.resume(tmp_path / str(k), blank()), k, 6)), expected)
    timed = mixed_session(rule, credit, Simulated(Hardware(Device(1e6), speeds=(1.0, 0.3), network=uniform(1e-3, 1e5))))
    train(timed, 0, 4).save(tmp_path / "timed")
    train(timed, 4, 6).settle()
    assert_same(state(timed), expected)
    assert_same(state(train(ul.Trainer.resume(tmp_path / "timed", blank()), 4, 6)), expected)


@pytest.mark.covering
@pytest.mark.parametrize(("rule", "credit"), PAIRS)
def test_after_a_step_that_failed_training_goes_on(rule, credit):
    for bad, victim in [(0, 1), (4, 3)]:
        made = mixed_session(rule, credit)
        for k in range(7):
            if k == bad:
                poisoned(made, k, victim)
                assert all(getattr(weights, "weight", 1.0) == 1.0 for weights in made.weights)
            train(made, k, k + 1)
            for stage in (0, 1):
                assert len({w.worker.version for w in made.weights if w.worker.stage == stage}) == 1
        made.settle()
        assert all(row.isfinite().all() for row in weights_of(made))
        if rule.name == "sgp":
            assert sums_of_stage(made) == pytest.approx(4.0)


def sums_of_stage(made):
    """Σ w of stage 0; a message begins with its w."""
    mine = [weights for weights in made.weights if weights.worker.stage == 0]
    early = [message[:8].clone().view(torch.float64).item() for weights in mine for message in weights._early.values()]
    return sum(weights.weight for weights in mine) + sum(early)


@pytest.mark.parametrize(("rule", "credit"), [(DPSGD(), "dgl"), (SGP(overlap=1), "pipedream")], ids=repr)
def test_it_learns(rule, credit):
    made = session(
        rule, replicas=3, stages=2, optimizer=lambda ps: torch.optim.Adam(ps, lr=0.03), credit=CREDITS[credit]()
    )
    records = made.fit(data(90), 6, batch_size=6, validate=data(60, 1), validate_every=100)
    assert records[-1]["validation"]["accuracy"] > 0.6


def seconds(rule, exchange):
    """Per update; an update computes for 3 s, all weights travel over one link in `exchange` s."""
    hardware = Hardware(network=uniform(bandwidth=4000.0 / exchange))
    timeline = simulate(
        ul.credit.Backprop(), rule, costs=unit(1, weights=1000), replicas=4, steps=40, hardware=hardware
    )
    return seconds_per_update(timeline, 20)[ul.worker.Place(0, 0)]


def test_on_a_clock_what_travels_beside_the_gradient_is_free():
    free = seconds(rules.Independent(), 1.0)
    assert seconds(DPSGD(), 1.0) == pytest.approx(free, rel=0.01)
    assert seconds(SGP(overlap=1), 1.0) == pytest.approx(free, rel=0.01)
    assert seconds(SGP(), 1.0) == pytest.approx(free + 1.0, rel=0.01)
    assert seconds(DPSGD(order="adapt-then-combine"), 1.0) >= free + 1.0
    assert seconds(DPSGD(), 40.0) > 5 * free


@pytest.mark.parametrize("rule", STATES, ids=repr)
def test_shapes_are_enough_to_simulate(rule):
    costs = costs_of(profile(blank()), Device())
    timeline = simulate(ul.credit.Backprop(), rule, costs=costs, replicas=4, steps=6, chain=blank())
    made = train(session(rule, replicas=4, stages=2, model=mlp(2, norm=True)), 0, 6)
    assert (
        sum(act.bytes for act in timeline if act.channel == rule.name and act.kind == "S") == made.bytes_sent[rule.name]
    )


# ---- on several processes --------------------------------------------------------------------------------------------

X, Y = batch(200, dtype=torch.float32)
PROCESSES = {
    "d-psgd": (DPSGD(), "dgl"),
    "d-psgd adapt first": (DPSGD(order="adapt-then-combine", period=2), "dgl"),
    "d-psgd fdg": (DPSGD(), "fdg"),
    "sgp": (SGP(), "pipedream"),
    "sgp overlapped": (SGP(graph=((0, 1), (1, 2), (2, 0), (0, 2)), overlap=2, period=2), "dgl"),
}


def small(name, world=None):
    rule, credit = PROCESSES[name]
    model = mlp(2, norm=True, dropout=0.2, dtype=torch.float32)
    return session(
        rule,
        stages=2,
        optimizer="adam",
        model=model,
        credit=CREDITS[credit](),
        batchnorm="average",
        seed=3,
        world=world,
    )


def go(made, begin, end):
    for k in range(begin, end):
        made.step(X[6 * k : 6 * k + 24], Y[6 * k : 6 * k + 24])
    return made


def on_processes(cluster, folder):
    found = []
    for name, links in [*((name, "auto") for name in PROCESSES), ("sgp overlapped", "gloo")]:
        with Distributed(cluster, links=links) as world:
            made = go(small(name, world), 0, 5)
            made.save(folder / name)
            go(made, 5, 9).settle()
            average = made.averaged()
            found.append((here(made), average and dict(average.state_dict())))
    return found


def test_processes_give_the_numbers_of_one_and_what_they_save_goes_on_anywhere(tmp_path):
    found = run_processes(on_processes, 3, tmp_path)
    for k, name in enumerate([*PROCESSES, "sgp overlapped"]):
        made = go(small(name), 0, 9)
        chain = ul.cut(mlp(2, norm=True, dropout=0.2, dtype=torch.float32), 2, like=X[:4])
        resumed = go(ul.Trainer.resume(tmp_path / name, chain), 5, 9)
        assert_same(state(resumed), state(made))
        merged = {}
        for rows in found:
            merged |= rows[k][0]
        expected = here(made)
        odd = [place for place, x in expected.items() if not torch.equal(x, merged[place])]
        assert merged.keys() == expected.keys() and not odd, f"{name}: these differ: {odd}"
        average = made.averaged().state_dict()
        assert all(torch.equal(x, found[0][k][1][key]) for key, x in average.items()), name


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: session(DPSGD(graph=((0, 1), (2, 3))), replicas=4), "not connected"),
        (lambda: session(DPSGD(graph=((0, 1), (1, 3)))), "leads to node 3; nodes are numbered 0 to 2"),
        (lambda: session(DPSGD(graph="rnig")), "rnig.*did you mean 'ring'"),
        (lambda: DPSGD(graph=7), "graph=7 is not possible"),
        (lambda: DPSGD(period=0), "period=0 is not possible"),
        (lambda: DPSGD(mixing="best"), "Unknown mixing 'best'"),
        (lambda: DPSGD(order="adapt"), "Unknown order 'adapt'"),
        (lambda: session(DPSGD(graph=((0, 1, 0.7), (1, 2, 0.7)), mixing="given")), "replica 1 sum to 1.4"),
        (lambda: session(DPSGD(graph=((0, 1, 1.0),), mixing="given"), replicas=2), "never agree: they would swap"),
        (lambda: session(SGP(graph=((0, 1), (1, 2), (0, 2)))), "reached from every other"),
        (lambda: session(SGP(graph=((0, 1), (1, 0)))), "Not every one of the 3"),
        (lambda: session(SGP(graph=((0, 1), (1, 3)))), "arc 1 → 3 is not possible; replicas are numbered 0 to 2"),
        (lambda: session(SGP(graph=((0, 0),))), "arc 0 → 0 is not possible"),
        (lambda: session(SGP(graph=((0, 1, 2.0),))), r"arcs \(i, j\): i sends to j"),
        (lambda: session(SGP(graph="exponential-one-per")), "did you mean 'exponential-one-peer'"),
        (lambda: session(SGP(graph="grid"), replicas=3), "grid .*3 nodes"),
        (lambda: SGP(overlap=2), "overlap=2 .*give a number from 0 to 1"),
        (lambda: SGP(overlap=-1), "overlap=-1"),
        (lambda: session(SGP(), initial="different"), "begin"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(InvalidChoice, match=words):
        make()


def test_a_graph_may_be_given_as_one():
    graph = Graph.make(5, BULL)
    for rule, same in ((DPSGD(graph=graph), DPSGD(graph=BULL)), (SGP(graph=graph), SGP(graph=copy.copy(graph)))):
        one, other = (train(session(made, replicas=5), 0, 3) for made in (rule, same))
        assert_same(state(one), state(other))
