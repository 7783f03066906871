"""ZeRO-1, 2, 3 and the communication hooks, PyTorch's own: what they train, hold, send and save.

The runs are made by real processes, all in one go (starting them is what costs), and compared with all-reduce in this
one.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

import unlocked as ul
from unlocked.cluster import Cluster
from unlocked.consensus import AllReduce, Consensus, TorchDDP, TorchFullyShard, TorchZeRO1
from unlocked.consensus.base import Weights
from unlocked.consensus.torch_fully_shard import _blocks
from unlocked.consensus.torch_zero1 import _second
from unlocked.credit import DGL, Backprop, Credit, Interlocking
from unlocked.credit.torch_pipelining import TorchGPipe
from unlocked.delays import check_delays
from unlocked.errors import InvalidChoice
from unlocked.sharding import is_part, local, whole
from unlocked.worlds import Distributed

from methods import SMALL, batch, data, momentum, state, trainer
from methods import mlp as seven
from processes import run_processes

pytestmark = [pytest.mark.xdist_group("sharding"), pytest.mark.timeout(600)]  # the runs are made once
SIZES = (24, 24, 24, 16, 16)


def mlp(depth: int = 4, width: int = 7, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Sequential:
    """As in methods.py; wider ones without BatchNorm and dropout."""
    if width == 7:
        return seven(depth, dtype=dtype, **options)
    torch.manual_seed(0)
    sizes = [5, *[width] * depth]
    inside = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*inside, nn.Linear(width, 3)).to(dtype)


@dataclass(frozen=True)
class PlainHead:
    """No BatchNorm: one sample will do."""

    def __call__(self, features: torch.Tensor, outputs: int) -> nn.Module:
        return nn.Linear(features.shape[-1], outputs).to(features.dtype)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def grouped_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Matrices decay, vectors do not; the two groups have other learning rates."""
    matrices, rest = [x for x in parameters if x.dim() > 1], [x for x in parameters if x.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 0.003}]
    return torch.optim.AdamW(groups, lr=0.01, amsgrad=True)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def chained(optimizer: torch.optim.Optimizer) -> Any:
    """A schedule of schedules; the first also moves the momentum."""
    one = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=10)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [one, halving(optimizer)], [2])


HARD = functools.partial(mlp, norm=True, dropout=0.2)


@dataclass(frozen=True)
class Case:
    """A rule on J stages and N replicas, equal to all-reduce up to `within` (0: bit for bit)."""

    name: str
    stages: int
    replicas: int
    consensus: Consensus
    credit: Credit = field(default_factory=Backprop)
    options: Mapping[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = HARD
    within: float = 0.0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each update."""
        return SIZES if self.within < 1e-9 else (2,) * 5

    def make(self, world: Distributed | None = None) -> ul.Trainer:
        """The trainer in this world; without one, that of all-reduce in this process."""
        consensus = AllReduce() if world is None else self.consensus
        credit = Backprop() if world is None and isinstance(self.credit, TorchGPipe) else self.credit
        options = dict(self.options)
        return trainer(
            credit, consensus, self.stages, replicas=self.replicas, model=self.model(), world=world, **options
        )


dgl = DGL(head=SMALL, budget=None)
plain_dgl = DGL(head=PlainHead(), budget=None)
interlocking = Interlocking(1, head=SMALL, budget=None)
RULES: dict[str, Consensus] = {
    "zero1": TorchZeRO1(),
    "level 2": TorchFullyShard(2),
    "level 3": TorchFullyShard(3),
    "level 2, blocks": TorchFullyShard(2, "block"),
    "level 3, blocks": TorchFullyShard(3, "block"),
}
COMPOSED = [
    Case(f"{credit.name} × {name}, {optimizer.__name__}", stages, 2, rule, credit, {"optimizer": optimizer})
    for name, rule in RULES.items()
    for credit, stages, optimizer in ((Backprop(), 1, adam), (dgl, 3, adam), (interlocking, 3, momentum))
]
SCHEDULED = {"optimizer": grouped_adamw, "schedule": chained, "clip": 0.3, "accumulate": 2}
FOUR = [  # one stage on four replicas; the sum of four numbers in another order
    Case("4 × zero1", 1, 4, TorchZeRO1(), options=SCHEDULED),
    Case("4 × zero1, small buckets", 1, 4, TorchZeRO1(bucket_mb=1e-4)),
    Case("4 × level 2", 1, 4, TorchFullyShard(2), options=SCHEDULED, within=1e-10),
    Case("4 × level 3, blocks", 1, 4, TorchFullyShard(3, "block"), options=SCHEDULED, within=1e-10),
]
wide = functools.partial(mlp, depth=2, width=20)


def mixed(dtype: torch.dtype) -> nn.Sequential:
    """Weights of two shapes in turn: PyTorch keeps those of one shape together."""
    torch.manual_seed(0)
    inside = [part for a, b in ((5, 20), (20, 5), (5, 20)) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*inside, nn.Linear(20, 3)).to(dtype)


EXACT = TorchDDP(hook="powersgd", rank=2, start=2)  # two samples: gradients are matrices of rank 2
COMPRESSED = [
    Case("gpipe × powersgd", 2, 2, EXACT, TorchGPipe(1), model=wide, within=1e-8),
    Case("dgl × powersgd", 2, 2, EXACT, plain_dgl, model=wide, within=1e-8),  # buckets of body and head at once
]
MORE = [
    Case("zero1, scheduled", 1, 2, TorchZeRO1(), options=SCHEDULED),
    Case("level 2, accumulate", 1, 2, TorchFullyShard(2), options={"accumulate": 2}),
    Case("level 3, accumulate", 1, 2, TorchFullyShard(3, "block"), options={"accumulate": 2}),
    Case("powersgd, exact", 1, 2, EXACT, model=wide, within=1e-8),
]
HOOKED = [
    Case(f"hook {rule.hook}", 1, 2, rule, options={"optimizer": adam}, model=functools.partial(mixed, dtype))
    for rule, dtype in (
        (TorchDDP(hook="bf16"), torch.float32),
        (TorchDDP(hook="fp16"), torch.float64),
        (TorchDDP(hook="powersgd", start=2, bucket_mb=0.001), torch.float64),
        (TorchDDP(hook="powersgd-bf16", start=3), torch.float32),
    )
]
WITHOUT = MORE[0]  # the case that is also gone on with from a checkpoint of all-reduce
EQUAL = [*COMPOSED, *FOUR, *COMPRESSED, *MORE]
RESUMED = [
    case
    for case in (*EQUAL, *HOOKED)
    if case.name
    in (
        "zero1, scheduled",
        "dgl × zero1, adam",
        "level 2, accumulate",
        "interlocking × level 3, blocks, momentum",
        *(case.name for case in HOOKED),
    )
]
KNOWN = {case.name: case for case in (*EQUAL, *HOOKED)}
BIG = 1 << 14  # numbers of a weight of the network whose memory is looked at


# ---- in the processes


def run_all(cluster: Cluster, names: list[str], folder: str) -> dict[str, Any]:
    """These cases, on one process; and what else is measured where there are two."""
    with contextlib.ExitStack() as stack:
        worlds: dict[int, Distributed] = {}
        for name in names:  # a world has one mesh
            if KNOWN[name].stages not in worlds:
                worlds[KNOWN[name].stages] = stack.enter_context(Distributed(cluster))
        found: dict[str, Any] = {name: run_case(KNOWN[name], worlds[KNOWN[name].stages]) for name in names}
        for case in RESUMED:
            if case.name in names:
                found[f"resumed {case.name}"] = resume_case(case, worlds[case.stages], f"{folder}/{case.name}")
        if cluster.size == 2:
            other = stack.enter_context(Distributed(cluster, reduction="backend"))  # no links, which have memory, too
            found |= {f"memory {name}": memory(rule, other) for name, rule in (ALL_REDUCE | RULES).items()}
            found["left out"] = left_out(worlds[1])
            path = f"{folder}/{WITHOUT.name}"
            found["from all-reduce"] = tensors(go_on(WITHOUT, path, WITHOUT.consensus, worlds[1]))
        return found


def run_case(case: Case, world: Distributed) -> dict[str, Any]:
    session = case.make(world)
    sent = train(session, case)
    (weights,) = session.weights
    return {
        "state": tensors(session),
        "kept": len(weights.store.optimizer.state),
        "sent": sent,
        "weights": [tuple(x.shape) for x in weights.parameters],
        "carried": weights.carried(),
        "score": session.evaluate(held_out(case)).to_json()["loss"],
    }


def tensors(session: ul.Trainer) -> dict[str, torch.Tensor]:
    """All of this process's stage, under replica, stage and name."""
    (weights,) = session.weights
    place, known = weights.worker.place, weights.stage.state_dict(keep_vars=True)
    return {f"{place.replica}.{place.stage}.{name}": whole(x).clone() for name, x in known.items()}


def train(session: ul.Trainer, case: Case, part: slice = slice(None)) -> list[dict[str, int]]:
    """Some of the case's batches; what was sent for each."""
    dtype, sent = next(session.weights[0].stage.parameters()).dtype, []
    for k, size in list(enumerate(case.sizes))[part]:
        session.step(*batch(size, seed=k, dtype=dtype))
        sent.append(dict(session.timeline.bytes_sent()))
    return sent


def held_out(case: Case) -> Any:
    return data(24, 1, next(case.model().parameters()).dtype)


def resume_case(case: Case, world: Distributed, path: str) -> dict[str, Any]:
    """The state after three updates, a checkpoint, a new trainer, and the rest; of how many weights the optimizer has some."""
    first = case.make(world)
    train(first, case, slice(3))
    first.save(path)
    again = go_on(case, path, case.consensus, world)
    return {"state": tensors(again), "kept": len(again.weights[0].store.optimizer.state)}


def go_on(case: Case, path: str, consensus: Consensus, world: Distributed | None = None) -> ul.Trainer:
    chain = ul.cut(case.model(), case.stages, like=batch(dtype=next(case.model().parameters()).dtype)[0])
    given = {key: case.options[key] for key in ("optimizer", "schedule") if key in case.options}
    again = ul.Trainer.resume(path, chain, credit=case.credit, consensus=consensus, world=world, **given)
    train(again, case, slice(3, None))
    return again


ALL_REDUCE: dict[str, Consensus] = {"all-reduce": AllReduce()}


def big() -> nn.Sequential:
    torch.manual_seed(0)
    side = int(BIG**0.5)
    inside = [part for _ in range(6) for part in (nn.Linear(side, side, bias=False), nn.Tanh())]
    return nn.Sequential(*inside).to(torch.float32)


def memory(rule: Consensus, world: Distributed) -> dict[str, float]:
    """What a worker holds, in copies of the weights: all tensors at most in a forward, at the loss, at most in a backward,
    after the step and after an evaluation; its gradients at the update; its optimizer's state."""
    gc.collect()
    gc.freeze()  # what there is now is not looked at
    unit = 4.0 * 6 * BIG
    seen: dict[str, float] = {}

    def look(when: str) -> None:
        seen[when] = max(seen.get(when, 0.0), live() / unit)

    def hooked(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        look("forward")
        output.register_hook(lambda gradient: look("backward"))

    def loss(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if h.requires_grad:  # no evaluation
            look("loss")
        return h.sum()

    def count(*_: Any) -> None:
        seen["gradients"] = sum(local(parameter.grad).nbytes for parameter in weights.parameters) / unit

    x, y = torch.randn(2, int(BIG**0.5)), torch.zeros(2)
    chain = ul.Chain([ul.Stage(big(), loss=loss)])
    session = ul.Trainer(chain, consensus=rule, replicas=2, world=world, optimizer=adam)
    (weights,) = session.weights
    weights.store.optimizer.register_step_pre_hook(count)
    session.step(x, y)
    hooks = [part.register_forward_hook(hooked) for part in weights.stage.body if isinstance(part, nn.Tanh)]
    rows = []
    for _ in range(4):
        seen.clear()
        session.step(x, y)
        gc.collect()
        look("after a step")
        rows.append(dict(seen))
    for hook in hooks:
        hook.remove()
    found = {key: min(row[key] for row in rows) for key in rows[0]}  # gloo's threads let go of tensors a moment later
    kept = [local(x) for own in weights.store.optimizer.state.values() for x in own.values() if x.dim()]
    found["state"] = sum(part.nbytes for part in kept) / unit
    session.evaluate((x, y))
    gc.collect()
    look("after an evaluation")
    gc.unfreeze()
    return found | {"after an evaluation": seen["after an evaluation"]}


def live() -> float:
    """Bytes of all tensors of this process that are not frozen."""
    found = {}
    for x in gc.get_objects():
        if issubclass(type(x), torch.Tensor) and not is_part(x) and not x.is_meta:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return float(sum(found.values()))


def left_out(world: Distributed) -> dict[str, torch.Tensor]:
    """A loss linear in the weights, so that all gradients are known: where powersgd of rank 1 gets, its errors."""
    torch.manual_seed(0)
    model = nn.Linear(20, 20, bias=False).double()
    start = model.weight.detach().clone()
    slopes = torch.randn(4, 20, dtype=torch.float64)
    chain = ul.Chain([ul.Stage(model, loss=lambda h, y: (h * slopes[y]).sum())])
    rule = TorchDDP(hook="powersgd", rank=1, start=2)
    session = ul.Trainer(
        chain, consensus=rule, replicas=2, world=world, optimizer=lambda some: torch.optim.SGD(some, lr=1.0)
    )
    x, total = torch.randn(5, 4, 20, dtype=torch.float64), torch.zeros(20, 20, dtype=torch.float64)
    for row in x:
        session.step(row, torch.arange(4))
        total += slopes.T @ row / 2
    (weights,) = session.weights
    error = weights.carried()["body"]["parts"]["weight"]["error"].view(20, 20)
    return {"moved": start - weights.parameters[0].detach(), "error": error.clone(), "gradients": total}


# ---- here


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Any:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def found(folder) -> dict[str, list[Any]]:
    """What the processes found, by case."""
    at_once(lambda: train_and_save(WITHOUT, f"{folder}/{WITHOUT.name}"))
    everything: dict[str, list[Any]] = {}
    for count in (2, 4, 6):
        names = [case.name for case in KNOWN.values() if case.stages * case.replicas == count]
        rows = run_processes(run_all, count, names, str(folder), deadline=300.0)
        everything |= {name: [row[name] for row in rows] for name in rows[0]}
    return everything


def train_and_save(case: Case, path: str) -> None:
    session = case.make()
    train(session, case, slice(3))
    session.save(path)


def at_once(work: Callable[[], Any]) -> Any:
    """On one thread, as in the processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


@functools.cache
def reference(name: str) -> tuple[dict[str, torch.Tensor], float, list[dict[str, int]]]:
    """All-reduce: the state, the score, what was sent per update."""
    case = KNOWN[name]

    def work() -> Any:
        session = case.make()
        sent = train(session, case)
        return state(session), session.evaluate(held_out(case)).to_json()["loss"], sent

    return at_once(work)


def merged(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: x for row in rows for name, x in row.items()}


def ids(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


@pytest.mark.parametrize("case", EQUAL, ids=ids(EQUAL))
def test_it_trains_what_all_reduce_trains(case, found):
    expected, score, _ = reference(case.name)
    ours = merged([row["state"] for row in found[case.name]])
    assert ours.keys() == expected.keys()
    for name, x in ours.items():
        torch.testing.assert_close(
            x, expected[name], rtol=case.within, atol=case.within, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert all(row["score"] == pytest.approx(score, rel=1e-6) for row in found[case.name])


@pytest.mark.parametrize("case", RESUMED, ids=ids(RESUMED))
def test_a_run_resumed_ends_where_it_would_have(case, found):
    before, after = found[case.name], found[f"resumed {case.name}"]
    assert [row["kept"] for row in before] == [row["kept"] for row in after]
    unbroken, resumed = (merged([row["state"] for row in rows]) for rows in (before, after))
    assert [name for name in unbroken if not torch.equal(unbroken[name], resumed[name])] == []


@pytest.mark.parametrize("case", RESUMED[:4], ids=ids(RESUMED[:4]))
def test_a_checkpoint_goes_on_without_sharding(case, found, folder):
    """It holds the whole optimizer state: all-reduce in one process ends at the same numbers."""
    again = at_once(lambda: state(go_on(case, f"{folder}/{case.name}", AllReduce())))
    ours = merged([row["state"] for row in found[case.name]])
    assert [name for name in ours if not torch.equal(ours[name], again[name])] == []


def test_zero1_goes_on_from_a_checkpoint_of_all_reduce(found):
    ours = merged(found["from all-reduce"])
    assert [name for name, x in reference(WITHOUT.name)[0].items() if not torch.equal(ours[name], x)] == []


# ---- memory


def test_what_a_worker_holds_is_what_the_level_says(found):
    """In copies of the weights, Adam keeping two: all between two steps; the gradient at the update; at the loss."""
    expected = {
        "all-reduce": (3.0, 1.0, 2.0, 3.0),
        "zero1": (2.0, 1.0, 1.0, 2.0),
        "level 2": (1.5, 0.5, 1.0, 2.5),  # weights are whole until the backward has ended
        "level 3": (1.5, 0.5, 1.0, 1.5),
        "level 2, blocks": (1.5, 0.5, 1.0, 2.5),
        "level 3, blocks": (1.5, 0.5, 1.0, 1.5),
    }
    for name, (between, gradients, kept, loss) in expected.items():
        for row in found[f"memory {name}"]:
            assert row["after a step"] == pytest.approx(between, rel=0.03), name
            assert row["after an evaluation"] == pytest.approx(between, abs=0.2), name
            assert row["loss"] == pytest.approx(loss, abs=0.2), name  # a sixth: one block of six
            assert (row["gradients"], row["state"]) == (gradients, kept), name


def test_blocks_bound_what_is_whole_at_a_time(found):
    """Six equal blocks at level 3. Beside the shards (and at last those of gradients) a forward has one block whole, a
    backward two and a gradient; of a stage as a whole all six are."""
    for block, stage in zip(found["memory level 3, blocks"], found["memory level 3"], strict=True):
        assert block["forward"] < 1.5 + 1 / 6 + 0.05 and stage["forward"] > 2.5
        assert block["backward"] < 2.0 + 3 / 6 and stage["backward"] > 2.5


# ---- bytes


def padded(shapes: list[tuple[int, ...]], replicas: int, element: int = 8) -> int:
    """Bytes of all weights cut into equal parts along their first dimension, of one part."""
    return sum(-(-shape[0] // replicas) * torch.Size(shape[1:]).numel() for shape in shapes) * element


@pytest.mark.parametrize(
    ("name", "exchanges"),
    [
        ("backprop × level 2, adam", 2),
        ("backprop × level 3, adam", 3),
        ("level 2, accumulate", 2),  # the weights are whole from the first micro-batch to the last
        ("level 3, accumulate", 5),  # gathered four times
        ("4 × level 2", 2),
        ("interlocking × level 3, momentum", 3),
    ],
)
def test_fully_shard_sends_a_shard_to_each_of_the_others_per_exchange(name, exchanges, found):
    case = KNOWN[name]
    for row in found[name]:
        expected = exchanges * (case.replicas - 1) * padded(row["weights"], case.replicas)
        if "interlocking" not in name:
            assert [sent["torch-fully-shard"] for sent in row["sent"]] == [expected] * len(case.sizes)
        else:
            assert all(sent["torch-fully-shard"] >= expected for sent in row["sent"])


@pytest.mark.parametrize("name", ["backprop × zero1, adam", "4 × zero1"])
def test_zero1_sends_an_all_reduce_and_every_weight_to_the_others(name, found):
    case, rows = KNOWN[name], found[name]
    weights = sum(8 * torch.Size(shape).numel() for shape in rows[0]["weights"])
    for k, expected in enumerate(reference(name)[2]):
        assert sum(row["sent"][k]["all-reduce"] for row in rows) == expected["all-reduce"]
        assert sum(row["sent"][k]["torch-zero1"] for row in rows) == (case.replicas - 1) * weights


@pytest.mark.parametrize("case", HOOKED, ids=ids(HOOKED))
def test_a_hook_sends_what_its_formula_says(case, found):
    rule, (row, _) = case.consensus, found[case.name]
    element = 2 if "16" in rule.hook else 8
    for update, sent in enumerate(row["sent"]):
        numbers = 0
        for shape in row["weights"]:
            size = torch.Size(shape).numel()
            factors = rule.rank * (shape[0] + size // shape[0])
            small = "powersgd" in rule.hook and update >= rule.start and 2 * factors < size
            numbers += factors if small else size
        assert sent == {"torch-ddp": element * numbers}  # 2(N−1)/N of it, N = 2
    assert "powersgd" not in rule.hook or row["sent"][-1]["torch-ddp"] < row["sent"][0]["torch-ddp"]


# ---- what hooks do to a gradient


@pytest.mark.parametrize(("name", "dtype"), [("hook bf16", torch.bfloat16), ("hook fp16", torch.float16)])
def test_a_cast_is_the_mean_of_rounded_gradients(name, dtype, found):
    case = KNOWN[name]
    session = at_once(lambda: trained(case, Rounded(str(dtype).removeprefix("torch."))))
    ours = merged([row["state"] for row in found[name]])
    assert [key for key, x in state(session).items() if not torch.equal(ours[key], x)] == []
    assert any(not torch.equal(ours[key], x) for key, x in reference(name)[0].items())  # it is not all-reduce


def trained(case: Case, consensus: Consensus) -> ul.Trainer:
    session = replace(case, consensus=consensus).make(ul.worlds.InProcess())  # type: ignore[arg-type]
    train(session, case)
    return session


class _RoundedMean(Weights):
    def __init__(self, dtype: torch.dtype, *made: Any) -> None:
        super().__init__(*made)
        self._dtype = dtype

    async def reduce(self) -> None:
        for parameter in self.parameters:
            assert parameter.grad is not None
            half = parameter.grad.to(self._dtype) / 2
            one, other = await self.worker.replicas.gather("rounded", half)
            parameter.grad.copy_(one + other)


@dataclass(frozen=True)
class Rounded(Consensus):
    """The mean of two replicas in 16 bits, written down."""

    dtype: str

    name = "rounded"
    properties = AllReduce.properties
    shares_data = True

    def weights(self, *made: Any) -> Weights:
        worker, chain, store, _ = made
        return _RoundedMean(getattr(torch, self.dtype), worker, chain, store)


def test_what_powersgd_leaves_out_is_in_its_errors(found):
    """Σ of what was applied + mean error = Σ of the mean gradients; with rank 1 the error is not nothing."""
    one, other = found["left out"]
    error = (one["error"] + other["error"]) / 2
    assert torch.equal(one["moved"], other["moved"])
    torch.testing.assert_close(one["moved"] + error, one["gradients"], rtol=1e-9, atol=1e-9)
    assert error.norm() > 0.01 * one["gradients"].norm()


def test_errors_are_saved_for_every_weight(found):
    """Flat, as large as the weight, on each replica its own; and a factor where there is one."""
    for name in ("hook powersgd", "hook powersgd-bf16"):
        rows = [row["carried"]["body"] for row in found[name]]
        assert [row["updates"] for row in rows] == [len(SIZES)] * 2
        sizes = {key: part["error"].numel() for key, part in rows[0]["parts"].items()}
        assert sorted(sizes.values()) == sorted(torch.Size(shape).numel() for shape in found[name][0]["weights"])
        assert {key for key, part in rows[0]["parts"].items() if "q" in part} == {
            name for name in sizes if "weight" in name
        }
        assert not torch.equal(*(row["parts"]["2_2.weight"]["error"] for row in rows))


# ---- without processes


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TorchFullyShard(1), "torch-zero1"),
        (lambda: TorchFullyShard(3, "blocks"), "did you mean 'block'"),
        (lambda: TorchDDP(hook="bf15"), "did you mean 'bf16'"),
        (lambda: TorchDDP(hook="powersgd", rank=0), "rank=0"),
        (lambda: TorchDDP(hook="powersgd", start=1), "start=1.*at least 2"),
    ],
)
def test_impossible_parameters_are_refused(make, words):
    with pytest.raises(InvalidChoice, match=words):
        make()


def test_blocks_want_a_sequence_that_shares_no_weights():
    with pytest.raises(InvalidChoice, match="stage 4 is a Linear"):
        _blocks(nn.Linear(3, 3), 4)
    tied = nn.Linear(3, 3)
    other = nn.Linear(3, 3)
    other.weight = tied.weight
    with pytest.raises(InvalidChoice, match="share no weights"):
        _blocks(nn.Sequential(tied, other), 0)
    assert _blocks(nn.Sequential(tied, nn.ReLU(), tied), 0) == [tied]  # one block, used twice


def test_an_optimizer_with_more_than_its_state_is_refused():
    class Odd(torch.optim.SGD):
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            super().__init__(parameters, lr=0.1)
            self.memory: list[int] = []

    made = Odd([nn.Parameter(torch.zeros(2))])
    with pytest.raises(InvalidChoice, match=r"second Odd.* memory would be missing"):
        _second(made, made.param_groups)


@pytest.mark.parametrize("rule", [*RULES.values(), TorchDDP(hook="bf16")])
def test_delayed_rules_are_refused(rule):
    with pytest.raises(InvalidChoice, match="several forwards in flight"):
        check_delays(ul.credit.PipeDream(), rule, "float32", None)
