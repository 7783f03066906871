"""The laws of the consensus rules, and of WASH's draw."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unlocked as ul
from unlocked.errors import InvalidChoice
from unlocked.rules.shuffle import draw, layer_probability

from methods import assert_same, batch, consensus_rules, credits, data, mlp, name_of, state, trainer


def steps(session, count=3, replicas=1):
    for k in range(count):
        pairs = [batch(12, seed=10 * k + n) for n in range(replicas)]
        session.step([x for x, _ in pairs], [y for _, y in pairs])
    return session


@pytest.mark.covering
@pytest.mark.parametrize("rule", consensus_rules("one_at_a_time"), ids=name_of)
@pytest.mark.parametrize("credit", credits("delayed"), ids=name_of)
def test_delayed_rules_are_refused_where_a_replica_has_one_micro_batch_at_a_time(credit, rule):
    with pytest.raises(
        InvalidChoice, match=f"{credit.make().name} has several micro-batches in flight, .* use another"
    ):
        trainer(credit.make(), rule.make(), replicas=3)


def goes(credit, rule):
    """Whether two rules go together: delayed ones are refused where a replica has one micro-batch at a time."""
    return not ("delayed" in credit.laws and "one_at_a_time" in rule.laws)


def pairs(rules):
    return [
        pytest.param(row, credit, id=f"{row.name}-{credit.name}")
        for row in rules
        for credit in credits()
        if goes(credit, row)
    ]


# v1 of cyclic data parallelism and exchanges beside the computation are a delay, whatever N is
@pytest.mark.covering
@pytest.mark.parametrize("row, credit", pairs(consensus_rules("one_is_ordinary")))
def test_one_replica_of_any_rule_is_independent(row, credit):
    results = []
    for rule in (row.make(), ul.consensus.Independent()):
        results.append(state(steps(trainer(credit.make(), rule, stages=3, model=mlp(norm=True)))))
    assert_same(*results)


def without_batchnorm(row):
    """The rule with heads that have no BatchNorm (the library's own mlp and linear heads look at the whole batch)."""
    credit = row.make()
    if not hasattr(credit, "head"):
        return credit
    return dataclasses.replace(credit, head=lambda h, outputs: torch.nn.Linear(h.shape[1], outputs).to(h.dtype))


# predsim and infopro compare the samples of one batch with each other, or bring them to one scale: shards are another
# objective, even without BatchNorm; replicas of async-dgl draw from their buffers each for itself;
# under cdp-pipeline some micro-batches see newer weights than others, and shards are split into other ones
@pytest.mark.covering
@pytest.mark.parametrize(
    "credit",
    [
        row
        for row in credits()
        if row.name not in ("predsim", "infopro", "infopro-contrast", "async-dgl", "cdp-pipeline")
        # each shard's gradient is projected by itself, on directions of its own
        and not row.name.startswith(("forward-gradient", "local-forward-gradient", "mezo", "node-perturbation"))
    ],
    ids=name_of,
)
@pytest.mark.parametrize("n", [2, 3])
def test_all_reduce_over_equal_shards_is_the_big_batch(credit, n):
    whole = trainer(without_batchnorm(credit), stages=3)
    split = trainer(without_batchnorm(credit), ul.consensus.AllReduce(), stages=3, replicas=n)
    for k in range(3):
        x, y = batch(12, seed=k)
        whole.step(x, y)
        split.step(x, y)
    for (name, a), b in zip(whole.chains[0].named_parameters(), split.chains[n - 1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.covering
@pytest.mark.parametrize("row, credit", pairs(consensus_rules("equal_replicas")))
def test_replicas_stay_equal_bit_for_bit(row, credit):
    session = steps(trainer(credit.make(), row.make(), replicas=3), 3, 3)
    first = dict(session.chains[0].named_parameters())
    for chain in session.chains[1:]:
        for name, parameter in chain.named_parameters():
            assert torch.equal(parameter, first[name]), name


def test_independent_replicas_are_separate_trainings():
    together = steps(trainer(ul.credit.DGL(head="linear", budget=None), replicas=3), 3, 3)
    for n in range(3):
        alone = trainer(ul.credit.DGL(head="linear", budget=None))
        for k in range(3):
            alone.step(*batch(12, seed=10 * k + n))
        for a, b in zip(together.chains[n].parameters(), alone.chains[0].parameters()):
            assert torch.equal(a, b)


def test_wash_0_is_independent_and_wash_is_not():
    def trained(rule):
        return state(steps(trainer(ul.credit.Backprop(), rule, replicas=3), 3, 3))

    independent = trained(ul.consensus.Independent())
    assert_same(trained(ul.consensus.WASH(p=0.0)), independent)
    washed = trained(ul.consensus.WASH(p=0.5))
    assert any(not torch.equal(washed[name], independent[name]) for name in washed)


class NoStep(torch.optim.SGD):
    """Leaves the parameters alone, so that only the mixing is seen."""

    def step(self, closure=None):
        return None


@given(
    n=st.integers(2, 5),
    p=st.floats(0.0, 1.0),
    schedule=st.sampled_from(["decreasing", "constant", "increasing"]),
    layers=st.sampled_from(["module", "tensor"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=25)
def test_a_shuffle_permutes_each_scalar_among_the_replicas(n, p, schedule, layers, dtype):
    rule = ul.consensus.WASH(p=p, schedule=schedule, layers=layers)
    session = trainer(
        ul.credit.DGL(head="linear", budget=None),
        rule,
        model=mlp(dtype=dtype),
        replicas=n,
        optimizer=lambda ps: NoStep(ps, lr=0.0),
    )
    for k, chain in enumerate(session.chains):
        source = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for parameter in chain.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=source, dtype=dtype))
    before = [torch.cat([x.detach().flatten() for x in chain.parameters()]) for chain in session.chains]
    pairs = [batch(12, seed=k, dtype=dtype) for k in range(n)]
    session.step([x for x, _ in pairs], [y for _, y in pairs])
    after = [torch.cat([x.detach().flatten() for x in chain.parameters()]) for chain in session.chains]
    # the multiset of each scalar's values is the same, so sums and distances to the mean are
    assert torch.equal(torch.stack(before).sort(0).values, torch.stack(after).sort(0).values)
    moved = torch.stack(before) != torch.stack(after)
    # every moved value was sent, once
    assert int(moved.sum()) * before[0].element_size() == session.bytes_sent.get("wash", 0)


@given(count=st.integers(1, 400), p=st.floats(0, 1), n=st.integers(2, 6), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_the_draw_gives_distinct_indices_and_permutations(count, p, n, seed):
    indices, owners = draw(count, p, n, torch.Generator().manual_seed(seed))
    assert torch.equal(indices, indices.unique()) and (len(indices) == 0 or 0 <= indices[0] <= indices[-1] < count)
    assert torch.equal(owners.sort(0).values, torch.arange(n)[:, None].expand(n, len(indices)))


@pytest.mark.parametrize("count, p", [(40, 0.1), (40, 0.7), (3, 0.5)])
def test_each_scalar_is_drawn_with_probability_p_and_every_permutation_alike(count, p):
    source, rounds, n = torch.Generator().manual_seed(1), 4000, 3
    hits = torch.zeros(count)
    orders: dict[tuple[int, ...], int] = {}
    for _ in range(rounds):
        indices, owners = draw(count, p, n, source)
        hits[indices] += 1
        for column in owners.T.tolist():
            orders[tuple(column)] = orders.get(tuple(column), 0) + 1
    error = 4.5 * math.sqrt(p * (1 - p) / rounds)
    assert (hits / rounds - p).abs().max() < error
    total = sum(orders.values())
    assert len(orders) == 6
    assert max(abs(k / total - 1 / 6) for k in orders.values()) < 4.5 * math.sqrt(5 / 36 / total)


def test_the_expectation_of_a_shuffle_is_a_step_to_the_mean():
    """E[θ̂_n] = (1−p)θ_n + pθ̄ (F Eq. 6.4)."""
    n, d, p, rounds = 4, 50, 0.3, 3000
    source = torch.Generator().manual_seed(0)
    theta = torch.randn(n, d, generator=source, dtype=torch.float64)
    total = torch.zeros_like(theta)
    for _ in range(rounds):
        indices, owners = draw(d, p, n, source)
        shuffled = theta.clone()
        shuffled[:, indices] = theta[:, indices].gather(0, owners)
        total += shuffled
    expected = (1 - p) * theta + p * theta.mean(0)
    assert (total / rounds - expected).abs().max() < 4.5 * theta.std() * math.sqrt(p / rounds) * 2


def test_layer_probabilities():
    rows = {
        kind: [layer_probability(0.4, k, 5, kind) for k in range(5)]
        for kind in ("decreasing", "constant", "increasing")
    }
    assert rows["decreasing"] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    assert rows["constant"] == [0.4] * 5
    assert rows["increasing"] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert layer_probability(0.4, 0, 1, "decreasing") == 0.4


def test_the_shuffle_does_not_depend_on_where_the_network_is_cut():
    """Backprop × WASH over 1, 2 and 5 stages is one and the same training."""
    results = []
    for stages in (1, 2, 5):
        session = steps(trainer(ul.credit.Backprop(), ul.consensus.WASH(p=0.3), stages=stages, replicas=2), 3, 2)
        results.append([chain.state_dict() for chain in session.chains])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            for name in a:
                torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12)


def test_wash_bytes_are_as_predicted():
    """(N−1)/N · Σ_l p_l d_l values a replica and step, and no index (FACTS 2.2)."""
    n, p, rounds = 3, 0.2, 200
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 40), torch.nn.Tanh(), torch.nn.Linear(40, 40), torch.nn.Linear(40, 3)
    )
    session = trainer(
        ul.credit.Backprop(), ul.consensus.WASH(p=p), model=model.double(), stages=2, replicas=n,
        optimizer=lambda ps: NoStep(ps, lr=0.0),
    )  # fmt: skip
    steps(session, rounds, n)
    sizes = [5 * 40 + 40, 40 * 40 + 40, 40 * 3 + 3]
    expected = rounds * n * 8 * (n - 1) / n * sum(p * (1 - k / 2) * size for k, size in enumerate(sizes))
    assert session.bytes_sent["wash"] == pytest.approx(expected, rel=0.02)


def test_averaged_is_the_mean_and_ensemble_the_mean_prediction():
    session = steps(trainer(ul.credit.Backprop(), replicas=3, model=mlp(norm=True)), 3, 3)
    mean = session.averaged().state_dict()
    for name, x in mean.items():
        rows = torch.stack([chain.state_dict()[name] for chain in session.chains])
        torch.testing.assert_close(x, rows.mean(0) if x.is_floating_point() else rows[0])
    x, _ = batch(seed=5)
    for chain in session.chains:
        chain.eval()
    expected = sum(chain(x).softmax(-1) for chain in session.chains) / 3
    for chain in session.chains:
        chain.train()
    torch.testing.assert_close(session.ensemble(x), expected)
    assert all(chain.training for chain in session.chains)


def test_batchnorm_policies():
    def trained(policy):
        return steps(
            trainer(ul.credit.Backprop(), ul.consensus.AllReduce(), model=mlp(norm=True), replicas=3, batchnorm=policy),
            2,
            3,
        )

    def statistics(chain):
        return [x for name, x in chain.state_dict().items() if "running" in name]

    local, average = trained("local"), trained("average")
    assert not all(torch.equal(a, b) for a, b in zip(statistics(local.chains[0]), statistics(local.chains[1])))
    for a, b, c in zip(*(statistics(chain) for chain in average.chains)):
        assert torch.equal(a, b) and torch.equal(b, c)
    assert average.bytes_sent["batchnorm"] > 0

    session = trainer(ul.credit.Backprop(), model=mlp(1, norm=True), stages=1, replicas=2, batchnorm="refresh")
    train = data(64)
    session.fit(train, 1, batch_size=16)
    refreshed = session.averaged()
    weight = refreshed.state_dict()["0.weight"]
    bias = refreshed.state_dict()["0.bias"]
    everything = torch.cat([x for x, _ in train.batches(16, epoch=0, seed=0)])  # all 64 in some order
    torch.testing.assert_close(refreshed.state_dict()["1.running_mean"], (everything @ weight.T + bias).mean(0))


def test_members_and_ensemble_are_evaluated():
    session = trainer(ul.credit.Backprop(), ul.consensus.WASH(p=0.1), replicas=2)
    (record,) = session.fit(data(), 1, batch_size=12, validate=data(24, 1))
    validation = record["validation"]
    assert len(validation["members"]) == 2 and 0 <= validation["ensemble"] <= 1
    x, y = data(24, 1).x, data(24, 1).y
    accuracy = (session.averaged().eval()(x).argmax(1) == y).double().mean().item()
    assert validation["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_an_impossible_probability_is_refused(p):
    with pytest.raises(InvalidChoice, match="not a probability"):
        ul.consensus.WASH(p=p)


def test_replicas_start_equal_and_do_not_share_tensors():
    session = trainer(ul.credit.DGL(head="linear", budget=None), replicas=2)
    a, b = (dict(chain.named_parameters()) for chain in session.chains)
    for name in a:
        assert torch.equal(a[name], b[name]) and a[name].data_ptr() != b[name].data_ptr()
