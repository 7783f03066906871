"""Rules that learn from pairs of views: each is its formula on the whole batch, and another rule at the end of its option."""

from __future__ import annotations

import copy
import itertools
import math
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import unlocked as ul
from unlocked import pairs
from unlocked.cli import main
from unlocked.credit.oracle import Oracle
from unlocked.cutting import from_recipe_of_chain
from unlocked.errors import NonFiniteLoss
from unlocked.method_names import make_credit, parse_method
from unlocked.pairs import Judged, PairLoss
from unlocked.probes.predicted import predicted
from unlocked.probes.step import Metering
from unlocked.simulation import Device, Hardware, uniform
from unlocked.simulation.costs import Costs, StageCosts, costs_of
from unlocked.simulation.memory import device_peaks
from unlocked.simulation.profile import profile
from unlocked.timeline import Timeline
from unlocked.worker import Place
from unlocked.worlds import Simulated

import methods
from methods import CONTRASTS, assert_same, batch, mlp, momentum, name_of, state

CONSENSUS = {"all-reduce": ul.consensus.AllReduce, "unbucketed": lambda: ul.consensus.AllReduce(bucket_mb=0)}
LOSSES = [
    "nt-xent",
    "hard-negatives",
    "barlow-twins",
    "vicreg",
    pairs.SubsampledNTXent(0.1),
    pairs.EasyNTXent(0.0, 0.6),
]


def trainer(credit, consensus=None, stages=3, **options):
    """Of a network of five parts whose features are 7 numbers."""
    model = options.pop("model", None) or body()
    options.setdefault("optimizer", momentum)
    like = options.pop("like", batch()[0].to(next(model.parameters()).dtype))
    return ul.Trainer(ul.cut(model, stages, like=like), credit=credit, consensus=consensus, **options)


def body(**options):
    """Without the classifier."""
    return ul.models.encoder(mlp(**options))


def images(size=24, seed=0):
    """Views of small images in two classes."""
    source = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (size,), generator=source)
    x = torch.randn(size, 1, 4, 4, generator=source) + y[:, None, None, None]
    return ul.data.from_tensors(x, y, augment="views+crop-flip")


def pixels(dropout=0.0):
    torch.manual_seed(1)
    layers = [nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))


def parameters(session):
    return {f"{n}.{name}": x.detach().clone() for n, c in enumerate(session.chains) for name, x in c.named_parameters()}


def close(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], rtol=tolerance, atol=tolerance)


# ---- one loss over all views -----------------------------------------------------------------------------------------------


@given(stages=st.integers(1, 4), norm=st.booleans(), loss=st.sampled_from(LOSSES))
@settings(deadline=None, max_examples=8)
def test_simclr_over_stages_is_autograd_on_the_whole_network(stages, norm, loss):
    session = trainer(ul.credit.SimCLR(loss, dimension=6), stages=stages, model=body(norm=norm))
    chain = copy.deepcopy(session.chains[0])
    optimizer = momentum(list(chain.parameters()))
    judge = pairs.PAIR_LOSSES[loss] if isinstance(loss, str) else loss
    for seed in range(2):
        x, y = batch(12, seed)
        losses = session.step(x, y)
        optimizer.zero_grad()
        expected = judge(chain[-1].head(chain(x)), y)
        expected.backward()
        optimizer.step()
        assert losses[:-1] == [None] * (stages - 1) and losses[-1] == pytest.approx(expected.item(), rel=1e-12)
    close({name: x.detach() for name, x in session.chains[0].named_parameters()}, dict(chain.named_parameters()))


@pytest.mark.parametrize("row", [row for row in CONTRASTS if "local" in row.laws], ids=name_of)
def test_a_local_rule_follows_the_gradient_of_its_own_loss(row):
    session = trainer(row.make(), optimizer=lambda ps: torch.optim.SGD(ps, lr=1.0))
    if row.name == "dgssl-llm-oracle":
        session = trainer(met(row.make()), optimizer=lambda ps: torch.optim.SGD(ps, lr=1.0))
    chain = copy.deepcopy(session.chains[0])
    x, y = batch(16)
    before, oracle = parameters(session), methods.Oracle()(x)
    session.step(x, y)
    for j, stage in enumerate(chain):
        x = stage(x.detach())
        loss = stage.loss.judge(stage.head(x), y, oracle).loss
        for (name, parameter), gradient in zip(
            stage.named_parameters(), torch.autograd.grad(loss, list(stage.parameters()))
        ):
            moved = before[f"0.stages.{j}.{name}"] - dict(session.chains[0][j].named_parameters())[name]
            torch.testing.assert_close(
                moved.detach(), gradient, rtol=1e-9, atol=1e-12, msg=f"{j} {name} {parameter.shape}"
            )


def met(rule):
    """dgssl-llm with the thresholds an oracle would give to some views."""
    seen = methods.Oracle()(batch(40, 9)[0])
    square = pairs.contrasting.cosines(seen)
    positive, negative = (
        pairs.contrasting.of_partners(square)[::2],
        square[pairs.contrasting.negatives(40, seen.device)],
    )
    rows = [pairs.thresholds(positive, negative, share, share) for share in pairs.ratios(rule.ratio, 3)]
    alpha, beta = zip(*rows)
    return ul.credit.DGSSLLLM(thresholds=(alpha, beta), oracle=methods.Oracle(), by=rule.by, dimension=6)


@pytest.mark.parametrize("split", [(3, 1, None), (1, 2, "all-reduce"), (2, 2, "unbucketed"), (2, 3, "all-reduce")])
@pytest.mark.parametrize("row", CONTRASTS, ids=name_of)
@pytest.mark.covering(2)
def test_micro_batches_and_replicas_are_one_batch(row, split):
    """Without BatchNorm the loss is that of all views, and so is every gradient."""
    accumulate, replicas, consensus = split
    make = (lambda: met(row.make())) if row.name == "dgssl-llm-oracle" else row.make
    whole = trainer(make(), clip=0.5)
    parts = trainer(
        make(), CONSENSUS[consensus]() if consensus else None, accumulate=accumulate, replicas=replicas, clip=0.5
    )
    for seed in range(2):
        x, y = batch(24, seed)
        assert parts.step(x, y) == pytest.approx(whole.step(x, y), rel=1e-12)
    for chain in parts.chains:
        close(
            {name: x.detach() for name, x in chain.named_parameters()}, dict(whole.chains[0].named_parameters()), 1e-11
        )
    if replicas > 1:
        views, bytes_sent = 24 // replicas, parts.bytes_sent
        learning = 1 if row.name == "simclr" else 3
        assert bytes_sent["pairs"] == 2 * learning * replicas * (replicas - 1) * views * 6 * 8


@pytest.mark.parametrize("consensus", [lambda: ul.consensus.AllReduce(), lambda: ul.consensus.LocalSGD(period=1)])
def test_alone_every_replica_contrasts_its_own_views(consensus):
    """The mean of the replicas' own gradients, and nothing of their views is sent."""
    rule = ul.credit.DGSSL(dimension=6, projector="0c2f", replicas="alone")
    session = trainer(rule, consensus(), replicas=2, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
    x, y = batch(24)
    session.step(x, y)
    halves = [trainer(rule, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1)) for _ in range(2)]
    for half, rows in zip(halves, (slice(12), slice(12, 24))):
        half.step(x[rows], y[rows])
    first, second = (dict(half.chains[0].named_parameters()) for half in halves)
    means = {name: ((first[name] + second[name]) / 2).detach() for name in first}
    close({name: v.detach() for name, v in session.chains[1].named_parameters()}, means)
    assert "pairs" not in session.bytes_sent


def test_replicas_whose_weights_differ_contrast_their_own_views():
    for consensus in (ul.consensus.Independent(), ul.consensus.WASH(p=0.5), ul.consensus.PAPA(period=1)):
        session = trainer(ul.credit.DGSSL(dimension=6), consensus, replicas=2)
        alone = trainer(ul.credit.DGSSL(dimension=6))
        x, y = batch(24)
        losses = session.step([x[:12], x[12:]], [y[:12], y[12:]])
        both = [trainer(ul.credit.DGSSL(dimension=6)).step(x[rows], y[rows]) for rows in (slice(12), slice(12, 24))]
        assert losses == pytest.approx([(a + b) / 2 for a, b in zip(*both)]) and alone.steps == 0
        assert "pairs" not in session.bytes_sent


class _Loud(PairLoss):
    """Another loss, times 1000."""

    def __init__(self, loss):
        self.loss = loss

    def judge(self, z, y, oracle=None):
        found = self.loss.judge(z, y, oracle)
        return Judged(1000 * found.loss, found.notes)


@pytest.mark.parametrize("loud", range(3))
@pytest.mark.parametrize("row", [row for row in CONTRASTS if "local" in row.laws], ids=name_of)
@pytest.mark.covering
def test_no_gradient_of_a_local_rule_leaves_its_stage(row, loud):
    results = []
    for factor in (1, 1000):
        session = trainer(met(row.make()) if row.name == "dgssl-llm-oracle" else row.make(), accumulate=2)
        if factor > 1:
            session.chains[0][loud].loss = _Loud(session.chains[0][loud].loss)
        session.step(*batch(16))
        results.append(parameters(session))
        assert session.bytes_sent.get("gradient", 0) == 0
    changed = {name.split(".")[2] for name in results[0] if not torch.equal(results[0][name], results[1][name])}
    assert changed == {str(loud)}


# ---- limits ----------------------------------------------------------------------------------------------------------------


def everything(credit, stages=3, accumulate=1):
    """After three updates with BatchNorm and dropout."""
    model = body(norm=True, dropout=0.3, dtype=torch.float32)
    session = trainer(credit, stages=stages, model=model, accumulate=accumulate, seed=4)
    losses = [session.step(*batch(16, seed, torch.float32)) for seed in range(3)]
    return state(session), losses


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loss", ["nt-xent", "vicreg"])
def test_one_stage_of_dgssl_is_simclr_bit_for_bit(loss, accumulate):
    found = [everything(rule(loss, dimension=6), 1, accumulate) for rule in (ul.credit.DGSSL, ul.credit.SimCLR)]
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rules_that_keep_all_pairs_are_dgssl_bit_for_bit(accumulate):
    expected, losses = everything(ul.credit.DGSSL(projector="1c2f", dimension=6), accumulate=accumulate)
    for rule in (
        ul.credit.SubsampledSimCLR(threshold=-1, dimension=6),
        ul.credit.OracleSimCLR(methods.Oracle(), positive=-1, negative=1, dimension=6),
        ul.credit.DGSSLLLM(ratio=1.0, dimension=6),
        ul.credit.DGSSLLLM(ratio=1.0, by="oracle", oracle=methods.Oracle(), thresholds="batch", dimension=6),
        ul.credit.DGSSLLLM(thresholds=((-1, -1, -1), (1, 1, 1)), dimension=6),
        ul.credit.DGSSL(pairs.NTXent(0.5), dimension=6),
        ul.credit.DGSSL(temperature=0.5, dimension=6),
    ):
        found = everything(rule, accumulate=accumulate)
        assert_same(found[0], expected)
        assert found[1] == losses


@given(ratio=st.floats(0.3, 1), negatives=st.none() | st.floats(0.3, 1), stages=st.integers(1, 4), only=st.booleans())
@settings(deadline=None, max_examples=12)
def test_dgssl_llm_keeps_the_shares_of_its_stages(ratio, negatives, stages, only):
    """μ^(K−j) of the pairs of every batch, the last stage all; the other way round in decreasing order."""
    session = trainer(
        ul.credit.DGSSLLLM(ratio, negatives, positives_only=only, thresholds="batch", dimension=6), stages=stages
    )
    down = ul.credit.DGSSLLLM(ratio, negatives, "decreasing", positives_only=only, thresholds="batch", dimension=6)
    other = 1.0 if only else ratio if negatives is None else negatives
    z = torch.randn(12, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.zeros(12, dtype=torch.long)
    for j in range(stages):
        loss = session.chains[0][j].loss
        kept = loss.judge(z, y).notes
        assert float(kept["positives kept"]) == pytest.approx(math.ceil(6 * ratio ** (stages - 1 - j) - 1e-9) / 6)
        # a negative pair is one of two rows, which are both in the matrix
        share = other ** (stages - 1 - j)
        assert share - 1e-6 <= float(kept["negatives kept"]) <= share + 2 / 120 + 1e-6
        assert down.loss_of(stages - 1 - j, stages) == loss
    assert session.chains[0][-1].loss.judge(z, y).loss.item() == pytest.approx(pairs.NTXent()(z, y).item())


def test_thresholds_are_those_of_the_oracle_on_the_training_views():
    """In every world and after a resume the same: they depend on the data and the seed alone."""
    data = images(40)
    found = []
    for batch_size in (8, 20):
        rule = ul.credit.DGSSLLLM(0.5, oracle=methods.Oracle(), dimension=6)
        session = ul.Trainer(ul.cut(pixels(), 3, like=data.x[:4]), credit=rule, optimizer=momentum)
        with pytest.raises(ul.UnlockedError, match="call fit, or before steps by hand"):
            session.step(torch.randn(8, 1, 4, 4), torch.zeros(8, dtype=torch.long))
        session.fit(data, 1, batch_size=batch_size)
        found.append([stage.loss for stage in session.chains[0]])
        for chain in (session.averaged(), *session.members()):  # new chains have them, too
            assert [stage.loss for stage in chain] == found[-1]
    assert found[0] == found[1] and found[0][2] == pairs.EasyNTXent(-1.0, 1.0, "oracle")
    x, _ = next(iter(data.batches(40, epoch=0, seed=ul.rng.seed_of(0, "thresholds"))))
    square = pairs.contrasting.cosines(methods.Oracle()(x))
    positives = sorted(float(square[k, k + 1]) for k in range(0, 80, 2))
    negatives = sorted(float(square[a, b]) for a, b in itertools.product(range(80), repeat=2) if a // 2 != b // 2)
    for j, share in enumerate((0.25, 0.5)):
        assert found[0][j].alpha == pytest.approx(positives[-math.ceil(40 * share)])
        assert found[0][j].beta == pytest.approx(negatives[math.ceil(len(negatives) * share) - 1])


def test_easiest_pairs_of_what_is_not_a_number_are_no_error_of_the_user_s():
    session = trainer(ul.credit.DGSSLLLM(0.5, thresholds="batch", dimension=6))
    with torch.no_grad():
        next(session.chains[0][1].head.parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match="loss of stage 1"):
        session.step(*batch(8))


# ---- the two passes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [ul.credit.SimCLR, ul.credit.DGSSL])
def test_the_second_forward_draws_the_same_numbers_and_leaves_buffers_alone(rule):
    head = nn.Sequential(nn.Linear(7, 6), nn.Dropout(0.4))
    chain = ul.cut(body(norm=True, dropout=0.4), 2, like=batch()[0])
    for stage in chain:
        stage.head = copy.deepcopy(head).double()
    session = ul.Trainer(chain, credit=rule(dimension=6), optimizer=momentum, accumulate=3)
    seen: dict[int, list[Tensor]] = {}
    for j, stage in enumerate(chain):
        for part in (stage.body, stage.head):
            part.register_forward_hook(
                lambda _, inputs, out, k=(j, part is stage.head): seen.setdefault(k, []).append(out)
            )
    plain = copy.deepcopy(chain)
    for weights in session.weights:  # a rule for the replicas may compute before a forward
        weights.read = lambda worker=weights.worker: worker.run("X", int)
    x, y = batch(24)
    session.step(x, y)
    learning = [(0, False), (1, False), (1, True)] + ([(0, True)] if rule is ul.credit.DGSSL else [])
    assert sorted(seen) == sorted(learning)
    for outputs in seen.values():
        first, again = outputs[:3], outputs[3:]
        assert len(again) == 3 and all(torch.equal(a, b) for a, b in zip(first, again))
        assert not torch.equal(first[0], first[1])
    assert [out.requires_grad for out in seen[1, True]] == [False] * 3 + [True] * 3
    norms = [[m for m in c.modules() if isinstance(m, nn.BatchNorm1d)] for c in (chain, plain)]
    assert all(int(m.num_batches_tracked) == 3 for m in norms[0])
    with torch.no_grad():
        for part in x.chunk(3):
            norms[1][0](plain[0].body[0](part))
    torch.testing.assert_close(norms[0][0].running_var, norms[1][0].running_var, rtol=0, atol=0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_local_stage_asks_for_no_gradient_of_its_input(accumulate):
    session = trainer(ul.credit.DGSSL(dimension=6), accumulate=accumulate)
    asked = []
    for stage in session.chains[0]:
        stage.body.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].requires_grad))
    session.step(*batch(8))
    assert set(asked) == {False}


def test_with_one_micro_batch_nothing_runs_twice_and_with_several_the_graph_is_made_again():
    def kinds(rule, accumulate, stage):
        session = trainer(rule(dimension=6), stages=2, accumulate=accumulate)
        session.step(*batch(8))
        return "".join(act.kind for act in session.timeline.of(0, stage) if act.kind in "FLBU")

    assert [kinds(ul.credit.SimCLR, 1, j) for j in (0, 1)] == ["FBU", "FLLBU"]
    assert [kinds(ul.credit.DGSSL, 1, j) for j in (0, 1)] == ["FLLBU"] * 2
    assert [kinds(ul.credit.SimCLR, 2, j) for j in (0, 1)] == ["FFBBU", "FLFLLBBU"]
    assert [kinds(ul.credit.DGSSL, 2, j) for j in (0, 1)] == ["FLFLLBBU"] * 2


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("rule", [ul.credit.SimCLR, ul.credit.DGSSL])
def test_what_is_kept_for_backward_is_what_the_shapes_say(rule, accumulate):
    """With several micro-batches their inputs and one graph, not all graphs (wider than what the loss takes)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 300), nn.BatchNorm1d(300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh())
    session = trainer(rule(dimension=6), stages=2, accumulate=accumulate, model=model)
    meter = Metering(session)
    for _ in range(2):
        meter.update({0: batch(32, dtype=torch.float32)})
    measured = {row["stage"]: row["saved"] for row in meter.records[-1]["workers"]}
    for row in predicted(session, session.timeline, 32):
        if accumulate == 1:
            assert row["saved"] == measured[row["stage"]]
        else:  # a head's share counts its micro-batch's loss, too, which is judged with all others
            assert measured[row["stage"]] <= 1.04 * row["saved"] and row["saved"] <= 1.04 * measured[row["stage"]]


def test_the_oracle_sees_every_batch_once_in_evaluation_mode():
    oracle = methods.Oracle()
    modes = []
    oracle.register_forward_hook(lambda module, *_: modes.append(module.training))
    session = trainer(ul.credit.OracleSimCLR(oracle, dimension=6), accumulate=3)
    before = oracle.calls
    session.step(*batch(24))
    assert oracle.calls - before == 3 and set(modes) == {False} and oracle.training
    assert session.bytes_sent["oracle"] == 2 * 24 * 4 * 8


@pytest.mark.parametrize("row", [row for row in CONTRASTS if row.name != "dgssl-llm-oracle"], ids=name_of)
def test_shapes_alone_give_the_acts_of_training(row):
    """Every message and every computation."""
    rule = row.make()
    session = trainer(rule, ul.consensus.AllReduce(), stages=2, accumulate=2, replicas=2)
    session.step(*batch(16))
    costs = Costs(tuple(StageCosts({}, stage) for stage in profile(session.template, sizes=(4, 8)).stages))
    shapes = ul.simulation.simulate(
        rule, ul.consensus.AllReduce(), costs=costs, replicas=2, samples=4, accumulate=2, chain=session.template
    )
    found = [Counter((*act[:4], act.channel) for act in acts if act.kind != "M") for acts in (session.timeline, shapes)]
    assert found[0] == found[1]
    for channel in ("activation", "gradient", "pairs", "oracle", "all-reduce"):
        times = 2 if channel == "oracle" else 1  # it has the data's type, which is float32 where there are shapes only
        assert times * sum(a.bytes for a in shapes if a.channel == channel) == sum(
            a.bytes for a in session.timeline if a.channel == channel
        )


def test_the_simulated_clock_charges_an_oracle_s_forward_as_a_stage_s_and_changes_no_weight():
    device = Device(flops=1e6, memory_bandwidth=1e6)
    oracles = [nn.Identity(), nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3)).double()]
    found = []
    for rule in (ul.credit.DGSSL(dimension=6), *(ul.credit.OracleSimCLR(o, -1, 1, dimension=6) for o in oracles)):
        world = Simulated(Hardware(device, network=uniform(0.0, 1e3)))
        session = trainer(rule, stages=1, accumulate=2, world=world)
        session.step(*batch(24))
        found.append((session.world.clock(), state(session)))
    (plain, _), (free, _), (asked, _) = found
    for _, weights in found[1:]:
        assert_same(weights, found[0][1])
    of_a_stage = costs_of(profile(ul.Chain([ul.Stage(oracles[1])], batch()[0])), device)[0].of(("forward",), 12)
    assert plain < free and of_a_stage > 12 * 2 * 40 * 8 / 1e6  # the loss has more to compare
    assert asked - free == pytest.approx(2 * of_a_stage)  # for each micro-batch
    weights = (5 * 40 + 40 + 40 * 3 + 3) * 8  # of each replica's first stage, and no other's
    rules = [ul.credit.OracleSimCLR(oracle, -1, 1, dimension=6) for oracle in oracles]
    assert [[rule.holds_beside(j) for j in (0, 1)] for rule in rules] == [[0, 0], [weights, 0]]
    costs, devices = costs_of(profile(ul.cut(body(), 2, like=batch()[0])), device), {Place(0, j): j for j in (0, 1)}
    peaks = [device_peaks(Timeline(), costs, 24, devices, rule) for rule in rules]
    assert [peaks[1][device] - peaks[0][device] for device in (0, 1)] == [weights, 0]
    above = trainer(ul.credit.OracleSimCLR(oracles[1], -1, 1, dimension=6), stages=2, world=Simulated(world.hardware))
    above.step(*batch(24))
    (sent,) = (act for act in above.timeline if act.kind == "S" and act.channel == "oracle")
    (taken,) = (act for act in above.timeline if act.kind == "R" and act.channel == "oracle")
    assert sent.bytes == 24 * 3 * 8 and taken.end - sent.start >= sent.bytes / 1e3


# ---- whole runs ------------------------------------------------------------------------------------------------------------


def test_a_record_has_the_notes_of_every_stage():
    data = images()
    session = ul.Trainer(
        ul.cut(pixels(), 3, like=data.x[:4]), credit=ul.credit.SubsampledSimCLR(0.97), optimizer=momentum
    )
    (record,) = session.fit(data, 1, batch_size=12)
    assert record["samples"] == 24 and session.steps == 2
    assert set(record["notes"]) == {"positives kept", "negatives kept"}
    assert all(0 <= share <= 1 for shares in record["notes"].values() for share in shares)
    assert 0 < record["notes"]["negatives kept"][0] < 1


class _Stop(ul.callbacks.Callback):
    def on_step(self, trainer, record):
        if trainer.steps == 3:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("credit", ["simclr", "dgssl", "oracle-simclr", "dgssl-llm"])
def test_a_run_resumed_from_its_files_alone_is_uninterrupted_bit_for_bit(credit, tmp_path):
    """The network is an encoder of ul.models, the oracle a run before; nothing is given again."""
    data = images(32)

    def session(rule):
        torch.manual_seed(0)
        model = ul.models.encoder(ul.models.cnn((1, 4, 4), 2, width=4, depth=3))
        chain = ul.cut(model, 3, like=data.x[:4])
        return ul.Trainer(chain, credit=rule, optimizer=momentum, accumulate=2, seed=5)

    before = session(ul.credit.SimCLR(dimension=6))
    before.fit(data, 1, batch_size=16, checkpoint=tmp_path / "before" / "checkpoint")
    path = str(tmp_path / "before")
    rule = {
        "simclr": ul.credit.SimCLR(dimension=6),
        "dgssl": ul.credit.DGSSL("barlow-twins", dimension=6),
        "oracle-simclr": ul.credit.OracleSimCLR(path, 0.2, 0.9, dimension=6),
        "dgssl-llm": ul.credit.DGSSLLLM(0.6, oracle=path, by="oracle", dimension=6),
    }[credit]
    whole, stopped = session(rule), session(rule)
    whole.fit(data, 2, batch_size=16)
    with pytest.raises(ul.Interrupted):
        stopped.fit(data, 2, batch_size=16, callbacks=[_Stop()], checkpoint=tmp_path / "run")
    if credit == "oracle-simclr":
        x, (first,) = torch.randn(3, 1, 4, 4), before.chains
        assert torch.equal(rule.oracle_rows(x), first[-1].head(first.eval()(x)))
    resumed = ul.Trainer.resume(tmp_path / "run")
    assert resumed.credit == rule and resumed.chains[0].recipe["model"]["encoder"] is True
    resumed.fit(data, 2, batch_size=16)
    assert resumed.steps == whole.steps == 4
    assert_same(state(resumed), state(whole))
    assert [stage.loss for stage in resumed.chains[0]] == [stage.loss for stage in whole.chains[0]]
    again = from_recipe_of_chain(resumed.chains[0].recipe, resumed.chains[0].example())
    assert again.state_dict().keys() == resumed.chains[0].state_dict().keys()


def test_different_first_weights_and_one_stage_in_memory(tmp_path):
    rule = ul.credit.DGSSL(dimension=6)
    session = trainer(rule, replicas=2, initial="different")
    a, b = (dict(chain.named_parameters()) for chain in session.chains)
    assert all(not torch.equal(a[name], b[name]) for name in a)
    plain, resident = trainer(rule, seed=2), trainer(rule, seed=2, resident=ul.OneStage(folder=tmp_path))
    for seed in range(2):
        assert plain.step(*batch(12, seed)) == resident.step(*batch(12, seed))


# ---- degenerate batches and errors -----------------------------------------------------------------------------------------


def test_nothing_to_learn_from_moves_nothing():
    """One image has no negatives, and a threshold no pair reaches leaves none: loss 0, no gradient, no NaN."""
    for rule, rows in ((ul.credit.DGSSL(dimension=6), 2), (ul.credit.SubsampledSimCLR(1.0, dimension=6), 12)):
        session = trainer(rule, optimizer=lambda ps: torch.optim.SGD(ps, lr=1.0))
        before = parameters(session)
        x, y = batch(rows)
        assert session.step(x, y) == pytest.approx([0.0] * 3, abs=1e-12)
        close(parameters(session), before, 1e-9)


def test_a_loss_that_is_not_finite_names_its_stage():
    session = trainer(ul.credit.DGSSL(dimension=6), stages=3)
    with torch.no_grad():
        next(session.chains[0][1].head.parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match="loss of stage 1"):
        session.step(*batch(8))


GROUPED = {"groups": 2}


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (
            lambda: trainer(ul.credit.DGSSL()).step(*batch(7)),
            "7 rows, which are no pairs of views; train on data with augment='simclr'",
        ),
        (lambda: trainer(ul.credit.DGSSL(), accumulate=4).step(*batch(20)), "5 rows, which are no pairs"),
        (lambda: trainer(ul.credit.SimCLR()).fit(methods.data(12), 1), "load them with augment='simclr'"),
        (
            lambda: trainer(ul.credit.SimCLR(), accumulate=3).fit(images(), 1, batch_size=8),
            "batch of 8 images is not 3 micro-batches",
        ),
        (lambda: ul.credit.DGSSL("nt-xnet"), "did you mean 'nt-xent'"),
        (lambda: ul.credit.DGSSL(3), "loss is a int; give a name"),
        (lambda: ul.credit.DGSSL("vicreg", temperature=0.2), "its loss VICReg has none"),
        (lambda: ul.credit.DGSSL(projector="2c2f"), "Unknown projector '2c2f'"),
        (lambda: ul.credit.SimCLR(dimension=0), "dimension=0 is not possible"),
        (lambda: ul.credit.SimCLR(replicas="both"), "Unknown replicas 'both'"),
        (lambda: ul.credit.SubsampledSimCLR(2.0), "given 2.0"),
        (lambda: ul.credit.DGSSLLLM(ratio=0), "given 0"),
        (lambda: ul.credit.DGSSLLLM(thresholds="orcale"), "give 'oracle', 'batch', or two rows"),
        (lambda: ul.credit.DGSSLLLM(thresholds=((0.1, 0.2), (0.1,))), "2 numbers α and 1 β"),
        (lambda: trainer(ul.credit.DGSSLLLM(thresholds=((0.1, 0.2), (0.1, 0.4)))), "2 values of alpha for 3 stages"),
        (lambda: trainer(ul.credit.DGSSLLLM()), "dgssl-llm needs an oracle"),
        (lambda: trainer(ul.credit.OracleSimCLR()), "oracle-simclr needs an oracle"),
        (lambda: trainer(ul.credit.OracleSimCLR(3)), "oracle is a int"),
        (
            lambda: ul.credit.OracleSimCLR("/no/such/run").check_data(images(), 8, 1),
            "oracle-simclr's oracle /no/such/run cannot be read: There is no checkpoint",
        ),
        (lambda: trainer(ul.credit.OracleSimCLR(nn.Linear(9, 2).double())), "cannot read inputs of shape (5,)"),
        (lambda: trainer(ul.credit.OracleSimCLR(nn.Flatten(0))), "must give (B, E)"),
        (lambda: its_own_oracle(), "oracle has weights of the network that is trained"),
        (lambda: ul.credit.DGSSL(loss=pairs.OracleNTXent()), "dgssl has no oracle, whose projections OracleNTXent"),
        (lambda: ul.credit.SimCLR(loss=pairs.EasyNTXent(by="oracle")), "simclr has no oracle"),
        (lambda: ul.credit.DGSSL(projector=3), "give '1c2f' or '0c2f', a head's dataclass"),
        (lambda: ul.credit.DGSSLLLM(ratio="x"), "in (0, 1]; given 'x'"),
        (lambda: pairs.ratios("x", 3), "given 'x'"),
        (lambda: pairs.BarlowTwins(weight=None), "BarlowTwins's weight must be a number"),
        (lambda: pairs.VICReg(invariance="x"), "invariance must be a number"),
        (lambda: pairs.HardNegatives(beta="x"), "beta must be a number"),
        (lambda: ul.probes.Recipe(lr="x"), "lr must be a number"),
        (lambda: trainer(ul.credit.DGSSL(dimension=6)).fit(images(), 1, batch_size=1), "a single image"),
        (
            lambda: trainer(ul.credit.DGSSL(), ul.consensus.TorchDDP(), replicas=2),
            "dgssl judges all views of an update",
        ),
        (
            lambda: trainer(ul.credit.SimCLR(), ul.consensus.CDP(), replicas=2),
            "under cdp a replica begins a micro-batch when",
        ),
        (lambda: trainer(ul.credit.DGSSL(), ul.consensus.ACCO(), replicas=2, accumulate=2), "take all-reduce, wash"),
        (
            lambda: ul.Trainer(
                ul.cut(ul.models.cnn((1, 4, 4), 2, width=4), 3, like=torch.randn(4, 1, 4, 4), **GROUPED),
                credit=ul.credit.DGSSL(),
                optimizer=momentum,
            ),
            "wants its stages in a row",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(attempt, says):
    with pytest.raises(ul.UnlockedError) as error:
        attempt()
    assert says in str(error.value)


def test_an_oracle_may_share_a_frozen_part():
    network = body()
    first = next(network.children())
    first.requires_grad_(False)
    trainer(ul.credit.OracleSimCLR(nn.Sequential(first, nn.Flatten()), dimension=6), model=network)


class _Together(PairLoss):
    """Draws the views of an image together, which takes no other image."""

    def judge(self, z, y, oracle=None):
        return Judged((z[::2] - z[1::2]).square().sum(), {})


def test_a_loss_that_needs_no_other_image_learns_from_one():
    data = images(4)
    session = ul.Trainer(
        ul.cut(pixels(), 2, like=data.x[:4]), credit=ul.credit.DGSSL(loss=_Together()), optimizer=momentum
    )
    assert session.fit(data, 1, batch_size=1)[0]["losses"][0] > 0


def its_own_oracle():
    network = body()
    return trainer(ul.credit.OracleSimCLR(network, dimension=6), model=network)


def test_an_oracle_of_no_numbers_shows_in_the_loss():
    class Lost(nn.Module):
        def forward(self, x):
            return x.flatten(1) * math.nan

    for rule in (
        ul.credit.OracleSimCLR(Lost(), dimension=6),
        ul.credit.DGSSLLLM(0.8, thresholds="batch", oracle=Lost(), by="oracle", dimension=6),
    ):
        with pytest.raises(NonFiniteLoss):
            trainer(rule).step(*batch(24))


def test_thresholds_for_each_stage_are_those_of_its_loss():
    alpha, beta = (0.2, -0.5, -1.0), (0.1, 0.6, 1.0)
    session = trainer(ul.credit.DGSSL(loss=pairs.EasyNTXent(alpha, beta), dimension=6))
    losses = [stage.loss for stage in session.chains[0]]
    assert losses == [pairs.EasyNTXent(a, b) for a, b in zip(alpha, beta)]
    session.step(*batch(24))
    with pytest.raises(ul.UnlockedError, match="3 values of alpha for 2 stages"):
        trainer(ul.credit.DGSSL(loss=pairs.EasyNTXent(alpha, beta), dimension=6), stages=2)


def test_a_single_held_out_image_has_no_loss_of_pairs():
    data = images()
    rule = ul.credit.DGSSL(loss="barlow-twins", dimension=6)
    session = ul.Trainer(ul.cut(pixels(), 2, like=data.x[:4]), credit=rule, optimizer=momentum)
    one = ul.data.from_tensors(data.x[:1], data.y[:1], like=data)
    (record,) = session.fit(data, 1, batch_size=12, validate=one)
    assert record["validation"]["loss"] is None and record["validation"]["accuracy"] in (0.0, 1.0)
    assert session.fit(data, 2, batch_size=12, validate=data)[-1]["validation"]["loss"] > 0


def test_a_run_goes_on_only_with_the_oracle_it_began_with(tmp_path):
    data, oracle = images(), nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    def session():
        chain = ul.cut(ul.models.encoder(ul.models.cnn((1, 4, 4), 2, width=4, depth=2)), 2, like=data.x[:4])
        return ul.Trainer(chain, credit=ul.credit.OracleSimCLR(oracle, dimension=6), optimizer=momentum)

    begun = session()
    begun.fit(data, 1, batch_size=12)
    begun.save(tmp_path)
    resumed = ul.Trainer.resume(tmp_path, credit=begun.credit)
    assert resumed.oracle is None  # given anew on purpose
    resumed.fit(data, 2, batch_size=12)
    nn.init.zeros_(oracle[1].bias)
    with pytest.raises(ul.UnlockedError, match="oracle is not the one that this run was trained with"):
        resumed.fit(data, 3, batch_size=12)


def test_an_oracle_is_a_run_with_a_projector(tmp_path):
    session = trainer(ul.credit.Backprop(), model=ul.models.mlp((5,), 3, width=7), stages=2)
    session.step(batch()[0].float(), batch()[1])
    session.save(tmp_path / "supervised")
    with pytest.raises(ul.UnlockedError, match="a network without a projector, trained by backprop"):
        ul.credit.OracleSimCLR(str(tmp_path / "supervised")).check_data(images(), 8, 1)


def test_an_oracle_is_read_once_until_its_run_goes_on(tmp_path):
    x = images().x[:12].float()
    model = ul.models.encoder(ul.models.mlp(x.shape[1:], 2, width=4))
    session = trainer(ul.credit.SimCLR(dimension=6), model=model, like=x)
    session.save(tmp_path)
    seen: list[Oracle] = []
    for _ in range(2):
        seen += [ul.credit.OracleSimCLR(str(tmp_path), dimension=6)._oracle for _ in range(2)]
        assert torch.equal(seen[-1](x), seen[-2](x)) and seen[-1]._network is seen[-2]._network
        session.step(x, images().y[:12])
        session.save(tmp_path)
    assert not torch.equal(seen[0](x), seen[2](x))


@pytest.mark.parametrize("rule", [ul.credit.OracleSimCLR, ul.credit.DGSSLLLM])
def test_a_run_whose_oracle_is_gone_can_be_exported_but_not_trained_on(rule, tmp_path):
    data = images()

    def session(credit):
        chain = ul.cut(ul.models.encoder(ul.models.cnn((1, 4, 4), 2, width=4, depth=2)), 2, like=data.x[:4])
        return ul.Trainer(chain, credit=credit, optimizer=momentum)

    before, after = tmp_path / "before", tmp_path / "after"
    session(ul.credit.SimCLR(dimension=6)).save(before)
    trained = session(rule(oracle=str(before), dimension=6))
    trained.fit(data, 1, batch_size=12)
    trained.save(after)
    before.rename(tmp_path / "elsewhere")
    opened = ul.Trainer.resume(after)
    assert_same(opened.averaged().state_dict(), trained.averaged().state_dict())
    for use in (lambda: opened.fit(data, 2, batch_size=12), lambda: opened.evaluate(data, train=data)):
        with pytest.raises(
            ul.UnlockedError, match=f"oracle {before} cannot be read: There is no .* looked for at {before}"
        ):
            use()


def test_the_document_s_example_runs():
    page = (Path(__file__).parent.parent / "docs" / "self_supervised.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(code.replace('"digits", ', '"digits", subset=128, '), names)
    assert names["record"]["losses"][0] > 0


def test_an_oracle_s_path_needs_no_quotes_in_a_method():
    method = parse_method("dgssl-llm(oracle=runs/simclr-1,ratio=0.9)/all-reduce@2")
    assert parse_method(str(method)) == method and method.replicas == 2
    rule = make_credit(method.credit, 4)
    assert rule == ul.credit.DGSSLLLM(0.9, oracle="runs/simclr-1")
    tables = parse_method("dgssl-llm(thresholds=((0.5,-1),(0.2,1)),by=own)")
    assert make_credit(tables.credit, 2).thresholds == ((0.5, -1), (0.2, 1))


@pytest.mark.parametrize(
    ("option", "says"), [("--augment=crop", "give one"), ("--accumulate=3", "not 3 micro-batches")]
)
def test_data_that_do_not_fit_leave_no_folder_behind(option, says, tmp_path, capsys):
    """So that the command can be given again, mended."""
    words = ["train", "--credit", "simclr", "--subset", "64", "--augment", "views+crop", "--device", "cpu", option]
    assert main([*words, "--run", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "rule, oracles",
    [
        (ul.credit.DGSSLLLM(oracle=methods.Oracle()), True),
        (ul.credit.DGSSLLLM(oracle=methods.Oracle(), by="own"), False),
        (ul.credit.DGSSLLLM(thresholds="batch"), False),
        (ul.credit.DGSSLLLM(ratio=1.0), False),
        (ul.credit.DGSSLLLM(thresholds=((0.5, -1.0), (0.2, 1.0))), False),
    ],
)
def test_thresholds_of_the_oracle_are_compared_with_its_similarities(rule, oracles):
    assert (rule.oracle_rows is not None) == oracles == (rule.loss_of(0, 2).reads_oracle)
