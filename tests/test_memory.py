"""The meters of memory: they count to the byte, change nothing, and see what the shapes foretell."""

from __future__ import annotations

import copy
import functools
import gc
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode

import unlocked as ul
from unlocked.cli import main
from unlocked.consensus.base import Weights
from unlocked.credit.delayed import Delayed
from unlocked.credit.two_versions import TwoVersions
from unlocked.errors import BadData
from unlocked.method_names import make_credit, parse_call
from unlocked.probes import live as meters
from unlocked.probes.live import GRADIENTS, INPUTS, OPTIMIZER, OTHER, PARAMETERS, SAVED, AllocatorBytes, LiveBytes
from unlocked.probes.memory import SavedBytes
from unlocked.probes.predicted import predicted, states_of
from unlocked.probes.step import live_peak, merged
from unlocked.report import write_report
from unlocked.report.footprint import read_footprint
from unlocked.simulation.costs import unit
from unlocked.simulation.memory import activation_curves, device_peaks, version_curves
from unlocked.simulation.simulating import simulate
from unlocked.timeline import BUSY, Timeline
from unlocked.worker import Place

from methods import CREDITS, Row, assert_same, batch, data, mlp, name_of, state, trainer

LAYERS, WIDTH, BATCH = 5, 8, 64
WEIGHT, ACTIVATION, SCALAR = 4 * WIDTH * WIDTH, 4 * BATCH * WIDTH, 4


def deep(layers: int = LAYERS) -> nn.Sequential:
    """Linear and ReLU in turn, without biases."""
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())))


def metered(model: nn.Module, *inputs: Tensor) -> LiveBytes:
    """A meter that knows the model and its inputs."""
    meter = LiveBytes()
    meter.register(PARAMETERS, model.parameters())
    meter.register(INPUTS, inputs)
    return meter


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def parts_of(row: Row) -> int:
    """Micro-batches per update that a rule needs on three stages."""
    return 2 if row.name in ("pipedream-2bw", "cdp-pipeline") else 1


def record_of(session: ul.Trainer) -> dict[str, Any]:
    """The only one."""
    (record,) = session.memory
    return record


# ---- live bytes --------------------------------------------------------------------------------------------------------


def test_the_peak_is_what_one_computes_by_hand():
    """L layers keep L activations; at the last but one backward there are a gradient before and behind the ReLU besides,
    the last layer's weight gradient, the loss and the 1 that its backward begins with."""
    model, x = deep(), torch.randn(BATCH, WIDTH)
    with metered(model, x) as meter:
        loss = model(x).sum()
        loss.backward()
    always = LAYERS * WEIGHT + ACTIVATION
    assert meter.start == always
    assert meter.peak == always + (LAYERS + 1) * ACTIVATION + WEIGHT + 2 * SCALAR
    assert meter.peak == max(size for _, size in meter.curve) == sum(meter.categories.values())
    assert meter.categories[PARAMETERS] == LAYERS * WEIGHT and meter.categories[INPUTS] == ACTIVATION
    assert meter.categories[GRADIENTS] == WEIGHT
    assert meter.live == always + LAYERS * WEIGHT + SCALAR  # the gradients and the loss stay


def test_live_returns_to_its_start_once_gradients_are_dropped():
    model, x = deep(), torch.randn(BATCH, WIDTH)
    with metered(model, x) as meter:
        model(x).sum().backward()
        assert meter.live == meter.start + LAYERS * WEIGHT
        model.zero_grad(set_to_none=True)
        assert meter.live == meter.start
    times = [seconds for seconds, _ in meter.curve]
    assert times == sorted(times) and meter.curve[0] == (0.0, meter.start) and meter.curve[-1][1] == meter.start


def test_gradients_that_are_there_before_are_gradients_and_a_second_backward_adds_none():
    model, x = deep(), torch.randn(BATCH, WIDTH)
    model(x).sum().backward()
    with metered(model, x) as meter:
        assert meter.start == 2 * LAYERS * WEIGHT + ACTIVATION
        model(x).sum().backward()
        assert meter.live == meter.start
    assert meter.categories[GRADIENTS] >= LAYERS * WEIGHT


def test_views_and_in_place_operations_add_nothing():
    before, registered = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    meter = LiveBytes()
    meter.register(INPUTS, [registered, registered.t()])
    assert meter.live == size([registered])
    with meter:
        views = [registered.view(-1), registered[3:], registered.t(), registered.detach(), registered.expand(2, -1, -1)]
        views += [before.view(-1), before[3:], *before.split(7), *before.unbind()]
        registered.add_(1).mul_(2).clamp_(0)
        torch.add(registered, 1, out=before)
        assert meter.live == meter.start == meter.peak
        made = registered + 1
        views += [made.view(-1), made.t()]
        made.relu_()
        assert meter.live == meter.start + size([made])
        del made
        assert meter.live == meter.start + size([registered])  # a view still holds it
        del views
        assert meter.live == meter.start


def test_an_allocation_counts_until_its_last_holder_is_gone_even_in_a_graph():
    weight = torch.randn(100, requires_grad=True)
    with LiveBytes() as meter:
        y = weight.exp()  # saves its result
        z = y.sum()
        del y
        gc.collect()
        assert meter.live == 400 + SCALAR
        del z
        assert meter.live == 0
        constant = torch.tensor([1.0, 2.0])
        assert meter.live == 8
        x = torch.empty(10)
        x.resize_(30)
        assert meter.live == 8 + 120
        del x, constant
        assert meter.live == 0 and meter.peak == 400 + SCALAR


def test_what_takes_no_memory_here_is_not_counted():
    with LiveBytes() as meter:
        kept = [torch.empty(1000, device="meta") + 1, torch.empty(0), torch.randn(3, 3).to_sparse()]
    assert kept and meter.live <= 100


def test_tensors_in_parts_count_by_the_part_that_is_here_and_fake_ones_not_at_all():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = DTensor.from_local(torch.ones(25, requires_grad=True), mesh, [Shard(0)])
        meter = LiveBytes()
        meter.register(INPUTS, [x])
        assert meter.live == 100
        with meter:
            y = x.exp()
            z = y.clone()
            assert meter.live == 300
            with FakeTensorMode():
                fake = torch.empty(1000) + 1
            assert meter.live == 300
            del y, z, fake
        assert meter.live == 100
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("outer", ["meters", "flops"])
def test_meters_and_torchs_own_counter_nest_in_any_order(outer: str):
    model, x = deep(), torch.randn(BATCH, WIDTH)

    def work() -> None:
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)

    with metered(model, x) as alone:
        work()
    with SavedBytes(ignore=model.parameters()) as saved_alone:
        work()
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    flops = counter.get_total_flops()
    meter, saved = metered(model, x), SavedBytes(ignore=model.parameters())
    counter = FlopCounterMode(display=False)
    first, second = (meter, counter) if outer == "meters" else (counter, meter)
    with first, saved, second:
        work()
    assert (meter.peak, saved.peak, counter.get_total_flops()) == (alone.peak, saved_alone.peak, flops)


def test_an_exception_inside_leaves_no_mode_and_no_hook():
    model, x = deep(), torch.randn(BATCH, WIDTH)
    meter = metered(model, x)
    with pytest.raises(RuntimeError, match="mat1"), meter:
        model(x[:, 1:])
    assert _get_current_dispatch_mode() is None
    assert all(not weight._post_accumulate_grad_hooks for weight in model.parameters())
    live = meter.live
    kept = x + 1
    assert meter.live == live and size([kept])


def test_a_closed_meter_stands_still():
    with LiveBytes() as meter:
        x = torch.randn(100)
    del x
    assert meter.live == 400 == meter.curve[-1][1]


def test_the_meter_agrees_with_torchs_profiler():
    from torch.profiler import ProfilerActivity, profile

    for name, shape in (("mlp", (64,)), ("vgg6a", (3, 32, 32)), ("resnet18", (3, 16, 16))):
        torch.manual_seed(0)
        options = {"width": 0.125} if name != "mlp" else {}
        model = ul.models.build(name, input_shape=shape, classes=10, **options)
        x, y = torch.randn(32, *shape), torch.randint(10, (32,))

        def work(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> None:
            nn.functional.cross_entropy(model(x), y).backward()
            model.zero_grad(set_to_none=True)

        work()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        level = peak = 0
        for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
            level += event.nbytes() if event.name() == "[memory]" else 0
            peak = max(peak, level)
        with LiveBytes() as meter:
            work()
        assert 0.95 * peak <= meter.peak <= peak, name  # what kernels take for themselves is not seen
        assert meter.peak == peak or name != "mlp"


def test_what_is_unknown_is_registered_when_it_is_saved_and_categories_are_told_in_hindsight():
    with LiveBytes() as meter:
        kept, state = torch.randn(10), torch.randn(20)
        meter.mark(SAVED, kept)
        meter.mark(OPTIMIZER, kept)  # it has its category
        meter.mark(OPTIMIZER, state)
        made = torch.randn(5)
    assert meter.categories == {OPTIMIZER: 80, SAVED: 40, OTHER: size([made])}
    outside = torch.randn(7)
    with LiveBytes() as meter:
        meter.mark(SAVED, outside)
    assert meter.categories == {SAVED: 28}


def test_the_allocator_is_asked_on_an_accelerator(monkeypatch: pytest.MonkeyPatch):
    calls, device = [], torch.device("cuda", 0)
    answers = {"memory_allocated": iter([1000, 1200]), "max_memory_allocated": iter([5000])}
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda where, name=name: calls.append((name, where)))
    for name, values in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda where, values=values: next(values))
    with meters.live_meter(device) as meter:
        assert isinstance(meter, AllocatorBytes)
        meter.register(PARAMETERS, [torch.randn(3)])  # of another device
    assert (meter.start, meter.live, meter.peak, meter.categories) == (1000, 1200, 5000, {OTHER: 5000})
    assert [size for _, size in meter.curve] == [1000, 1200]
    assert calls == [("synchronize", device), ("reset_peak_memory_stats", device), ("synchronize", device)]
    assert isinstance(meters.live_meter(torch.device("cpu")), LiveBytes)


# ---- in training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", CREDITS, ids=name_of)
def test_metered_steps_change_no_bit(row: Row):
    runs = []
    for bare in (False, True):
        session = trainer(row.make(), model=mlp(norm=True, dropout=0.1), replicas=2, accumulate=parts_of(row))
        if bare:
            session.memory = [{"phase": phase, "processes": []} for phase in range(3)]  # as if it were known
        session.fit(data(24), 1, batch_size=12)
        assert any(record.get("workers") for record in session.memory) == (not bare)
        runs.append(state(session))
    assert_same(*runs)


KEPT = ["pipedream(keep=input)", "pipedream(weights=snapshot)", "pipedream-2bw(keep=input)", "fdg(replay=True)"]
KEPT += [
    "delayed-gradients(keep=input)",
    *(f"petra(keep={keep!r})" for keep in ("input", "weights", "input+weights", "graph")),
]
RULES = CREDITS + [Row(text, lambda text=text: make_credit(parse_call(text), 3), frozenset()) for text in KEPT]


def reversible() -> nn.Sequential:
    """The tiny network with reversible parts on every stage of three, between others."""

    def coupling() -> ul.reversible.Coupling:
        return ul.reversible.Coupling(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)))

    torch.manual_seed(0)
    below = [nn.Linear(5, 6), ul.reversible.Split(), coupling(), coupling()]
    return nn.Sequential(
        *below, nn.Linear(12, 12), nn.Tanh(), coupling(), coupling(), coupling(), nn.Linear(12, 3)
    ).double()


NETWORKS = {"plain": mlp, "norm": lambda: mlp(norm=True), "reversible": reversible}


@pytest.mark.covering
@pytest.mark.parametrize(
    ("row", "network"),
    [
        (row, name)
        for row in RULES
        for name in NETWORKS
        if name == "plain" or row.name.startswith(("pipedream", "petra"))
    ],
    ids=lambda given: getattr(given, "name", given),
)
def test_measured_is_predicted(row: Row, network: str):
    """To the byte, but for the last stage of a rule that splits a batch: all of its targets lie in one storage, and what
    accumulation weights losses with is two numbers a micro-batch."""
    accumulate = 2 if row.name.startswith(("pipedream-2bw", "cdp-pipeline")) else 1
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    session = trainer(row.make(), optimizer=adam, model=NETWORKS[network](), accumulate=accumulate)
    credit, parts = session.credit, accumulate * session.credit.parts
    needed = 2 + credit.filling(3, accumulate)
    session.fit(data(12 * needed), 1, batch_size=12)
    phases = credit.phases(3)
    assert [record["phase"] for record in session.memory] == list(range(phases))
    foretold = predicted(session, session.recent[-1], 12)
    for record in session.memory:
        assert record["step"] == needed * (record["phase"] + 1)
        for worker in record["workers"]:
            j, stage = worker["stage"], foretold[worker["stage"]]
            weights = sum(p.requires_grad for p in session.chains[0][j].parameters())
            assert worker["parameters"] == stage["parameters"]
            if phases > 1 and j != record["phase"]:
                assert worker["saved"] == worker["gradients"] == 0
                continue
            assert worker["gradients"] == stage["gradients"]
            assert worker["optimizer_state"] == stage["optimizer_state"] + 4 * weights  # Adam counts its steps
            assert worker["versions"] == stage["versions"]
            if j == session.phase or phases == 1:  # what is foretold is the last phase
                beyond = 16 * parts + 8 * 12 if parts > 1 and j == 2 else 0
                bound = row.name.startswith(
                    ("forward-gradient-activity", "local-forward-gradient")
                )  # below the last stage
                below = stage["saved"] if bound and j < 2 else 0
                assert -below <= worker["saved"] - stage["saved"] <= beyond
                assert (worker["saved"] > 0) == (row.name != "mezo")


@pytest.mark.parametrize("stages", [2, 4])
def test_what_delayed_rules_keep_is_what_their_papers_say(stages: int):
    """Graphs and copies of the weights at the peak of a full pipeline: J − j and J − 1 − j of PipeDream, one copy of its two
    versions, inputs only where it recomputes, nothing but one graph under PETRA."""
    costs, rest = unit(stages, activation=3, weights=5), range(stages - 1, -1, -1)
    cases: list[tuple[Any, int, list[int], list[int]]] = [
        (ul.credit.OneFOneB(2 * stages), 1, [d + 1 for d in rest], [0] * stages),
        (ul.credit.PipeDream(), 1, [d + 1 for d in rest], list(rest)),
        (ul.credit.PipeDream(weights="snapshot"), 1, [d + 1 for d in rest], [0] * stages),
        (ul.credit.PipeDream2BW(), stages, [d + 1 for d in rest], [1] * stages),
        (ul.credit.DelayedGradients(), 1, [d + 1 for d in rest], [0] * stages),
        (ul.credit.PETRA(keep="graph"), 1, [2 * d + 1 for d in rest], [2 * d for d in rest]),
        (ul.credit.PETRA(keep="weights"), 1, [1] * stages, [2 * d for d in rest]),
        (ul.credit.PETRA(), 1, [1] * stages, [0] * stages),
        (ul.credit.FDG(), 1, [max(1, 2 * d) for d in rest], [max(0, 2 * d - 1) for d in rest]),
    ]
    for credit, accumulate, graphs, copies in cases:
        found = simulate(credit, costs=costs, steps=6 * stages, samples=credit.parts, accumulate=accumulate)
        busy = Timeline(act for act in found if act.kind in BUSY)
        kept, old = activation_curves(busy, costs, 1, credit), version_curves(busy, costs, credit)
        assert [max(size for _, size in kept[Place(0, j)]) for j in range(stages)] == [12 * n for n in graphs], credit
        assert [max((size for _, size in old[Place(0, j)]), default=0) for j in range(stages)] == [
            20 * n for n in copies
        ]


FLYING = [(row, 1) for row in RULES if isinstance(row.make(), Delayed) and not isinstance(row.make(), TwoVersions)]
FLYING += [(row, k) for row in RULES for k in (4,) if row.name.startswith(("pipedream", "petra", "fdg"))]


@pytest.mark.parametrize(("row", "accumulate"), FLYING, ids=lambda given: getattr(given, "name", str(given)))
def test_a_part_of_a_timeline_says_what_the_whole_says_of_it(row: Row, accumulate: int):
    """Whatever is in flight when the record begins or ends, as long as each worker has some of its acts in it."""
    credit, costs = row.make(), unit(3, backward=2.0, activation=3, weights=5)
    whole = simulate(credit, costs=costs, steps=60 // accumulate, accumulate=accumulate)
    whole = Timeline(act for act in whole if act.kind in BUSY)
    curves = [activation_curves(whole, costs, 1, credit), version_curves(whole, costs, credit)]
    for begin, end in ((60.0, 110.0), (61.0, 108.0), (73.0, 131.0)):
        part = whole.between(begin, end)
        found = [activation_curves(part, costs, 1, credit), version_curves(part, costs, credit)]
        for mine, of_whole in zip(found, curves):
            for place in map(Place._make, whole.workers()):
                for tick in range(int(begin), int(end)):
                    assert level(mine[place], tick + 0.5) == level(of_whole[place], tick + 0.5), (place, tick, begin)


def level(curve: list[tuple[float, int]], when: float) -> int:
    """Bytes at a moment."""
    return next((size for begin, size in reversed(curve) if begin <= when), 0)


def test_messages_that_come_from_before_a_record_or_stay_until_after_it_lie_with_their_receiver():
    credit, costs = ul.credit.PETRA(), unit(2, activation=3)
    whole = simulate(credit, costs=costs, steps=20)
    full = activation_curves(whole, costs, 1, credit)
    part = Timeline(act for act in whole if 30.0 < act.end <= 50.0 and act.kind in "SR")
    curves = activation_curves(part, costs, 1, credit)
    kept = activation_curves(Timeline(act for act in whole if act.kind in BUSY), costs, 1, credit)
    assert len([act for act in part if act.kind == "S"]) != len(part.messages())  # some have their other end outside
    for place in curves:
        for tick in range(32, 48):
            together = level(curves[place], tick + 0.5) + level(kept[place], tick + 0.5)
            assert together == level(full[place], tick + 0.5)


def test_old_weights_are_on_their_device():
    credit, costs = ul.credit.PipeDream(), unit(3, weights=5)
    found = simulate(credit, costs=costs, steps=12)
    devices = {Place(0, j): 0 for j in range(3)}
    apart = device_peaks(found, costs, 1, {place: place.stage for place in devices}, credit)
    graphs = activation_curves(found, costs, 1, credit)
    assert apart[2] == costs[2].held + max(size for _, size in graphs[Place(0, 2)])
    assert apart[0] == costs[0].held + max(size for _, size in graphs[Place(0, 0)]) + 2 * 20
    assert device_peaks(found, costs, 1, devices, credit)[0] <= sum(apart.values())


def test_a_pipeline_is_metered_until_it_is_full_or_emptied():
    for epochs, updates, step in ((1, 3, 3), (2, 3, 3), (1, 6, 6), (1, 9, 6)):
        session = trainer(ul.credit.PipeDream())
        session.fit(data(12 * updates), epochs, batch_size=12)
        assert [record["step"] for record in session.memory] == [step]
    session = trainer(ul.credit.PipeDream(drain="end"))
    session.fit(data(12 * 2), 4, batch_size=12)
    assert [record["step"] for record in session.memory] == [6]
    (whole, *_) = record_of(session)["workers"]
    filled = trainer(ul.credit.PipeDream())
    filled.fit(data(12 * 2), 4, batch_size=12)
    (emptied, *_) = record_of(filled)["workers"]
    assert emptied["saved"] == 2 / 3 * whole["saved"] and (emptied["versions"], whole["versions"] > 0) == (0, True)


def test_a_meter_that_is_opened_again_goes_on_with_what_is_still_kept():
    weight, x = torch.randn(10, requires_grad=True), torch.randn(10)
    with SavedBytes(ignore=[weight]) as meter:
        first = weight * x
    with SavedBytes(ignore=[weight]) as other:
        del first
    assert (meter.live, meter.peak, other.peak) == (0, 40, 0)
    meter.restart(ignore=[weight])
    copy = weight.detach().clone()
    meter.disregard([copy])
    assert (meter.peak, meter.curve) == (0, [0])
    with meter:
        second = weight * copy
        assert meter.live == 0
        third = weight * x
    meter.restart(ignore=[weight])
    assert meter.peak == meter.live == 40 and meter.holds(x) and not meter.holds(copy)
    assert meter.passed([weight, copy]) == 40
    address = copy.untyped_storage()._cdata
    del second, third, copy
    assert address not in meter._disregarded and meter.live == 0


def test_without_a_timeline_of_backwards_nothing_is_kept():
    session = trainer(ul.credit.Backprop())
    assert [row["saved"] for row in predicted(session, session.timeline, 12)] == [0, 0, 0]


def test_states_of_optimizers():
    weight = [nn.Parameter(torch.zeros(3))]
    optimizers = [
        (torch.optim.SGD(weight, lr=0.1), 0),
        (torch.optim.SGD(weight, lr=0.1, momentum=0.9), 1),
        (torch.optim.AdamW(weight), 2),
        (torch.optim.Adam(weight, amsgrad=True), 3),
        (torch.optim.Rprop(weight), None),
    ]
    for optimizer, count in optimizers:
        assert states_of(optimizer) == count
        weight[0].grad = torch.ones(3)
        optimizer.step()
        kept = [x for x in optimizer.state[weight[0]].values() if isinstance(x, Tensor) and x.shape == (3,)]
        assert count is None or len(kept) == count


def test_workers_are_told_apart_and_their_sum_is_the_whole():
    session = trainer(ul.credit.DGL(head="linear", budget=None), ul.consensus.AllReduce(), replicas=2)
    session.fit(data(48), 1, batch_size=12)
    (record,) = session.memory
    (process,) = record["processes"]
    places = [(worker["replica"], worker["stage"]) for worker in record["workers"]]
    assert places == [(i, j) for i in range(2) for j in range(3)]
    for part in (PARAMETERS, OPTIMIZER):
        assert process["categories"][part] == sum(worker["categories"][part] for worker in record["workers"])
    for worker in record["workers"]:
        assert worker["peak"] == sum(worker["categories"].values())
    assert max(worker["saved"] for worker in record["workers"]) <= process["saved"]
    assert process["saved"] <= sum(worker["saved"] for worker in record["workers"])
    assert process["peak"] <= sum(worker["peak"] for worker in record["workers"]) + 10_000  # inputs, exchanges


def test_bytes_saved_count_for_every_worker_that_saves_them(monkeypatch: pytest.MonkeyPatch):
    weight, x = torch.randn(10, requires_grad=True), torch.randn(10)
    with SavedBytes(ignore=[weight]) as meter:
        graphs = []
        for place in (Place(0, 0), Place(0, 1), None):
            monkeypatch.setattr("unlocked.worker.computing", place)
            graphs.append(weight * x)
        assert meter.live == 40 and meter.workers == {(0, 0): 40, (0, 1): 40}
        del graphs
        assert meter.live == 0
        monkeypatch.setattr("unlocked.worker.computing", Place(0, 1))
        kept = weight * torch.randn(20, 10)
        assert kept.requires_grad and meter.workers == {(0, 0): 40, (0, 1): 800}


def test_whose_computation_it_is_is_known_only_while_it_lasts():
    from unlocked import worker as module

    session, seen = trainer(ul.credit.Backprop()), []
    for stage in session.chains[0]:
        stage.body.register_forward_hook(lambda *_: seen.append(module.computing))
    session.step(*batch())
    assert seen == [(0, 0), (0, 1), (0, 2)] and module.computing is None
    session.chains[0][1].body.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.step(*batch())
    assert module.computing is None


def test_local_learning_needs_less_than_backprop_on_a_deep_chain():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)), nn.Linear(64, 10))
    x, y = torch.randn(512, 64), torch.randint(10, (512,))
    peaks = {}
    for credit in (ul.credit.Backprop(), ul.credit.DGL(head="linear", budget=None)):
        session = ul.Trainer(
            ul.cut(copy.deepcopy(model), 8, like=x),
            credit=credit,
            optimizer=lambda weights: torch.optim.SGD(weights, lr=0.1),
        )
        (record,) = session.fit((x, y), 1, batch_size=256)
        peaks[credit.name] = live_peak(session.memory)
        assert record["live_peak"] == peaks[credit.name]
        categories = record_of(session)["processes"][0]["categories"]
        assert categories[SAVED] >= (7 if credit.name == "backprop" else 1) * 4 * 256 * 64
    assert peaks["dgl"] is not None and peaks["backprop"] is not None and peaks["dgl"] < 0.7 * peaks["backprop"]


def test_gradients_that_are_put_there_by_hand_are_found_before_the_update():
    class Copies(Weights):
        async def reduce(self) -> None:
            copies = [parameter.grad.clone() for parameter in self.parameters]
            for parameter, copied in zip(self.parameters, copies):
                parameter.grad = copied

    class Copying(ul.consensus.Independent):
        def weights(self, *arguments: Any) -> Weights:
            worker, chain, store, _ = arguments
            return Copies(worker, chain, store)

    session = trainer(ul.credit.Backprop(), Copying())
    session.fit(data(24), 1, batch_size=12)
    for worker in record_of(session)["workers"]:
        assert worker["gradients"] == 2 * size(session.chains[0][worker["stage"]].parameters())


def test_the_second_update_is_kept_for_the_optimizers_state_is_there_then():
    for size_of_data, step in ((12, 1), (24, 2), (36, 2)):
        session = trainer(ul.credit.Backprop())
        session.fit(data(size_of_data), 1, batch_size=12)
        (record,) = session.memory
        assert record["step"] == step
        known = sum(worker["optimizer_state"] for worker in record["workers"])
        assert known == size(session.chains[0].parameters())
        at_peak = record["processes"][0]["categories"][OPTIMIZER]
        assert at_peak < known if step == 1 else at_peak == known
    session = trainer(ul.credit.Backprop())
    session.fit(data(12), 3, batch_size=12)  # one update in an epoch
    assert [record["step"] for record in session.memory] == [2]
    session.fit(data(12), 5, batch_size=12)
    assert [record["step"] for record in session.memory] == [2]


def test_a_resumed_run_remembers(tmp_path: Path):
    session = trainer(ul.credit.Backprop())
    session.fit(data(24), 1, batch_size=12)
    session.save(tmp_path)
    resumed = ul.Trainer.resume(tmp_path, ul.cut(mlp(), 3, like=batch()[0]))
    assert resumed.memory == session.memory


def test_records_of_processes_are_put_together():
    def record(phase: int, rank: int) -> dict:
        workers = [{"replica": 1 - rank, "stage": 0, "rank": rank}]
        return {"phase": phase, "step": 2, "processes": [{"rank": rank, "peak": 10 * rank}], "workers": workers}

    whole = merged([[record(0, 0), record(1, 0)], [record(0, 1), record(1, 1)]])
    assert [one["phase"] for one in whole] == [0, 1]
    for one in whole:
        assert [process["rank"] for process in one["processes"]] == [0, 1]
        assert [worker["rank"] for worker in one["workers"]] == [1, 0]
    assert live_peak(whole) == 10 and live_peak([]) is None


# ---- in files and in the report ----------------------------------------------------------------------------------------

TINY = ["--data", "digits", "--model", "mlp", "--subset", "64", "--batch-size", "16", "--stages", "2", "--epochs", "1"]


def test_a_run_leaves_its_memory_and_the_report_shows_it(tmp_path: Path):
    folder = tmp_path / "run"
    assert main(["train", *TINY, "--credit", "backprop", "--run", str(folder), "--json"]) == 0
    (record,) = json.loads((folder / "memory.json").read_text())
    assert record["meter"] == "storages" and record["samples"] == 16
    for worker, foretold in zip(record["workers"], record["predicted"]):
        for part in ("parameters", "gradients", "optimizer_state", "saved"):
            assert worker[part] == foretold[part] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["live_peak"] == record["processes"][0]["peak"]
    footprint = read_footprint(folder)
    assert footprint is not None and footprint.peak == summary["live_peak"] and len(footprint.stages) == 2
    assert footprint.stages[1].measured == footprint.stages[1].predicted
    page = write_report(folder).read_text()
    assert "Memory stage by stage, predicted and measured" in page and page.count("<td>1.000</td>") == 8
    assert "Live memory of backprop" in page


def test_the_table_takes_the_most_over_replicas_and_phases_and_divides_by_what_was_predicted(tmp_path: Path):
    def worker(stage: int, saved: int) -> dict[str, Any]:
        return {"replica": 0, "stage": stage, "rank": 0, "saved": saved, "parameters": 10, "gradients": 10}

    foretold = {"parameters": 10, "gradients": 10, "optimizer_state": None}
    records: list[dict[str, Any]] = [
        {"phase": 0, "step": 2, "workers": [worker(0, 200), worker(0, 300), worker(1, 0)]},
        {"phase": 1, "step": 9, "workers": [worker(0, 0), worker(1, 70)]},
    ]
    for k, record in enumerate(records):
        record["processes"] = [{"rank": 0, "peak": 100 + k, "categories": {"inputs": k}, "curve": [[0, 1], [1, 2 + k]]}]
        record["predicted"] = [{**foretold, "stage": j, "saved": 400 if j == k else 0} for j in range(2)]
    (tmp_path / "memory.json").write_text(json.dumps(records))
    (tmp_path / "events.jsonl").write_text("")
    footprint = read_footprint(tmp_path)
    assert footprint is not None and (footprint.steps, footprint.peak) == ([2, 9], 101)
    assert (footprint.categories, footprint.curve) == ({"inputs": 1}, [(0, 1), (1, 3)])
    assert [stage.measured["saved"] for stage in footprint.stages] == [300, 70]
    assert [stage.predicted["saved"] for stage in footprint.stages] == [400, 400]
    page = write_report(tmp_path).read_text()
    assert "<td>400 B</td><td>300 B</td><td>0.750</td>" in page and "<td>400 B</td><td>70 B</td><td>0.175</td>" in page


def test_old_runs_without_it_still_give_a_report_and_damaged_ones_a_sentence(tmp_path: Path):
    folder = tmp_path / "run"
    assert main(["train", *TINY, "--credit", "backprop", "--run", str(folder), "--json"]) == 0
    file = folder / "memory.json"
    good = json.loads(file.read_text())
    file.unlink()
    assert read_footprint(folder) is None
    assert "Live memory was not recorded (no memory.json)." in write_report(folder).read_text()
    for text in ("[", "{}", "[1]", '[{"processes": 3}]', '[{"processes": [{"peak": "much"}]}]'):
        file.write_text(text)
        with pytest.raises(BadData, match=r"memory\.json"):
            write_report(folder)
    for gone in ("predicted", "workers", "meter"):  # what is missing is said, or left out
        file.write_text(json.dumps([{key: value for key, value in good[0].items() if key != gone}]))
        assert "Live memory of backprop" in write_report(folder).read_text()
    good[0]["processes"][0]["curve"] = []
    good[0]["meter"] = "allocator"
    file.write_text(json.dumps(good))
    page = write_report(folder).read_text()
    assert "Live memory of backprop" not in page and "the allocator handed out" in page


def test_a_network_that_does_not_run_on_shapes_alone_is_trained_all_the_same(tmp_path: Path, monkeypatch):
    def fails(*_: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr("unlocked.probes.predicted.profile", fails)
    folder = tmp_path / "run"
    assert main(["train", *TINY, "--credit", "backprop", "--run", str(folder), "--json"]) == 0
    assert json.loads((folder / "memory.json").read_text())[0]["predicted"] == []


def test_every_process_meters_its_own_workers(tmp_path: Path):
    folder = tmp_path / "run"
    argv = [
        sys.executable,
        "-m",
        "unlocked",
        "launch",
        "--processes",
        "2",
        "--",
        "train",
        *TINY,
        "--credit",
        "backprop",
    ]
    subprocess.run([*argv, "--run", str(folder)], check=True, capture_output=True, timeout=60)
    (record,) = json.loads((folder / "memory.json").read_text())
    assert [process["rank"] for process in record["processes"]] == [0, 1]
    assert [(worker["stage"], worker["rank"]) for worker in record["workers"]] == [(0, 0), (1, 1)]
    for process, worker, foretold in zip(record["processes"], record["workers"], record["predicted"]):
        assert worker["saved"] == process["saved"] == foretold["saved"] > 0
        assert worker["gradients"] == foretold["gradients"]
        assert process["categories"]["parameters"] == worker["parameters"]
    footprint = read_footprint(folder)
    assert footprint is not None and footprint.processes == 2
