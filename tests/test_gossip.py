"""Gossip and A²CiD²: the flow, plain float64 loops, conservation, limits, replicas that run freely on a clock."""

from __future__ import annotations

import itertools
import os
import signal
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2 as chi_square
from torch import nn

import unlocked as ul
from test_averaging import OPTIMIZERS, apart, batches_of, cosine, poisoned, session, still, train, weights_of
from unlocked import worker as workers
from unlocked.consensus.gossiping.copies import Copies
from unlocked.errors import InvalidChoice
from unlocked.graphs.gossip import Momentum, accelerated_gossip, poisson_events, randomized_gossip
from unlocked.rng import seed_of
from unlocked.rules.gossip import acid_parameters, meet, mix, mixed_share
from unlocked.simulation import Hardware, SlowDowns, uniform, unit
from unlocked.worlds import Simulated

from gossip_reference import Pair, Training, flow
from methods import assert_same, batch, data, mlp, state

Gossip, ACiD = ul.consensus.Gossip, ul.consensus.ACiD
BULL = ((0, 1, 0.7), (1, 2, 1.9), (0, 2, 0.2), (1, 3, 0.5), (2, 4, 1.1))  # irregular, 5 replicas, its own rates
GRAPHS = {"ring": ("ring", "uniform", 5), "star": ("star", "uniform", 4), "bull": (BULL, "given", 5)}
times, rates = st.floats(0.0, 8.0), st.floats(0.0, 4.0)


def momentum_of(made):
    """(N, d) of stage 0: x̃, or x where there is none."""
    mine = [weights for weights in made.weights if weights.worker.stage == 0]
    return torch.stack([w.copies.x[0] if w.copies.tilde is None else w.copies.tilde[0] for w in mine])


def rows(made):
    return torch.stack(weights_of(made))


def events_of(graph, end, seed=0, stage=0):
    """(time, i, j) up to a moment."""
    moments, edges = poisson_events(graph, 0.0, float(end), seed_of(seed, "gossip", stage))
    return [(time, *graph.edges[edge].tolist()) for time, edge in zip(moments.tolist(), edges.tolist())]


# ---- the rule of two tensors -----------------------------------------------------------------------------------------


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(rates, times)
def test_mixing_is_the_flow_of_its_equation_and_keeps_the_sum(eta, passed):
    x, tilde = normal(2, 7)
    expected, total = torch.einsum("ab,bn->an", flow(eta, passed), torch.stack([x, tilde])), x + tilde
    mix(x, tilde, mixed_share(eta, passed))
    torch.testing.assert_close(torch.stack([x, tilde]), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(x + tilde, total, rtol=0, atol=1e-14)


@settings(deadline=None, max_examples=40)
@given(rates, times, times)
def test_mixing_twice_is_mixing_once_for_both_times(eta, a, b):
    found, expected = normal(2, 7), normal(2, 7)
    for passed in (a, b):
        mix(*found, mixed_share(eta, passed))
    mix(*expected, mixed_share(eta, a + b))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert 0.0 <= mixed_share(eta, a) <= 0.5


@settings(deadline=None, max_examples=40)
@given(rates, times, st.floats(0.05, 3.0))
def test_an_exchange_taken_in_late_has_flowed_since(eta, passed, alpha_tilde):
    share, m = mixed_share(eta, passed), normal(7, seed=1)
    at_once, late = normal(2, 7), normal(2, 7)
    meet(*at_once, m, alpha_tilde)
    mix(*at_once, share)
    mix(*late, share)
    meet(*late, m, alpha_tilde, share)
    torch.testing.assert_close(late, at_once, rtol=0, atol=1e-13)


def test_without_momentum_an_exchange_puts_the_mean_into_both():
    x, y = normal(2, 7)
    middle, m = (x + y) / 2, x - y
    meet(x, None, m, 3.0)
    meet(y, None, -m, 3.0)
    torch.testing.assert_close(x, middle)
    torch.testing.assert_close(y, middle)


@settings(deadline=None, max_examples=40)
@given(rates, st.floats(0.05, 3.0), st.lists(st.tuples(times, times), min_size=1, max_size=6), times, st.randoms())
def test_copies_take_in_exchanges_in_any_order_as_if_in_time(eta, alpha_tilde, moments, step, random):
    """Exchanges at some moments, known only later and in any order, with a displacement between them."""
    end = 20.0
    ms = [normal(7, seed=k + 1) for k in range(len(moments))]
    in_time, late = Copies(eta, alpha_tilde), Copies(eta, alpha_tilde)
    acts = [(time, "meet", k) for k, (time, _) in enumerate(moments)] + [(step, "step", 0)]
    delayed = [(time + wait, "meet", k) for k, (time, wait) in enumerate(moments)] + [(step, "step", 0)]
    random.shuffle(delayed)
    for copies, order in ((in_time, sorted(acts)), (late, sorted(delayed, key=lambda act: act[0]))):
        copies.begin([normal(7)], 0.0)
        if copies.tilde is not None:
            copies.tilde[0] += normal(7, seed=50)
        for time, what, k in order:
            copies.flow(time)
            if what == "step":
                copies.displace([normal(7)], [normal(7, seed=61)], time)  # of what was there in the beginning
            else:
                copies.meet([ms[k]], [torch.zeros_like(ms[k])], moments[k][0])
        copies.flow(end)
    torch.testing.assert_close(late.x, in_time.x, rtol=0, atol=1e-12)
    if eta:
        torch.testing.assert_close(late.tilde, in_time.tilde, rtol=0, atol=1e-12)


def test_a_copy_that_nothing_but_gradients_has_moved_is_not_even_rounded():
    copies = Copies(0.0, 0.5)
    x, after = normal(2, 7).float() * 1e3
    copies.begin([x], 0.0)
    copies.displace([x], [after], 1.0)
    assert torch.equal(copies.x[0], after)
    sent = copies.sent(1.5)[0]
    copies.x[0].add_(1.0)
    assert torch.equal(sent, after)  # a copy


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.floats(0.1, 5.0))
def test_on_a_complete_graph_the_parameters_are_those_of_no_acceleration(n, rate):
    eta, alpha_tilde = acid_parameters(Gossip(graph="complete", rate=rate).graph_of(n))
    assert (eta, alpha_tilde) == pytest.approx((rate * n / (2 * (n - 1)), 0.5))  # χ₁ = χ₂ = (n − 1)/(n rate)


def test_given_parameters_stand_in_place_of_the_graphs_own():
    graph = Gossip(graph="ring").graph_of(16)
    eta, alpha_tilde = ACiD().parameters(graph)
    assert (eta, alpha_tilde) == acid_parameters(graph) and alpha_tilde > 1.0
    assert ACiD(eta=0.3).parameters(graph) == (0.3, alpha_tilde)
    assert ACiD(alpha_tilde=0.7).parameters(graph) == (eta, 0.7)
    assert acid_parameters(ACiD().graph_of(1)) == (0.0, 0.5)


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_acid_without_mixing_is_gossip_bit_for_bit(graph, optimizer):
    chosen, rule_rates, n = GRAPHS[graph]
    made = []
    for rule in (Gossip(graph=chosen, rates=rule_rates), ACiD(graph=chosen, rates=rule_rates, eta=0, alpha_tilde=1.7)):
        made.append(
            session(
                rule,
                replicas=n,
                stages=2,
                optimizer=(lambda ps: torch.optim.AdamW(ps, lr=0.02)) if optimizer == "adamw" else optimizer,
                model=mlp(2, norm=True, dropout=0.2, dtype=torch.float32),
                credit=ul.credit.DGL(head="linear", budget=None),
                batchnorm="average",
            )
        )
        train(made[-1], 0, 5, dtype=torch.float32)
    assert_same(state(made[0]), state(made[1]))
    assert sum(map(sum, (weights.exchanges.values() for weights in made[0].weights))) > 10


@pytest.mark.parametrize("accelerated", [False, True], ids=["gossip", "acid"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_without_a_learning_rate_the_weights_are_the_gossip_process_on_the_same_events(graph, accelerated):
    chosen, rule_rates, n = GRAPHS[graph]
    rule = ACiD(graph=chosen, rates=rule_rates) if accelerated else Gossip(graph=chosen, rates=rule_rates)
    made, steps = apart(session(rule, replicas=n, optimizer=still, seed=7)), 6
    begin, web = rows(made), rule.graph_of(n)
    train(made, 0, steps)
    eta, alpha_tilde = acid_parameters(web) if accelerated else (0.0, 0.5)
    pair, events = Pair(begin, eta, alpha_tilde), events_of(web, steps, seed=7)
    pair.go(events, float(steps))
    torch.testing.assert_close(rows(made), pair.z[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(momentum_of(made), pair.z[accelerated * 1], rtol=0, atol=1e-13)
    counts = {(i, j): sum(event[1:] == (i, j) for event in events) for i, j, _ in web.pairs()}
    for (i, j), count in counts.items():
        assert made.weights[i].exchanges[j] == made.weights[j].exchanges[i] == count
    end, seed = [float(steps)], [seed_of(7, "gossip", 0)]
    process = (
        accelerated_gossip(web, begin.numpy(), end, seed, Momentum.of(web))
        if accelerated
        else randomized_gossip(web, begin.numpy(), end, seed)
    )
    torch.testing.assert_close(rows(made), torch.from_numpy(process.values[0]), rtol=0, atol=1e-13)


def test_the_graph_gets_the_rates_that_were_asked_for():
    web = Gossip(graph="ring", rate=0.8).graph_of(6)
    assert web.strengths == pytest.approx([0.8] * 6)
    assert list(Gossip(graph=BULL, rates="given", rate=9.0).graph_of(5).rates) == pytest.approx(
        [0.7, 0.2, 1.9, 0.5, 1.1]
    )
    assert Gossip(graph=BULL).graph_of(5).strengths.mean() == pytest.approx(1.0)
    assert Gossip(graph=Gossip(graph="star").graph_of(4), rates="given").graph_of(4) == Gossip(graph="star").graph_of(4)


# ---- against a plain loop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batchnorm"])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("accelerated", [False, True], ids=["gossip", "acid"])
def test_training_is_the_plain_loop(accelerated, stages, norm):
    """Momentum, weight decay and a schedule; gradients of the weights as they were when it began; BatchNorm too."""
    rule = ACiD(graph=BULL, rates="given") if accelerated else Gossip(graph=BULL, rates="given")
    model, web = mlp(2, norm=norm), rule.graph_of(5)
    made = session(
        rule, replicas=5, stages=stages, model=model, schedule=cosine, batchnorm="average" if norm else "local"
    )
    reference = Training(
        mlp(2, norm=norm),
        5,
        [sum(1 for _ in stage.body.children()) for stage in made.chains[0]],
        [events_of(web, 8, stage=j) for j in range(stages)],
        acid_parameters(web) if accelerated else (0.0, 0.5),
        OPTIMIZERS["momentum"],
        cosine,
        statistics=norm,
    )
    for k in range(8):
        train(made, k, k + 1)
        reference.step(batches_of(k, 5))
        for j in range(stages):
            found = [weights for weights in made.weights if weights.worker.stage == j]
            values = torch.stack([torch.cat([x.detach().reshape(-1) for x in w.averaged]) for w in found])
            torch.testing.assert_close(values, reference.values(j), rtol=1e-12, atol=1e-12)
            if accelerated:
                tilde = torch.stack([w.copies.tilde[0] for w in found])
                torch.testing.assert_close(tilde, reference.pairs[j].z[1], rtol=1e-12, atol=1e-12)
    assert rows(made).std(0).max() > 1e-3  # they differ


# ---- conservation ----------------------------------------------------------------------------------------------------


class Recorded(torch.optim.SGD):
    """SGD with momentum and weight decay that remembers the sum of its displacements."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)
        self.moved = 0.0

    def row(self):
        return torch.cat([x.detach().reshape(-1) for x in self.param_groups[0]["params"]])

    def step(self, closure=None):
        before = self.row()
        super().step()
        self.moved = self.moved + (self.row() - before)


SLOW = Hardware(speeds=(0.25,), network=uniform(0.3, 2e3))


def on_a_clock(hardware=SLOW, stages=1):
    return Simulated(hardware, costs=unit(stages))


def assert_conserved(made, begin):
    moved = torch.stack([weights.store.optimizer.moved for weights in made.weights])
    torch.testing.assert_close(rows(made).mean(0), begin.mean(0) + moved.sum(0) / len(begin), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows(made).sum(0), momentum_of(made).sum(0), rtol=0, atol=1e-12)
    assert moved.std(0).max() > 1e-2


@pytest.mark.parametrize("rule", [Gossip, ACiD])
def test_the_mean_is_moved_by_gradients_only_step_by_step(rule):
    made = apart(session(rule(graph=BULL, rates="given"), replicas=5, optimizer=Recorded))
    begin = rows(made)
    for k in range(5):
        train(made, k, k + 1)
        assert_conserved(made, begin)
    if rule is ACiD:
        assert (rows(made) - momentum_of(made)).abs().max() > 1e-2


@pytest.mark.parametrize("latency, bandwidth", [(0.0, float("inf")), (0.3, 2e3), (5.0, 100.0)])
@pytest.mark.parametrize("rule", [Gossip, ACiD])
def test_the_mean_is_moved_by_gradients_only_however_late_messages_are(rule, latency, bandwidth):
    world = on_a_clock(Hardware(speeds=(0.25,), network=uniform(latency, bandwidth)))
    made = apart(session(rule(rate=2.0, pairing="available"), replicas=4, optimizer=Recorded, world=world))
    begin = rows(made)
    for epoch in (1, 2):
        made.fit(data(96), epoch, batch_size=2)
        assert_conserved(made, begin)
    assert sum(sum(weights.exchanges.values()) for weights in made.weights) > 8
    assert sum(weights.stale for weights in made.weights) >= 1


@pytest.mark.parametrize("latency, bandwidth, least, most", [(0.0, float("inf"), 0.75, 1.0), (5.0, 100.0, 0.0, 0.6)])
def test_eta_follows_the_share_of_exchanges_that_the_network_delivers(latency, bandwidth, least, most):
    world = on_a_clock(Hardware(network=uniform(latency, bandwidth)))
    made = apart(session(ACiD(rate=2.0, pairing="available"), replicas=4, optimizer=Recorded, world=world))
    nominal = made.consensus.parameters(made.weights[0].graph)[0]
    assert all(weights.copies.eta == nominal for weights in made.weights)
    made.fit(data(96), 1, batch_size=2)
    (eta,) = {weights.copies.eta for weights in made.weights}  # alike on all
    assert least * nominal < eta <= most * nominal


# ---- the same numbers everywhere -------------------------------------------------------------------------------------


class Stop(ul.callbacks.Callback):
    """Ctrl-C at a moment of the run."""

    def __init__(self, after):
        self.left = after

    def on_step(self, trainer, record):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


TRAIN = data(96, dtype=torch.float32)


def network():
    return mlp(2, norm=True, dropout=0.2, dtype=torch.float32)


def everything(rule, world=None, **options):
    """Two stages with dropout, BatchNorm, Adam, a schedule, clipping and accumulation."""
    options = {"replicas": 3, "stages": 2, "seed": 3, "accumulate": 2} | options
    return session(
        rule,
        optimizer=lambda ps: torch.optim.AdamW(ps, lr=0.02),
        model=network(),
        credit=ul.credit.DGL(head="linear", budget=None),
        schedule=cosine,
        clip=5.0,
        batchnorm="average",
        world=world,
        **options,
    )


def blank():
    """A network whose weights must come from a checkpoint."""
    model = network()
    with torch.no_grad():
        for x in model.parameters():
            x.zero_()
    return ul.cut(model, 2, like=TRAIN.x[:4])


@pytest.mark.parametrize("rule", [Gossip(graph="star"), ACiD(rate=2.0)], ids=repr)
def test_a_clock_changes_no_number_and_a_run_may_stop_anywhere(rule, tmp_path):
    whole = everything(rule)
    whole.fit(TRAIN, 3, batch_size=8)
    timed = everything(rule, on_a_clock(stages=2))
    timed.fit(TRAIN, 3, batch_size=8)
    assert_same(state(timed), state(whole))
    other = everything(rule, seed=4)
    other.fit(TRAIN, 3, batch_size=8)
    assert not torch.equal(rows(other), rows(whole))
    stopped = everything(rule)
    with pytest.raises(ul.Interrupted):
        stopped.fit(TRAIN, 3, batch_size=8, callbacks=[Stop(6)], checkpoint=tmp_path)
    assert stopped.steps == 6 and stopped.batch_in_epoch == 2
    resumed = ul.Trainer.resume(tmp_path, blank())
    resumed.fit(TRAIN, 3, batch_size=8)
    assert_same(state(resumed), state(whole))
    assert resumed.bytes_sent == whole.bytes_sent
    assert [w.exchanges for w in resumed.weights] == [w.exchanges for w in whole.weights]


@pytest.mark.parametrize("rule", [Gossip, ACiD])
def test_after_a_step_that_failed_training_goes_on(rule):
    made = session(rule(), replicas=4, stages=2, credit=ul.credit.DGL(head="linear", budget=None))
    for k in range(5):
        if k in (0, 3):
            poisoned(made, k, 2)
        train(made, k, k + 1)
    assert rows(made).isfinite().all()
    parts = torch.stack([torch.cat([x.detach().reshape(-1) for x in w.averaged]) for w in made.weights[::2]])
    for stage in (0, 1):
        assert len({weights.worker.version for weights in made.weights if weights.worker.stage == stage}) == 1
    torch.testing.assert_close(parts.sum(0), momentum_of(made).sum(0), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["pipedream", "fdg", "backprop"])
@pytest.mark.parametrize("rule", [Gossip(graph="complete"), ACiD(graph="complete", eta=0.4)], ids=repr)
def test_it_learns(rule, name):
    credits = {"pipedream": ul.credit.PipeDream, "fdg": ul.credit.FDG, "backprop": ul.credit.Backprop}
    made = session(rule, stages=2, optimizer=lambda ps: torch.optim.Adam(ps, lr=0.03), credit=credits[name]())
    records = made.fit(data(90), 6, batch_size=6, validate=data(60, 1), validate_every=100)
    assert records[-1]["validation"]["accuracy"] > 0.6


# ---- replicas that run freely, on a clock ----------------------------------------------------------------------------


class Watch(nn.Module):
    """Remembers which samples are trained on, and by whom."""

    seen: ClassVar[list[tuple[int, list[float]]]] = []

    def forward(self, x):
        if self.training and x.requires_grad is False:
            self.seen.append((workers.computing.replica, x[:, 0].tolist()))
        return x


def watched(rule, world, samples=240, **options):
    """A trainer, its data and what it sees, which begins anew."""
    Watch.seen.clear()
    made = session(rule, model=nn.Sequential(Watch(), *mlp(1)), world=world, **options)
    Watch.seen.clear()
    return made, data(samples)


def free(rule=Gossip, **options):
    return rule(pairing="available", **options)


@pytest.mark.parametrize("rule", [Gossip, ACiD])
def test_every_batch_is_used_once_nobody_waits_and_a_slow_replica_does_less(rule):
    speeds, batches = (0.25, 1.0, 1.0, 1.0), 260
    made, train_set = watched(free(rule), on_a_clock(Hardware(speeds=speeds)), 4 * batches, replicas=4)
    (record,) = made.fit(train_set, 1, batch_size=4)
    used = [tuple(values) for _, values in Watch.seen]
    order = train_set.batches(4, epoch=0, seed=0)
    assert used and sorted(used) == sorted(tuple(x[:, 0].tolist()) for x, _ in order) and len(set(used)) == batches
    made_by = np.bincount([replica for replica, _ in Watch.seen])
    assert list(made_by) == [weights.worker.version for weights in made.weights]
    assert made_by == pytest.approx(batches * np.array(speeds) / sum(speeds), abs=1)
    shortest = 2.0 * batches / sum(speeds)  # a gradient is 2 s
    assert shortest - 1e-9 <= record["seconds"] <= shortest + 2.0 / 0.25
    assert record["samples"] == 4 * batches and made.steps == record["step"] == batches // 4
    clocked = session(rule(), replicas=4, world=on_a_clock(Hardware(speeds=speeds)))
    assert clocked.fit(train_set, 1, batch_size=4)[0]["seconds"] == pytest.approx(2.0 / 0.25 * batches / 4)


def test_messages_take_none_of_the_gradients_time():
    seconds = []
    for network in (uniform(), uniform(0.5, 1e3)):
        made, train_set = watched(free(ACiD), on_a_clock(Hardware(network=network)), 400, replicas=4)
        seconds.append(made.fit(train_set, 1, batch_size=4)[0]["seconds"])
        assert all(weights.stale for weights in made.weights)
    assert seconds[0] == 2.0 * 25
    assert seconds[0] <= seconds[1] <= seconds[0] + 10.0  # the last exchange has still to end


def test_a_replica_alone_is_ordinary_training():
    kwargs = {"replicas": 1, "stages": 1, "model": network(), "schedule": cosine, "optimizer": "adam"}
    found = []
    for rule, world in (
        (free(ACiD), on_a_clock()),
        (free(Gossip), on_a_clock()),
        (ACiD(), None),
        (ul.consensus.Independent(), None),
    ):
        made = session(rule, world=world, **kwargs | {"model": network()})
        made.fit(TRAIN, 2, batch_size=8)
        found.append((state(made), made.learning_rates(), made.steps))
    for values, learning_rates, steps in found[:-1]:
        assert_same(values, found[-1][0])
        assert learning_rates == found[-1][1] and steps == found[-1][2]


@pytest.mark.parametrize("rule", [Gossip, ACiD])
def test_a_clock_makes_free_runs_alike_and_another_seed_another(rule):
    made = [everything(free(rule), on_a_clock(stages=2), seed=seed) for seed in (3, 3, 4)]
    for one in made:
        one.fit(TRAIN, 2, batch_size=8)
    assert_same(state(made[0]), state(made[1]))
    assert not torch.equal(rows(made[0]), rows(made[2]))
    assert [w.exchanges for w in made[0].weights] == [w.exchanges for w in made[1].weights]


@pytest.mark.parametrize("rule", [Gossip, ACiD])
def test_a_free_run_goes_on_at_the_end_of_an_epoch_as_if_it_had_not_stopped(rule, tmp_path):
    whole = everything(free(rule), on_a_clock(stages=2))
    whole.fit(TRAIN, 3, batch_size=8)
    stopped = everything(free(rule), on_a_clock(stages=2))
    stopped.fit(TRAIN, 1, batch_size=8, checkpoint=tmp_path)
    resumed = ul.Trainer.resume(tmp_path, blank(), world=on_a_clock(stages=2))
    resumed.fit(TRAIN, 3, batch_size=8)
    assert_same(state(resumed), state(whole))
    for a, b in zip(resumed.weights, whole.weights):
        assert (a.exchanges, a.stale, a.worker.version) == (b.exchanges, b.stale, b.worker.version)
        if rule is ACiD:
            assert all(torch.equal(x, y) for x, y in zip(a.copies.tilde, b.copies.tilde))
    assert resumed.elapsed == pytest.approx(whole.elapsed)
    assert resumed.bytes_sent == whole.bytes_sent


def test_a_free_run_stops_at_a_whole_round_and_uses_the_rest_of_the_batches_later(tmp_path):
    made, train_set = watched(free(ACiD), on_a_clock(), 240, replicas=3)
    with pytest.raises(ul.Interrupted):
        made.fit(train_set, 2, batch_size=4, callbacks=[Stop(8)], checkpoint=tmp_path)
    before = len(Watch.seen)
    assert 8 <= before <= 8 + 2 * 3 and before == 3 * made.steps == 3 * made.batch_in_epoch
    assert made.book.samples == 4 * before
    torch.testing.assert_close(rows(made).sum(0), momentum_of(made).sum(0), rtol=0, atol=1e-12)
    chain = ul.cut(nn.Sequential(Watch(), *mlp(1)), 1, like=batch()[0])
    resumed = ul.Trainer.resume(tmp_path, chain, world=on_a_clock())
    records = resumed.fit(train_set, 2, batch_size=4)
    assert [record["samples"] for record in records] == [240, 240] and resumed.steps == 40
    for epoch in (0, 1):
        used = sorted(tuple(values) for _, values in Watch.seen[60 * epoch :][:60])
        assert used == sorted(tuple(x[:, 0].tolist()) for x, _ in train_set.batches(4, epoch=epoch, seed=0))


class Rates(torch.optim.SGD):
    """Remembers the learning rate of each of its steps."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=1.0)
        self.used = []

    def step(self, closure=None):
        self.used.append(self.param_groups[0]["lr"])


def test_the_schedule_follows_the_rounds_of_all():
    """Whose batch belongs to round r steps with the rate of round r, however few steps it has made itself."""
    made, train_set = watched(
        free(Gossip),
        on_a_clock(Hardware(speeds=(0.25,))),
        4 * 4 * 21,
        replicas=4,
        optimizer=Rates,
        schedule=lambda one: torch.optim.lr_scheduler.LambdaLR(one, lambda k: 1.0 / (1 + k)),
    )
    made.fit(train_set, 1, batch_size=4)
    numbers = {tuple(x[:, 0].tolist()): k for k, (x, _) in enumerate(train_set.batches(4, epoch=0, seed=0))}
    for replica, weights in enumerate(made.weights):
        rounds = [numbers[tuple(values)] // 4 for who, values in Watch.seen if who == replica]
        assert [1.0 / (1 + r) for r in rounds] == pytest.approx(weights.store.optimizer.used)
        assert weights.store.optimizer.param_groups[0]["lr"] == pytest.approx(1.0 / 22)  # as if all had waited


def test_edges_are_used_as_often_as_their_rates_say():
    """Where messages are free nobody is refused: Poisson counts, λ_ij/2 for each gradient of either end."""
    hardware = Hardware(speeds=(1.0, 0.7, 1.3, 0.4, 1.0), slow_downs=SlowDowns(spread=0.3))
    rule = free(graph=BULL, rates="given")
    made = session(
        rule, replicas=5, optimizer=still, model=nn.Sequential(nn.Linear(5, 3)).double(), world=on_a_clock(hardware)
    )
    made.fit(data(2000), 1, batch_size=1)
    done = [weights.worker.version for weights in made.weights]
    web, total = rule.graph_of(5), 0.0
    for i, j, rate in web.pairs():
        expected, count = rate * (done[i] + done[j]) / 2, made.weights[i].exchanges[j]
        assert count == made.weights[j].exchanges[i]
        total += (count - expected) ** 2 / expected
    assert sum(done) == 2000
    assert 1e-3 < chi_square.sf(total, len(web)) < 0.999


# ---- acceleration ----------------------------------------------------------------------------------------------------


def distance(rule, seed, replicas, steps):
    """‖πx‖² after so many gradients without a step, over what it was."""
    model = nn.Sequential(nn.Linear(5, 3)).double()
    made = apart(session(rule, replicas=replicas, optimizer=still, model=model, seed=seed), seed)
    begin = rows(made)
    train(made, 0, steps)
    end = rows(made)
    return float((end - end.mean(0)).square().sum() / (begin - begin.mean(0)).square().sum())


@pytest.mark.parametrize(("graph", "steps", "helps"), [("ring", 24, True), ("complete", 3, False)])
def test_momentum_speeds_up_the_ring_and_not_the_complete_graph(graph, steps, helps):
    gains = [
        np.log(distance(Gossip(graph=graph), seed, 16, steps) / distance(ACiD(graph=graph), seed, 16, steps))
        for seed in range(6)
    ]
    mean, error = float(np.mean(gains)), float(np.std(gains, ddof=1) / np.sqrt(len(gains)))
    assert error < 0.3
    if helps:
        assert mean - 3 * error > np.log(2.0)
    else:
        assert mean - 3 * error < np.log(1.1)


# ---- refusals --------------------------------------------------------------------------------------------------------


def freely(**options):
    return session(free(), world=on_a_clock(), **options)


def domains():
    return ul.data.Domains([data(24, k) for k in range(3)])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: session(Gossip(graph="rnig")), "rnig.*did you mean 'ring'"),
        (lambda: session(Gossip(graph=((0, 1), (2, 3))), replicas=4), "of 4 replicas is not connected.*add an edge"),
        (lambda: session(Gossip(graph=((0, 1), (1, 3)))), "leads to node 3; nodes are numbered 0 to 2"),
        (lambda: session(Gossip(graph=((0, 1), (1, 2, 0.0)), rates="given")), "rate of 0 is not possible"),
        (lambda: session(Gossip(graph=((0, 1), (1, 2, 1.0, 1.0)))), r"edges \(i, j\) or \(i, j, rate\)"),
        (lambda: Gossip(graph=7), "graph=7 is not possible; give a name such as 'ring'"),
        (lambda: Gossip(rate=0), "rate=0 is not possible; give exchanges per gradient"),
        (lambda: ACiD(rate=float("inf")), "rate=inf is not possible"),
        (lambda: Gossip(rates="best"), "Unknown rates 'best'"),
        (lambda: Gossip(pairing="none"), "Unknown pairing 'none'"),
        (lambda: ACiD(eta=-0.1), "eta=-0.1 is no mixing rate; give a number of at least 0"),
        (lambda: ACiD(eta=float("nan")), "eta=nan is no mixing rate"),
        (lambda: ACiD(alpha_tilde=0.0), "alpha_tilde=0.0 is no share"),
        (lambda: session(free(), replicas=3), "as fast as they can.*pairing='clocks'"),
        (lambda: train(freely(replicas=3), 0, 1), "no step of all; call fit, or take pairing='clocks'"),
        (lambda: freely(stages=2, credit=ul.credit.PipeDream()), "pipedream.*come later; take pairing='clocks'"),
        (lambda: freely(replicas=3).fit(domains(), 1, batch_size=4), "one data set; give one, or pairing='clocks'"),
        (lambda: session(ACiD(), initial="different"), "differ|same|equal"),
    ],
    ids=itertools.count(),
)
def test_what_is_not_possible_is_refused_in_a_sentence(make, words):
    with pytest.raises(InvalidChoice, match=words) as told:
        make()
    assert str(told.value).endswith(".")
