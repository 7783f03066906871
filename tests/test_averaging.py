"""The rules that average now and then: against a loop over plain models, at their limits, through failures and resumes."""

from __future__ import annotations

import dataclasses
import itertools
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import averaging_reference as plain
import unlocked as ul
from unlocked.consensus.averaging.codecs import codec, payload_bytes
from unlocked.consensus.averaging.exchange import Exchange
from unlocked.consensus.papa_all import drawn_pairs
from unlocked.errors import InvalidChoice, NonFiniteLoss
from unlocked.flat import bounds
from unlocked.rules.mean import ordered_mean
from unlocked.rules.outer import clipped, staleness_gap
from unlocked.simulation import Device, Hardware, costs_of, profile, simulate, uniform, unit
from unlocked.simulation.simulating import seconds_per_update
from unlocked.worlds import InProcess, Simulated
from unlocked.worlds.exchange import mean_bytes

from methods import assert_same, batch, data, mlp, state

rules = ul.consensus
OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.2),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.02),
}


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)


def session(rule, *, replicas=3, stages=1, optimizer="momentum", model=None, credit=None, **options):
    model = model or mlp()
    return ul.Trainer(
        ul.cut(model, stages, like=batch()[0].to(next(model.parameters()).dtype)),
        credit=credit,
        consensus=rule,
        replicas=replicas,
        optimizer=OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer,
        **options,
    )


def batches_of(step, replicas, size=6, dtype=torch.float64):
    return [batch(size, 100 * step + n, dtype) for n in range(replicas)]


def train(made, begin=0, end=13, dtype=torch.float64):
    for k in range(begin, end):
        pairs = batches_of(k, made.replicas, dtype=dtype)
        made.step([x for x, _ in pairs], [y for _, y in pairs])
    return made


def trained(rule, steps=13, **options):
    return train(session(rule, **options), 0, steps)


def parts_of(made):
    return [len(list(stage.parameters())) for stage in made.chains[0]]


def weights_of(made):
    """Per replica, all weights in a row."""
    return [plain.vector(list(chain.parameters())) for chain in made.chains]


def still(parameters):
    """An optimizer that makes no step."""
    return torch.optim.SGD(parameters, lr=0.0)


def apart(made, seed=0):
    """Give every replica weights of its own."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for chain in made.chains:
            for x in chain.parameters():
                x.copy_(torch.randn(x.shape, generator=source, dtype=torch.float64))
    return made


# ---- against the sequential reference --------------------------------------------------------------------------------

PAPA = [
    ({"alpha": 0.3, "period": 4}, {}),
    ({"alpha": 0.3, "period": 3, "overlap": 2}, {}),
    ({"alpha": 0.5, "period": 4, "overlap": 3, "anneal": False, "staggered": True}, {}),
    ({"alpha": 1.0, "period": 1}, {}),
]
LOCAL = [
    ({"period": 4}, {}),
    ({"period": 4, "overlap": 1}, {}),
    ({"period": 5, "overlap": 4}, {}),
    ({"period": 3, "staggered": True, "overlap": 2}, {}),
    ({"period": 3, "shared": 5}, {}),
    ({"period": 4, "optimizer_state": "average"}, {"state": "average"}),
    ({"period": 4, "optimizer_state": "reset"}, {"state": "reset"}),
    ({"period": 4, "overlap": 2, "optimizer_state": "reset"}, {"state": "reset"}),
]
OUTER = {
    "nesterov": ({}, lambda xs: torch.optim.SGD(xs, lr=0.7, momentum=0.9, nesterov=True)),
    "plain": ({"nesterov": False, "outer_lr": 0.5}, lambda xs: torch.optim.SGD(xs, lr=0.5, momentum=0.9)),
}


def compare(rule, kind, *, replicas, stages, optimizer, steps=13, schedule=cosine, **options):
    made = session(rule, replicas=replicas, stages=stages, optimizer=optimizer, schedule=schedule)
    reference = kind(mlp(), replicas, OPTIMIZERS[optimizer], parts_of(made), schedule=schedule, **options)
    for k in range(steps):
        train(made, k, k + 1)
        reference.step(batches_of(k, replicas))
        for n, chain in enumerate(made.chains):
            for x, y in zip(chain.parameters(), reference.models[n].parameters()):
                torch.testing.assert_close(
                    x, y, rtol=1e-10, atol=1e-11, msg=lambda text, k=k: f"update {k + 1}: {text}"
                )
    return made, reference


def same_options(given):
    """What the reference calls the same."""
    return {key: value for key, value in given.items() if key != "optimizer_state"}


SIZES = [("sgd", 2, 1), ("momentum", 3, 2), ("adam", 4, 3)]  # optimizer, replicas, stages


@pytest.mark.covering
@pytest.mark.parametrize(("optimizer", "replicas", "stages"), SIZES)
@pytest.mark.parametrize(("options", "more"), PAPA)
def test_papa(options, more, optimizer, replicas, stages):
    compare(rules.PAPA(**options), plain.Papa, replicas=replicas, stages=stages, optimizer=optimizer, **options)


@pytest.mark.covering
@pytest.mark.parametrize(("optimizer", "replicas", "stages"), SIZES)
@pytest.mark.parametrize(("options", "more"), LOCAL)
def test_local_sgd(options, more, optimizer, replicas, stages):
    given = same_options(options) | more
    compare(rules.LocalSGD(**options), plain.LocalSGD, replicas=replicas, stages=stages, optimizer=optimizer, **given)


@pytest.mark.parametrize("overlap", [0, 1])
def test_local_sgd_with_a_period_for_each_stage(overlap):
    options = {"period": (2, 3, 5), "overlap": overlap}
    compare(rules.LocalSGD(**options), plain.LocalSGD, replicas=3, stages=3, optimizer="momentum", **options)


@pytest.mark.covering
@pytest.mark.parametrize("levels", [((2, 2), (6, 4)), ((1, 1), (2, 2), (5, 4)), ((3, 4),)])
@pytest.mark.parametrize("kept", ["local", "average"])
def test_hierarchical_local_sgd(levels, kept):
    rule = rules.LocalSGD(hierarchy=levels, optimizer_state=kept)
    compare(rule, plain.LocalSGD, replicas=4, stages=2, optimizer="adam", hierarchy=levels, state=kept)


@pytest.mark.covering
@pytest.mark.parametrize(("optimizer", "replicas", "stages"), SIZES)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.7), (0.5, 0.3), (1.0, 0.0)])
def test_slowmo_in_the_papers_own_form(alpha, beta, optimizer, replicas, stages):
    options = {"alpha": alpha, "beta": beta, "period": 3, "staggered": stages == 3}
    compare(rules.SlowMo(**options), plain.SlowMo, replicas=replicas, stages=stages, optimizer=optimizer, **options)


@pytest.mark.covering
@pytest.mark.parametrize(("optimizer", "replicas", "stages"), SIZES)
@pytest.mark.parametrize("outer", OUTER)
def test_diloco(outer, optimizer, replicas, stages):
    given, make = OUTER[outer]
    rule = rules.DiLoCo(period=4, **given)
    compare(rule, plain.DiLoCo, replicas=replicas, stages=stages, optimizer=optimizer, period=4, outer=make)


@pytest.mark.parametrize(
    ("period", "fragments", "overlap", "mixing", "stages"),
    [(4, 2, 0, 0.0, 1), (6, 3, 2, 0.5, 1), (6, 3, 5, 0.5, 1), (4, 4, 3, 0.25, 1), (4, 2, 3, 0.5, 2), (3, 5, 2, 0.0, 1)],
)
def test_streaming_diloco(period, fragments, overlap, mixing, stages):
    given, make = OUTER["nesterov"]
    options = {"period": period, "fragments": fragments, "overlap": overlap, "mixing": mixing}
    compare(
        rules.DiLoCo(**options, **given),
        plain.DiLoCo,
        replicas=3,
        stages=stages,
        optimizer="adam",
        outer=make,
        steps=20,
        **options,
    )


@pytest.mark.covering
@pytest.mark.parametrize(("optimizer", "replicas", "stages"), SIZES)
@pytest.mark.parametrize(
    ("period", "beta", "clip", "penalty"),
    [(3, 0.2, None, True), (3, 0.5, 0.05, True), (2, 0.3, None, False), (1, 0, 1, 0)],
)
def test_co2(period, beta, clip, penalty, optimizer, replicas, stages):
    options = {"period": period, "alpha": 0.8, "beta": beta, "clip": clip, "penalty": penalty}
    options["staggered"] = period == 3
    compare(rules.CO2(**options), plain.CO2, replicas=replicas, stages=stages, optimizer=optimizer, **options)


@pytest.mark.covering
@pytest.mark.parametrize(("optimizer", "replicas", "stages"), SIZES)
@pytest.mark.parametrize("options", [{"period": 3}, {"period": 4, "overlap": 3, "rho": 0.2}, {"period": 1, "rho": 0.1}])
def test_easgd(options, optimizer, replicas, stages):
    made, reference = compare(
        rules.EASGD(**options), plain.Easgd, replicas=replicas, stages=stages, optimizer=optimizer, **options
    )
    centre = torch.cat(reference.centre)
    torch.testing.assert_close(plain.vector(list(made.averaged().parameters())), centre, rtol=1e-10, atol=1e-11)


def groups_of(rule, seed, replicas, epoch):
    if epoch < rule.shared or not hasattr(rule, "epochs") or (epoch + 1) % rule.epochs:
        return None
    if isinstance(rule, rules.PAPA2):
        return drawn_pairs(replicas, seed, epoch)
    return [range(replicas)] * replicas


@pytest.mark.covering
@pytest.mark.parametrize("replicas", [2, 3, 4])
@pytest.mark.parametrize(
    "rule",
    [
        rules.PAPAAll(epochs=2),
        rules.PAPAAll(epochs=1, shared=2),
        rules.PAPA2(epochs=1),
        rules.PAPA2(epochs=2, shared=1),
        rules.BTM(),
        rules.BTM(shared=3),
    ],
    ids=repr,
)
def test_populations_merged_by_epochs(rule, replicas):
    made = session(rule, replicas=replicas, stages=2, seed=5)
    reference = plain.ByEpochs(mlp(), replicas, OPTIMIZERS["momentum"], parts_of(made), shared=rule.shared)
    for epoch in range(6):
        for k in range(2):
            train(made, 2 * epoch + k, 2 * epoch + k + 1)
            reference.step(batches_of(2 * epoch + k, replicas))
        made.end_epoch()
        reference.end_epoch(groups_of(rule, 5, replicas, epoch))
        for chain, model in zip(made.chains, reference.models):
            for x, y in zip(chain.parameters(), model.parameters()):
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


def test_pairs_are_of_different_replicas_and_all_equally_likely():
    counts: dict[tuple[int, int], int] = {}
    for epoch in range(1500):
        for pair in drawn_pairs(4, 0, epoch):
            counts[pair] = counts.get(pair, 0) + 1
    assert sorted(counts) == list(itertools.combinations(range(4), 2))
    assert all(abs(count - 1000) < 5 * 1000**0.5 for count in counts.values())


# ---- limits ----------------------------------------------------------------------------------------------------------


def assert_equal_runs(one, other, exact=True, steps=13, **options):
    a, b = state(trained(one, steps, **options)), state(trained(other, steps, **options))
    if exact:
        assert_same(a, b)
    else:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("one", "other", "exact"),
    [
        (rules.PAPA(alpha=0.0, period=2), rules.Independent(), True),
        (rules.PAPA(alpha=0.0, period=3, overlap=2), rules.Independent(), True),
        (rules.PAPA(alpha=1.0, anneal=False, period=3), rules.LocalSGD(period=3), True),
        (rules.PAPA(alpha=1.0, anneal=False, period=3, overlap=2), rules.LocalSGD(period=3, overlap=2), True),
        (rules.LocalSGD(period=1000), rules.Independent(), True),
        (rules.LocalSGD(period=4, shared=1000), rules.AllReduce(), True),
        (rules.SlowMo(alpha=1.0, beta=0.0, period=3), rules.LocalSGD(period=3), False),
        (rules.DiLoCo(period=3, outer_lr=1.0, outer_momentum=0.0), rules.LocalSGD(period=3), False),
        (rules.DiLoCo(period=1, outer_lr=1.0, outer_momentum=0.0), rules.PAPA(alpha=1, anneal=False, period=1), False),
        (rules.LocalSGD(period=(4, 4, 4)), rules.LocalSGD(period=4), True),
        (rules.LocalSGD(hierarchy=((4, 4),)), rules.LocalSGD(period=4), True),
        (rules.LocalSGD(hierarchy=((4, 4),), overlap=3), rules.LocalSGD(period=4, overlap=3), True),
        (rules.EASGD(rho=0.0, period=2), rules.Independent(), True),
        (rules.EASGD(rho=0.0, period=2, asynchronous=True), rules.Independent(), True),
        (rules.PAPAAll(epochs=9), rules.Independent(), True),
        (rules.BTM(shared=0), rules.Independent(), True),
        (rules.BTM(shared=1), rules.AllReduce(), True),
    ],
    ids=repr,
)
def test_one_rule_is_another_at_its_limit(one, other, exact):
    assert_equal_runs(one, other, exact, replicas=4, stages=3, schedule=cosine)


def test_local_sgd_after_every_update_is_all_reduce_for_plain_sgd():
    assert_equal_runs(rules.LocalSGD(period=1), rules.AllReduce(), exact=False, optimizer="sgd", stages=2)


@pytest.mark.parametrize(
    "rule",
    [
        rules.PAPA(alpha=0.5, period=2),
        rules.PAPA(alpha=0.5, period=3, overlap=2),
        rules.PAPA(alpha=0.5, period=2, compression="int8"),
        rules.LocalSGD(period=2),
        rules.LocalSGD(period=3, overlap=2),
        rules.LocalSGD(period=2, compression="topk:0.1"),
        rules.LocalSGD(period=2, shared=3, optimizer_state="average"),
        rules.PAPAAll(epochs=1),
        rules.PAPA2(epochs=1),
        rules.BTM(shared=2),
    ],
    ids=repr,
)
def test_one_replica_is_ordinary_training(rule):
    one, other = (trained(given, 7, replicas=1, stages=2, schedule=cosine) for given in (rule, rules.Independent()))
    one.end_epoch()
    assert_same(state(one), state(other))


def test_co2_without_its_extras_is_local_sgd_one_round_late():
    """x_{t+1} = x_t − (x_{t−1} − θ̄_{t−1}), in three lines."""
    made = session(rules.CO2(alpha=1.0, beta=0.0, penalty=False, period=3), optimizer="sgd")
    x = [weights_of(made)[0]]
    ended = []
    for update in range(1, 19):
        local = session(rules.Independent(), optimizer="sgd", replicas=3)
        for chain in local.chains:
            plain.write(x[-1], list(chain.parameters()))
        train(made, update - 1, update)
        if update % 3 == 0:
            train(local, update - 3, update)
            ended.append(plain.mean(weights_of(local)))
            before = None if len(ended) == 1 else (x[-2], ended[-2])
            x.append(x[-1] if before is None else x[-1] - (before[0] - before[1]))
            for row in weights_of(made):
                torch.testing.assert_close(row, x[-1], rtol=1e-10, atol=1e-11)


def test_rho_of_1_over_n_puts_the_centre_at_the_mean():
    made = apart(session(rules.EASGD(rho=0.25, period=3), replicas=4, optimizer=still))
    middle = plain.mean(weights_of(made))
    train(made, 0, 3)
    torch.testing.assert_close(plain.vector(list(made.averaged().parameters())), middle)


@pytest.mark.parametrize("factor", [0.5, 0.0, 1.0, 2.0])
def test_papas_share_follows_the_rate_of_the_update_just_made(factor):
    """The averaging is after the second update; neither the first one's rate nor the third one's matters."""

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: [0.9, factor, 7.0][min(k, 2)])

    made = session(rules.PAPA(alpha=0.4, period=2), optimizer="sgd", schedule=schedule)
    alone = session(rules.Independent(), optimizer="sgd", schedule=schedule)
    train(made, 0, 2), train(alone, 0, 2)
    rows = weights_of(alone)
    middle = plain.mean(rows)
    for mine, row in zip(weights_of(made), rows):
        torch.testing.assert_close(mine, row + 0.4 * factor * (middle - row), rtol=1e-12, atol=1e-13)


def test_groups_with_rates_of_their_own_are_pulled_by_them():
    def two_rates(parameters):
        return torch.optim.SGD([{"params": parameters[:2], "lr": 0.0}, {"params": parameters[2:]}], lr=0.1)

    def only_the_first(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda k: 1.0, lambda k: 0.5])

    made = session(rules.PAPA(alpha=0.4, period=1), optimizer=two_rates, schedule=only_the_first)
    alone = session(rules.Independent(), optimizer=two_rates, schedule=only_the_first)
    apart(made), apart(alone)
    train(made, 0, 1), train(alone, 0, 1)
    for k, columns in enumerate(zip(*(list(chain.parameters()) for chain in alone.chains))):
        middle = plain.mean([x.detach() for x in columns])
        share = 0.4 if k < 2 else 0.2  # a rate of 0 says nothing: α itself
        for mine, x in zip([list(chain.parameters())[k] for chain in made.chains], columns):
            torch.testing.assert_close(mine, x + share * (middle - x), rtol=1e-12, atol=1e-13)


# ---- what is conserved -----------------------------------------------------------------------------------------------

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}


@settings(max_examples=20, deadline=None)
@given(
    replicas=st.integers(1, 5),
    dtype=st.sampled_from(list(DTYPES)),
    period=st.integers(1, 5),
    late=st.integers(0, 4),
    kind=st.sampled_from(["papa", "local-sgd", "easgd"]),
    stages=st.integers(1, 2),
)
def test_an_averaging_keeps_the_sum(replicas, dtype, period, late, kind, stages):
    overlap = min(late, period - 1)
    rule = {
        "papa": rules.PAPA(alpha=0.3, period=period, overlap=overlap),
        "local-sgd": rules.LocalSGD(period=period, overlap=overlap),
        "easgd": rules.EASGD(rho=0.15, period=period, overlap=overlap),
    }[kind]
    made = apart(session(rule, replicas=replicas, stages=stages, optimizer=still, model=mlp(2, dtype=dtype)))
    before = sum(row.double() for row in weights_of(made))
    if kind == "easgd":  # the centre begins at replica 0's weights, as replicas begin alike; here it is given
        centres = [[row.clone() for row in weights.sent(weights.fragments[0])] for weights in made.weights[:stages]]
        for weights in made.weights:
            weights.centre = [row.clone() for row in centres[weights.worker.stage]]
        before = before + torch.cat([row.double() for rows in centres for row in rows])
    rows = weights_of(made)
    for k in range(period + overlap):
        train(made, k, k + 1, dtype)
    after = sum(row.double() for row in weights_of(made))
    if kind == "easgd":
        after = after + torch.cat([row.double() for weights in made.weights[:stages] for row in weights.centre])
    torch.testing.assert_close(after, before, rtol=DTYPES[dtype], atol=10 * DTYPES[dtype])
    share = {"papa": 0.3, "local-sgd": 1.0, "easgd": 0.15}[kind]
    expected = (
        plain.consensus_distance(rows) * (1 - share) ** 2
    )  # to their own mean: a spring to a centre does the same
    assert plain.consensus_distance(weights_of(made)) == pytest.approx(expected, rel=20 * DTYPES[dtype], abs=1e-10)
    if replicas > 1 and kind == "papa":
        assert plain.consensus_distance(rows) > 1.0


@settings(max_examples=12, deadline=None)
@given(
    replicas=st.integers(2, 4),
    compression=st.sampled_from(["bf16", "int8", "int8:16", "topk:0.1"]),
    overlap=st.integers(0, 1),
)
def test_what_a_codec_leaves_out_of_local_sgd_is_only_late(replicas, compression, overlap):
    """Σ_n θ_n and what is owed are together all the progress that was made: here noise, by hand, before each update."""
    rule = rules.LocalSGD(period=2, overlap=overlap, compression=compression)
    made = session(rule, replicas=replicas, optimizer=still, model=mlp(2))
    source = torch.Generator().manual_seed(1)
    expected = sum(weights_of(made))
    for k in range(10 + overlap):
        for chain in made.chains if k < 10 else ():
            noise = torch.randn(len(expected), generator=source, dtype=torch.float64)
            expected = expected + noise
            parameters = list(chain.parameters())
            plain.write(plain.vector(parameters) + noise, parameters)
        train(made, k, k + 1)
    owed = owed_of(made)
    torch.testing.assert_close(sum(weights_of(made)) + owed, expected, rtol=1e-9, atol=1e-8)
    assert owed.norm() > (1.0 if compression.startswith("topk") else 1e-4)


def owed_of(made):
    """What all members owe of the sum of the weights; what an owner of a part owes of the mean counts N times."""
    size = made.replicas
    total = torch.zeros(sum(x.numel() for x in made.chains[0].parameters()), dtype=torch.float64)
    cuts = bounds(len(total), size)
    for weights in made.weights:
        for name, x in weights.fragments[0].exchange.carried()["feedback"].items():
            kind, _, _ = name.partition("/")
            member = weights.worker.replica if kind == "mean" else int(kind)
            total[cuts[member] : cuts[member + 1]] += x.double() * (size if kind == "mean" else 1)
    return total


# ---- exchanges -------------------------------------------------------------------------------------------------------


def exchanged(rows, members, compression="none", turn=0, end=0, sends="rows", repeat=1):
    """The means that the members get of rows[n] = one row per dtype, begun, turned and ended in three runs; and the bytes."""
    world = InProcess()
    replicas = max(members) + 1
    workers = [worker for worker in world.mesh(replicas, 1) if worker.replica in members]
    exchanges = [Exchange(worker, "here", members, codec(compression), sends) for worker in workers]
    world.crossing = frozenset(["here/parts", "here/means"])
    found, sent = [None] * len(members), dict.fromkeys(members, 0)

    def run(programs):
        for act in world.run(zip(workers, programs)):
            sent[act.replica] += act.bytes if act.kind in ("S", "M") else 0

    async def take(k):
        found[k] = await exchanges[k].end()

    for _ in range(repeat):
        run([one.begin(rows[n]) for one, n in zip(exchanges, members)])
        if turn == "collected":
            run([one.collect() for one in exchanges])
        run([one.turn() for one in exchanges])
        if turn == "collected":
            run([one.collect() for one in exchanges])
        run([take(k) for k in range(len(members))])
    assert not any(one.under_way for one in exchanges)
    return found, sent


ROWS = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
    min_size=1,
    max_size=3,
)


@settings(max_examples=40, deadline=None)
@given(
    shapes=ROWS,
    members=st.sets(st.integers(0, 5), min_size=1, max_size=5),
    seed=st.integers(0, 9),
    turn=st.sampled_from([0, "collected"]),
)
def test_an_exchange_in_parts_is_the_ordered_mean_bit_for_bit(shapes, members, seed, turn):
    members = sorted(members)
    source = torch.Generator().manual_seed(seed)
    rows = {n: [torch.randn(count, generator=source).to(dtype) for count, dtype in shapes] for n in members}
    found, sent = exchanged(rows, members, turn=turn)
    for k in range(len(shapes)):
        column = [rows[n][k] for n in members]
        expected = ordered_mean([x.clone() for x in column]) if len(members) > 1 else column[0]
        assert all(torch.equal(row[k], expected) for row in found)
    for rank, n in enumerate(members):
        assert sent[n] == sum(mean_bytes([x], rank, len(members)) for x in rows[n])


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 2000),
    size=st.integers(2, 4),
    compression=st.sampled_from(["bf16", "int8", "int8:64", "topk:0.1"]),
    seed=st.integers(0, 9),
)
def test_through_a_codec_all_members_get_the_same_bits_and_the_codecs_bytes_travel(count, size, compression, seed):
    source = torch.Generator().manual_seed(seed)
    members = list(range(size))
    rows = {n: [torch.randn(count, generator=source)] for n in members}
    found, sent = exchanged(rows, members, compression)
    assert all(torch.equal(row[0], found[0][0]) for row in found)
    cuts = [end - begin for begin, end in itertools.pairwise(bounds(count, size))]
    parts = [payload_bytes(codec(compression).empty(torch.empty(k))) for k in cuts]
    for n in members:
        assert sent[n] == sum(parts) - parts[n] + (size - 1) * parts[n]
    if compression == "bf16":
        torch.testing.assert_close(found[0][0], sum(row[0] for row in rows.values()) / size, rtol=0.02, atol=0.02)


@pytest.mark.covering
@pytest.mark.parametrize("compression", ["bf16", "int8", "int8:16", "topk:0.1"])
@pytest.mark.parametrize("sends", ["estimates", "rows"])
def test_rows_that_stay_are_known_better_every_time(compression, sends):
    """Through estimates the mean of rows that do not move is found; as rows, by the mean over time."""
    rows = {n: [torch.randn(60, generator=torch.Generator().manual_seed(n)).double()] for n in range(3)}
    expected = sum(row[0] for row in rows.values()) / 3
    first = exchanged(rows, [0, 1, 2], compression, sends=sends)[0][0][0]
    found = exchanged(rows, [0, 1, 2], compression, sends=sends, repeat=60)[0][0][0]
    if sends == "estimates":
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    elif compression == "bf16":
        torch.testing.assert_close(first, expected, rtol=0.02, atol=0.02)


# ---- compression -----------------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("compression", ["bf16", "int8", "topk:0.1"])
@pytest.mark.parametrize("options", [{}, {"hierarchy": ((2, 2), (4, 4))}], ids=str)
def test_after_an_averaging_all_replicas_of_local_sgd_have_the_same_bits(compression, options):
    made = session(rules.LocalSGD(period=4, compression=compression, **options), replicas=4, stages=2)
    for k in range(12):
        train(made, k, k + 1)
        rows = weights_of(made)
        pairs_alike = torch.equal(rows[0], rows[1]) and torch.equal(rows[2], rows[3])
        assert all(torch.equal(row, rows[0]) for row in rows) == (k % 4 == 3)
        assert pairs_alike == (k % 2 == 1 if options else k % 4 == 3)


def test_nothing_is_averaged_while_gradients_are_shared():
    made = trained(rules.LocalSGD(period=2, shared=4), 4)
    assert set(made.bytes_sent) == {"all-reduce"}
    assert set(train(made, 4, 6).bytes_sent) == {"all-reduce", "local-sgd"}


def test_groups_go_on_from_what_all_have():
    """Without training nothing is left to average in a group after all have: also through a codec that leaves out most."""
    rule = rules.LocalSGD(hierarchy=((2, 2), (4, 4)), compression="topk:0.1")
    made = apart(session(rule, replicas=4, optimizer=still))
    middle = plain.mean(weights_of(made))
    train(made, 0, 6)
    for row in weights_of(made):
        torch.testing.assert_close(row, middle, rtol=1e-12, atol=1e-13)


@pytest.mark.covering
@pytest.mark.parametrize(
    ("rule", "near"),
    [
        (lambda c: rules.PAPA(alpha=0.3, period=2, compression=c), 0.01),
        (lambda c: rules.PAPA(alpha=0.3, period=3, overlap=2, compression=c), 0.01),
        (lambda c: rules.LocalSGD(period=2, compression=c), 0.02),
        (lambda c: rules.DiLoCo(period=3, compression=c), 0.02),
        (lambda c: rules.SlowMo(period=3, compression=c), 0.02),
        (lambda c: rules.CO2(period=3, compression=c), 0.02),
        (lambda c: rules.EASGD(period=2, compression=c), 0.01),
    ],
)
@pytest.mark.parametrize("compression", ["bf16", "int8"])
def test_compressed_is_close_to_whole(rule, near, compression):
    made, whole = (torch.stack(weights_of(trained(rule(c), 20))) for c in (compression, "none"))
    begin = torch.stack(weights_of(session(rule("none"))))
    assert 0 < (made - whole).norm() < near * (whole - begin).norm()


@pytest.mark.covering
@pytest.mark.parametrize("make", [rules.PAPA, rules.EASGD], ids=["papa", "easgd"])
@pytest.mark.parametrize("compression", ["topk:0.05", "int8", "bf16"])
def test_a_pull_through_a_codec_comes_to_the_same_consensus(make, compression):
    """Replicas that only pull at each other: their distance shrinks, their mean stays near, with any codec."""
    options = {"alpha": 0.2} if make is rules.PAPA else {"rho": 0.2}
    made = apart(session(make(period=1, compression=compression, **options), optimizer=still))
    before, middle = plain.consensus_distance(weights_of(made)), plain.mean(weights_of(made))
    train(made, 0, 40)
    assert plain.consensus_distance(weights_of(made)) < (0.1 if compression.startswith("topk") else 1e-3) * before
    if make is rules.PAPA:  # the mean that is pulled to is known better and better; until then the true one moves
        far = 0.5 if compression.startswith("topk") else 0.01
        assert (plain.mean(weights_of(made)) - middle).norm() < far * middle.norm()


@pytest.mark.covering
@pytest.mark.parametrize(("compression", "ratio"), [("int8", 0.25), ("bf16", 0.5)])
@pytest.mark.parametrize(
    "rule", [rules.LocalSGD(period=2), rules.PAPA(period=2), rules.DiLoCo(period=2), rules.EASGD(period=2)], ids=repr
)
def test_bytes_of_a_compressed_averaging(rule, compression, ratio):
    model = nn.Sequential(nn.Linear(5, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 3))
    sent = {}
    for how in (compression, "none"):
        made = session(dataclasses.replace(rule, compression=how), model=model, replicas=4)
        train(made, 0, 2, torch.float32)
        before = made.bytes_sent.total()
        train(made, 2, 4, torch.float32)
        sent[how] = made.bytes_sent.total() - before
    assert sent[compression] / sent["none"] == pytest.approx(ratio, rel=0.05)
    values = sum(x.numel() for x in model.parameters())
    assert sent["none"] == pytest.approx(4 * 2 * 3 / 4 * 4 * values, rel=1e-3)


# ---- checkpoints -----------------------------------------------------------------------------------------------------

EVERY_STATE = [
    rules.PAPA(alpha=0.3, period=5, overlap=4),
    rules.PAPA(alpha=0.3, period=4, compression="topk:0.2", overlap=3),
    rules.LocalSGD(period=(4, 6), overlap=3, staggered=True),
    rules.LocalSGD(period=3, compression="int8", optimizer_state="average"),
    rules.LocalSGD(hierarchy=((4, 2), (8, 4)), overlap=3, compression="topk:0.2"),
    rules.SlowMo(period=3, compression="topk:0.2"),
    rules.DiLoCo(period=3, compression="topk:0.2"),
    rules.DiLoCo(period=6, fragments=3, overlap=5, mixing=0.5),
    rules.CO2(period=4, compression="int8"),
    rules.EASGD(period=4, overlap=3, compression="topk:0.2"),
    rules.EASGD(period=2, asynchronous=True),
    rules.PAPAAll(epochs=1, compression="topk:0.2", shared=1),
    rules.PAPA2(epochs=1, shared=1),
    rules.BTM(shared=2),
]


def by_epochs(made, begin, end):
    """Steps; every fourth ends an epoch."""
    for k in range(begin, end):
        train(made, k, k + 1)
        if k % 4 == 3:
            made.end_epoch()
    return made


def blank(stages=2):
    return ul.cut(mlp(), stages, like=batch()[0])


@pytest.mark.parametrize("rule", EVERY_STATE, ids=repr)
def test_resumed_is_not_stopped_bit_for_bit(rule, tmp_path):
    """Stopped after every one of six updates: between begin and turn, between turn and end, and in between exchanges."""
    whole = session(rule, replicas=4, stages=2, optimizer="adam", schedule=cosine, seed=3)
    for k in range(10):
        if k >= 4:
            whole.save(tmp_path / str(k))
        by_epochs(whole, k, k + 1)
    whole.settle()
    expected = state(whole)
    for k in range(4, 10):
        again = by_epochs(ul.Trainer.resume(tmp_path / str(k), blank()), k, 10)
        assert_same(state(again), expected)


# ---- under a clock ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [rule for rule in EVERY_STATE if not getattr(rule, "asynchronous", False)], ids=repr)
def test_a_simulated_world_gives_the_same_bits(rule, tmp_path):
    """Messages are late there, fragments' exchanges lie across each other, and nothing settles but what asks for it."""
    hardware = Hardware(Device(1e6), speeds=(1.0, 0.3), network=uniform(1e-3, 1e5))
    options = {"replicas": 4, "stages": 2, "seed": 3, "schedule": cosine}
    timed, made = session(rule, world=Simulated(hardware), **options), session(rule, **options)
    by_epochs(made, 0, 11), by_epochs(timed, 0, 7)
    timed.save(tmp_path)
    again = ul.Trainer.resume(tmp_path, blank(), world=Simulated(hardware))
    for one in (timed, again):
        by_epochs(one, 7, 11).settle()
        assert_same(state(one), state(made))


def test_fragments_that_are_under_way_together_do_not_mix(tmp_path):
    """After 12 updates the parts of the last fragment, begun at 10, and of the first, begun at 12, are on their way."""
    rule = rules.DiLoCo(period=6, fragments=3, overlap=5, mixing=0.5)
    timed, made = session(rule, world=Simulated(Hardware(network=uniform(1e-3, 1e5)))), session(rule)
    train(timed, 0, 12).save(tmp_path)
    train(timed, 12, 18).settle()
    assert_same(state(timed), state(train(made, 0, 18)))


def seconds(rule, exchange, period=4):
    """Per update, once it runs evenly; an update computes for 3 s, an exchange of all weights lasts so long."""
    hardware = Hardware(network=uniform(bandwidth=6000.0 / exchange))
    timeline = simulate(
        ul.credit.Backprop(), rule, costs=unit(1, weights=1000), replicas=4, steps=10 * period, hardware=hardware
    )
    return seconds_per_update(timeline, 4 * period)[ul.worker.Place(0, 0)]


@pytest.mark.parametrize(
    ("make", "exchange", "hidden"),
    [
        (lambda tau: rules.LocalSGD(period=4, overlap=tau), 3.0, 3),
        (lambda tau: rules.PAPA(period=4, overlap=tau), 3.0, 3),
        (lambda tau: rules.DiLoCo(period=4, overlap=tau), 3.0, 3),
        (lambda tau: rules.EASGD(period=4, overlap=tau), 3.0, 3),
        (lambda tau: rules.LocalSGD(period=4, overlap=tau, compression="int8"), 12.0, 3),
    ],
)
def test_on_a_clock_an_overlapped_exchange_is_free(make, exchange, hidden):
    free = seconds(rules.Independent(), exchange)
    assert seconds(make(hidden), exchange) == pytest.approx(free, rel=1e-9)
    assert seconds(make(0), exchange) == pytest.approx(free + (exchange if exchange == 3.0 else 3.1) / 4, rel=0.05)
    assert seconds(make(hidden), 40 * exchange) > 1.5 * free


def test_on_a_clock_co2_hides_what_slowmo_waits_for():
    free = seconds(rules.Independent(), 8.0)
    assert seconds(rules.CO2(period=4), 8.0) == pytest.approx(free, rel=1e-9)
    assert seconds(rules.SlowMo(period=4), 8.0) == pytest.approx(free + 2.0, rel=0.01)


@pytest.mark.covering
@pytest.mark.parametrize("with_chain", [False, True])
@pytest.mark.parametrize("rule", [*EVERY_STATE, rules.LocalSGD(shared=3, period=2)], ids=repr)
def test_shapes_are_enough_to_simulate(rule, with_chain):
    chain = blank()
    options = {
        "costs": costs_of(profile(chain), Device()),
        "replicas": 4,
        "steps": 18,
        "chain": chain if with_chain else None,
    }
    timeline = simulate(ul.credit.DGL(head="linear", budget=None), rule, **options)
    updates = [act for act in timeline if act.kind == "U" and act.replica == 0 and act.stage == 0]
    assert len({act.micro_batch for act in updates}) == 18
    alone = simulate(ul.credit.DGL(head="linear", budget=None), rules.Independent(), **options)
    assert sum(act.bytes for act in timeline) > sum(act.bytes for act in alone) or isinstance(rule, rules.PAPA2)


# ---- steps that fail -------------------------------------------------------------------------------------------------


def poisoned(made, k, victim):
    pairs = batches_of(k, made.replicas)
    rows = [x.clone() for x, _ in pairs]
    rows[victim][:] = float("nan")
    with pytest.raises(NonFiniteLoss):
        made.step(rows, [y for _, y in pairs])


FAILING = [
    rules.PAPA(alpha=0.5, period=3, overlap=2),
    rules.PAPA(alpha=0.5, period=2, compression="int8"),
    rules.LocalSGD(period=3, overlap=2),
    rules.LocalSGD(period=3, overlap=2, compression="int8"),
    rules.LocalSGD(period=2, compression="topk:0.2"),
    rules.WASH(p=0.5),
    rules.SlowMo(period=3),
    rules.DiLoCo(period=3, overlap=2),
    rules.DiLoCo(period=4, fragments=2, overlap=3, compression="int8"),
    rules.CO2(period=3),
    rules.EASGD(period=3, overlap=2, compression="int8"),
    rules.EASGD(period=2, asynchronous=True),
    rules.PAPAAll(epochs=1),
]


def alike(made):
    """What must be alike on all replicas under a rule, by stage: last means, slow weights and centres."""
    found = {}
    for weights in made.weights:
        kept = weights.carried()
        row = []
        for fragment in kept.get("fragments", []):
            row += (fragment or {"exchange": {"last": None}})["exchange"]["last"] or []
        for name in ("slow", "outer", "x", "u", "centre"):
            row += flattened(kept.get(name))
        found.setdefault(weights.worker.stage, []).append(row)
    return found


def flattened(x):
    if isinstance(x, (list, tuple)):
        return [one for part in x for one in flattened(part)]
    return [] if x is None else [x]


@pytest.mark.covering
@pytest.mark.parametrize("credit", [None, ul.credit.DGL(head="linear", budget=None)], ids=["backprop", "dgl"])
@pytest.mark.parametrize("rule", FAILING, ids=repr)
def test_after_a_step_that_failed_training_goes_on(rule, credit):
    for bad, victim in [(0, 1), (4, 1), (5, 2), (6, 1)] if credit is None else [(4, 1), (7, 2)]:
        made = session(rule, stages=2, credit=credit)
        for k in range(16):
            if k == bad:
                poisoned(made, k, victim)
            train(made, k, k + 1)
            for stage in (0, 1):
                assert len({w.worker.version for w in made.weights if w.worker.stage == stage}) == 1
        made.settle()
        assert all(row.isfinite().all() for row in weights_of(made))
        if not getattr(rule, "asynchronous", False):
            for rows in alike(made).values():
                assert all(len(row) == len(rows[0]) for row in rows)
                assert all(torch.equal(a, b) for row in rows[1:] for a, b in zip(row, rows[0]))
        if isinstance(rule, rules.LocalSGD):
            for k in range(16, 22):
                train(made, k, k + 1)
                rows = weights_of(made)
                if rule.overlap == 0 and made.weights[0].worker.version % rule.period == 0:
                    assert all(torch.equal(row, rows[0]) for row in rows)


# ---- with other credit rules -----------------------------------------------------------------------------------------

SMALL = ul.heads.MLPHead(hidden=6, depth=1)
TRAIN, EPOCHS = data(60), 6
PAIRS = {
    "a swarm of layers": (lambda: ul.credit.DGL(head="linear", budget=None), rules.LocalSGD(period=(2, 3, 5))),
    "dgl staggered": (
        lambda: ul.credit.DGL(head="linear", budget=None),
        rules.LocalSGD(period=4, staggered=True, overlap=2),
    ),
    "dgl wash": (lambda: ul.credit.DGL(head="linear", budget=None), rules.WASH(p=0.2)),
    "interlocking papa": (lambda: ul.credit.Interlocking(1, head=SMALL, budget=None), rules.PAPA(period=3, overlap=1)),
    "pipedream papa": (ul.credit.PipeDream, rules.PAPA(alpha=0.3, period=3, overlap=2)),
    "pipedream local-sgd": (ul.credit.PipeDream, rules.LocalSGD(period=3)),
    "petra-like diloco": (ul.credit.FDG, rules.DiLoCo(period=4, fragments=2, overlap=1, mixing=0.5)),
    "greedy papa-all": (lambda: ul.credit.Greedy(head=SMALL, budget=None), rules.PAPAAll(epochs=2)),
    "gpipe easgd": (lambda: ul.credit.GPipe(2), rules.EASGD(period=2, asynchronous=True)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_it_goes_with_other_credit_rules(pair, tmp_path):
    credit, rule = PAIRS[pair]

    def made():
        return session(rule, credit=credit(), replicas=2, stages=3, optimizer=lambda ps: torch.optim.Adam(ps, lr=0.03))

    one, other = made(), made()
    records = one.fit(TRAIN, EPOCHS, batch_size=6, validate=TRAIN, validate_every=100)
    assert records[-1]["validation"]["accuracy"] > 0.6, records[-1]["validation"]
    with pytest.raises(ul.Interrupted):
        other.fit(TRAIN, EPOCHS, batch_size=6, callbacks=[StopAt(one.steps // 2 + 1)], checkpoint=tmp_path)
    again = ul.Trainer.resume(tmp_path, blank(3), credit=credit())
    again.fit(TRAIN, EPOCHS, batch_size=6)
    assert_same(state(again), state(one))


class StopAt(ul.callbacks.Callback):
    """As Ctrl-C after so many updates."""

    def __init__(self, update):
        self.update = update

    def on_step(self, trainer, record):
        if trainer.steps == self.update:
            signal.raise_signal(signal.SIGINT)


def statistics(made):
    """The running means and variances of every replica."""
    return [torch.cat([x for name, x in chain.named_buffers() if "running" in name]) for chain in made.chains]


@pytest.mark.covering
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("make", [rules.PAPA, rules.LocalSGD, rules.EASGD], ids=["papa", "local-sgd", "easgd"])
def test_batchnorms_statistics_are_averaged_when_the_weights_are(make, overlap):
    made, local = (
        session(make(period=3, overlap=overlap), batchnorm=policy, model=mlp(2, norm=True))
        for policy in ("average", "local")
    )
    for k in range(8):
        before = statistics(made)
        train(made, k, k + 1), train(local, k, k + 1)
        rows = statistics(made)
        equal = all(torch.equal(row, rows[0]) for row in rows)
        assert equal == ((k + 1 - overlap) % 3 == 0 and k > 1)
        if k + 1 == 3 + overlap:  # until then all is alike
            torch.testing.assert_close(rows[0], plain.mean(statistics(local)), rtol=1e-12, atol=1e-13)
        assert not any(torch.equal(a, b) for a, b in zip(rows, before))


def test_groups_average_statistics_among_themselves():
    made = session(rules.LocalSGD(hierarchy=((2, 2), (4, 4))), replicas=4, batchnorm="average", model=mlp(2, norm=True))
    for k in range(4):
        train(made, k, k + 1)
        rows = statistics(made)
        assert torch.equal(rows[0], rows[1]) == torch.equal(rows[2], rows[3]) == (k % 2 == 1)
        assert torch.equal(rows[0], rows[2]) == (k == 3)


def test_an_epochs_number_is_known_after_a_resume(tmp_path):
    made = session(rules.BTM(shared=1), stages=2)
    train(made, 0, 2).end_epoch()
    made.save(tmp_path)
    again = ul.Trainer.resume(tmp_path, blank())
    for one in (made, again):
        train(one, 2, 4)
    assert_same(state(made), state(again))


# ---- asynchronous EASGD ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speeds", [(1.0, 0.3, 0.7), (0.2, 1.0, 1.0)])
def test_asynchronous_easgd_keeps_the_sum_whoever_is_faster(speeds):
    """With saves and evaluations between, when requests and answers are under way; no step is made."""
    hardware = Hardware(Device(1e6), speeds=speeds, network=uniform(2e-3, 1e5))
    rule = rules.EASGD(rho=0.2, period=2, asynchronous=True)
    made = apart(session(rule, optimizer=still, world=Simulated(hardware)))
    expected = sum(weights_of(made)) + weights_of(made)[0]
    seen = []
    for k in range(12):
        train(made, k, k + 1)
        if k in (2, 3, 4, 7, 11):
            made.settle()
            centre = torch.cat(made.weights[0].centre)
            torch.testing.assert_close(sum(weights_of(made)) + centre, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(plain.vector(list(made.averaged().parameters())), centre)
            seen.append(centre)
    assert not torch.equal(seen[0], seen[-1])
    assert plain.consensus_distance(weights_of(made)) < 0.5 * plain.consensus_distance(weights_of(apart(session(rule))))


# ---- refusals --------------------------------------------------------------------------------------------------------


def of_replicas(rule, replicas=4, **options):
    return session(rule, replicas=replicas, **options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rules.PAPA(period=0), "period=0 is not possible"),
        (lambda: rules.PAPA(period=2.5), "period=2.5 is not possible"),
        (lambda: rules.PAPA(period=()), r"period=\(\) is not possible"),
        (lambda: rules.PAPA(period=(2, 0)), "one for each stage"),
        (lambda: rules.PAPA(period=3, overlap=3), "overlap=3 .*from 0 to 2"),
        (lambda: rules.PAPA(period=3, overlap=-1), "overlap=-1"),
        (lambda: rules.PAPA(period=3, overlap=1.5), "overlap=1.5"),
        (lambda: rules.LocalSGD(period=(8, 3), overlap=3), "from 0 to 2"),
        (lambda: rules.PAPA(compression="zip"), "compression"),
        (lambda: rules.PAPA(compression="int8:0"), "cannot be used"),
        (lambda: rules.PAPA(alpha=1.1), "no share of the mean"),
        (lambda: rules.PAPA(alpha=-0.1), "no share of the mean"),
        (lambda: of_replicas(rules.PAPA(period=(2, 3)), stages=3), "for 2 stages, but there are 3"),
        (lambda: rules.LocalSGD(shared=-1), "no number of updates"),
        (lambda: rules.LocalSGD(shared=1.5), "no number of updates"),
        (lambda: rules.LocalSGD(optimizer_state="lost"), "optimizer_state"),
        (lambda: rules.LocalSGD(overlap=1, optimizer_state="average"), "moved on"),
        (lambda: rules.LocalSGD(hierarchy=((2, 2), (2, 4))), "both growing"),
        (lambda: rules.LocalSGD(hierarchy=((2, 4), (4, 4))), "both growing"),
        (lambda: rules.LocalSGD(hierarchy=(2, 4)), "both growing"),
        (lambda: rules.LocalSGD(hierarchy=((0, 4),)), "both growing"),
        (lambda: rules.LocalSGD(hierarchy=((2, 2), (8, 4)), overlap=2), "from 0 to 1"),
        (lambda: of_replicas(rules.LocalSGD(hierarchy=((2, 2),))), "does not fit 4 replicas"),
        (lambda: of_replicas(rules.LocalSGD(hierarchy=((2, 3), (4, 4)))), "does not fit 4 replicas"),
        (lambda: rules.SlowMo(alpha=0.0), "alpha=0.0 is no learning rate"),
        (lambda: rules.SlowMo(alpha=float("nan")), "alpha=nan is no learning rate"),
        (lambda: rules.SlowMo(beta=1.0), "beta=1.0 is no momentum"),
        (lambda: rules.SlowMo(overlap=1), "co2 or diloco"),
        (lambda: rules.DiLoCo(outer_lr=float("inf")), "outer_lr=inf"),
        (lambda: rules.DiLoCo(outer_momentum=-0.1), "outer_momentum=-0.1"),
        (lambda: rules.DiLoCo(fragments=0), "fragments=0"),
        (lambda: rules.DiLoCo(mixing=1.0), "mixing=1.0"),
        (lambda: rules.CO2(clip=0.0), "clip=0.0 is no norm"),
        (lambda: rules.CO2(overlap=1), "leave out overlap"),
        (lambda: rules.CO2(alpha=-1), "alpha=-1"),
        (lambda: rules.EASGD(rho=1.5), "rho=1.5"),
        (lambda: rules.EASGD(rho=-0.5), "rho=-0.5"),
        (lambda: rules.EASGD(asynchronous=True, overlap=1), "overlaps by itself"),
        (lambda: rules.EASGD(asynchronous=True, compression="int8"), "weights as they are"),
        (lambda: rules.BTM(shared=-1), "no number of epochs"),
        (lambda: rules.PAPAAll(epochs=0), "epochs=0"),
        (lambda: rules.PAPA2(epochs=1.5), "epochs=1.5"),
        (lambda: of_replicas(rules.SlowMo(), initial="different"), "begin with the same weights"),
        (lambda: of_replicas(rules.DiLoCo(), initial="different"), "begin with the same weights"),
        (lambda: of_replicas(rules.CO2(), initial="different"), "begin with the same weights"),
        (lambda: of_replicas(rules.EASGD(), initial="different"), "begin with the same weights"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(make, words):
    with pytest.raises(InvalidChoice, match=words) as refused:
        make()
    assert str(refused.value).endswith(".")


def test_pieces_of_the_outer_rules():
    x = torch.tensor([3.0, 4.0])
    assert clipped(x, None) is x and clipped(x, 5.0) is x
    torch.testing.assert_close(clipped(x, 1.0), x / 5)
    zero = torch.zeros(2)
    assert staleness_gap(x, x, zero) == 1.0 and staleness_gap(x, zero, zero) == 1.0
    assert staleness_gap(x, zero, torch.tensor([0.0, 10.0])) == pytest.approx(1.5)
