"""The planner: its figures meet their closed forms, and it says what a person must know before believing them."""

from __future__ import annotations

import itertools
import json
import math
import shlex

import pytest
import torch
from torch import nn

import unlocked as ul
from unlocked import cli, running
from unlocked.config import resolve
from unlocked.method_names import parse_method
from unlocked.planning import ACCURACY, Cuts, predicting
from unlocked.simulation import cost_file
from unlocked.simulation.costs import costs_of
from unlocked.simulation.hardware import Device, Hardware
from unlocked.simulation.network import Edge, Network, uniform
from unlocked.simulation.profile import profile

DEVICE = Device(flops=1e9, memory_bandwidth=1e9)
WIRED = Hardware(DEVICE)
BATCH = 24
LOCAL = "dgl(head=linear,budget=None)"
FEW = {"credit": ("backprop", "gpipe", LOCAL), "consensus": ("independent", "all-reduce", "wash(p=0.1)")}


def tower(depth: int = 4, width: int = 64, norm: bool = False) -> nn.Sequential:
    """Equal layers: stages of equal cost."""
    rows = [[nn.Linear(width, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()] for _ in range(depth)]
    return nn.Sequential(*(layer for row in rows for layer in row))


X = torch.zeros(2, 64)


KNOWN: dict[str, ul.Plan] = {}
TOWER = Cuts(tower(), X)


def planned(devices: int = 4, *, model=None, batch: int = BATCH, hardware: Hardware = WIRED, **options) -> ul.Plan:
    """Of the tower, unless a model is given; asked for again, it is not made again."""
    make = lambda network: ul.plan(network, X, batch=batch, devices=devices, hardware=hardware, **(FEW | options))  # noqa: E731
    if model is not None:
        return make(model)
    asked = repr((predicting.STEPS, devices, batch, hardware, options))
    if asked not in KNOWN:
        KNOWN[asked] = make(TOWER)
    return KNOWN[asked]


def row_of(plan: ul.Plan, method: str, stages: int, accumulate: int = 1):
    [row] = [row for row in plan.rows if (row.method, row.stages, row.accumulate) == (method, stages, accumulate)]
    return row


def costs(stages: int, model=None, heads: bool = True):
    """Of the tower, really cut and headed."""
    chain = ul.cut(tower() if model is None else model, stages, like=X)
    if heads:
        ul.credit.DGL(head="linear", budget=None).prepare(chain, 0)
    return costs_of(profile(chain), DEVICE)


def by_name(plan: ul.Plan) -> dict:
    return {(row.method, row.stages, row.accumulate): row for row in plan.rows}


# ---- time --------------------------------------------------------------------------------------------------------------

STEP = ("forward", "head-forward", "head-backward", "weight-backward", "update")


def test_dgl_on_j_balanced_stages_is_j_times_one_device_but_for_its_heads():
    model = nn.Sequential(*tower(16), nn.Linear(64, 2))  # few outputs, so small heads
    cuts = Cuts(model, X)
    plan = planned(model=cuts, credit=(LOCAL,))
    row = row_of(plan, LOCAL, 4)
    slowest = max(stage.of(STEP, BATCH) for stage in costs(4, model=model).stages)
    assert row.samples_per_second == pytest.approx(BATCH / slowest)
    # a head costs a little, and of the gradients of 16 layers' inputs, a third of all work, three more are spared
    assert 0.9 * 4 < row.samples_per_second / plan.single.samples_per_second < 4 / (1 - 4 / 16 / 3)
    assert row.bound == "computing"
    plan = planned(model=cuts, credit=(LOCAL,), consensus=("independent",))
    assert plan.best == row
    assert plan.headline.startswith(f"Fastest is {LOCAL} with 4 stages on 4 devices")


def test_backprop_over_stages_uses_one_device_of_j():
    row = row_of(planned(), "backprop", 4)
    rows = costs(4, heads=False).stages
    seconds = sum(stage.of(("forward", "backward"), BATCH) for stage in rows)
    seconds += rows[-1].of(("head-forward",), BATCH)
    seconds += rows[0].of(("update",), BATCH)  # the others update meanwhile
    assert row.samples_per_second == pytest.approx(BATCH / seconds)
    assert row.utilisation == pytest.approx(0.25, abs=0.06)
    assert row.bound == "waiting"


def test_all_reduce_over_n_devices_without_a_network_is_n_times_one_but_for_the_updates():
    plan = planned(4)
    stage = costs(1).stages[0]
    seconds = stage.of(("forward", "head-forward", "backward", "update"), BATCH // 4)
    assert row_of(plan, "backprop/all-reduce@4", 1).samples_per_second == pytest.approx(BATCH / seconds)


def test_parts_that_are_not_equal_take_what_each_takes_and_hold_at_most_what_the_largest_would():
    small, uneven, large = (row_of(planned(batch=samples), "gpipe", 4) for samples in (24, 26, 28))
    assert large.updates_per_second < uneven.updates_per_second < small.updates_per_second
    assert uneven.peaks == large.peaks


def test_greedy_counts_a_sample_once_all_stages_have_learnt_from_it():
    greedy = "greedy(head=linear,budget=None)"
    row = row_of(planned(credit=(greedy,)), greedy, 4)
    seconds = 0.0
    rows = costs(4).stages
    for k, stage in enumerate(rows):
        seconds += max([stage.of(STEP, BATCH), *(below.of(("forward",), BATCH) for below in rows[:k])])
    assert row.samples_per_second == pytest.approx(BATCH / seconds)


def test_when_the_network_is_too_slow_one_device_wins_and_the_headline_says_so():
    plan = planned(hardware=Hardware(DEVICE, network=uniform(0.0, 1.0)))
    assert plan.best == plan.single
    assert plan.headline.startswith("One device is at least as fast for one network as any number up to 4: backprop")
    other = next(row for row in plan.rows if row.devices > 1 and row.networks == 1)
    assert other.bound == "wire"
    assert f"{other.samples_per_second:.3g} samples/s" in plan.headline
    assert "the wire of device" in plan.headline


def test_a_latency_nobody_can_hide_is_waiting_not_computing():
    rule = "all-reduce(bucket_mb=0)"
    plan = planned(hardware=Hardware(DEVICE, network=uniform(10.0, math.inf)), consensus=(rule,))
    row = row_of(plan, f"backprop/{rule}@4", 1)
    assert row.bound == "waiting"
    assert row.samples_per_second == pytest.approx(BATCH / (2 * 3 * 10.0), rel=0.01)


def test_a_faster_network_or_device_never_makes_anything_slower():
    def rates(**changes):
        network = uniform(1e-4, changes.get("bandwidth", 1e8))
        device = Device(changes.get("flops", 1e9), changes.get("flops", 1e9))
        return {
            name: row.samples_per_second
            for name, row in by_name(planned(hardware=Hardware(device, network=network))).items()
        }

    for key, values in (("bandwidth", (1e5, 1e7, math.inf)), ("flops", (1e7, 1e9, 1e10))):
        found = [rates(**{key: value}) for value in values]
        for slower, faster in itertools.pairwise(found):
            assert slower.keys() == faster.keys()
            assert all(slower[name] <= faster[name] * (1 + 1e-9) for name in slower)
        assert any(found[0][name] < 0.9 * found[-1][name] for name in found[0])


@pytest.mark.parametrize("slow", [2.0, 5.0])
def test_a_straggler_slows_an_all_reduce_to_its_own_speed_and_of_independent_networks_only_one(slow):
    usual, slowed = planned(), planned(hardware=WIRED.but(speeds=(1.0, 1.0, 1 / slow)))
    together, apart = "backprop/all-reduce@4", "backprop@4"
    ratio = lambda name: row_of(slowed, name, 1).samples_per_second / row_of(usual, name, 1).samples_per_second  # noqa: E731
    assert ratio(together) == pytest.approx(1 / slow)
    assert ratio(apart) == pytest.approx((3 + 1 / slow) / 4)
    assert f"device 2 (replica 2, speed {1 / slow:g}) computes 100 %" in row_of(slowed, together, 1).bound_by
    # fewer devices than there are: the slow one is left out
    assert row_of(slowed, "backprop/all-reduce@2", 1) == row_of(usual, "backprop/all-reduce@2", 1)


def test_a_slow_device_is_left_out_where_that_is_faster():
    slowed = planned(hardware=WIRED.but(speeds=(1.0, 0.1)), consensus=("all-reduce",))
    row = row_of(slowed, LOCAL, 3)
    assert row.devices == 3
    assert row.samples_per_second == row_of(planned(3, consensus=("all-reduce",)), LOCAL, 3).samples_per_second
    assert row.samples_per_second > 3 * row_of(slowed, LOCAL, 4).samples_per_second
    assert slowed.best.method == "backprop/all-reduce@3"


def test_the_one_device_is_the_fastest():
    plan = planned(2, hardware=WIRED.but(speeds=(0.5, 2.0)))
    assert plan.single.samples_per_second == pytest.approx(2 * planned(2).single.samples_per_second)


def test_rules_that_do_not_share_the_batch_train_n_networks_each_at_its_own_rate():
    plan = planned()
    row = row_of(plan, "backprop@4", 1)
    assert (row.networks, row.replicas, row.devices) == (4, 4, 4)
    assert row.samples_per_second == pytest.approx(plan.single.samples_per_second)
    assert plan.rows.index(row) > plan.rows.index(plan.single)  # no faster for one network, so one device comes first
    assert row_of(plan, "backprop/all-reduce@4", 1).networks == 1


# ---- bytes and memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [2, 4])
def test_bytes_are_the_closed_forms(replicas):
    plan = planned()
    parameters = 4 * 4 * (64 * 64 + 64)
    row = row_of(plan, f"backprop/all-reduce@{replicas}", 1)
    assert row.bytes_replicas == pytest.approx(2 * (replicas - 1) / replicas * parameters, abs=8)
    assert row.bytes_step == pytest.approx(2 * (replicas - 1) * parameters, abs=32)
    assert (row.bytes_up, row.bytes_down) == (0, 0)
    boundary = 4 * 64 * BATCH
    for name, down in (("backprop", boundary), ("gpipe", boundary), (LOCAL, 0)):
        row = row_of(plan, name, replicas)
        assert (row.bytes_up, row.bytes_down, row.bytes_replicas) == (boundary, down, 0)
        assert row.bytes_step == (replicas - 1) * (boundary + down)
        assert row.bytes_per_sample == row.bytes_step / BATCH


def test_wash_sends_half_of_p_of_the_weights_that_move():
    row = row_of(planned(), "backprop/wash(p=0.1)@4", 1)
    assert row.bytes_replicas == pytest.approx(3 / 4 * 0.1 / 2 * 4 * 4 * (64 * 64 + 64), rel=0.01)


def test_memory_is_what_is_held_and_what_is_kept():
    plan = planned()
    stage = costs(1).stages[0]
    for name, samples in (("backprop", BATCH), ("backprop/all-reduce@4", BATCH // 4)):
        kept = round(stage.profile.kept.at(samples)) + round(stage.profile.head_kept.at(samples))
        assert set(row_of(plan, name, 1).peaks) == {stage.held + kept}
    stage = costs(4, heads=False).stages[0]  # of gpipe: all its micro-batches at once, and a message or two
    kept, message = stage.profile.kept.at(BATCH), 4 * 64 * BATCH // 4
    assert 0 <= row_of(plan, "gpipe", 4).peaks[0] - stage.held - kept <= predicting.HELD_MESSAGES * message


@pytest.mark.parametrize("name", [("backprop", 4), ("gpipe/all-reduce@2", 2), (LOCAL, 4), ("backprop/all-reduce@4", 1)])
def test_a_memory_just_below_a_peak_is_too_small_and_just_above_it_is_enough(name):
    peak = row_of(planned(), *name).peak
    fits = planned(hardware=WIRED.but(device=Device(1e9, 1e9, peak)))
    assert row_of(fits, *name).peak == peak
    small = planned(hardware=WIRED.but(device=Device(1e9, 1e9, peak - 1)))
    assert (*name, 1) not in by_name(small)
    [refused] = [one for one in small.infeasible if (one.method, one.stages) == name]
    assert refused.kind == "memory"
    assert f"would hold {predicting.in_bytes(peak)}, but has {predicting.in_bytes(peak - 1)}" in refused.reason
    assert "or a smaller batch" in refused.remedy
    assert ("more stages" in refused.remedy) == (name[0] != "backprop/all-reduce@4")  # that has all devices already
    assert all(row.peak < peak for row in small.rows)


def test_what_is_too_large_in_one_go_is_tried_in_the_fewest_micro_batches():
    whole = planned().single
    half = planned(accumulate=2).single
    assert half.peak < whole.peak
    plan = planned(hardware=WIRED.but(device=Device(1e9, 1e9, half.peak)))
    assert (plan.single.accumulate, plan.single.peak) == (2, half.peak)
    [refused] = [one for one in plan.infeasible if (one.method, one.stages) == ("backprop", 1)]
    assert refused.instead == 2
    assert plan.single.samples_per_second == pytest.approx(whole.samples_per_second, rel=1e-4)


def test_nothing_fits_and_the_headline_says_why():
    plan = planned(hardware=WIRED.but(device=Device(1e9, 1e9, 1000)))
    assert plan.best is None
    assert plan.headline.startswith("Nothing fits. backprop on 1 stage: device 0 would hold ")
    assert "weights, gradients and the optimizer's state alone take" in plan.headline


def test_the_state_of_the_optimizer_counts():
    weights = 4 * 4 * (64 * 64 + 64)
    peaks = [planned(optimizer=name).single.peak for name in ("sgd", "momentum", "adam")]
    assert [after - before for before, after in itertools.pairwise(peaks)] == [weights, weights]


def test_messages_do_not_pile_up_where_the_wire_is_slow(monkeypatch):
    def peaks():
        plan = planned(hardware=Hardware(DEVICE, network=uniform(0.0, 1e4)))
        return row_of(plan, LOCAL, 4).peaks

    found = peaks()
    monkeypatch.setattr(predicting, "STEPS", 2 * predicting.STEPS)
    assert peaks() == found
    free = row_of(planned(), LOCAL, 4).peaks
    assert all(slow <= fast + predicting.HELD_MESSAGES * 4 * 64 * BATCH for slow, fast in zip(found, free))


# ---- what is tried -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [tower(), tower(norm=True), ul.models.cnn((1, 8, 8), 10)])
@pytest.mark.parametrize(
    "credit", [ul.credit.Backprop(), ul.credit.DGL(head="linear", budget=None), ul.credit.PredSim(budget=None)]
)
def test_cut_on_shapes_alone_it_costs_what_it_costs_cut_for_real(model, credit):
    like = torch.zeros(2, 1, 8, 8) if isinstance(model, ul.models.Layered) else X
    cuts = Cuts(model, like)
    for stages in (1, 2, 4):
        chain = ul.cut(model, stages, like=like)
        credit.prepare(chain, 0)
        _, found = cuts.profiled(stages, credit)
        real = profile(chain)
        assert found == real


def test_the_model_stays_as_it_is():
    model = tower(norm=True).eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    planned(model=model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not model.training and all(x.device.type == "cpu" for x in model.parameters())


def test_a_chain_keeps_its_own_stages_and_heads():
    def stage(last=False):
        return ul.Stage(nn.Linear(64, 64), None if last else nn.Linear(64, 7))

    chain = ul.Chain([stage(), stage(), stage(last=True)], like=X)
    plan = ul.plan(chain, batch=BATCH, devices=3, hardware=WIRED, credit=("backprop", "dgl(budget=None)"))
    assert {row.stages for row in plan.rows} == {1, 3}
    assert {one.reason for one in plan.infeasible} == {
        "The chain given has 3 stages; it can be joined to one, but not cut into 2."
    }
    made = []

    def factory(stages):
        made.append(stages)
        return ul.Chain([stage(last=j == stages - 1) for j in range(stages)], like=X)

    plan = ul.plan(factory, batch=BATCH, devices=3, hardware=WIRED, credit=("backprop", "dgl(budget=None)"))
    assert {row.stages for row in plan.rows} == set(made) == {1, 2, 3}
    assert len(chain[0].head.state_dict()) == 2


def test_what_cannot_be_split_says_what_would_help():
    plan = planned(batch=6)
    [one] = [one for one in plan.infeasible if one.method == "backprop/all-reduce@4"]
    assert (one.kind, one.reason) == ("batch", "A batch of 6 cannot be split evenly among 4 replicas.")
    assert one.remedy == "a batch of 8"
    [one] = [one for one in planned(batch=3, devices=2).infeasible if one.method == "gpipe"]
    assert "cannot be split into 4 parts" in one.reason


def test_rules_that_refuse_each_other_are_not_feasible():
    plan = planned(4, credit=["dgssl(projector=0c2f)"], consensus=["acco"])
    refused = [one for one in plan.infeasible if one.method == "dgssl(projector=0c2f)/acco@2"]
    assert [one.stages for one in refused] == [1, 2]
    assert all("judges all views of an update together" in one.reason for one in refused)


def test_every_rule_is_tried_once_on_every_mesh_and_those_of_torch_are_named():
    plan = ul.plan(tower(), X, batch=BATCH, devices=4, hardware=WIRED)
    tried = [(row.method, row.stages, row.accumulate) for row in plan.rows]
    tried += [(one.method, one.stages, 0) for one in plan.infeasible]
    assert len(tried) == len(set(tried))
    names = {method.partition("(")[0].partition("/")[0].partition("@")[0] for method, _, _ in tried}
    assert names == {kind.name for kind in ul.credit.ALL if not kind.needs_processes and kind.planned}
    pairs = {method.partition("/")[2].partition("@")[0] for method, _, _ in tried} - {""}
    unasked = {kind.name for kind in ul.consensus.ALL if not kind.planned}
    unplanned = {kind.name for kind in ul.credit.ALL if not kind.planned}
    simulated = {kind.name for kind in ul.consensus.ALL if not kind.needs_processes}
    assert pairs == simulated - unasked - {"independent"}
    assert any(all(name in line for name in unasked | unplanned) for line in plan.assumptions)
    named = ul.plan(tower(), X, batch=BATCH, devices=2, hardware=WIRED, credit=["backprop"], consensus=sorted(unasked))
    assert {row.method.partition("/")[2].partition("@")[0] for row in named.rows} - {""} == unasked
    assert any(
        "torch-gpipe, torch-1f1b, torch-ddp, torch-fully-shard, torch-zero1" in line for line in plan.assumptions
    )
    # interlocking(d) is backprop from d = J−1 on, so it is not tried there
    assert {stages for method, stages, _ in tried if method == "interlocking"} == {4}
    assert "interlocking(d=2)" in {method for method, _, _ in tried}


def test_a_delayed_rule_is_measured_once_its_pipeline_is_full():
    """Equal stages on a free network: J times one device, where nothing is recomputed; J − j graphs and J − 1 − j copies."""
    model = nn.Sequential(*tower(16), nn.Linear(64, 2))
    rules = ("backprop", "pipedream", "pipedream-2bw", "petra(keep=graph)", "petra")
    plan = planned(model=Cuts(model, X), credit=rules, consensus=("independent",), batch=64)
    row = {rule: row_of(plan, rule, 4, 4 if "2bw" in rule else 1) for rule in rules}
    stages = costs(4, model=model, heads=False).stages
    slowest = max(stage.of(("forward", "head-forward", "backward", "update"), 64) for stage in stages)
    assert row["pipedream"].samples_per_second == pytest.approx(64 / slowest, rel=0.01)
    assert row["pipedream"].bound == "computing" and row["pipedream"].utilisation > 0.9
    assert row["petra(keep=graph)"].samples_per_second == pytest.approx(64 / slowest, rel=0.01)
    again = max(stage.of(("forward", "forward", "backward", "update"), 64) for stage in stages[:-1])
    assert row["petra"].samples_per_second == pytest.approx(64 / again, rel=0.01)
    assert [row[rule].delay for rule in rules] == [0, 3, 1, 6, 6]
    assert row["pipedream-2bw"].accumulate == 4 and not any(row[rule].exact for rule in rules[1:])
    boundary = stages[0].profile.boundary(64)
    assert row["pipedream"].bytes_up == row["pipedream"].bytes_down == boundary
    assert (row["petra"].bytes_up, row["petra"].bytes_down) == (boundary, 2 * boundary)
    first = stages[0]
    assert row["pipedream"].peaks[0] >= first.held + 3 * first.profile.trained + 4 * first.profile.kept.at(64)
    assert row["petra"].peaks[0] < row["petra(keep=graph)"].peaks[0]
    assert row["petra"].accuracy.endswith("nothing here is reversible, so it keeps inputs")


def test_petra_is_taken_at_its_word_where_a_stage_is_reversible():
    def block() -> nn.Module:
        return ul.reversible.Coupling(nn.Sequential(nn.Linear(32, 32), nn.Tanh()))

    model = nn.Sequential(*(block() for _ in range(8)), nn.Linear(64, 4))
    plan = planned(2, model=Cuts(model, X), credit=("petra", "petra(keep=input)"), consensus=("independent",))
    nothing, inputs = (row_of(plan, rule, 2) for rule in ("petra", "petra(keep=input)"))
    assert "reversible" not in nothing.accuracy and nothing.peaks[0] < inputs.peaks[0]


def test_every_rule_has_a_word_about_its_accuracy():
    for kind in (*ul.credit.ALL, *ul.consensus.ALL):
        known = ACCURACY[kind.name]
        assert known.short and known.source and known.sentence.endswith("."), kind.name
    assert set(ACCURACY) == {kind.name for kind in (*ul.credit.ALL, *ul.consensus.ALL)}


def test_exact_is_said_of_exact_pairs_only_and_batchnorm_is_mentioned():
    plan = planned()
    exact = {row.method.partition("@")[0] for row in plan.rows if row.exact}
    assert exact == {"backprop", "gpipe", "backprop/all-reduce", "gpipe/all-reduce"}
    assert {row.accuracy for row in plan.rows if row.exact} == {"exact"}
    normed = planned(model=tower(norm=True))
    assert row_of(normed, "backprop", 4).accuracy == "exact"
    assert row_of(normed, "backprop/all-reduce@4", 1).accuracy == "exact, but BatchNorm sees 6 samples"
    assert row_of(normed, "gpipe/all-reduce@2", 2).accuracy == "exact, but BatchNorm sees 3 samples"


def test_a_fast_but_inexact_winner_is_said_to_be_so_beside_the_best_exact_one():
    plan = planned(consensus=("independent",), credit=(LOCAL,))
    assert f"Its updates are not those of one device ({ACCURACY['dgl'].short})" in plan.headline
    assert "With exact updates one device is best" in plan.headline
    plan = planned(
        model=nn.Sequential(*tower(16), nn.Linear(64, 2)), consensus=("independent",), credit=("gpipe", LOCAL)
    )
    assert "Best with exact updates: gpipe with 4 stages on 4 devices" in plan.headline


def test_the_objective_sorts():
    keys = {
        "throughput": lambda row: -float(f"{row.samples_per_second:.9g}"),
        "memory": lambda row: row.peak,
        "bytes": lambda row: row.bytes_per_sample,
    }
    orders = []
    for objective, key in keys.items():
        plan = planned(objective=objective, hardware=Hardware(DEVICE, network=uniform(1e-4, 1e8)))
        values = [key(row) for row in plan.rows]
        assert values == sorted(values) and values[0] < values[-1]
        orders.append([(row.method, row.stages) for row in plan.rows])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


def test_nodes_share_their_wire_and_the_planner_sees_it():
    inside, outside = Edge(0.0, 1e9), Edge(0.0, 1e5)
    plan = planned(hardware=Hardware(DEVICE, network=Network(outside, inside, 2)))
    near, far = row_of(plan, "backprop/all-reduce@2", 1), row_of(plan, "backprop/all-reduce@4", 1)
    assert near.bound != "wire" and far.bound == "wire"
    assert any("between nodes of 2" in line for line in plan.assumptions)
    # who is whose neighbour is given, so a slow one cannot be passed over
    slowed = planned(hardware=Hardware(DEVICE, speeds=(1.0, 0.5), network=Network(outside, inside, 2)))
    assert "device 1 (replica 1, speed 0.5)" in row_of(slowed, "backprop/all-reduce@2", 1).bound_by


# ---- the words and the command -----------------------------------------------------------------------------------------


def test_what_was_not_given_is_said_to_be_assumed():
    lines = " ".join(ul.plan(tower(), X, batch=8, devices=2, **FEW).assumptions)
    assert lines.count("(assumed)") == 4
    lines = " ".join(
        ul.plan(
            tower(),
            X,
            batch=8,
            devices=2,
            flops="1T",
            memory_bandwidth="1GB/s",
            bandwidth="8Gbit/s",
            latency="1ms",
            **FEW,
        ).assumptions
    )
    assert "(assumed)" not in lines
    assert "1 TFLOP/s" in lines and "8 Gbit/s, 1000 µs" in lines


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: planned(0), "devices 0 is not possible"),
        (lambda: planned(batch=0), "batch 0 is not possible"),
        (lambda: planned(accumulate=30), "cannot be split into 30 micro-batches"),
        (lambda: planned(objective="speed"), "Unknown objective 'speed'"),
        (lambda: planned(optimizer="lion"), "Unknown optimizer 'lion'"),
        (lambda: planned(credit=("dgll",)), "did you mean 'dgl'"),
        (lambda: planned(consensus=("wsah",)), "did you mean 'wash'"),
        (lambda: planned(bandwith="1Gbit/s"), "did you mean 'bandwidth'"),
        (lambda: planned(memory=16), "must be a text with a unit"),
        (lambda: planned(memory="16 apples"), "is no size"),
        (lambda: planned(2, speeds="1,1,1"), "3 speeds were given for 2 devices"),
        (lambda: ul.plan(tower(), batch=8, devices=2), "needs an example batch"),
        (lambda: ul.plan(3, X, batch=8, devices=2), "needs a module, a chain, or a function"),
        (lambda: ul.plan(nn.LSTM(4, 4), torch.zeros(2, 3, 4), batch=8, devices=2), "LSTM is neither an nn.Sequential"),
        (lambda: ul.plan(lambda stages: tower(), X, batch=8, devices=2), "must make a Chain of 1 stage"),
        (lambda: ul.plan(Peeking(), X, batch=8, devices=2), "could not be run on shapes alone"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ul.UnlockedError, match=sentence):
        make()


class Peeking(nn.Sequential):
    """Looks at values."""

    def __init__(self):
        super().__init__(nn.Linear(64, 64), Looking(), nn.Linear(64, 64))

    forward = nn.Sequential.forward


class Looking(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


FEW_RULES = ["--credit", "backprop", "gpipe", "dgl", "--consensus", "all-reduce", "wash"]  # all are tried above
SMALL = ["plan", "--model", "mlp", "--input", "16", "--width", "16", "--devices", "4", "--batch", "32"]


def test_the_command_prints_all_there_is_to_know(capsys):
    assert (
        cli.main(
            [*SMALL, *FEW_RULES, *shlex.split("--memory 1GiB --bandwidth 1Gbit/s --latency 100us --speeds 1,1,0.5")]
        )
        == 0
    )
    printed = capsys.readouterr().out
    for words in (
        "samples/s",
        "What is known about accuracy",
        "Assumptions",
        "To train by the first of them: unlocked ",
    ):
        assert words in printed
    assert "Speeds 1, 1, 0.5, else 1" in printed
    assert "10 outputs (assumed" in printed


def test_json_is_one_valid_line_with_everything(capsys):
    assert cli.main([*SMALL, "--credit", "gpipe", "dgl", "--json"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["event"] == "result" and found["headline"] and found["assumptions"]
    rates = [row["samples_per_second"] for row in found["rows"]]
    assert rates == sorted(rates, reverse=True)
    assert all(len(row["peaks"]) == row["devices"] and row["peak"] == max(row["peaks"]) for row in found["rows"])


def test_the_command_to_train_by_is_one_that_train_takes(capsys):
    shared = shlex.split(
        "--consensus all-reduce --credit backprop --flops 1M --memory-bandwidth 1MB/s --bandwidth 1Gbit/s"
    )
    apart = ["--objective", "memory", "--optimizer", "adam", "--credit", "dgl"]
    for more in (apart, shared, ["--credit", "gpipe", "--accumulate", "2"]):
        assert cli.main([*SMALL, *more, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        words = shlex.split(found["train"])
        best = found["rows"][0]
        assert (best["replicas"] == 4 and best["networks"] == 1) or more != shared
        if best["devices"] > 1:
            assert words[:5] == ["unlocked", "launch", "--processes", str(best["devices"]), "--"]
            words = words[4:]
        options = cli._parse(words[1:], False)
        method = parse_method(f"{options.credit}/{options.consensus}@{options.replicas}")
        config = resolve(options, method, 0, 1)
        assert (str(method), options.stages, options.accumulate) == (best["method"], best["stages"], best["accumulate"])
        whole = config.batch_size * (1 if best["networks"] == best["replicas"] else best["replicas"])
        assert (whole, config.model_options["width"]) == (32, 16)


@pytest.mark.parametrize("credit", ["dgssl", "simclr"])
def test_a_rule_without_labels_is_planned_as_it_is_trained(credit, capsys):
    """The encoder, its projectors, two views of every sample; by the command that the plan gives."""
    words = shlex.split("plan --model mlp --input 1x8x8 --width 16 --depth 3 --devices 2 --batch 32 --objective memory")
    assert cli.main([*words, "--credit", credit, "--consensus", "wash", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = next(row for row in found["rows"] if row["stages"] == 2)
    assert (row["method"], found["headline"].count("backprop")) == (credit, 0)
    words = shlex.split(found["train"])
    options = cli._parse([*words[words.index("train") :], "--stages", "2", "--replicas", "1"], False)
    train = ul.data.from_tensors(
        torch.zeros(32, 1, 8, 8, dtype=torch.uint8), torch.arange(32) % 10, augment=options.augment
    )
    config = resolve(options, parse_method(credit), 0, 1)
    trainer = running.make_trainer(config, train)
    (images,) = train.batches(32, epoch=0, seed=0)
    trainer.step(*images)
    _, planned = Cuts(ul.models.mlp((1, 8, 8), 10, width=16, depth=3), torch.zeros(2, 1, 8, 8)).profiled(
        2, trainer.credit
    )
    assert planned == profile(trainer.template)
    sizes = [sum(x.numel() for x in stage.parameters()) for stage in trainer.chains[0]]
    assert [stage.trained for stage in planned.stages] == [4 * size for size in sizes]
    sent = trainer.bytes_sent
    assert row["bytes_up"] == sent["activation"] == 64 * 16 * 4 and row["bytes_down"] == sent.get("gradient", 0)


def test_texts_are_planned_too(capsys):
    assert cli.main(["plan", "--model", "gpt", "--context", "16", "--devices", "2", "--credit", "dgl", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["stages"] for row in found["rows"]} == {1, 2}
    assert "--context 16" in found["train"]


def test_a_cost_file_is_the_machine(tmp_path, capsys):
    cost_file.save(tmp_path / "costs.json", Hardware(Device(2e12, 1e11), network=uniform(1e-3, 1e8)))
    assert (
        cli.main([*SMALL, "--costs", str(tmp_path / "costs.json"), "--latency", "5ms", "--credit", "dgl", "--json"])
        == 0
    )
    lines = " ".join(json.loads(capsys.readouterr().out)["assumptions"])
    assert "2 TFLOP/s really reached, 100 GB/s of memory bandwidth" in lines
    assert "0.8 Gbit/s, 5000 µs" in lines


def test_one_device_is_a_plan_too(capsys):
    assert cli.main([*SMALL[:-4], "--devices", "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 1


def test_nothing_that_fits_is_exit_code_1(capsys):
    assert cli.main([*SMALL, "--memory", "1kB", *FEW_RULES]) == 1
    assert capsys.readouterr().out.startswith("Nothing fits.")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--devices", "0"], "--devices 0 is not possible"),
        (["--model", "resnet51"], "Unknown model 'resnet51'"),
        (["--input", "3by4"], "is no shape"),
        (["--bandwidth", "fast"], "is no bandwidth"),
        (["--memory", "0GiB"], "must be greater than 0"),
        (["--speeds", "1,x"], "no row of numbers"),
        (["--credit", "nothing"], "Unknown credit rule"),
        (["--depth", "0"], "depth"),
        (["--costs", "nowhere.json"], "nowhere.json"),
        (["--batch", "0"], "--batch 0 is not possible"),
    ],
)
def test_bad_input_on_the_command_line_is_a_sentence_and_exit_code_2(arguments, sentence, capsys):
    assert cli.main([*SMALL, *arguments]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err + printed.out
    assert "Traceback" not in printed.err


def test_an_image_network_needs_its_input(capsys):
    assert cli.main(["plan", "--model", "resnet18", "--devices", "2"]) == 2
    assert "--input 3x224x224" in capsys.readouterr().err


def test_the_issues_command_on_its_own_network(capsys):
    """All but its rules, of which two are enough here."""
    network = shlex.split("plan --model resnet50 --input 3x224x224 --batch 256 --devices 8")
    cluster = shlex.split("--memory 16GiB --bandwidth 1Gbit/s --latency 100us")
    assert cli.main([*network, *cluster, "--credit", "backprop", "dgl", "--consensus", "all-reduce", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["headline"].startswith("One device is at least as fast for one network as any number up to 8")
    assert any("stem=large" in line for line in found["assumptions"])
    [wide] = [row for row in found["rows"] if row["method"] == "backprop/all-reduce@8"]
    assert wide["bytes_replicas"] == pytest.approx(2 * 7 / 8 * 4 * 25_557_032, rel=1e-6)
    assert any(one["kind"] == "memory" and one["stages"] == 1 for one in found["infeasible"])
