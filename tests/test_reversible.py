"""Reversible layers and networks: exact inverses, the fused backward against autograd, the formulas, pieces and cuts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import unlocked as ul
from unlocked import costs, models
from unlocked.errors import InvalidChoice, UnlockedError
from unlocked.models.blocks import ConvBlock
from unlocked.models.revresnet import DownSampling
from unlocked.models.revtransformer import attention_branch, mlp_branch
from unlocked.models.transformer import Block, Embedding, Output
from unlocked.reversible import Coupling, Reversible, Split, check, is_reversible, pair, units
from unlocked.simulation import profile

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}

NETWORKS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "revresnet18": ((3, 16, 16), {"width": 1 / 8}),
    "revresnet34": ((3, 16, 16), {"width": 1 / 8}),
    "revresnet50": ((3, 16, 16), {"width": 1 / 16}),
    "revgpt": ((9,), {"width": 16, "heads": 2, "layers": 5}),
    "revvit": ((3, 16, 16), {"width": 16, "heads": 2, "layers": 5}),
}
PLAIN = {"vit": NETWORKS["revvit"], "resnet34": ((3, 16, 16), {"width": 1 / 8})}
EVERY = pytest.mark.parametrize("name", sorted(NETWORKS))


def network(name: str, dtype: torch.dtype = torch.float32) -> models.Layered:
    """With weights larger than at the start, so that the branches matter beside the streams, and BatchNorm's statistics
    those of one batch, so that evaluation mode is a network as it is after training."""
    torch.manual_seed(0)
    shape, options = (NETWORKS | PLAIN)[name]
    model = models.build(name, input_shape=shape, classes=7, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        model(batch(name))
        for norm in norms:
            norm.momentum = 0.1
    return model.to(dtype)


def batch(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    shape, _ = (NETWORKS | PLAIN)[name]
    return torch.randint(0, 7, (4, *shape)) if name == "revgpt" else torch.randn(4, *shape, dtype=dtype)


class Affine(nn.Module):
    """tanh(weight · x + bias), element by element: for tensors of any shape; counts its calls."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale * torch.randn(()))
        self.bias = nn.Parameter(torch.randn(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.weight * x + self.bias)


def convolutions(channels: int = 3) -> nn.Module:
    return nn.Sequential(ConvBlock(channels, channels), ConvBlock(channels, channels))


FUNCTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "convolutions with BatchNorm": (convolutions, (4, 6, 5, 5), 1),
    "attention": (lambda: attention_branch(8, 2, 0.0, causal=True), (3, 5, 16), -1),
    "mlp": (lambda: mlp_branch(8, 0.0), (3, 5, 16), 2),
    "rows": (Affine, (6, 3), 0),
}
ANY_FUNCTION = pytest.mark.parametrize(("make", "shape", "dim"), FUNCTIONS.values(), ids=FUNCTIONS)


def gap(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


# ---- the formulas

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(shapes, st.integers(-4, 3), st.integers(0, 99))
def test_a_pair_is_the_textbook_block_in_any_shape_and_dimension(sizes: list[int], place: int, seed: int) -> None:
    torch.manual_seed(seed)
    dim = place % len(sizes) - (len(sizes) if place < 0 else 0)
    f, g = Affine().double(), Affine().double()
    x1, x2 = (torch.randn(sizes, dtype=torch.float64) for _ in range(2))
    y1 = x1 + f(x2)
    y2 = x2 + g(y1)
    both = pair(f, g, dim, like=torch.cat([x2, x1], dim))
    assert type(both) is nn.Sequential and units(both) == list(both)
    assert torch.equal(both(torch.cat([x2, x1], dim)), torch.cat([y2, y1], dim))
    assert torch.equal(both[0](torch.cat([x2, x1], dim)), torch.cat([y1, x2], dim))
    assert torch.equal(Split(dim)(x1), torch.cat([x1, x1], dim))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(shapes, st.integers(-4, 3), st.integers(0, 99))
def test_reverse_is_autograd_in_any_shape_and_dimension(sizes: list[int], place: int, seed: int) -> None:
    torch.manual_seed(seed)
    dim = place % len(sizes) - (len(sizes) if place < 0 else 0)
    sizes[dim] *= 2
    reverse_is_autograd(pair(Affine(), Affine(), dim).double(), torch.randn(sizes, dtype=torch.float64))


# ---- the fused backward


def backwards(body: nn.Sequential, z: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    for unit in reversed(units(body)):
        assert is_reversible(unit)
        z, gradient = unit.reverse(z, gradient)
    return z, gradient


def reverse_is_autograd(body: nn.Sequential, x: Tensor, tolerance: float = 1e-12) -> None:
    theirs = copy.deepcopy(body)
    x = x.detach().requires_grad_()
    y = theirs(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    with torch.no_grad():  # the caller may have switched gradients off
        found, through = backwards(body, body(x), gradient)
    assert x.grad is not None
    assert not found.requires_grad and not through.requires_grad
    assert gap(found, x.detach()) <= tolerance and gap(through, x.grad) <= tolerance
    for ours, reference in zip(body.parameters(), theirs.parameters(), strict=True):
        assert ours.grad is not None and reference.grad is not None
        nothing = max(ours.grad.abs().max(), reference.grad.abs().max()) <= tolerance  # biases before BatchNorm
        assert nothing or gap(ours.grad, reference.grad) <= tolerance


@ANY_FUNCTION
def test_reverse_is_autograd(make: Callable[[], nn.Module], shape: tuple[int, ...], dim: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    reverse_is_autograd(nn.Sequential(Coupling(make().double(), dim)), x)
    reverse_is_autograd(pair(make().double(), make().double(), dim), x)


@EVERY
def test_reverse_is_autograd_in_whole_stacks(name: str) -> None:
    for stack, x in stacks(network(name, torch.float64), batch(name, torch.float64)):
        reverse_is_autograd(stack, x, tolerance=1e-9)  # the errors of a whole stack


def test_reverse_adds_to_the_gradients_and_calls_the_function_once() -> None:
    unit = Coupling(Affine()).double()
    z, gradient = torch.randn(2, 3, 4, dtype=torch.float64)
    unit.reverse(z, gradient)
    once = [parameter.grad.clone() for parameter in unit.parameters()]
    unit.reverse(z, gradient)
    assert unit.function.calls == 2
    for parameter, first in zip(unit.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, 2 * first) and first != 0
    unit.inverse(z)
    assert unit.function.calls == 3 and not unit.inverse(z.requires_grad_()).requires_grad


def test_functions_without_weights_or_without_a_gradient() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones_like(x)

    z, gradient = torch.randn(2, 4), torch.randn(2, 4)
    for function, slope in [(Constant(), 0.0), (nn.Identity(), 1.0)]:
        found, through = Coupling(function).reverse(z, gradient)
        x, d1, d2 = z[:, 2:], gradient[:, :2], gradient[:, 2:]
        assert torch.equal(found, torch.cat([x, z[:, :2] - function(x)], 1))
        assert torch.equal(through, torch.cat([d2 + slope * d1, d1], 1))
    frozen = Coupling(Affine().requires_grad_(False))
    assert not torch.equal(frozen.reverse(z, gradient)[1][:, :2], gradient[:, 2:])
    assert all(parameter.grad is None for parameter in frozen.parameters())


def test_dropout_is_replayed_when_the_random_state_is_put_back() -> None:
    torch.manual_seed(0)
    unit = Coupling(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))).double()
    x, gradient = torch.randn(5, 16, dtype=torch.float64, requires_grad=True), torch.randn(5, 16, dtype=torch.float64)
    before = torch.get_rng_state()
    y = unit(x)
    wanted = torch.autograd.grad(y, [x, *unit.parameters()], gradient)
    assert gap(unit.inverse(y.detach()), x) > 0.1
    torch.set_rng_state(before)
    assert gap(unit.inverse(y.detach()), x) <= 1e-12
    torch.set_rng_state(before)
    found, through = unit.reverse(y.detach(), gradient)
    assert gap(found, x) <= 1e-12
    for ours, reference in zip([through, *(p.grad for p in unit.parameters())], wanted, strict=True):
        assert ours is not None and gap(ours, reference) <= 1e-12


def test_batch_norm_writes_its_statistics_once_per_evaluation_as_the_caller_is_told() -> None:
    unit = Coupling(convolutions()).train()
    z = torch.randn(4, 6, 5, 5)
    y = unit(z)
    assert [int(b) for b in unit.buffers() if b.dim() == 0] == [1, 1]
    unit.reverse(y, torch.randn_like(y))
    assert [int(b) for b in unit.buffers() if b.dim() == 0] == [2, 2]


def test_under_autocast_the_streams_stay_in_single_precision() -> None:
    torch.manual_seed(0)
    unit, x, gradient = Coupling(nn.Linear(8, 8)), torch.randn(5, 16), torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        leaf = x.clone().requires_grad_()
        assert unit.function(x[:, :8]).dtype == torch.bfloat16
        wanted = torch.autograd.grad(unit(leaf), [leaf, *unit.parameters()], gradient)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():  # its casts of the weights must not be found again by reverse: they have no graph
            y = unit(x)
        found, through = unit.reverse(y, gradient)
    assert y.dtype == found.dtype == through.dtype == torch.float32
    assert within_bound(found, x, y, torch.float32)
    assert gap(found, x) < 1e-6
    for ours, reference in zip([through, *(p.grad for p in unit.parameters())], wanted, strict=True):
        assert ours is not None and torch.equal(ours, reference)


# ---- inverses


def within_bound(found: Tensor, x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    """|x̃' − x̃| ≤ u (|y| + |x̃'|) for every element, and x itself bit for bit; streams along the last dimension or 1."""
    dim = 1 if x.dim() == 4 else -1
    (same, found2), (first, x2), (y1, _) = (part.double().chunk(2, dim) for part in (found, x, y))
    bound = UNIT_ROUNDOFF[dtype] * (y1.abs() + found2.abs())
    return torch.equal(same, first) and bool(((found2 - x2).abs() <= bound).all())


@torch.no_grad()
def reversible_units(model: models.Layered, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    found = []
    for unit in units(model):
        if is_reversible(unit):
            found.append((unit, x))
        x = unit(x)
    return found


def stacks(model: models.Layered, x: Tensor) -> list[tuple[nn.Sequential, Tensor]]:
    """The longest rows of reversible units, each with its input."""
    found: list[tuple[list[nn.Module], Tensor]] = []
    before = False
    for unit in units(model):
        now = is_reversible(unit)
        if now and not before:
            found.append(([], x))
        if now:
            found[-1][0].append(unit)
        with torch.no_grad():
            x = unit(x)
        before = now
    return [(nn.Sequential(*row), start) for row, start in found]


@pytest.mark.covering
@EVERY
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_every_shipped_block_is_inverted(name: str, training: bool, dtype: torch.dtype, limit: float) -> None:
    blocks = reversible_units(network(name, dtype).train(training), batch(name, dtype))
    assert blocks
    for unit, x in blocks:
        buffers = copy.deepcopy(list(unit.buffers()))
        error = check(unit, x, limit)
        assert error <= 2 * UNIT_ROUNDOFF[dtype]  # what the bound says, far below the limit
        assert all(torch.equal(a, b) for a, b in zip(buffers, unit.buffers(), strict=True))
        y = unit(x)
        assert gap(unit.inverse(y), x) <= limit and within_bound(unit.inverse(y), x, y, dtype)
        assert gap(y, x) > 0.01  # it does something


@pytest.mark.covering
@EVERY
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_whole_stacks_are_inverted(name: str, training: bool, dtype: torch.dtype, limit: float) -> None:
    rows = stacks(network(name, dtype).train(training), batch(name, dtype))
    lengths = {
        "revresnet18": [2, 1, 1, 1],
        "revresnet34": [3, 3, 5, 2],
        "revresnet50": [2, 3, 5, 2],
        "revgpt": [10],
        "revvit": [10],
    }
    assert [len(row) for row, _ in rows] == lengths[name]
    for row, x in rows:
        z = row(x)
        for unit in reversed(row):
            z = unit.inverse(z)
        assert gap(z, x) <= limit


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY
def test_half_precision_keeps_its_stated_bound_for_every_element(name: str, dtype: torch.dtype) -> None:
    errors = []
    for unit, x in reversible_units(network(name), batch(name)):
        unit, x = unit.to(dtype), x.to(dtype)
        with torch.no_grad():
            y = unit(x)
        found = unit.inverse(y)
        assert within_bound(found, x, y, dtype)
        errors.append(check(unit, x))
    assert 0 < max(errors) <= 2 * UNIT_ROUNDOFF[dtype]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(0, 10**6), st.floats(-3, 3), st.sampled_from(sorted(UNIT_ROUNDOFF, key=str)))
def test_the_bound_holds_for_streams_and_functions_of_any_scale(seed: int, power: float, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    unit = Coupling(Affine(), dim=-1).to(dtype)
    x = (10**power * torch.randn(7, 16)).to(dtype)
    y = unit(x)
    assert within_bound(unit.inverse(y), x, y, dtype)


# ---- refusals


class Stateful(nn.Module):
    """Another value at each call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_what_cannot_be_coupled_is_refused() -> None:
    x = torch.randn(2, 6, 4, 4)
    sizes = r"has the shape|must have the shape of the input; Conv2d made \(2, 5, 4, 4\) of \(2, 3, 4, 4\)"
    with pytest.raises(InvalidChoice, match=sizes):
        Coupling(nn.Conv2d(3, 5, 1))(x)
    with pytest.raises(InvalidChoice, match=r"made \(2, 1, 4, 4\)"):  # it would be broadcast in silence
        Coupling(nn.Conv2d(3, 1, 1), like=x)
    with pytest.raises(InvalidChoice, match="GRU made a tuple"):
        Coupling(nn.GRU(3, 3, batch_first=True), dim=-1)(torch.randn(2, 5, 6))
    for wrong, dim in [(torch.randn(2, 5), 1), (torch.randn(2, 5), -1), (torch.randn(2), 1), (torch.randn(3, 2), 0)]:
        unit = Coupling(nn.Identity(), dim)
        for call in (unit, unit.inverse, lambda z, unit=unit: unit.reverse(z, z)):
            with pytest.raises(InvalidChoice, match=rf"along dimension {dim}, .* given the shape \({wrong.shape[0]},"):
                call(wrong)


def test_an_inverse_that_fails_is_refused_at_construction() -> None:
    x = torch.randn(2, 6)
    for function in (Stateful(), nn.ReLU(inplace=True)):
        with pytest.raises(
            UnlockedError, match=f"inverse of Coupling of {type(function).__name__} misses its input by"
        ):
            Coupling(function, like=x)
        Coupling(function)
    with pytest.raises(UnlockedError, match="Coupling of Stateful"):
        pair(nn.Linear(3, 3), Stateful(), like=x)
    with pytest.raises(UnlockedError, match="misses its input by nan"):
        Coupling(nn.Identity(), like=torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(UnlockedError, match=r"allowed is 1\.0e-20"):
        check(Coupling(Affine()), torch.randn(40, 6), 1e-20)
    with pytest.raises(TypeError, match=r"abstract.*inverse.*reverse"):
        type("Half", (Reversible,), {"forward": lambda self, z: z})()
    with pytest.raises(InvalidChoice, match="Linear has no methods inverse and reverse"):
        check(nn.Linear(2, 2), x)


def test_the_second_function_of_a_pair_is_checked_on_what_it_will_see() -> None:
    class Until(nn.Module):
        """Finite for numbers below 5 only."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x < 5, x, torch.inf)

    plus = nn.Linear(3, 3)
    with torch.no_grad():
        plus.bias.fill_(10.0)
    pair(Until(), plus, like=torch.zeros(2, 6))
    with pytest.raises(UnlockedError, match="Coupling of Until"):
        pair(plus, Until(), like=torch.zeros(2, 6))


@pytest.mark.parametrize("training", [True, False])
def test_the_check_at_construction_leaves_no_trace(training: bool) -> None:
    function = nn.Sequential(convolutions(), nn.Dropout(0.5)).train(training)
    function[0][0].train(not training)
    before, modes = copy.deepcopy(function.state_dict()), [part.training for part in function.modules()]
    state = torch.get_rng_state()
    like = torch.randn(4, 6, 5, 5)
    torch.set_rng_state(state)
    pair(function, convolutions(), like=like)
    Coupling(function, like=like)
    fresh = torch.get_rng_state()
    torch.set_rng_state(state)
    convolutions()  # the second function's weights are the only random numbers
    assert torch.equal(fresh, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), function.state_dict().values(), strict=True))
    assert modes == [part.training for part in function.modules()]
    assert all(parameter.grad is None for parameter in function.parameters())


# ---- networks


@EVERY
def test_only_couplings_are_reversible(name: str) -> None:
    kinds = {type(unit): is_reversible(unit) for unit in units(network(name))}
    assert [kind for kind, yes in kinds.items() if yes] == [Coupling]
    assert ("resnet" not in name) or kinds[DownSampling] is False
    assert kinds[Split] is False


@pytest.mark.parametrize(
    ("name", "pieces", "reversible"),
    [("revresnet18", 10, 5), ("revresnet34", 18, 13), ("revresnet50", 18, 12), ("revgpt", 12, 10), ("revvit", 12, 10)],
)
def test_number_of_pieces(name: str, pieces: int, reversible: int) -> None:
    model = network(name)
    assert len(model.pieces()) == pieces
    assert sum(is_reversible(piece.module) for piece in model.pieces()) == reversible


@pytest.mark.parametrize("name", sorted(NETWORKS | PLAIN))
def test_cut_into_any_number_of_stages_is_the_network_bit_for_bit(name: str) -> None:
    model, x = network(name), batch(name)
    total = len(model.pieces())
    whole = copy.deepcopy(model)
    for stages in sorted({2, total // 2, total}):
        chain = ul.cut(model, stages, like=x, balance="parameters")
        assert len(chain) == stages
        for training in (True, False):
            whole.train(training), chain.train(training)
            assert torch.equal(chain(x), whole(x))
        assert list(chain.state_dict()) == list(whole.state_dict())
    costs_of = profile(chain)
    assert len(costs_of) == total
    for (_, before), (stage, after) in pairwise(zip(chain, costs_of.stages)):
        assert before.output == after.input and all(line.each >= 0 for line in after.flops.values())
        if any(map(is_reversible, units(stage.body))):
            assert after.input == after.output


def test_parameter_counts_are_the_papers() -> None:
    published = {"revresnet18": 12.2, "revresnet34": 22.3, "revresnet50": 30.4}
    with torch.device("meta"):
        for name, millions in published.items():
            model = models.build(name, input_shape=(3, 224, 224), classes=1000, stem="large")
            assert round(costs.parameters(model) / 1e6, 1) == millions
        small = {name: models.build(name, input_shape=(3, 32, 32), classes=10) for name in published}
    assert [costs.parameters(model) for model in small.values()] == [11_183_818, 21_295_690, 26_348_234]
    plain, ours = (models.build(name, input_shape=(8,), classes=9, layers=3) for name in ("gpt", "revgpt"))
    assert costs.parameters(ours) - costs.parameters(plain) == (9 + 2) * 128  # the output sees two streams


def test_down_sampling_and_coupling_of_basic_blocks_by_the_formula() -> None:
    model = network("revresnet18", torch.float64).train()
    layers = model.state_dict()
    x, other = (torch.randn(4, 8, 6, 6, dtype=torch.float64) for _ in range(2))

    def conv_norm(z: Tensor, name: str, stride: int = 1, conv: str = "conv", norm: str = "norm") -> Tensor:
        weight, bias = layers[f"blocks.{name}.{conv}.weight"], layers[f"blocks.{name}.{conv}.bias"]
        z = F.conv2d(z, weight, bias, stride, padding=weight.shape[-1] // 2)
        scale, shift = layers[f"blocks.{name}.{norm}.weight"], layers[f"blocks.{name}.{norm}.bias"]
        return F.batch_norm(z, None, None, scale, shift, training=True)

    value = conv_norm(conv_norm(x, "0.function.0").relu(), "0.function.1").relu()
    torch.testing.assert_close(model.blocks[0](torch.cat([x, other], 1)), torch.cat([other + value, x], 1))
    half = conv_norm(x, "2.function.0", 2).relu()
    value = conv_norm(half, "2.function.1").relu()
    projected = conv_norm(other, "2.shortcut", 2, "0", "1")
    wanted = torch.cat([projected + value, half], 1)
    assert model.blocks[2](torch.cat([x, other], 1)).shape == (4, 32, 3, 3)
    torch.testing.assert_close(model.blocks[2](torch.cat([x, other], 1)), wanted)


def test_down_sampling_of_bottlenecks_projects_both_streams() -> None:
    model = network("revresnet50", torch.float64).eval()
    for index, stride in [(0, 1), (3, 2), (7, 2), (13, 2)]:
        block = model.blocks[index]
        assert isinstance(block, DownSampling)
        inputs = block.shortcut[0].in_channels
        x, other = (torch.randn(2, inputs, 4, 4, dtype=torch.float64) for _ in range(2))
        wanted = torch.cat([block.shortcut(other) + block.function(x), block.second(x)], 1)
        assert torch.equal(block(torch.cat([x, other], 1)), wanted)
        assert wanted.shape == (2, 2 * 4 * block.function[0].conv.out_channels, 4 // stride, 4 // stride)
        assert block.function(x).min() == 0  # F ends in a ReLU
        assert block.second[0].weight is not block.shortcut[0].weight and block.second(x).min() < 0


def test_the_stem_feeds_both_streams_and_the_classifier_reads_both() -> None:
    model, x = network("revresnet18").eval(), batch("revresnet18")
    first, second = model.stem(x).chunk(2, 1)
    assert torch.equal(first, second) and first.shape == (4, 8, 16, 16)
    z = torch.randn(4, 128, 2, 2)
    wanted = F.linear(z.mean((2, 3)), model.classifier.weight, model.classifier.bias)
    torch.testing.assert_close(model.classifier(z), wanted)


def test_revgpt_is_the_recurrence_of_two_streams() -> None:
    model, ids = network("revgpt", torch.float64), batch("revgpt")
    embedding, output = model.embedding[0], model.output
    assert isinstance(embedding, Embedding) and isinstance(output, Output)
    x1 = x2 = embedding(ids)
    functions = [coupling.function for coupling in model.blocks]
    for attention, mlp in zip(functions[::2], functions[1::2], strict=True):
        assert isinstance(attention.attention, nn.Module) and isinstance(mlp.gelu, nn.GELU)
        x1 = x1 + attention(x2)
        x2 = x2 + mlp(x1)
    torch.testing.assert_close(model(ids), output(torch.cat([x2, x1], -1)), rtol=1e-12, atol=1e-12)


def sees(model: nn.Module, tokens: Tensor) -> Tensor:
    """(t, t), whether the output at a position depends on the tokens at another, for the blocks in a row."""
    tokens = tokens.clone().requires_grad_()
    h = model(tokens)
    rows = [
        torch.autograd.grad(h[0, i].sum(), tokens, retain_graph=True)[0][0].abs().sum(-1) for i in range(h.shape[1])
    ]
    return torch.stack(rows) > 0


def test_gpt_sees_the_past_and_vit_sees_all() -> None:
    for name, future in [("revgpt", False), ("revvit", True), ("vit", True)]:
        blocks = nn.Sequential(*network(name, torch.float64).blocks)
        streams = 16 if name == "vit" else 32
        found = sees(blocks, torch.randn(1, 6, streams, dtype=torch.float64))
        assert torch.equal(found, torch.ones(6, 6, dtype=torch.bool).tril(5 if future else 0)), name
    model, ids = network("revgpt").eval(), batch("revgpt")
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 7
    assert torch.equal(model(ids)[:, :5], model(other)[:, :5])
    assert not torch.equal(model(ids)[:, 5:], model(other)[:, 5:])


def test_branches_are_those_of_the_plain_block() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, 0.0, causal=False).double()
    attention, mlp = attention_branch(8, 2, 0.0, causal=False).double(), mlp_branch(8, 0.0).double()
    attention.load_state_dict({k.replace("norm1", "norm"): v for k, v in block.state_dict().items() if k[:5] in FIRST})
    mlp.load_state_dict({k.replace("norm2", "norm"): v for k, v in block.state_dict().items() if k[:5] not in FIRST})
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    middle = x + attention(x)
    torch.testing.assert_close(block(x), middle + mlp(middle), rtol=1e-12, atol=1e-12)


FIRST = ("norm1", "atten")


def test_vit_is_torchs_encoder_on_patches() -> None:
    model, images = network("vit", torch.float64).eval(), batch("vit", torch.float64)
    conv = model.embedding.patches
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(4, 16, 48)
    tokens = patches @ conv.weight.flatten(1).T + conv.bias + model.embedding.positions
    names = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias", "projection": "out_proj"}
    names |= {"attention": "self_attn", "widen": "linear1", "narrow": "linear2"}
    for block in model.blocks:
        gelu = nn.GELU(approximate="tanh")
        theirs = nn.TransformerEncoderLayer(16, 2, 64, 0.0, gelu, batch_first=True, norm_first=True).double().eval()
        weights = {}
        for name, weight in block.state_dict().items():
            for old, new in names.items():
                name = name.replace(old, new)
            weights[name] = weight
        theirs.load_state_dict(weights)
        tokens = theirs(tokens)
    head = model.classifier
    wanted = head.linear(F.layer_norm(tokens, (16,), head.norm.weight, head.norm.bias).mean(1))
    torch.testing.assert_close(model(images), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["vit", "revvit", "revgpt"])
def test_a_transformer_begins_as_gpt_does(name: str) -> None:
    torch.manual_seed(0)
    shape = (64,) if name == "revgpt" else (3, 32, 32)
    model = models.build(name, input_shape=shape, classes=100, layers=8, width=128)
    for key, parameter in model.named_parameters():
        if key.endswith(("attention.projection.weight", "narrow.weight")):
            assert parameter.std().item() == pytest.approx(0.02 / 4, rel=0.1), key
        elif parameter.dim() > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), key
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm" in key and "weight" in key))), key


@pytest.mark.parametrize(
    ("name", "shape", "options", "words"),
    [
        ("vit", (3, 30, 32), {}, "vit cuts images into patches of 4×4 .* given 30×32"),
        ("revvit", (3, 32, 30), {"patch": 8}, "revvit cuts images into patches of 8×8 .* given 32×30"),
        ("vit", (3, 32, 32), {"patch": 0}, "'patch' must be greater than 0"),
        ("vit", (32,), {}, "takes images"),
        ("revvit", (3, 8, 8), {"heads": 3}, "revvit's width must be a multiple of its heads"),
        ("vit", (3, 8, 8), {"dropout": 1.0}, "'dropout' is a probability"),
        ("revgpt", (3, 8, 8), {}, "revgpt takes text"),
        ("revgpt", (8,), {"layers": 0}, "'layers' must be greater than 0"),
        ("revresnet18", (3, 4, 8), {}, "revresnet18 needs images of at least 5×5"),
        ("revresnet34", (3, 16, 16), {"stem": "large"}, "revresnet34 needs images of at least 17×17"),
        ("revresnet50", (3, 8, 8), {"stem": "smal"}, "stem of revresnet50 'smal'; did you mean 'small'"),
        ("revresnet50", (3, 8, 8), {"width": -1.0}, "'width' must be greater than 0"),
        ("revresnet18", (3, 8, 8), {"skip": False}, "option of revresnet18 'skip'"),
    ],
)
def test_refusals_are_sentences(name: str, shape: tuple[int, ...], options: dict, words: str) -> None:
    with pytest.raises(InvalidChoice, match=words):
        models.build(name, input_shape=shape, classes=5, **options)


def test_images_of_another_shape_are_refused() -> None:
    for wrong in (torch.zeros(2, 3, 16, 8), torch.zeros(2, 1, 16, 16), torch.zeros(3, 16, 16)):
        with pytest.raises(InvalidChoice, match=r"images of shape \(3, 16, 16\); given"):
            network("vit")(wrong)


@EVERY
def test_dropout_and_biases_are_where_they_should_be(name: str) -> None:
    model = network(name)
    if "resnet" in name:
        biased = {
            key.split(".")[0]: conv.bias is not None for key, conv in model.named_modules() if hasattr(conv, "stride")
        }
        assert biased == {"stem": False, "blocks": True}
        return
    shape, options = NETWORKS[name]
    with_dropout = models.build(name, input_shape=shape, classes=7, dropout=0.5, **options)
    assert sum(isinstance(part, nn.Dropout) for part in with_dropout.modules()) == 1 + 2 * 5
    assert {part.dropout for part in with_dropout.modules() if hasattr(part, "qkv")} == {0.5}
    assert not any(isinstance(part, nn.Dropout) for part in model.modules())
