"""What is done about delayed gradients is its formula, under every delayed rule and every consensus rule."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unlocked as ul
from unlocked.credit.keeping import KeepGraph
from unlocked.delays import check_delays
from unlocked.errors import InvalidChoice
from unlocked.mitigation import Mitigation

from delayed_cases import (
    BY_NAME,
    CASES,
    OPTIMIZERS,
    Case,
    chain_of,
    expected,
    flat,
    name_of,
    pair_of,
    step_batch,
    weights_of,
)
from delayed_reference import SGD
from methods import assert_same, batch, mlp, momentum, state

C, M = ul.credit, ul.mitigation
ALL: dict[str, Mitigation] = {
    "staleness": M.StalenessAware(),
    "gap": M.GapAware(decay=0.9),
    "compensation": M.DelayCompensation(lam=0.5),
    "adaptive": M.DelayCompensation(lam=0.5, adaptive=True, decay=0.8, epsilon=1e-5),
    "prediction": M.WeightPrediction(),
    "linear": M.WeightPrediction(form="linear"),
}
every_mitigation = pytest.mark.parametrize("name", ALL)


class Formula:
    """A mitigation as hooks of the reference, from its formula. They count forwards and backwards of every stage."""

    def __init__(self, name: str, optimizer: Any, k: int) -> None:
        self.name, self.optimizer, self.k = name, optimizer, k
        self.forwards: dict[int, int] = defaultdict(int)
        self.backwards: dict[int, int] = defaultdict(int)
        self.squares: dict[int, list[Any]] = {}
        self.updates: dict[int, int] = defaultdict(int)

    def predict(self, j: int, weights: list[Tensor], states: list[dict[str, Tensor]], updates: int) -> list[Tensor]:
        if self.name == "gap" and updates > self.updates[j]:
            assert updates == self.updates[j] + 1  # one forward, at least, between two updates
            self.updates[j] = updates
            steps = [self.unit_step(entry, updates) for entry in states]
            before = self.squares.get(j, [0.0] * len(steps))
            self.squares[j] = [0.9 * old + 0.1 * u * u for old, u in zip(before, steps)]
        in_front = self.forwards[j] - self.backwards[j]
        ahead = (self.backwards[j] % self.k + in_front) // self.k
        self.forwards[j] += 1
        if self.name not in ("prediction", "linear") or not any(states):
            return weights
        return [self.ahead(x, entry, updates, ahead) for x, entry in zip(weights, states)]

    def unit_step(self, entry: dict[str, Tensor], count: int) -> Tensor:
        """What an update subtracts, per unit of learning rate."""
        if isinstance(self.optimizer, SGD):
            return entry["v"]
        first, second = self.optimizer.betas
        return (entry["m"] / (1 - first**count)) / ((entry["u"] / (1 - second**count)).sqrt() + self.optimizer.epsilon)

    def ahead(self, x: Tensor, entry: dict[str, Tensor], count: int, tau: int) -> Tensor:
        opt, v = self.optimizer, entry.get("v")
        for s in range(1, tau + 1):
            if isinstance(opt, SGD) and self.name == "linear":
                x = x - opt.rate * v
            elif isinstance(opt, SGD):
                v = opt.momentum * v + opt.weight_decay * x  # torch's step with gradient 0
                x = x - opt.rate * v
            else:
                later = {"m": entry["m"] * opt.betas[0] ** s, "u": entry["u"] * opt.betas[1] ** s}
                x = x - opt.rate * self.unit_step(later, count + s)
        return x

    def transform(self, j: int, gradients: list[Tensor], tau: int, drift: list[Tensor]) -> list[Tensor]:
        self.backwards[j] += 1
        if self.name == "staleness":
            return [g / max(1, tau) for g in gradients]
        if self.name == "gap" and tau and self.updates[j]:
            correction = 1 - 0.9 ** self.updates[j]
            scales = [self.optimizer.rate * (square / correction).sqrt() for square in self.squares[j]]
            return [g / (1 + torch.where(d == 0, 0.0, d.abs() / s)) for g, d, s in zip(gradients, drift, scales)]
        if self.name == "compensation":
            return [g + 0.5 * g * g * d for g, d in zip(gradients, drift)]
        if self.name == "adaptive":
            before = self.squares.get(j, [0.0] * len(gradients))
            self.squares[j] = [0.8 * old + 0.2 * g * g for old, g in zip(before, gradients)]
            rows = zip(gradients, drift, self.squares[j])
            return [g + 0.5 / (square + 1e-5).sqrt() * g * g * d for g, d, square in rows]
        return gradients


def fits(name: str, case: Case, optimizer: str = "momentum") -> bool:
    if name == "linear" and optimizer == "adam":
        return False
    return not (case.run is None and name in ("prediction", "linear"))


FORMULAS = [
    pytest.param(case, name, optimizer, k, id=f"{case.name}-{name}-{optimizer}-{k}")
    for case in CASES
    for name in ALL
    for optimizer, k in (("momentum", 1), ("adam", 2))
    if case.run is not None and fits(name, case, optimizer)
]


@pytest.mark.covering("case", ("name", "optimizer"))
@pytest.mark.parametrize(("case", "name", "optimizer", "k"), FORMULAS)
def test_a_mitigation_is_its_formula(case: Case, name: str, optimizer: str, k: int) -> None:
    """While the pipeline fills, and once it is full."""
    mine, torchs = OPTIMIZERS[optimizer]
    chain, network = pair_of(4, "coupled" if "petra" in case.name else "plain")
    session = ul.Trainer(chain, credit=case.make(), optimizer=torchs, accumulate=k, mitigation=ALL[name])
    for step in range(9):
        session.step(*step_batch(step, k))
    hooks = Formula(name, mine, k)
    options = {"drain": False, "transform": hooks.transform, "predict": hooks.predict}
    wanted = expected(case, network, 9, k, mine, **options)
    torch.testing.assert_close(weights_of(session), flat(wanted.weights), rtol=1e-9, atol=1e-9)
    plain = expected(case, network, 9, k, mine, drain=False)
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(flat(plain.weights), flat(wanted.weights)))


@pytest.mark.parametrize("name", ["staleness", "gap", "compensation", "adaptive"])
def test_two_versions_with_a_mitigation_is_gradient_descent_with_one(name: str) -> None:
    """The whole network at once, every gradient at the weights of the step before."""
    k, (mine, torchs) = 3, OPTIMIZERS["momentum"]
    chain, _ = pair_of(4, "plain")
    session = ul.Trainer(chain, credit=C.PipeDream2BW(), optimizer=torchs, accumulate=k, mitigation=ALL[name])
    twin, _ = pair_of(4, "plain")
    parameters = list(twin.parameters())
    optimizer, hooks = torchs(parameters), Formula(name, mine, 10**9)
    old = [x.detach().clone() for x in parameters]
    for step in range(7):
        session.step(*step_batch(step, k))
        states = [{"v": entry["momentum_buffer"]} for entry in optimizer.state.values()]
        hooks.predict(0, parameters, states, step)  # type: ignore[arg-type]
        now = [x.detach().clone() for x in parameters]
        total = [torch.zeros_like(x) for x in parameters]
        for x, y in zip(*(part.chunk(k) for part in step_batch(step, k))):
            _put(parameters, old)
            found = torch.autograd.grad(F.cross_entropy(twin(x), y), parameters)
            drift = [a - b for a, b in zip(now, old)]
            changed = hooks.transform(0, list(found), min(step, 1), drift)
            total = [a + b / k for a, b in zip(total, changed)]
        _put(parameters, now)
        for parameter, g in zip(parameters, total):
            parameter.grad = g
        optimizer.step()
        old = now
    session.drain()
    torch.testing.assert_close(weights_of(session), [x.detach() for x in parameters], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def _put(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for x, value in zip(parameters, values):
        x.copy_(value)


# ---- limits ------------------------------------------------------------------------------------------------------------


def ended(credit: Any, mitigation: Mitigation | None, stages: int = 4, **options: Any) -> dict[str, Tensor]:
    """After six steps and a drain, in float32, with BatchNorm and dropout."""
    model = mlp(5, norm=True, dropout=0.2, dtype=torch.float32)
    options.setdefault("optimizer", momentum)
    chain = ul.cut(model, stages, like=batch()[0].float())
    session = ul.Trainer(chain, credit=credit, mitigation=mitigation, **options)
    for step in range(6):
        session.step(*batch(12, seed=step, dtype=torch.float32))
    session.drain()
    return state(session)


@pytest.mark.parametrize(
    "case", [BY_NAME[name] for name in ("pipedream", "delayed", "fdg", "petra", "2bw")], ids=name_of
)
@pytest.mark.parametrize("k", [2])
def test_without_delay_nothing_is_mitigated(case: Case, k: int) -> None:
    """One stage, or a warm-up to the end: the same bits as without."""
    k = max(k, case.fewest(4))
    for stages, warm_up in ((1, 0), (4, 6)):
        if case.run is None and stages == 1:
            continue  # two versions are a delay even then
        wanted = ended(case.make(warm_up=warm_up), None, stages, accumulate=k)
        for name, mitigation in ALL.items():
            if fits(name, case):
                assert_same(ended(case.make(warm_up=warm_up), mitigation, stages, accumulate=k), wanted)


@every_mitigation
def test_rules_without_delay_are_not_mitigated(name: str) -> None:
    assert_same(ended(C.Backprop(), ALL[name]), ended(C.Backprop(), None))


def test_numbers_that_do_nothing() -> None:
    """λ = 0; momentum 0; a delay of 1 for staleness-aware."""
    wanted = ended(C.PipeDream(), None)
    assert_same(ended(C.PipeDream(), M.DelayCompensation(lam=0.0)), wanted)
    plain = partial(torch.optim.SGD, lr=0.1)
    assert_same(*(ended(C.PipeDream(), m, optimizer=plain) for m in (None, M.WeightPrediction())))
    assert_same(*(ended(C.PipeDream(), m, stages=2) for m in (None, M.StalenessAware())))
    assert_same(*(ended(C.PipeDream2BW(), m, accumulate=3) for m in (None, M.StalenessAware())))
    with pytest.raises(AssertionError):
        assert_same(ended(C.PipeDream(), M.StalenessAware()), wanted)


def test_weights_are_predicted_exactly_when_no_gradient_comes() -> None:
    """Momentum goes on alone: every forward is computed at the weights its backward finds."""
    torch.manual_seed(0)
    rows = [nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)]
    stages = [
        ul.Stage(row.double(), loss=(lambda h, y: (h * y[:, None]).sum()) if row is rows[-1] else None) for row in rows
    ]
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    session = ul.Trainer(ul.Chain(stages), credit=C.PETRA(), optimizer=optimizer, mitigation=M.WeightPrediction())
    for step in range(30):
        x, _ = batch(6, seed=step)
        session.step(x, torch.full((6,), 1e-2 if step < 8 else 0.0, dtype=torch.float64))
        for weights in session.weights[:-1]:
            if step >= 22:  # the forward in front, six turns ago, came after the last gradient
                seen = weights.flight.queue[0].reading.weights
                now = [x.detach() for x in weights.parameters]
                torch.testing.assert_close(seen, now, rtol=1e-12, atol=1e-14)
                moved = weights.flight.queue[1].reading.weights
                assert not torch.allclose(moved[0], seen[0], rtol=1e-9, atol=0.0)


# ---- replicas ----------------------------------------------------------------------------------------------------------


def replicated(name: str, consensus: Any, replicas: int, alike: bool, credit: Any = None) -> ul.Trainer:
    chain = ul.cut(mlp(4), 4, like=batch()[0])
    session = ul.Trainer(
        chain,
        credit=credit or C.PipeDream(),
        consensus=consensus,
        replicas=replicas,
        optimizer=momentum,
        mitigation=ALL[name],
    )
    for step in range(7):
        shares = [batch(6, seed=step if alike else 10 * step + n) for n in range(replicas)]
        session.step([x for x, _ in shares], [y for _, y in shares])
    session.drain()
    return session


@pytest.mark.covering
@every_mitigation
@pytest.mark.parametrize("consensus", [ul.consensus.AllReduce(), ul.consensus.Independent(), ul.consensus.WASH(p=0.3)])
def test_replicas_with_the_same_data_are_one(name: str, consensus: Any) -> None:
    alone = replicated(name, None, 1, True)
    session = replicated(name, consensus, 2, True)
    for chain in session.chains:
        assert_same(dict(chain.state_dict()), dict(alone.chains[0].state_dict()))


@pytest.mark.covering
@every_mitigation
@pytest.mark.parametrize("rule", ["pipedream", "petra", "fdg", "delayed"])
def test_replicas_that_reduce_stay_equal_however_gradients_travel(name: str, rule: str) -> None:
    """A mitigated gradient is complete only after its backward, so buckets must not leave during it."""
    whole, buckets = (
        replicated(name, ul.consensus.AllReduce(bucket_mb=size), 2, False, BY_NAME[rule].make()) for size in (0.0, 1.0)
    )
    assert_same(state(whole), state(buckets))
    first, second = (dict(chain.state_dict()) for chain in buckets.chains)
    assert_same(first, second)


# ---- refusals ----------------------------------------------------------------------------------------------------------


class Mixed(C.PipeDream):
    """A rule from outside the library whose graphs look at today's weights."""

    name = "mixed"
    keeping = KeepGraph("current")


class Older(C.PipeDream):
    """A rule from outside the library that sees older weights than the newest."""

    name = "older"
    sees_newest = False


def make(credit: Any, mitigation: Any, optimizer: Any = momentum, **options: Any) -> ul.Trainer:
    return ul.Trainer(
        chain_of([nn.Linear(5, 4), nn.Linear(4, 3)]),
        credit=credit,
        optimizer=optimizer,
        mitigation=mitigation,
        **options,
    )


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (
            lambda: make(C.PipeDream(), M.WeightPrediction(), torch.optim.RMSprop),
            "the steps of SGD, Adam, AdamW, not of RMS",
        ),
        (
            lambda: make(C.PipeDream(), M.WeightPrediction("linear"), torch.optim.Adam),
            "knows the steps of SGD, not of Adam",
        ),
        (
            lambda: make(C.PipeDream2BW(), M.WeightPrediction()),
            "pipedream-2bw computes with the weights of the step before",
        ),
        (
            lambda: make(C.PipeDream(), "gap-aware"),
            "mitigation must be one of ul.mitigation .*StalenessAware.* got str",
        ),
        (lambda: make(Older(), M.WeightPrediction()), "older computes with .*; weight-prediction would replace them"),
        (lambda: make(C.DelayedGradients(), None, precision="bf16"), "In bf16 a graph keeps casts .* use keep='input'"),
        (lambda: make(Mixed(), None, precision="bf16"), "so mixed would not see today's weights"),
        (
            lambda: check_delays(C.PETRA(), ul.consensus.TorchDDP(), "float32", None),
            "torch-ddp.* use all-reduce",
        ),
        (
            lambda: check_delays(C.FDG(), ul.consensus.TorchFullyShard(), "float32", None),
            "torch-fully-shard.*; use all-reduce",
        ),
        (lambda: M.GapAware(decay=1.0), "decay=1.0 is not possible; give a number of at least 0 and below 1"),
        (lambda: M.GapAware(decay=-0.1), "decay=-0.1 is not possible"),
        (lambda: M.DelayCompensation(lam=-1.0), "lam=-1.0 is not possible; give a number of at least 0"),
        (lambda: M.DelayCompensation(lam=float("nan")), "lam=nan is not possible"),
        (lambda: M.DelayCompensation(decay=1.0), "decay=1.0 is not possible"),
        (lambda: M.DelayCompensation(epsilon=0.0), "epsilon=0.0 is not possible; give a number above 0"),
        (lambda: M.WeightPrediction("cubic"), "form.*cubic"),
        (lambda: C.FDG(shrink=0.0), "shrink=0.0 is not possible; give a number above 0"),
        (lambda: C.DDG(shrink=float("inf")), "shrink=inf is not possible"),
        (lambda: C.FeaturesReplay(shrink=-1.0), "shrink=-1.0 is not possible"),
        (lambda: C.PipeDream(warm_up=-1), "warm_up=-1 is not possible; give a whole number of updates"),
        (lambda: C.PipeDream(warm_up=1.5), "warm_up=1.5 is not possible"),
        (lambda: C.PipeDream(warm_up=True), "warm_up=True is not possible"),
        (lambda: C.PipeDream(drain="never"), "drain.*never"),
        (lambda: C.PipeDream(keep="input", weights="snapshot"), "Only a graph can keep a snapshot of the weights"),
        (lambda: C.PipeDream(keep="nothing"), "keep.*nothing"),
        (lambda: C.DelayedGradients(keep="weights"), "keep.*weights"),
        (lambda: C.PETRA(keep="all"), "keep.*all"),
        (lambda: C.PipeDream2BW(keep="all"), "keep.*all"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(act: Any, sentence: str) -> None:
    with pytest.raises(InvalidChoice, match=sentence):
        act()


@pytest.mark.parametrize("credit", [C.PipeDream(), C.DelayedGradients(keep="input"), C.PETRA()], ids=repr)
def test_in_bf16_what_does_not_mix_weights_is_allowed(credit: Any) -> None:
    check_delays(credit, ul.consensus.AllReduce(), "bf16", M.WeightPrediction())


def test_two_versions_need_as_many_micro_batches_as_links() -> None:
    session = ul.Trainer(ul.cut(mlp(), 4, like=batch()[0]), credit=C.PipeDream2BW(), optimizer=momentum, accumulate=2)
    with pytest.raises(
        InvalidChoice, match=r"over 4 stages needs at least 3 micro-batches per step, got 2; give accumulate=3"
    ):
        session.step(*batch(12))
