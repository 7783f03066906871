"""Members that compute as one (credit/stacking.py) are members that compute one after the other."""

from __future__ import annotations

import contextlib
import copy
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked.chain import Chain, Stage
from unlocked.consensus.base import Store, Weights
from unlocked.credit.stacking import refuse
from unlocked.errors import InvalidChoice, NonFiniteLoss
from unlocked.method_names import make_credit, parse_call, parse_method
from unlocked.restore import describe_method, restore_method
from unlocked.worker import Worker

from methods import assert_same, data, mlp, momentum, state

Batches = tuple[list[Tensor], list[Tensor]]
STACKED, LOOP = ul.credit.Backprop(stacked=True), ul.credit.Backprop()

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop"
)  # attention on the CPU has no batching rule


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """A bias before a BatchNorm has rounding for a gradient, which the usual eps of 1e-8 would blow up."""
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, eps=1e-4)


def still(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return (
        ul.models.build("cnn", input_shape=(3, 6, 6), classes=3, width=4, depth=2)
        .double()
        .to(memory_format=torch.channels_last)
    )


def group_norm() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, 3)).double()


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return ul.models.build("gpt", input_shape=(5,), classes=7, width=8, layers=1, heads=2).double()


def images(size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 6, 6, generator=source, dtype=torch.float64), torch.randint(
        3, (size,), generator=source
    )


def vectors(size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 5, generator=source, dtype=torch.float64), torch.randint(3, (size,), generator=source)


def tokens(size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randint(7, (size, 5), generator=source), torch.randint(7, (size, 5), generator=source)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, torch.Generator], tuple[Tensor, Tensor]]]] = {
    "mlp": (mlp, vectors),
    "mlp-bn": (lambda: mlp(norm=True), vectors),
    "cnn": (cnn, images),
    "group-norm": (group_norm, images),
    "gpt": (gpt, tokens),
}


def batches(name: str, members: int, step: int, size: int = 8) -> Batches:
    """A batch for each member, its own."""
    source = torch.Generator().manual_seed(step)
    pairs = [NETS[name][1](size, source) for _ in range(members)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def trainer(credit: ul.credit.Backprop, net: nn.Module, like: Tensor, **options: object) -> ul.Trainer:
    options = {"optimizer": momentum, "replicas": 3} | options
    return ul.Trainer(ul.cut(copy.deepcopy(net), 1, like=like), credit=credit, **options)


def pair(name: str, members: int = 3, **options: object) -> tuple[ul.Trainer, ul.Trainer]:
    """The same training, stacked and in a loop; the members begin with weights of their own."""
    both = []
    for credit in (STACKED, LOOP):
        one = trainer(credit, NETS[name][0](), batches(name, 1, 0)[0][0], replicas=members, **options)
        scatter(one)
        both.append(one)
    return both[0], both[1]


@torch.no_grad()
def scatter(session: ul.Trainer) -> None:
    """Other weights for every member, written in place."""
    for n, chain in enumerate(session.chains):
        source = torch.Generator().manual_seed(n)
        for x in chain.parameters():
            x += 0.05 * torch.randn(x.shape, generator=source, dtype=x.dtype)


def assert_close(a: ul.Trainer, b: ul.Trainer, tolerance: float = 1e-10) -> None:
    one, other = state(a), state(b)
    assert one.keys() == other.keys()
    odd = [name for name in one if not torch.allclose(one[name], other[name], rtol=0, atol=tolerance)]
    assert not odd, f"these differ: {odd}"


def assert_attached(session: ul.Trainer) -> None:
    """Every member's tensors are slices of the stacks."""
    rows = {**session.stack._weights, **session.stack._buffers}
    for n, chain in enumerate(session.chains):
        mine = {**dict(chain[0].body.named_parameters()), **dict(chain[0].body.named_buffers())}
        assert mine.keys() == rows.keys()
        for name, x in mine.items():
            assert x.data_ptr() == rows[name].whole[n].data_ptr() and torch.equal(x, rows[name].whole[n]), name


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.covering(2)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "rule", [ul.consensus.Independent(), ul.consensus.WASH(p=0.3), ul.consensus.AllReduce()], ids=lambda rule: rule.name
)
@pytest.mark.parametrize("optimizer", [momentum, adamw])
@pytest.mark.parametrize("name", NETS)
def test_stacked_is_separate(
    name: str, optimizer: Callable[..., torch.optim.Optimizer], rule: ul.consensus.Consensus, accumulate: int
) -> None:
    members = 2 + (accumulate + len(name)) % 3
    stacked, loop = pair(name, members, optimizer=optimizer, consensus=rule, accumulate=accumulate)
    assert stacked.stack is not None and loop.stack is None
    for step in range(4):
        given = batches(name, members, step, size=9)  # 9 samples: two micro-batches of 5 and 4
        assert stacked.step(*given) == pytest.approx(loop.step(*given), abs=1e-10)
        assert stacked._losses() == pytest.approx(loop._losses(), abs=1e-10)
    assert_close(stacked, loop)
    assert_attached(stacked)


def test_members_compute_together() -> None:
    """One forward and one backward of the network a micro-batch, whatever the number of members."""
    stacked, _ = pair("mlp", 5)
    forwards, backwards = [], []
    layer = stacked.chains[0][0].body[0]
    layer.register_forward_hook(lambda *_: forwards.append(1))
    next(iter(stacked.stack._weights.values())).whole.register_hook(lambda _: backwards.append(1))
    stacked.step(*batches("mlp", 5, 0))
    assert len(forwards) == len(backwards) == 1
    acts = [(act.kind, act.replica) for act in stacked.timeline if act.kind in "FLBU"]
    assert sorted(acts) == sorted((kind, n) for kind in "FLBU" for n in range(5))
    assert not stacked.timeline.bytes_sent().get("stacked")


def test_clip_schedule_and_policies() -> None:
    options = {
        "clip": 0.3,
        "accumulate": 2,
        "batchnorm": "average",
        "schedule": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
    }
    stacked, loop = pair("mlp-bn", **options)
    for step in range(5):
        stacked.step(*batches("mlp-bn", 3, step))
        loop.step(*batches("mlp-bn", 3, step))
    assert_close(stacked, loop)
    assert stacked.learning_rates() == loop.learning_rates() == [0.1 * 0.5**2]


def test_bf16() -> None:
    both = [
        trainer(credit, mlp(dtype=torch.float32), torch.randn(4, 5), precision="bf16", optimizer=momentum)
        for credit in (STACKED, LOOP)
    ]
    for step in range(3):
        x, y = batches("mlp", 3, step)
        for one in both:
            one.step([part.float() for part in x], y)
    assert_close(*both, tolerance=2e-2)
    exact = trainer(LOOP, mlp(dtype=torch.float32), torch.randn(4, 5), optimizer=momentum)
    for step in range(3):
        x, y = batches("mlp", 3, step)
        exact.step([part.float() for part in x], y)
    assert not all(torch.equal(a, b) for a, b in zip(state(both[0]).values(), state(exact).values()))


def test_one_member_is_ordinary() -> None:
    one, other = (trainer(credit, mlp(), batches("mlp", 1, 0)[0][0], replicas=1) for credit in (STACKED, LOOP))
    for session in (one, other):
        session.step(*batches("mlp", 1, 0))
    assert one.stack is None
    assert_same(state(one), state(other))


class Odd(nn.Module):
    """A frozen weight, one used twice, one not used at all, a buffer of whole numbers, and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.frozen, self.unused, self.last = nn.Linear(5, 5), nn.Linear(2, 2), nn.Linear(5, 3)
        self.frozen.requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.full((5,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.last(self.frozen(self.second(self.first(x).tanh()).tanh()) * self.scale)


def test_odd_weights_and_buffers() -> None:
    """Tied, frozen and unused ones: as separately. What got no gradient is not decayed."""
    like = batches("mlp", 1, 0)[0][0]
    chains = [Chain([Stage(Odd().double())], like) for _ in range(2)]
    both = [
        ul.Trainer(chain, credit=credit, replicas=3, optimizer=adamw) for chain, credit in zip(chains, (STACKED, LOOP))
    ]
    for session in both:
        for step in range(3):
            session.step(*batches("mlp", 3, step))
    assert_close(*both)
    body, before = both[0].chains[1][0].body, Odd().double()
    assert body.calls == 3 and body.first.weight is body.second.weight
    assert torch.equal(body.frozen.weight, before.frozen.weight)
    assert torch.equal(body.unused.weight, before.unused.weight)
    assert not torch.equal(body.first.weight, before.first.weight)


def test_a_head_and_losses_of_ones_own() -> None:
    """The loss is each member's own: a head given by hand, another loss for member 1, soft targets for member 2."""
    sessions = []
    for credit in (STACKED, LOOP):
        torch.manual_seed(0)
        chain = Chain([Stage(mlp()[:-1], head=nn.Linear(7, 3).double())], like=batches("mlp", 1, 0)[0][0])
        session = ul.Trainer(chain, credit=credit, replicas=3, optimizer=momentum)
        session.chains[1][0].loss = lambda output, y: output.logsumexp(-1).mean() - output.mean()
        session.chains[2][0].loss = nn.functional.cross_entropy
        for step in range(3):
            x, y = batches("mlp", 3, step)
            y[2] = torch.nn.functional.one_hot(y[2], 3) * 0.7 + 0.1
            session.step(x, y)
        sessions.append(session)
    assert_close(*sessions)


# ---- the members stay in the stacks ----------------------------------------------------------------------------------


def test_what_is_written_to_a_member_is_what_computes() -> None:
    stacked, _ = pair("mlp-bn", optimizer=still)
    stacked.step(*batches("mlp-bn", 3, 0))
    fresh = mlp(norm=True)
    with torch.no_grad():
        for x in fresh.parameters():
            x.mul_(1.5)
    stacked.chains[1].load_state_dict(fresh.state_dict())
    x, y = batches("mlp-bn", 3, 1)
    stacked.step(x, y)
    fresh.train()
    assert stacked._losses()["1.0"] == pytest.approx(nn.functional.cross_entropy(fresh(x[1]), y[1]).item(), abs=1e-12)
    assert_attached(stacked)


class _Aliased(Weights):
    """Keeps its weights as tensors without a gradient from the beginning, and halves them through these."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._mine = [x.detach() for x in self.parameters]

    async def mix(self) -> None:
        for x in self._mine:
            x.mul_(0.5)


@dataclass(frozen=True)
class Halving(ul.consensus.Independent):
    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return _Aliased(worker, chain, store)


def test_a_rule_may_keep_aliases() -> None:
    """The weights are moved before a rule sees them; and no exchange of gradients may begin before they are dealt."""
    stacked, loop = pair("mlp", consensus=Halving())
    for step in range(2):
        for session in (stacked, loop):
            session.step(*batches("mlp", 3, step))
    assert_close(stacked, loop)
    assert not any(weights.store.overlap for weights in stacked.weights)


def test_slices_lie_in_memory_as_the_members_did() -> None:
    stacked, loop = pair("cnn")
    for a, b in zip(stacked.chains[2].parameters(), loop.chains[2].parameters(), strict=True):
        assert a.stride() == b.stride() and torch.equal(a, b)


def test_a_shuffle_conserves() -> None:
    """WASH moves every entry, and loses none."""
    stacked, _ = pair("mlp", optimizer=still, consensus=ul.consensus.WASH(p=1.0, schedule="constant"))
    before = [torch.stack(row).detach().clone() for row in zip(*(chain.parameters() for chain in stacked.chains))]
    stacked.step(*batches("mlp", 3, 0))
    after = [torch.stack(row).detach() for row in zip(*(chain.parameters() for chain in stacked.chains))]
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    for a, b in zip(before, after):
        assert torch.equal(a.sort(0).values, b.sort(0).values)
    assert_attached(stacked)


@pytest.mark.parametrize("rule", [ul.consensus.Independent(), ul.consensus.WASH(p=0.3)], ids=["independent", "wash"])
def test_resume(rule: ul.consensus.Consensus, tmp_path: Path) -> None:
    """Bit for bit."""
    straight, _ = pair("mlp-bn", consensus=rule, optimizer=adamw)
    for step in range(6):
        if step == 3:
            straight.save(tmp_path)
        straight.step(*batches("mlp-bn", 3, step))
    chain = ul.cut(mlp(norm=True), 1, like=batches("mlp-bn", 1, 0)[0][0])
    resumed = ul.Trainer.resume(tmp_path, chain, optimizer=adamw)
    assert resumed.credit == STACKED
    assert_attached(resumed)
    for step in range(3, 6):
        resumed.step(*batches("mlp-bn", 3, step))
    assert_same(state(resumed), state(straight))
    assert_attached(resumed)


def test_fitted_evaluated_averaged() -> None:
    """A whole training, with memory measured on the way; then what comes of the population."""
    kept = data(48)
    found = []
    for credit in (STACKED, LOOP):
        session = trainer(credit, mlp(norm=True), batches("mlp", 1, 0)[0][0])
        session.fit(kept, 2, validate=kept, batch_size=20)
        x = batches("mlp", 1, 3)[0][0]
        found.append((session, session.averaged(), session.ensemble(x), session.evaluate(kept)))
    (one, mean, together, scores), (other, other_mean, other_together, other_scores) = found
    assert_close(one, other)
    assert_attached(one)
    for a, b in zip(mean.parameters(), other_mean.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    torch.testing.assert_close(together, other_together, rtol=0, atol=1e-10)
    assert scores.loss == pytest.approx(other_scores.loss, abs=1e-10) and scores.members == other_scores.members
    assert one.activation_peak


def test_a_failed_step_leaves_nothing() -> None:
    stacked, loop = pair("mlp", accumulate=2)
    for session in (stacked, loop):
        session.step(*batches("mlp", 3, 0))
    x, y = batches("mlp", 3, 1)
    x[1] = x[1].clone()
    x[1][-1] = torch.nan  # in the second micro-batch
    before = state(stacked)
    with pytest.raises(NonFiniteLoss, match=r"of replica 1 .*micro-batch 3"):
        stacked.step(x, y)
    assert_same(before, state(stacked))
    assert all(parameter.grad is None for chain in stacked.chains for parameter in chain.parameters())
    for session in (stacked, loop):
        session.step(*batches("mlp", 3, 2))
    assert_close(stacked, loop)


# ---- measured --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp-bn", "gpt"])
@pytest.mark.parametrize("faster", [True, False])
def test_measured_changes_nothing(name: str, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is chosen; and nobody measures twice."""
    given = itertools.cycle([1.0, 2.0] if faster else [2.0, 1.0])
    measured_ways: list[None] = []
    monkeypatch.setattr(
        "unlocked.credit.stacking._seconds", lambda way, _: (measured_ways.append(way()), next(given))[1]
    )
    like = batches(name, 1, 0)[0][0]
    measured = trainer(ul.credit.Backprop(stacked="measured"), NETS[name][0](), like)
    loop = trainer(LOOP, NETS[name][0](), like)
    assert measured.stack is not None and measured.stack.stacked is None
    for session in (measured, loop):
        for step in range(3):
            session.step(*batches(name, 3, step))
    assert measured.stack.stacked is faster
    assert measured.stack.seconds == ((1.0, 2.0) if faster else (2.0, 1.0))
    assert_close(measured, loop)
    assert len(measured_ways) == 2 * 6


def test_measured_where_it_is_impossible() -> None:
    """Then it is the loop, bit for bit."""
    like = batches("mlp", 1, 0)[0][0]
    both = [trainer(credit, mlp(dropout=0.5), like) for credit in (ul.credit.Backprop(stacked="measured"), LOOP)]
    for session in both:
        session.step(*batches("mlp", 3, 0))
    assert both[0].stack is None
    assert_same(state(both[0]), state(both[1]))


# ---- refusals --------------------------------------------------------------------------------------------------------


class Asks(nn.Linear):
    """Control flow that depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if x.sum() > 0 else 1.0)


class Replaces(nn.Linear):
    """A buffer that is replaced, not changed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("seen", torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        self.seen = 0.9 * self.seen + h.detach().mean(0)
        return h


class Own(torch.autograd.Function):
    """A function of the user's own, of the old style."""

    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return 2 * gradient


class UsesOwn(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Own.apply(super().forward(x))


CANNOT: list[tuple[type[nn.Module] | nn.Module, str]] = [
    (nn.Dropout(0.5), "random numbers.*its Dropout"),
    (Asks(7, 7), "data-dependent control flow.*its Asks"),
    (Replaces(7, 7), "buffer '1_1.seen' is replaced"),
    (UsesOwn(7, 7), "its UsesOwn"),
]


@pytest.mark.parametrize(("part", "sentence"), CANNOT, ids=lambda one: type(one).__name__)
def test_networks_that_cannot_be_stacked(part: nn.Module, sentence: str) -> None:
    net = nn.Sequential(nn.Linear(5, 7), part, nn.Linear(7, 3)).double()
    x, y = batches("mlp", 3, 0)
    kept = torch.random.get_rng_state()
    with pytest.raises(InvalidChoice, match=sentence) as refused:
        trainer(STACKED, net, x[0])
    assert str(refused.value).endswith("train them one after the other: stacked=False.")
    assert torch.equal(torch.random.get_rng_state(), kept)
    trainer(LOOP, net, x[0]).step(x, y)


def test_refused_in_training_without_an_example() -> None:
    chain = Chain([Stage(nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).double())])
    session = ul.Trainer(chain, credit=STACKED, replicas=2, optimizer=momentum)
    with pytest.raises(InvalidChoice, match="random numbers"):
        session.step(*batches("mlp", 2, 0))


def test_batches_of_unequal_shape() -> None:
    stacked, loop = pair("mlp")
    x, y = batches("mlp", 3, 0)
    x[1], y[1] = x[1][:5], y[1][:5]
    with pytest.raises(InvalidChoice, match=r"one shape, got \[\(5, 5\), \(8, 5\)\]"):
        stacked.step(x, y)
    for session in (stacked, loop):
        session.step(*batches("mlp", 3, 1))
    assert_close(stacked, loop)


def test_a_users_own_mistake_is_not_blamed_on_stacking() -> None:
    stacked, _ = pair("mlp")
    with pytest.raises(RuntimeError, match="Expected size"):
        stacked.step([torch.randn(4, 6).double()] * 3, [torch.zeros(4, dtype=torch.int64)] * 3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"consensus": ul.consensus.CDP()}, "compute at different times"),
        ({"consensus": ul.consensus.ACCO(), "accumulate": 2}, "compute at different times"),
        ({"world": ul.worlds.Simulated()}, "a clock"),
        ({"world": ul.worlds.InProcess(streams=True)}, "a stream"),
    ],
    ids=["cdp", "acco", "simulated", "streams"],
)
def test_settings_that_do_not_go_together(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidChoice, match=sentence):
        trainer(STACKED, mlp(), batches("mlp", 1, 0)[0][0], **options)
    assert trainer(ul.credit.Backprop(stacked="measured"), mlp(), batches("mlp", 1, 0)[0][0], **options).stack is None


@dataclass(frozen=True)
class Looking(ul.consensus.Independent):
    """A rule that puts something around every computation."""

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        worker.lens = contextlib.nullcontext
        return super().weights(worker, chain, store, seed)


def test_a_rule_around_computations_is_refused() -> None:
    like = batches("mlp", 1, 0)[0][0]
    with pytest.raises(InvalidChoice, match="around every replica's computations"):
        trainer(STACKED, mlp(), like, consensus=Looking())
    both = [
        trainer(credit, mlp(), like, consensus=Looking()) for credit in (ul.credit.Backprop(stacked="measured"), LOOP)
    ]
    for session in both:
        session.step(*batches("mlp", 3, 0))
    assert_same(state(both[0]), state(both[1]))


def test_several_stages_are_refused() -> None:
    chain = ul.cut(mlp(), 2, like=batches("mlp", 1, 0)[0][0])
    with pytest.raises(InvalidChoice, match="cut into 2 stages"):
        ul.Trainer(chain, credit=STACKED, replicas=2, optimizer=momentum)


def test_several_processes_are_refused() -> None:
    two = types.SimpleNamespace(crew=types.SimpleNamespace(size=2))
    with pytest.raises(InvalidChoice, match="live in one process, got 2"):
        refuse([Chain([Stage(mlp())])] * 2, ul.consensus.Independent(), two)


def test_the_option() -> None:
    """On the command line, in checkpoints, and only these values."""
    with pytest.raises(InvalidChoice, match="'maybe'"):
        ul.credit.Backprop(stacked="maybe")
    assert make_credit(parse_call("backprop(stacked=True)"), 1) == STACKED
    method = parse_method("backprop(stacked=measured)/wash(p=0.01)@3")
    assert make_credit(method.credit, 1) == ul.credit.Backprop(stacked="measured")
    for credit in (STACKED, LOOP, ul.credit.Backprop(stacked="measured")):
        assert restore_method(describe_method(credit), ul.credit.ALL, "credit") == credit
