"""The rules that average now and then, where they meet something else: drains, failures, resumes under another rule, bf16."""

from __future__ import annotations

import pytest
import torch

import unlocked as ul
from unlocked.consensus.averaging.codecs import codec
from unlocked.consensus.averaging.exchange import Exchange
from unlocked.errors import InvalidChoice
from unlocked.worlds import InProcess

from methods import assert_same, batch, data, mlp, state

rules = ul.consensus
TRAIN = data(24)


def session(rule, *, replicas=2, stages=3, **options):
    options.setdefault("optimizer", lambda ps: torch.optim.SGD(ps, lr=0.05))
    return ul.Trainer(blank(stages), consensus=rule, replicas=replicas, **options)


def blank(stages=3):
    return ul.cut(mlp(), stages, like=batch()[0])


def train(made, begin, end):
    for k in range(begin, end):
        pairs = [batch(6, 100 * k + n) for n in range(made.replicas)]
        made.step([x for x, _ in pairs], [y for _, y in pairs])
    return made


def rows_of(made):
    """Per replica, all weights in a row."""
    return [torch.cat([x.detach().reshape(-1) for x in chain.parameters()]) for chain in made.chains]


# ---- a pipeline that is emptied --------------------------------------------------------------------------------------

CROSSING = [
    rules.LocalSGD(period=3, overlap=2),
    rules.DiLoCo(period=3, overlap=2),
    rules.CO2(period=3),
    rules.EASGD(period=1, asynchronous=True),
]


@pytest.mark.parametrize("rule", CROSSING, ids=repr)
def test_what_a_drain_begins_is_in_the_checkpoint(rule, tmp_path):
    """The drain at an epoch's end makes updates, and these begin exchanges."""
    credit = ul.credit.PipeDream()
    whole = session(rule, credit=credit)
    whole.fit(TRAIN, 4, batch_size=2)
    session(rule, credit=credit).fit(TRAIN, 2, batch_size=2, checkpoint=tmp_path)
    again = ul.Trainer.resume(tmp_path, blank())
    again.fit(TRAIN, 4, batch_size=2)
    assert_same(state(again), state(whole))


@pytest.mark.parametrize("rule", [rules.SlowMo(period=2), rules.LocalSGD(period=3, overlap=2)], ids=repr)
def test_after_a_drain_that_failed_training_goes_on(rule):
    made = train(session(rule, credit=ul.credit.PipeDream()), 0, 6)
    weights = made.weights[0]
    mix = weights.mix

    async def failing():
        await mix()
        raise RuntimeError("on purpose")

    weights.mix = failing
    with pytest.raises(RuntimeError, match="on purpose"):
        made.drain()
    del weights.mix
    train(made, 6, 14)
    for stage in range(3):
        assert len({one.worker.version for one in made.weights if one.worker.stage == stage}) == 1


def test_after_a_merge_that_failed_the_next_one_makes_all_alike():
    made = session(rules.PAPAAll(epochs=1, compression="int8:8"), replicas=3, stages=1)
    for epoch in range(4):
        train(made, 3 * epoch, 3 * epoch + 3)
        if epoch == 2:
            fail_after_the_exchange(made)
        made.end_epoch()
    rows = rows_of(made)
    assert all(torch.equal(row, rows[0]) for row in rows)


def fail_after_the_exchange(made):
    """Replica 0 has the mean by then, others have not."""
    weights = made.weights[0]
    merged = weights.merged

    async def failing():
        await merged()
        raise RuntimeError("on purpose")

    weights.merged = failing
    with pytest.raises(RuntimeError, match="on purpose"):
        made.end_epoch()
    del weights.merged


# ---- gone on with under another rule ---------------------------------------------------------------------------------

EQUAL = [
    rules.SlowMo(period=2),
    rules.DiLoCo(period=2),
    rules.CO2(period=2),
    rules.AllReduce(),
    rules.LocalSGD(period=2, shared=100),
]


@pytest.mark.parametrize("rule", EQUAL, ids=repr)
def test_a_rule_that_wants_equal_replicas_gets_them_on_a_resume(rule, tmp_path):
    """These never bring replicas together that began apart: what they add is alike on all."""
    train(session(rules.PAPA(alpha=0.1, period=3)), 0, 5).save(tmp_path)
    again = train(ul.Trainer.resume(tmp_path, blank(), consensus=rule), 5, 16)
    rows = rows_of(again)
    torch.testing.assert_close(rows[1], rows[0], rtol=0, atol=1e-12)


def test_a_period_may_be_changed_on_a_resume(tmp_path):
    train(session(rules.SlowMo(period=4)), 0, 6).save(tmp_path)
    again = train(ul.Trainer.resume(tmp_path, blank(), consensus=rules.SlowMo(period=2)), 6, 12)
    rows = rows_of(again)
    torch.testing.assert_close(rows[1], rows[0], rtol=0, atol=1e-12)


def test_branches_stay_apart_on_a_resume_after_the_shared_epochs(tmp_path):
    made = train(session(rules.BTM(shared=1)), 0, 2)
    made.end_epoch()
    train(made, 2, 4).save(tmp_path)
    again = ul.Trainer.resume(tmp_path, blank(), consensus=rules.PAPAAll(epochs=50, shared=1))
    assert_same(state(again), state(made))


# ---- hierarchies -----------------------------------------------------------------------------------------------------


def test_a_hierarchy_written_with_0_for_all_may_overlap():
    one, other = (
        train(session(rules.LocalSGD(hierarchy=((2, 2), (4, size)), overlap=1), replicas=4), 0, 9) for size in (0, 4)
    )
    assert_same(state(one), state(other))


def test_a_hierarchys_overlap_is_bounded_by_its_own_periods():
    rules.LocalSGD(hierarchy=((16, 2), (64, 0)), overlap=10)


@pytest.mark.parametrize("compression", ["bf16", "int8:16"])
def test_a_larger_group_that_ends_in_between_does_not_disturb_a_smaller_one(compression):
    """Periods 3 and 5, overlap 2: the small exchange begins at 6, the large one ends at 7, the small one at 8."""

    def found(codec_name):
        rule = rules.LocalSGD(hierarchy=((3, 2), (5, 4)), overlap=2, compression=codec_name)
        return torch.stack(rows_of(train(session(rule, replicas=4, stages=1), 0, 24)))

    torch.testing.assert_close(found(compression), found("none"), rtol=0, atol=3e-3)


def test_groups_that_lie_across_each_other_are_refused_or_come_together():
    """Of the pair {2, 3} one is in the group {0, 1, 2}, one in {3, 4, 5}: they do not have the same last mean."""
    try:
        made = session(rules.LocalSGD(hierarchy=((2, 2), (3, 3), (24, 6)), compression="bf16"), replicas=6, stages=1)
    except InvalidChoice:
        return
    rows = rows_of(train(made, 0, 4))
    assert torch.equal(rows[2], rows[3])


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["bf16", "int8"])
def test_the_mean_of_bf16_rows_does_not_drift(compression):
    """Rows that move by less than half of what their type can tell apart: what was rounded off must not be lost."""
    world, size, count = InProcess(), 4, 400
    exchanges = [
        Exchange(worker, "here", range(size), codec(compression), "estimates") for worker in world.mesh(size, 1)
    ]
    workers = [one._worker for one in exchanges]
    world.crossing = frozenset(["here/parts", "here/means"])
    source = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, generator=source, dtype=torch.float64) for _ in range(size)]
    way = torch.randn(count, generator=source, dtype=torch.float64).sign()
    found = [None] * size

    async def mean(n):
        found[n] = await exchanges[n].mean([rows[n].bfloat16()])

    for _ in range(150):
        rows = [row + 1e-3 * way + 1e-4 * torch.randn(count, generator=source, dtype=torch.float64) for row in rows]
        world.run([(worker, mean(n)) for n, worker in enumerate(workers)])
    expected = sum(row.bfloat16().double() for row in rows) / size
    assert (found[0][0].double() - expected).square().mean().sqrt() < 4e-3


def test_a_pull_never_goes_beyond_the_mean():
    """A rate that grows over its first value: OneCycleLR begins with a 25th."""

    def cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100)

    made = train(session(rules.PAPA(alpha=0.2, period=1), replicas=3, schedule=cycle), 0, 40)
    rows = torch.stack(rows_of(made))
    assert (rows - rows.mean(0)).norm() < 1.0


@pytest.mark.parametrize(("rho", "replicas"), [(1.0, 2), (0.5, 4)])
def test_an_elastic_force_that_swings_is_refused(rho, replicas):
    """θ̄ − c becomes (1 − ρ(N+1)) (θ̄ − c) at an exchange."""
    with pytest.raises(InvalidChoice, match="rho"):
        session(rules.EASGD(period=1, rho=rho), replicas=replicas)
    made = train(session(rules.EASGD(period=1, rho=2 / (replicas + 1)), replicas=replicas), 0, 30)
    assert max(row.abs().max() for row in rows_of(made)) < 10.0


# ---- fragments -------------------------------------------------------------------------------------------------------


def test_a_fragment_is_exchanged_at_its_own_time_in_every_stage():
    """Fragment p, layers l ≡ p (mod P), is pH/P updates after the first one, also where a stage has only one of them."""
    made = session(rules.DiLoCo(period=12, fragments=3), stages=3)
    layers = {id(x): k for k, (_, _, row) in enumerate(made.chains[0].layers()) for x in row}
    for weights in made.weights[:3]:
        for fragment in weights.fragments:
            (part,) = {layers[id(x)] % 3 for x in fragment.parameters}
            assert fragment.offset == 4 * part


# ---- domains ---------------------------------------------------------------------------------------------------------


def test_more_domains_than_replicas_are_refused():
    domains = ul.data.Domains([TRAIN, TRAIN, TRAIN])
    with pytest.raises(ul.errors.UnlockedError, match="domain"):
        session(rules.BTM(), replicas=2).fit(domains, 1, batch_size=2)
