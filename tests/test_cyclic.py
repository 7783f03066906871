"""Cyclic data parallelism: every execution is the sequential formula (cyclic_reference.py), and goes round as it should."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import unlocked as ul
from unlocked.callbacks import Callback
from unlocked.errors import BadCheckpoint, InvalidChoice, NonFiniteLoss
from unlocked.probes.memory import SavedBytes
from unlocked.rules.cyclic import freshness, in_time, in_time_of_pipeline
from unlocked.simulation.costs import unit
from unlocked.simulation.simulating import simulate
from unlocked.worlds import Distributed, Simulated

import cyclic_reference as reference
from cyclic_reference import of_rule
from delayed_cases import CLASSES, FEATURES, OPTIMIZERS, chain_of, micro_batch, normal, step_batch
from delayed_reference import Network
from methods import assert_same, batch, credits, mlp, state
from processes import Training, finished, killed, run_processes

FORMS = ["ring", "single-device", "model-parallel", "zero"]
WHOLE = [form for form in FORMS if form in ("ring", "single-device")]  # any credit rule, any number of micro-batches
SQUARE = [(n, n) for n in (2, 3, 4, 5)]
OTHERS = [(1, 3), (3, 1), (2, 3), (3, 2), (2, 5), (5, 2)]
V2 = freshness("v2", 3, 3)
ODD = ((0, 0, 1), (0, 1, 0), (1, 0, 1))  # legal for three replicas of three stages


def network(stages):
    """A chain of stages of unequal depths and widths, and the same for the reference."""
    names, bodies, width = [], [], FEATURES
    for j in range(stages):
        row = []
        for k in range(1 + (2 * j + 1) % 3):
            out = 3 + (j + 2 * k) % 4
            row += [nn.Linear(width, out), nn.Tanh()]
            width = out
        row += [nn.Linear(width, CLASSES)] if j == stages - 1 else []
        names.append(["linear" if isinstance(layer, nn.Linear) else "tanh" for layer in row])
        bodies.append(nn.Sequential(*row).double())
    with torch.no_grad():
        for k, x in enumerate(itertools.chain.from_iterable(body.parameters() for body in bodies)):
            x.copy_(normal(*x.shape, seed=k) / x.shape[-1] ** 0.5)
    return chain_of(bodies), Network(names, [[x.detach().clone() for x in body.parameters()] for body in bodies])


def micro_batches(step, replicas, count=1):
    """Of one step, by replica."""
    first = step * replicas * count
    return [[micro_batch(first + n * count + b) for b in range(count)] for n in range(replicas)]


def train(session, steps, count=1):
    for step in steps:
        rows = micro_batches(step, session.replicas, count)
        session.step(*([torch.cat([pair[k] for pair in row]) for row in rows] for k in (0, 1)))
    return session


def trainer_of(stages, replicas, rule="v2", form="ring", optimizer="momentum", chain=None, **options):
    chain = chain if chain is not None else network(stages)[0]
    made = OPTIMIZERS[optimizer][1] if isinstance(optimizer, str) else optimizer
    staggered = options.pop("staggered", True)
    consensus = options.pop("consensus", None) or ul.consensus.CDP(rule, form=form, staggered=staggered)
    return ul.Trainer(chain, consensus=consensus, replicas=replicas, optimizer=made, **options)


def assert_near(session, expected, hint=""):
    """All workers that keep weights between steps have those of the reference."""
    keepers = [weights for weights in session.weights if weights.shard == weights.worker.place]
    assert {weights.worker.stage for weights in keepers} == set(range(session.stages))
    for weights in keepers:
        for x, y in zip(weights.stage.parameters(), expected[weights.worker.stage], strict=True):
            torch.testing.assert_close(x.detach(), y, rtol=1e-9, atol=1e-11, msg=f"{weights.worker.place} {hint}")


def of_here(session):
    """Every tensor that workers of this process keep between steps."""
    return {
        (*weights.worker.place, name): x.detach().clone()
        for weights in session.weights
        if weights.shard == weights.worker.place
        for name, x in nn.Module.state_dict(weights.stage).items()
    }


def rule_named(rule, replicas, stages):
    return of_rule(rule, replicas, stages) if isinstance(rule, str) else rule


@cache
def formula(replicas, stages, rule, optimizer, steps=12):
    rows = [micro_batches(step, replicas) for step in range(steps)]
    return reference.run(network(stages)[1], rows, rule_named(rule, replicas, stages), OPTIMIZERS[optimizer][0])


# ---- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.covering(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", ["v1", "v2"])
@pytest.mark.parametrize(
    "replicas, stages, optimizer",
    [(*size, name) for size in SQUARE for name in OPTIMIZERS] + [(*size, "momentum") for size in OTHERS],
)
def test_every_form_is_the_formula_after_every_step(replicas, stages, optimizer, rule, form):
    expected = formula(replicas, stages, rule, optimizer)
    session = trainer_of(stages, replicas, rule, form, optimizer)
    for step in range(12):
        train(session, [step])
        assert_near(session, expected[step + 1], f"after step {step}")
    if form in WHOLE:  # the optimizer's state is where the updates are made
        for weights in session.weights:
            assert bool(weights.store.optimizer.state) == (
                weights.worker.replica == replicas - 1 and optimizer != "sgd"
            )


def test_the_rules_differ_from_each_other_and_from_data_parallelism():
    """So that agreeing with the formula says something."""
    results = [formula(4, 4, rule, "momentum")[12] for rule in ("v1", "v2")]
    everywhere = [[True] * 4] * 4
    rows = [micro_batches(step, 4) for step in range(12)]
    results.append(reference.run(network(4)[1], rows, everywhere, OPTIMIZERS["momentum"][0])[12])
    for a, b in itertools.combinations(results, 2):
        for x, y in zip(a, b):
            assert (x[0] - y[0]).abs().max() > 1e-3
    session = train(trainer_of(4, 4, consensus=ul.consensus.AllReduce()), range(12))
    assert_near(session, results[2])


@st.composite
def legal(draw):
    """Sizes and a matrix that can be had in time."""
    replicas, stages = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    cells = [[draw(st.booleans()) and in_time(n, j, replicas, stages) for j in range(stages)] for n in range(replicas)]
    return replicas, stages, cells


@given(size=legal(), form=st.sampled_from(FORMS), count=st.integers(1, 3), clip=st.sampled_from([None, 0.02]))
@settings(deadline=None, max_examples=30)
def test_any_legal_matrix_with_micro_batches_and_a_clip_is_the_formula(size, form, count, clip):
    replicas, stages, cells = size
    count = count if form in WHOLE else 1
    chain, plain = network(stages)
    rows = [micro_batches(step, replicas, count) for step in range(5)]
    expected = reference.run(plain, rows, cells, OPTIMIZERS["adam"][0], clip=clip)
    session = trainer_of(stages, replicas, cells, form, "adam", chain, accumulate=count, clip=clip)
    train(session, range(5), count)
    assert_near(session, expected[-1])


@pytest.mark.parametrize("form", FORMS)
def test_a_clip_is_of_each_stages_own_gradient(form):
    chain, plain = network(3)
    rows = [micro_batches(step, 3) for step in range(6)]
    free, clipped = (reference.run(plain, rows, V2, OPTIMIZERS["sgd"][0], clip=clip)[-1] for clip in (None, 0.05))
    assert any((x - y).abs().max() > 1e-3 for a, b in zip(free, clipped) for x, y in zip(a, b))
    assert_near(train(trainer_of(3, 3, "v2", form, "sgd", chain, clip=0.05), range(6)), clipped)


@pytest.mark.parametrize("form", FORMS)
def test_the_first_step_is_an_ordinary_one(form):
    ordinary = train(trainer_of(3, 3, consensus=ul.consensus.AllReduce()), range(1))
    expected = [[x.detach() for x in stage.parameters()] for stage in ordinary.chains[0]]
    for rule in ("v1", "v2", ODD, lambda n, j: False):
        assert_near(train(trainer_of(3, 3, rule, form), range(1)), expected)


@pytest.mark.covering
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stages", [1, 3])
def test_one_replica_with_v2_is_ordinary_training_bit_for_bit(form, stages):
    results = []
    for consensus in (ul.consensus.CDP(form=form), ul.consensus.Independent()):
        model = mlp(norm=True, dropout=0.2)
        session = trainer_of(
            stages, 1, optimizer="adam", chain=ul.cut(model, stages, like=batch()[0]), consensus=consensus, clip=0.5
        )
        for k in range(5):
            session.step(*batch(seed=k))
        results.append(state(session))
    assert_same(*results)


@pytest.mark.parametrize("form", FORMS)
def test_schedules_count_training_steps(form):
    rates = [0.1 * 0.8**step for step in range(8)]
    chain, plain = network(3)
    rows = [micro_batches(step, 3) for step in range(8)]
    expected = reference.run(plain, rows, V2, OPTIMIZERS["momentum"][0], rates=rates)
    session = trainer_of(
        3, 3, "v2", form, chain=chain, schedule=lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.8)
    )
    for step, rate in enumerate(rates):
        assert session.learning_rates() == pytest.approx([rate] * 3)
        train(session, [step])
    assert_near(session, expected[-1])


@pytest.mark.parametrize("form", FORMS)
def test_a_schedule_by_epochs_is_one_that_waits_for_as_many_steps(form):
    train_set = ul.data.from_tensors(*batch(48))
    results = []
    for every, schedule in (
        ("epoch", partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)),
        ("step", partial(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.5)),
    ):
        chain = ul.cut(mlp(), 3, like=batch()[0])
        session = trainer_of(3, 3, "v1", form, chain=chain, schedule=schedule, schedule_every=every)
        records = session.fit(train_set, 3, batch_size=4)
        assert session.steps == 12
        assert [record["learning_rates"] for record in records] == [[rate] * 3 for rate in (0.05, 0.025, 0.0125)]
        results.append(of_here(session))
    assert_same(*results)


# ---- as a pipeline ---------------------------------------------------------------------------------------------------


def pipeline(credit, stages, count, optimizer="momentum", steps=12, **options):
    session = ul.Trainer(
        network(stages)[0], credit=credit, accumulate=count, optimizer=OPTIMIZERS[optimizer][1], **options
    )
    for step in range(steps):
        session.step(*step_batch(step, count))
    session.drain()
    return session


def of_pipeline(rule, count, stages):
    """u of a pipeline: micro-batch n begins two units after the one before it, stage j is one unit above the one below."""
    return [[rule == "v2" and n >= stages - 1 - j for j in range(stages)] for n in range(count)]


@pytest.mark.covering(("count", "stages"), "rule", "keep")
@pytest.mark.parametrize("keep", ["graph", "input"])
@pytest.mark.parametrize("rule", ["v1", "v2"])
@pytest.mark.parametrize(
    "count, stages", [*SQUARE, pytest.param(3, 4, id="fewest"), pytest.param(5, 2, id="more"), pytest.param(2, 1)]
)
def test_as_a_pipeline_it_is_the_formula_and_a_known_one(count, stages, rule, keep):
    rows = [micro_batches(step, count) for step in range(12)]
    for optimizer in OPTIMIZERS if count == stages and keep == "graph" else ["momentum"]:
        expected = reference.run(network(stages)[1], rows, of_pipeline(rule, count, stages), OPTIMIZERS[optimizer][0])[
            -1
        ]
        session = pipeline(ul.credit.CDPPipeline(rule=rule, keep=keep), stages, count, optimizer)
        assert_near(session, expected)
        known = ul.credit.PipeDream2BW(keep=keep) if rule == "v1" else ul.credit.PipeDream(keep=keep)
        assert_same(state(session), state(pipeline(known, stages, count, optimizer)))


@given(stages=st.integers(1, 4), more=st.integers(0, 2), seed=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=15)
def test_any_legal_matrix_as_a_pipeline_is_the_formula(stages, more, seed):
    count = max(1, stages - 1) + more
    cells = [
        [seed.random() < 0.5 and in_time_of_pipeline(n, j, count, stages) for j in range(stages)] for n in range(count)
    ]
    rows = [micro_batches(step, count) for step in range(5)]
    expected = reference.run(network(stages)[1], rows, cells, OPTIMIZERS["momentum"][0])[-1]
    assert_near(pipeline(ul.credit.CDPPipeline(rule=cells), stages, count, steps=5), expected)


@pytest.mark.covering
@pytest.mark.parametrize("rule", ["v1", "v2"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_with_as_many_replicas_as_stages_the_pipeline_and_the_forms_have_one_rule(count, rule):
    assert of_pipeline(rule, count, count) == of_rule(rule, count, count)
    assert [list(row) for row in freshness(rule, count, count)] == of_rule(rule, count, count)
    assert_near(pipeline(ul.credit.CDPPipeline(rule=rule), count, count), formula(count, count, rule, "momentum")[12])


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas, stages", [*SQUARE[:3], *OTHERS])
def test_the_condition_is_that_of_the_timeline(replicas, stages):
    found = [[in_time(n, j, replicas, stages) for j in range(stages)] for n in range(replicas)]
    assert found == of_rule("v2", replicas, stages)
    assert [list(row) for row in freshness("v2", replicas, stages)] == found


@pytest.mark.covering(("replicas", "stages"), "form")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("replicas, stages", [(2, 2), (3, 3), (2, 4), (4, 2)])
def test_what_cannot_be_had_in_time_is_refused_with_its_cell(replicas, stages, form):
    early = [(n, j) for n in range(replicas) for j in range(stages) if not in_time(n, j, replicas, stages)]
    assert early
    for n, j in early:
        first = min(m for m in range(replicas) if in_time(m, j, replicas, stages))
        with pytest.raises(InvalidChoice) as refused:
            trainer_of(stages, replicas, lambda a, b, cell=(n, j): (a, b) == cell, form)
        sentence = str(refused.value)
        assert f"cell [{n}][{j}]" in sentence and f"stage {j} in replica (or micro-batch) {n}" in sentence
        assert f"replicas {first} and later have them" in sentence


def test_the_pipeline_refuses_what_it_cannot_have_in_time():
    for n, j in [(0, 0), (1, 0), (0, 1)]:
        cells = [[(a, b) == (n, j) for b in range(3)] for a in range(3)]
        with pytest.raises(InvalidChoice, match=rf"cell \[{n}\]\[{j}\]"):
            pipeline(ul.credit.CDPPipeline(rule=cells), 3, 3, steps=1)
    with pytest.raises(InvalidChoice, match="needs at least 3 micro-batches per step, got 2"):
        pipeline(ul.credit.CDPPipeline(), 4, 2, steps=1)


@pytest.mark.parametrize("make", [ul.consensus.CDP, lambda rule: ul.credit.CDPPipeline(rule=rule)])
def test_what_is_no_rule_is_refused(make):
    with pytest.raises(InvalidChoice, match="v3"):
        make("v3")
    for wrong in (5, None, [True, False]):
        with pytest.raises(InvalidChoice, match="is no rule; give 'v1', 'v2'"):
            make(wrong)
    assert make([[0, 1], [1, 1]]) == make(((False, True), (True, True)))
    hash(make([[0, 1], [1, 1]]))


def test_a_matrix_of_another_size_and_an_unknown_form_are_refused():
    with pytest.raises(InvalidChoice, match=r"needs 3 rows \(replicas\) of 3 truth values .* got rows of \[3, 2\]"):
        trainer_of(3, 3, [[0, 0, 1], [0, 1]])
    with pytest.raises(InvalidChoice, match="form of cyclic data parallelism"):
        ul.consensus.CDP(form="spiral")
    with pytest.raises(InvalidChoice, match="equal parts"):
        trainer_of(2, 2).step([batch(4)[0], batch(6)[0]], [batch(4)[1], batch(6)[1]])


@pytest.mark.covering
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("credit", credits("delayed"), ids=lambda row: row.name)
def test_delayed_gradients_are_refused(credit, form):
    said = "the credit rule cdp-pipeline"
    with pytest.raises(InvalidChoice, match=f"{credit.make().name} .*{said}"):
        trainer_of(3, 3, form=form, credit=credit.make())


# ---- local losses ----------------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize("rule", ["v1", "v2", ODD])
def test_local_learning_follows_the_same_rule(rule, form):
    """DGL: every stage from its own loss; heads belong to their stage, and see the same version."""

    def head(h, outputs):
        made = nn.Linear(h.shape[1], outputs).to(h.dtype)
        with torch.no_grad():
            for k, x in enumerate(made.parameters()):
                x.copy_(normal(*x.shape, seed=50 + k))
        return made

    chain, plain = network(3)
    with_heads = []
    for j, weights in enumerate(plain.weights):
        extra = [] if j == 2 else [normal(CLASSES, weights[-1].shape[0], seed=50), normal(CLASSES, seed=51)]
        with_heads.append([*weights, *extra])
    rows = [micro_batches(step, 3) for step in range(6)]
    expected = reference.run(
        Network(plain.layers, with_heads),
        rows,
        rule_named(rule, 3, 3),
        OPTIMIZERS["momentum"][0],
        gradients=reference.local_gradients,
    )[-1]
    session = trainer_of(3, 3, rule, form, chain=chain, credit=ul.credit.DGL(head=head, budget=None))
    assert_near(train(session, range(6)), expected)


# ---- the clock -------------------------------------------------------------------------------------------------------


def on_the_clock(stages, replicas, rule="v2", form="ring", steps=6, **options):
    return simulate(
        ul.credit.Backprop(),
        ul.consensus.CDP(rule, form=form),
        costs=unit(stages, forward=float(replicas), backward=float(replicas)),  # so that all moments are whole numbers
        replicas=replicas,
        steps=steps,
        **options,
    )


def versions_seen(timeline):
    """{(replica, stage, step): version of the weights of the forward}."""
    return {(act.replica, act.stage, act.micro_batch): act.version for act in timeline if act.kind == "F"}


@pytest.mark.parametrize(
    "replicas, stages", [*((n, n) for n in range(2, 9)), (2, 3), (3, 2), (4, 6), (6, 4), (5, 3), (3, 5), (7, 2)]
)
def test_v2_is_what_the_stagger_gives_by_itself(replicas, stages):
    """Whoever takes the newest weights that have arrived when its turn comes takes those of v2, from the first step on."""
    steps = 8
    seen = versions_seen(on_the_clock(stages, replicas, "newest", steps=steps))
    expected = of_rule("v2", replicas, stages)
    assert seen == {
        (n, j, t): t if expected[n][j] else max(t - 1, 0)
        for n in range(replicas)
        for j in range(stages)
        for t in range(steps)
    }


@pytest.mark.covering
@pytest.mark.parametrize("rule", ["v1", "v2"])
@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_every_replica_is_busy_all_the_time(count, rule):
    timeline = on_the_clock(count, count, rule, steps=6)
    for n in range(count):
        spans = sorted((act.start, act.end) for act in timeline if act.replica == n and act.kind in "FB")
        assert len(spans) == 6 * 2 * count
        # one act after the other, each `count` long
        ends = [(count * k, count * (k + 1)) for k in range(2 * n, 2 * n + 12 * count)]
        assert [x for span in spans for x in span] == pytest.approx([x for span in ends for x in span])


@pytest.mark.parametrize("rule", ["v1", "v2", ODD])
def test_staleness_by_the_record_is_the_rules(rule):
    matrix = rule_named(rule, 3, 3)
    found = on_the_clock(3, 3, rule, steps=5).staleness()
    for (n, j), updates in found.items():
        assert updates == [[0], *[[0 if matrix[n][j] else 1]] * 4]


@pytest.mark.covering
@pytest.mark.parametrize("rule", ["v1", "v2", ODD])
@pytest.mark.parametrize("form", FORMS)
def test_with_a_clock_it_is_in_process_bit_for_bit(form, rule):
    """Replicas are ahead of each other there; what has been settled in the middle changes nothing."""
    expected = [of_here(train(trainer_of(3, 3, rule, form, "adam"), range(steps))) for steps in (4, 9)]
    for settled in (False, True):
        session = train(trainer_of(3, 3, rule, form, "adam", world=Simulated()), range(4))
        if settled:
            session.settle()
            assert_same(of_here(session), expected[0])
            assert_near(session, formula(3, 3, rule, "adam")[4])
        train(session, range(4, 9))
        session.settle()
        assert_same(of_here(session), expected[1])


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("world", [None, Simulated], ids=["in process", "simulated"])
@pytest.mark.parametrize("rule", ["v1", "v2"])
@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_as_many_bytes_as_a_ring_all_reduce(replicas, rule, world):
    size = sum(x.numel() * x.element_size() for x in network(3)[0].parameters())
    session = trainer_of(3, replicas, rule, world=world and world())
    train(session, range(4)).settle()
    together = trainer_of(3, replicas, consensus=ul.consensus.AllReduce())
    train(together, range(4))
    sent = session.bytes_sent
    assert sent["cdp-gradient"] == sent["cdp-weights"] == 4 * (replicas - 1) * size
    assert sent["cdp-gradient"] + sent["cdp-weights"] == together.bytes_sent["all-reduce"]


# ---- a step that fails -----------------------------------------------------------------------------------------------


def fail(session, replica):
    """A step whose loss is NaN in one replica."""
    rows = micro_batches(99, session.replicas)
    xs = [row[0][0].clone() for row in rows]
    xs[replica].fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="loss of stage 2"):
        session.step(xs, [row[0][1] for row in rows])


@pytest.mark.covering(2)
@pytest.mark.parametrize("world", [None, Simulated], ids=["in process", "simulated"])
@pytest.mark.parametrize("replica", range(3))
@pytest.mark.parametrize("rule", ["v1", "v2"])
@pytest.mark.parametrize("form", FORMS)
def test_after_a_step_that_failed_all_go_on_from_the_same_weights(form, rule, replica, world):
    session = train(trainer_of(3, 3, rule, form, "sgd", world=world and world()), range(4))
    fail(session, replica)
    session.settle()
    reached = formula(3, 3, rule, "sgd")[4]
    assert_near(session, reached)
    train(session, range(4, 8))
    session.settle()
    # as a run that begins there: its first step is an ordinary one
    rows = [micro_batches(step, 3) for step in range(4, 8)]
    begun = Network(network(3)[1].layers, reached)
    assert_near(session, reference.run(begun, rows, of_rule(rule, 3, 3), OPTIMIZERS["sgd"][0])[-1])


@pytest.mark.covering(2)
@pytest.mark.parametrize("world", [None, Simulated], ids=["in process", "simulated"])
@pytest.mark.parametrize("rule", ["v1", "v2"])
@pytest.mark.parametrize("form", WHOLE)
def test_a_step_that_failed_at_one_stage_after_others_were_updated(form, rule, world):
    """Local losses: the stages below have made their update, and some replicas have not heard of it."""
    credit = ul.credit.DGL(head="linear", budget=None)
    session = train(trainer_of(3, 3, rule, form, credit=credit, world=world and world()), range(4))
    stages = {id(chain[2]): chain[2] for chain in session.chains}.values()
    honest = [stage.loss for stage in stages]
    for stage in stages:
        stage.loss = lambda output, y, f=stage.loss: f(output, y) * float("nan")
    with pytest.raises(NonFiniteLoss):
        train(session, [4])
    for stage, loss in zip(stages, honest):
        stage.loss = loss
    for steps in ([], range(5, 8)):
        train(session, steps)
        session.settle()
        for weights in session.weights:
            newest = next(w for w in session.weights if w.updates and w.worker.stage == weights.worker.stage)
            assert weights.worker.version == newest.worker.version
            for x, y in zip(weights.stage.parameters(), newest.stage.parameters()):
                assert torch.equal(x, y)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def messy_chain(stages=3):
    """BatchNorm and dropout, which must come back as well."""
    return ul.cut(mlp(5, norm=True, dropout=0.2), stages, like=normal(2, 5, seed=0))


def messy(rule, form, world=None, replicas=3, **options):
    options = {
        "schedule": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20),
        "clip": 1.0,
        "accumulate": 2 if form in WHOLE else 1,
    } | options
    return trainer_of(3, replicas, rule, form, "adam", messy_chain(), world=world, **options)


def blank(stages=3):
    chain = messy_chain(stages)
    with torch.no_grad():
        for x in chain.parameters():
            x.zero_()  # everything must come from the checkpoint
    return chain


def settled(session):
    session.settle()
    return of_here(session)


@pytest.mark.covering
@pytest.mark.parametrize("rule", ["v1", "v2", ODD])
@pytest.mark.parametrize("form", FORMS)
def test_resumed_at_any_step_and_in_any_world_is_uninterrupted_bit_for_bit(form, rule, tmp_path):
    count = 2 if form in WHOLE else 1
    expected = settled(train(messy(rule, form), range(6), count))
    saving = messy(rule, form)
    for step in range(6):
        saving.save(tmp_path / str(step))
        train(saving, [step], count)
    assert_same(settled(saving), expected)
    for step, world in zip(range(6), itertools.cycle([Simulated, None])):
        resumed = ul.Trainer.resume(tmp_path / str(step), blank(), world=world and world())
        assert_same(settled(train(resumed, range(step, 6), count)), expected)


@pytest.mark.parametrize("form", FORMS)
def test_saved_by_a_world_whose_replicas_are_ahead_of_each_other(form, tmp_path):
    count = 2 if form in WHOLE else 1
    session = train(messy("v1", form, Simulated()), range(3), count)
    session.save(tmp_path)
    train(session, range(3, 6), count)
    resumed = train(ul.Trainer.resume(tmp_path, blank()), range(3, 6), count)
    assert_same(settled(resumed), settled(session))
    assert_same(settled(resumed), settled(train(messy("v1", form), range(6), count)))


def test_a_rule_that_is_a_function_is_given_again(tmp_path):
    def make():
        return ul.consensus.CDP(lambda n, j: n == 2 and j < 2)

    kept = make()
    expected = of_here(train(trainer_of(3, 3, consensus=kept), range(6)))
    train(trainer_of(3, 3, consensus=kept), range(3)).save(tmp_path)
    with pytest.raises(ul.errors.BadCheckpoint, match="give it again"):
        ul.Trainer.resume(tmp_path, network(3)[0])
    resumed = ul.Trainer.resume(tmp_path, network(3)[0], consensus=make())  # another function object, the same rule
    assert_same(of_here(train(resumed, range(3, 6))), expected)


@pytest.mark.covering
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", ["v1", "v2"])
def test_a_run_may_go_on_under_another_rule_with_its_momentum(rule, form, tmp_path):
    """From data parallelism and back: as if the formula had changed its matrix in between."""
    rows = [micro_batches(step, 3) for step in range(9)]
    plain, optimizer, everywhere = network(3)[1], OPTIMIZERS["momentum"][0], [[True] * 3] * 3
    session = train(trainer_of(3, 3, consensus=ul.consensus.AllReduce()), range(3))
    session.save(tmp_path / "a")
    session = ul.Trainer.resume(tmp_path / "a", network(3)[0], consensus=ul.consensus.CDP(rule, form=form))
    train(session, range(3, 6))
    matrix = of_rule(rule, 3, 3)
    # the first cyclic step sees the newest weights everywhere
    expected = reference.run(plain, rows, [everywhere] * 4 + [matrix] * 2 + [everywhere] * 3, optimizer)
    assert_near(session, expected[6])
    session.save(tmp_path / "b")
    session = ul.Trainer.resume(tmp_path / "b", network(3)[0], consensus=ul.consensus.AllReduce())
    assert all(weights.store.optimizer.state for weights in session.weights)
    assert_near(train(session, range(6, 9)), expected[9])


@pytest.mark.covering
@pytest.mark.parametrize("before, after", list(itertools.permutations(FORMS, 2)))
def test_a_run_may_go_on_in_another_form(before, after, tmp_path):
    """θ_{t−1} is the form's own; the first step sees the newest weights everywhere."""
    train(trainer_of(3, 3, "v1", before), range(3)).save(tmp_path)
    session = ul.Trainer.resume(tmp_path, network(3)[0], consensus=ul.consensus.CDP("v1", form=after))
    train(session, range(3, 6))
    rows = [micro_batches(step, 3) for step in range(6)]
    old, everywhere = of_rule("v1", 3, 3), [[True] * 3] * 3
    rules = [old] * 3 + [everywhere] + [old] * 2
    assert_near(session, reference.run(network(3)[1], rows, rules, OPTIMIZERS["momentum"][0])[-1])


@pytest.mark.parametrize("form", WHOLE)
def test_a_run_may_go_on_with_another_number_of_stages_with_its_momentum(form, tmp_path):
    """Under a rule that does not ask for θ_{t−1}; that is of the stages that saved it."""
    model = nn.Sequential(*(layer for stage in network(3)[0] for layer in stage.body))
    train(trainer_of(3, 3, "v1", form, chain=ul.cut(model, 3, like=normal(2, 5, seed=0))), range(3)).save(tmp_path)
    chain = ul.cut(model, 2, like=normal(2, 5, seed=0))
    with pytest.raises(BadCheckpoint, match="carries weights or sums of its own stages"):
        ul.Trainer.resume(tmp_path, chain, stages=2)
    session = train(ul.Trainer.resume(tmp_path, chain, consensus=ul.consensus.AllReduce(), stages=2), range(3, 6))
    rules = [of_rule("v1", 3, 3)] * 3 + [[[True] * 3] * 3] * 3
    rows = [micro_batches(step, 3) for step in range(6)]
    found = reference.run(network(3)[1], rows, rules, OPTIMIZERS["momentum"][0])[-1]
    for trained in session.chains:
        for x, y in zip(trained.parameters(), itertools.chain.from_iterable(found), strict=True):
            torch.testing.assert_close(x.detach(), y, rtol=1e-9, atol=1e-11)


# ---- memory ----------------------------------------------------------------------------------------------------------


class Kept(torch.autograd.Function):
    """Keeps its output for the backward, and nothing else: one activation of a stage."""

    @staticmethod
    def forward(ctx, x, w):
        y = x * w
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, d):
        return d, d.sum()


class OneActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return Kept.apply(x, self.w)


@pytest.mark.covering
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("count", range(2, 7))
def test_one_device_keeps_half_and_a_bit_of_the_activations(count, micro):
    """At most N (N + 1) / 2 of them, against N · N when all replicas begin at once; and two versions of the weights.

    In a moment half of the replicas do a forward, half a backward; one device does the forwards first, as if all were done
    side by side.
    """
    x = torch.ones(2 * micro, 5, dtype=torch.float64)
    for staggered, expected in ((True, count * (count + 1) // 2), (False, count * count)):
        chain = ul.Chain([ul.Stage(OneActivation(), loss=lambda h, y: h.sum()) for _ in range(count)])
        session = trainer_of(count, count, "v1", "single-device", "sgd", chain, staggered=staggered, accumulate=micro)
        for _ in range(3):
            with SavedBytes(ignore=chain.parameters()) as meter:
                session.step([x.clone() for _ in range(count)], [x[:, 0]] * count)
            assert meter.peak == expected * x.nbytes // micro
            assert all(len(weights.versions.kept) <= 1 for weights in session.weights)


@pytest.mark.parametrize("rule", ["v1", "v2"])
def test_the_model_is_there_once_with_at_most_one_version_more(rule):
    session = trainer_of(3, 3, rule, "single-device")
    assert len({id(x) for chain in session.chains for x in chain.parameters()}) == len(
        list(session.chains[0].parameters())
    )
    most = 0

    class Look(Callback):
        def on_step(self, trainer, record):
            nonlocal most
            most = max(most, max(len(weights.versions.kept) for weights in trainer.weights))

    session.fit(ul.data.from_tensors(*batch(60)), 2, batch_size=4, callbacks=[Look()])
    assert most == 1
    held = Counter()
    for weights in session.weights:
        held |= weights.versions.held
    assert set(held) <= {session.steps - 1}  # nothing but what the next step reads


# ---- several processes -----------------------------------------------------------------------------------------------


CASES = [(2, "v1"), (2, "v2"), (3, "v1"), (3, "v2"), (3, ODD), (4, "v2")]


def begun(cluster, links, cases, folder):
    """Six steps without a look at the weights, saved after the third; what came of them, and who was ahead of whom."""
    found = []
    for k, (replicas, rule) in enumerate(cases):
        with Distributed(cluster, links=links) as world:
            session = train(messy(rule, "ring", world, replicas), range(3), 2)
            if folder is not None:
                session.save(folder / str(k))
            train(session, range(3, 6), 2)
            behind = sum(weights.newest < weights.worker.version for weights in session.weights)
            session.settle()
            found.append((of_here(session), behind))
    return found


def ended(cluster, cases, folder):
    found = []
    for k, _ in enumerate(cases):
        with Distributed(cluster) as world:
            session = train(ul.Trainer.resume(folder / str(k), blank(), world=world), range(3, 6), 2)
            session.settle()
            found.append((of_here(session), 0))
    return found


def compare(found, cases):
    """What processes came to with what one process does."""
    for k, (replicas, rule) in enumerate(cases):
        merged = {}
        for rows in found:
            merged |= rows[k][0]
        assert_same(merged, of_here(train(messy(rule, "ring", replicas=replicas), range(6), 2)))


def test_on_processes_it_is_in_process_bit_for_bit_also_resumed_on_others(tmp_path):
    found = run_processes(begun, 2, "auto", CASES, tmp_path)
    compare(found, CASES)
    assert any(behind for rows in found for _, behind in rows)  # nobody had waited for the last weights
    compare(run_processes(ended, 4, CASES, tmp_path), CASES)


def test_over_gloo_it_is_in_process_bit_for_bit():
    compare(run_processes(begun, 2, "gloo", CASES[1:4:2], None), CASES[1:4:2])


def refused_on(cluster):
    with Distributed(cluster) as world:
        with pytest.raises(InvalidChoice) as refused:
            trainer_of(2, 2, form="single-device", world=world)
    return str(refused.value)


TRAIN = ul.data.from_tensors(*batch(48))


def four_epochs(session, **options):
    session.fit(TRAIN, 4, batch_size=4, **options)


def test_a_killed_process_loses_nothing_and_one_device_needs_one_process(tmp_path):
    whole = messy("v1", "ring")
    four_epochs(whole)
    training = Training(partial(messy, "v1", "ring"), blank, four_epochs, of_here)
    (told,) = killed(training, 2, tmp_path, 1, whole.steps // 2 + 1)
    assert "The last checkpoint is" in told
    assert_same(finished(training, 2, tmp_path), of_here(whole))
    for sentence in run_processes(refused_on, 2):
        assert "keeps all replicas on one device" in sentence and "take another form" in sentence
