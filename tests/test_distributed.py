"""The distributed world gives the in-process world's parameters, bit for bit, and its processes end by themselves."""

from __future__ import annotations

import time

import pytest
import torch

import unlocked as ul
from unlocked.worlds import Distributed

import methods
from methods import consensus_rules, credits, data, mlp, reversible_mlp, some_pairs, trainer
from processes import run_processes


def names_of(part):
    """The pairs of a part; the rules that average with pipedream only, as test_averaging_processes.py has more of them."""
    pairs = [(credit, rule) for credit, rule in some_pairs(part) if "one_process" not in rule.laws]
    return list(dict.fromkeys(("pipedream" if "averages" in b.laws else a.name, b.name) for a, b in pairs))


TRAIN, TEST = data(72, dtype=torch.float32), data(60, 1, dtype=torch.float32)


def session(credit, rule, world=None, **options):
    """Two replicas of two stages with everything on: momentum, schedule, clipping, accumulation, dropout, BatchNorm."""
    options = {
        "model": mlp(2, norm=True, dropout=0.2, dtype=torch.float32),
        "stages": 2,
        "replicas": 2,
        "schedule": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20),
        "clip": 5.0,
        "accumulate": 2,
        "seed": 3,
    } | options
    make = {row.name: row.make for row in [*credits(), *consensus_rules()]}
    return trainer(make[credit](), make[rule](), world=world, **options)


def here(session):
    """The tensors of the workers of this process, by replica, stage and name."""
    return {
        (weights.worker.replica, weights.worker.stage, name): x.detach().clone()
        for weights in session.weights
        for name, x in torch.nn.Module.state_dict(weights.stage).items()
    }


def outcome(session):
    """Everything that must be alike in all worlds, after 9 steps (all-reduce splits the epochs) or more."""
    records = session.fit(TRAIN, 3, batch_size=12, validate=TEST, validate_every=2)
    kept = ("epoch", "step", "losses", "bytes", "validation", "learning_rates", "samples")
    average = session.averaged()
    return (
        here(session),
        [{name: record[name] for name in kept} for record in records],
        None if average is None else dict(average.state_dict()),
        session.ensemble(TEST.x),
    )


def on_processes(cluster, names, links, options):
    torch.manual_seed(100 + cluster.rank)  # the user's own random state must not matter
    found = []
    for credit, rule in names:
        with Distributed(cluster, links=links) as world:
            found.append(outcome(session(credit, rule, world, **options)))
    return found


def compare(processes, names, links="auto", **options):
    found = run_processes(on_processes, processes, names, links, options)
    for k, (credit, rule) in enumerate(names):
        parameters, records, average, together = outcome(session(credit, rule, **options))
        merged = {}
        for rows in found:
            merged |= rows[k][0]
        assert merged.keys() == parameters.keys()
        odd = [name for name, x in parameters.items() if not torch.equal(x, merged[name])]
        assert not odd, f"{credit}/{rule}: these differ: {odd}"
        for rows in found:
            assert rows[k][1] == records, f"{credit}/{rule}"
        assert all(torch.equal(x, found[0][k][2][name]) for name, x in average.items())
        assert torch.equal(together, found[0][k][3])
        assert all(rows[k][2] is None and rows[k][3] is None for rows in found[1:])


def half_of(part, first):
    """Every second pair of a part; all of them with `--all-pairs`."""
    return names_of(part) if methods.ALL_PAIRS else names_of(part)[first::2]


# what the halves leave out
BESIDES = [
    ("infopro", "all-reduce"),
    ("delayed-gradients", "independent"),
    ("pipedream", "btm"),
    ("pipedream", "easgd"),
    ("gn-dgl", "all-reduce"),
    ("dgl-auglocal", "all-reduce"),
    ("forward-gradient-two-backward", "wash"),
    ("dgl-shared", "all-reduce"),
    ("mezo", "all-reduce"),
    ("1f1b", "wash"),
    ("greedy", "diloco"),
    ("backprop", "acco"),
    ("greedy", "papa-2"),
]


def test_pairs_on_four_processes_equal_in_process():
    compare(4, list(dict.fromkeys([*half_of(3, 0), *BESIDES])))


def test_every_rule_is_in_some_world_of_processes():
    pairs = [*half_of(3, 0), *BESIDES, *half_of(2, 1), *names_of(1)[::3]]
    credit_rules, rules = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
    alike = {"dgl", "ddg", "features-replay"}  # dgl is below; the two are pipedream and delayed-gradients with a factor
    assert {row.name for row in credits()} - credit_rules <= alike
    assert {row.name for row in consensus_rules() if "one_process" not in row.laws} <= rules


def test_two_workers_a_process():
    compare(2, names_of(1)[::3])


def test_uneven_placement_and_three_replicas():
    compare(4, [("interlocking1", "all-reduce"), ("dgl", "wash"), ("backprop", "independent")], replicas=3, stages=3)


def test_pairs_over_gloo():
    compare(2, half_of(2, 1), links="gloo")


def test_batchnorm_policies():
    compare(2, [("dgl", "wash")], batchnorm="average")
    compare(2, [("dgl", "wash")], batchnorm="refresh")


def backend_session(cluster, replicas, stages):
    with Distributed(cluster, reduction="backend") as world:
        made = session("backprop", "all-reduce", world, replicas=replicas, stages=stages)
        made.fit(TRAIN, 2, batch_size=12)
    return here(made), dict(made.bytes_sent)


@pytest.mark.parametrize("replicas, stages", [(2, 2), (4, 1)])
def test_the_backends_own_all_reduce_is_the_same_up_to_rounding(replicas, stages):
    merged = {}
    for found, _ in run_processes(backend_session, 4, replicas, stages):
        merged |= found
    made = session("backprop", "all-reduce", replicas=replicas, stages=stages)
    made.fit(TRAIN, 2, batch_size=12)
    expected = here(made)
    if replicas == 2:  # a + b = b + a
        assert all(torch.equal(merged[name], x) for name, x in expected.items())
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


# ---- pipelines that are never emptied ------------------------------------------------------------------------------------


def chain_of(kind, stages):
    """A plain or a reversible network with BatchNorm and dropout."""
    model = mlp(4, norm=True, dropout=0.2, dtype=torch.float32) if kind == "plain" else reversible_mlp()
    return ul.cut(model, stages, like=TRAIN.x[:4])


DELAYED = [(row.name, "plain") for row in credits("delayed")] + [("petra", "reversible")]
MITIGATIONS = {
    "pipedream": ul.mitigation.DelayCompensation(),
    "pipedream-2bw": ul.mitigation.GapAware(),
    "cdp-pipeline": ul.mitigation.DelayCompensation(adaptive=True),
    "delayed-gradients": ul.mitigation.WeightPrediction(),
    "ddg": ul.mitigation.GapAware(decay=0.9),
    "features-replay": ul.mitigation.DelayCompensation(adaptive=True),
    "fdg": ul.mitigation.WeightPrediction("linear"),
    "petra": ul.mitigation.StalenessAware(),  # needs a delay of two updates
}


def pipeline(name, kind, world=None, stages=4):
    (row,) = [row for row in credits("delayed") if row.name == name]
    return ul.Trainer(
        chain_of(kind, stages),
        credit=row.make(),
        optimizer=lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
        accumulate=3,
        mitigation=MITIGATIONS[name],
        world=world,
    )


def steps(session, begin, end):
    for k in range(begin, end):
        session.step(TRAIN.x[6 * k : 6 * k + 24], TRAIN.y[6 * k : 6 * k + 24])


def begun(cluster, folder):
    """Five steps of every pipeline on all processes, saved with whatever is in flight."""
    for name, kind in DELAYED:
        with Distributed(cluster) as world:
            session = pipeline(name, kind, world)
            steps(session, 0, 5)
            session.save(folder / f"{name}-{kind}")
            steps(session, 5, 6)
            session.drain()


def ended(cluster, folder):
    """Gone on with, by other processes, to the eighth step."""
    found = []
    for name, kind in DELAYED:
        with Distributed(cluster) as world:
            session = ul.Trainer.resume(folder / f"{name}-{kind}", chain_of(kind, 4), world=world)
            steps(session, 5, 8)
            session.drain()
            found.append(here(session))
    return found


def test_pipelines_of_four_stages_saved_in_flight_and_resumed_on_other_processes_equal_in_process(tmp_path):
    run_processes(begun, 4, tmp_path)
    found = run_processes(ended, 2, tmp_path)
    for k, (name, kind) in enumerate(DELAYED):
        session = pipeline(name, kind)
        steps(session, 0, 8)
        session.drain()
        merged = {}
        for rows in found:
            merged |= rows[k]
        expected = here(session)
        assert merged.keys() == expected.keys()
        odd = [place for place, x in expected.items() if not torch.equal(x, merged[place])]
        assert not odd, f"{name} ({kind}): these differ: {odd}"


def left_in_flight(cluster, links, count):
    """A program that stops with gradients under way."""
    began = time.perf_counter()
    with Distributed(cluster, links=links) as world:
        session = pipeline("petra", "reversible", world)
        steps(session, 0, count)
    return time.perf_counter() - began


# over gloo a channel must have been listened to, or its sender waits 15 s at the end
@pytest.mark.parametrize("links, count", [("shared-memory", 1), ("shared-memory", 5), ("gloo", 5)])
def test_a_program_may_stop_with_micro_batches_in_flight(links, count):
    assert max(run_processes(left_in_flight, 4, links, count)) < 10.0
