"""PyTorch's own pipelines and data parallelism train what the library's reference methods train.

Four real processes make all the runs below, one after the other (starting them is what costs); each run is then compared with
its reference in this process: same network, same start, same data.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import unlocked as ul
from unlocked.batch import Batch
from unlocked.cluster import Cluster
from unlocked.consensus import AllReduce, Consensus, Independent
from unlocked.consensus.torch_data_parallel import ReducedInBackward, TorchDDP
from unlocked.consensus.torch_fully_shard import TorchFullyShard
from unlocked.credit import DGL, Backprop, Credit, Greedy, Interlocking
from unlocked.credit.torch_pipelining import TorchGPipe, TorchOneFOneB
from unlocked.errors import InvalidChoice
from unlocked.sharding import filled, local, skeleton, whole
from unlocked.worlds import Distributed

from methods import SMALL, batch, data, mlp, state, trainer
from processes import run_processes

pytestmark = [pytest.mark.xdist_group("baselines"), pytest.mark.timeout(600)]  # the runs are made once
PROCESSES = 4
SIZES = (24, 24, 24, 16)  # one batch per update; the last has another shape


@dataclass(frozen=True)
class Case:
    """A method with J stages on the four processes, and the reference it must equal, up to `within` (0: bit for bit)."""

    name: str
    stages: int
    credit: Credit
    consensus: Consensus
    reference: tuple[Credit, Consensus]
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    as_accumulate: int = 1
    within: float = 0.0

    def make(self, world: Distributed | None = None) -> ul.Trainer:
        """The trainer in this world; without one, that of the reference."""
        credit, consensus = self.reference if world is None else (self.credit, self.consensus)
        return trainer(
            credit,
            consensus,
            self.stages,
            replicas=PROCESSES // self.stages,
            model=mlp(**self.model),
            world=world,
            accumulate=self.as_accumulate if world is None else self.accumulate,
            **self.options,
        )


BACKPROP, ALL_REDUCE = (Backprop(), Independent()), (Backprop(), AllReduce())
HARD = {"norm": True, "dropout": 0.2}
dgl = DGL(head=SMALL, budget=None)
greedy = Greedy(head=SMALL, budget=None)
interlocking = Interlocking(1, head=SMALL, budget=None)
FLOAT32 = {"dtype": torch.float32}

CASES = [
    Case("gpipe", 4, TorchGPipe(4), Independent(), BACKPROP, {"clip": 0.5}, HARD, as_accumulate=4),
    Case("1f1b", 4, TorchOneFOneB(4), Independent(), BACKPROP, {"clip": 0.5}, HARD, accumulate=2, as_accumulate=8),
    Case("gpipe bf16", 4, TorchGPipe(2), Independent(), BACKPROP, {"precision": "bf16"}, FLOAT32, as_accumulate=2),
    Case("gpipe × all-reduce", 2, TorchGPipe(2), AllReduce(), ALL_REDUCE, as_accumulate=2),
    Case("gpipe × ddp", 2, TorchGPipe(2), TorchDDP(), ALL_REDUCE, {"clip": 0.5}, HARD, as_accumulate=2),
    Case("1f1b × ddp, accumulate", 2, TorchOneFOneB(2), TorchDDP(), ALL_REDUCE, {}, {}, accumulate=2, as_accumulate=4),
    Case("1f1b × fully-shard", 2, TorchOneFOneB(2), TorchFullyShard(), ALL_REDUCE, as_accumulate=2),
    Case("backprop × ddp", 2, Backprop(), TorchDDP(), ALL_REDUCE, {}, HARD, accumulate=3, as_accumulate=3),
    Case("backprop × fully-shard", 2, Backprop(), TorchFullyShard(), ALL_REDUCE, {}, HARD),
    Case("dgl × ddp", 2, dgl, TorchDDP(), (dgl, AllReduce()), {"clip": 0.3}, {"norm": True}, 2, 2),
    Case("dgl × fully-shard", 2, dgl, TorchFullyShard(), (dgl, AllReduce()), {}, {"norm": True}, 2, 2),
    Case("dgl × fully-shard, clip", 2, dgl, TorchFullyShard(), (dgl, AllReduce()), {"clip": 0.3}, within=1e-12),
    Case("greedy × ddp", 2, greedy, TorchDDP(), (greedy, AllReduce())),
    Case("greedy × fully-shard", 2, greedy, TorchFullyShard(), (greedy, AllReduce())),
    Case("interlocking × ddp", 4, interlocking, TorchDDP(), (interlocking, Independent())),
    Case("interlocking × fully-shard", 4, interlocking, TorchFullyShard(), (interlocking, Independent())),
    Case("4 replicas × ddp", 1, Backprop(), TorchDDP(bucket_mb=1e-4), ALL_REDUCE, within=1e-12),
    Case("4 replicas × fully-shard", 1, Backprop(), TorchFullyShard(), ALL_REDUCE, within=1e-12),
]
RESUMED = [case for case in CASES if case.name in ("backprop × ddp", "dgl × fully-shard", "1f1b × fully-shard")]
names = [case.name for case in CASES]


# ---- in the processes --------------------------------------------------------------------------------------------------


def run_all(cluster: Cluster, folder: str) -> dict[str, dict[str, Any]]:
    """Every case, on one process of the four."""
    with contextlib.ExitStack() as stack:  # a world has one mesh
        worlds = {stages: stack.enter_context(Distributed(cluster)) for stages in (1, 2, 4)}
        found = {case.name: run_case(case, worlds[case.stages]) for case in CASES}
        return found | {f"resumed {case.name}": resume_case(case, worlds[case.stages], folder) for case in RESUMED}


def run_case(case: Case, world: Distributed) -> dict[str, Any]:
    session = case.make(world)
    train(session)
    (weights,) = session.weights
    place = weights.worker.place
    trained = weights.stage.state_dict(keep_vars=True)
    held = sum(local(x).numel() for x in weights.parameters)
    return {
        "place": place,
        "state": {f"{place.replica}.{place.stage}.{name}": array(whole(x)) for name, x in trained.items()},
        "held": held,
        "all": sum(x.numel() for x in weights.parameters),
        "momenta": sum(
            local(own["momentum_buffer"]).numel() for own in weights.store.optimizer.state_dict()["state"].values()
        ),
        "acts": str(session.timeline),
        "sent": dict(session.timeline.bytes_sent()),
        "evaluation": session.evaluate(data(24, 1, case.model.get("dtype", torch.float64))).to_json(),
        "after": {name: array(whole(x)) for name, x in weights.stage.state_dict(keep_vars=True).items()},
    }


def resume_case(case: Case, world: Distributed, folder: str) -> dict[str, np.ndarray]:
    """The state after two updates, a checkpoint, a new trainer, and the rest."""
    first = case.make(world)
    train(first, slice(2))
    path = f"{folder}/{case.name}"
    first.save(path)
    again = go_on(case, path, case.credit, case.consensus, world)
    (weights,) = again.weights
    return {name: array(whole(x)) for name, x in weights.stage.state_dict(keep_vars=True).items()}


def go_on(case: Case, path: str, credit: Credit, consensus: Consensus, world: Distributed | None = None) -> ul.Trainer:
    chain = ul.cut(mlp(**case.model), case.stages, like=batch()[0])
    again = ul.Trainer.resume(path, chain, credit=credit, consensus=consensus, world=world)
    train(again, slice(2, None))
    return again


def train(session: ul.Trainer, part: slice = slice(None)) -> None:
    dtype = next(session.weights[0].stage.parameters()).dtype
    for k, size in list(enumerate(SIZES))[part]:
        session.step(*batch(size, seed=k, dtype=dtype))


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy().copy()


# ---- here --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Any:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def found(folder) -> dict[str, list[dict[str, Any]]]:
    """What the four processes found, by case."""
    rows = run_processes(run_all, PROCESSES, str(folder), deadline=300.0)
    return {name: [row[name] for row in rows] for name in rows[0]}


@functools.cache
def reference(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    case = next(case for case in CASES if case.name == name)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes
    try:
        session = case.make()
        train(session)
        return state(session), session.evaluate(data(24, 1, case.model.get("dtype", torch.float64))).to_json()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=names)
def test_parameters_and_statistics_are_the_references(case, found):
    expected, _ = reference(case.name)
    ours = {name: torch.from_numpy(x) for row in found[case.name] for name, x in row["state"].items()}
    assert ours.keys() == expected.keys()
    for name, x in ours.items():
        torch.testing.assert_close(
            x, expected[name], rtol=case.within, atol=case.within, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", CASES, ids=names)
def test_evaluation_is_the_references_and_changes_nothing(case, found):
    _, expected = reference(case.name)
    for row in found[case.name]:
        assert row["evaluation"]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert row["evaluation"]["members"] == expected["members"]
        before = [x for _, x in sorted(row["state"].items())]
        after = [x for _, x in sorted(row["after"].items())]
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", [name for name in names if "fully-shard" in name])
def test_fully_shard_keeps_one_part_in_n_of_weights_and_momenta(name, found):
    by_stage: dict[int, list[dict[str, Any]]] = {}
    for row in found[name]:
        by_stage.setdefault(row["place"].stage, []).append(row)
    for rows in by_stage.values():
        assert sum(row["held"] for row in rows) == rows[0]["all"]
        assert sum(row["momenta"] for row in rows) in (rows[0]["all"], 0)  # greedy: upper stages have none yet
        assert len(rows) == 1 or all(row["held"] < row["all"] for row in rows)


@pytest.mark.parametrize("case", RESUMED, ids=[case.name for case in RESUMED])
def test_a_run_resumed_ends_where_it_would_have(case, found):
    for whole_run, resumed in zip(found[case.name], found[f"resumed {case.name}"], strict=True):
        prefix = "{}.{}.".format(*whole_run["place"])
        for name, x in resumed.items():
            assert np.array_equal(x, whole_run["state"][prefix + name]), name


@pytest.mark.parametrize("case", RESUMED, ids=[case.name for case in RESUMED])
def test_a_checkpoint_holds_ordinary_tensors_and_goes_on_in_one_process(case, found, folder):
    """Saved by four processes, gone on with by the reference method in one: still the reference's end."""
    again = state(go_on(case, f"{folder}/{case.name}", *case.reference))
    for name, x in reference(case.name)[0].items():
        torch.testing.assert_close(again[name], x, rtol=1e-12, atol=1e-12)


def test_the_schedules_are_what_they_are_called(found):
    def acts(name: str, stage: int) -> str:
        (row,) = (row for row in found[name] if row["place"].stage == stage)
        return " ".join(act.split("@")[0] for act in row["acts"].split(": ")[1].split() if act[0] in "FB")

    assert acts("gpipe", 1).endswith("F12 F13 F14 F15 B12 B13 B14 B15")
    # accumulate = 2: two batches of four; stage 2 of 4 warms up with two forwards
    assert acts("1f1b", 2).endswith("F28 F29 B28 F30 B29 F31 B30 B31")


@pytest.mark.parametrize("name", ["gpipe", "gpipe × ddp", "backprop × ddp"])
def test_the_bytes_that_torch_sends_are_those_of_the_reference(name, found):
    """Between stages as in backpropagation; among replicas as many as all-reduce sends, in one update. (What the sharded
    forms send: test_torch_sharding.py.)"""
    case = next(case for case in CASES if case.name == name)
    session = case.make()
    train(session)
    expected = session.timeline.bytes_sent()
    total: dict[str, int] = {}
    for row in found[name]:
        for channel, size in row["sent"].items():
            if channel == "example":  # the last batch has a new shape
                continue
            channel = "all-reduce" if channel.startswith("torch-") else channel
            total[channel] = total.get(channel, 0) + size
    assert total == expected


# ---- without processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "size", "stages", "words"),
    [
        (TorchGPipe(5), 12, 3, "splits a batch into 5 equal micro-batches; 12 samples"),
        (TorchOneFOneB(2), 12, 3, "micro_batches=2 and 3 stages"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(rule, size, stages, words):
    session = trainer(Backprop(), stages=stages)
    x, y = batch(size)
    program = rule.run(session.workers[0], session.weights[0].stage, [Batch(x, y)], session.weights[0])
    with pytest.raises(InvalidChoice, match=words):
        asyncio.run(program)


def test_a_pipeline_refuses_a_head_beside_hooks():
    session = trainer(Backprop(), stages=1)
    worker, weights = session.workers[0], session.weights[0]
    hooked = ReducedInBackward(worker, weights.chain, weights.store)
    weights.stage.head = torch.nn.Linear(3, 3)
    with pytest.raises(InvalidChoice, match="has a head"):
        asyncio.run(TorchGPipe(2).run(worker, weights.stage, [Batch(*batch())], hooked))


@pytest.mark.parametrize(
    "make", [lambda: TorchGPipe(0), lambda: TorchOneFOneB(True - 1), lambda: TorchGPipe(2.5), lambda: TorchDDP(0)]
)  # type: ignore[arg-type]
def test_impossible_parameters_are_refused(make: Callable[[], Any]):
    with pytest.raises(InvalidChoice, match=r"not possible|no size"):
        make()


def test_a_skeleton_is_filled_to_an_equal_module_ties_included():
    module = mlp(norm=True)
    module.append(torch.nn.Linear(3, 3).double())
    module.append(module[-1])  # tied
    bare = skeleton(module)
    assert all(x.is_meta for x in [*bare.parameters(), *bare.buffers()])
    copy = filled(bare, module)
    assert copy[-1].weight is copy[-2].weight and copy[-1].weight is not module[-1].weight
    assert [type(x) for x in copy.parameters()] == [type(x) for x in module.parameters()]
    for (name, x), y in zip(module.state_dict().items(), copy.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
