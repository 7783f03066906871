"""A stage's weights under names: what a backward sees after an update is what the method says, and nothing else."""

from __future__ import annotations

import ast
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import unlocked as ul
from unlocked.errors import InvalidChoice, UnlockedError
from unlocked.modes import statistics_kept
from unlocked.versions import Reading, Versions
from unlocked.worker import Place, Worker

from delayed_cases import BY_NAME, CASES, Case, chain_of, name_of, pair_of, step_batch, train
from methods import assert_same, batch, momentum, state

C = ul.credit
SEMANTICS = ["stash", "current", "snapshot"]


class Alone:
    """A stage by itself: its worker, its versions, and updates by hand."""

    def __init__(self, module: nn.Module) -> None:
        self.worker = Worker(None, Place(0, 2), 1, 4)  # type: ignore[arg-type]
        self.module, self.versions = module, Versions(self.worker, module)
        self.versions.keeps = True

    def forward(self, semantics: Any, x: Tensor) -> tuple[Reading, Tensor]:
        reading = self.versions.read()
        with self.versions.saving(reading, semantics), self.versions.in_place(reading):
            return reading, self.module(x)

    def update(self, behind: bool = False) -> None:
        """Every weight times −2, seen by autograd or not."""
        self.versions.before_update()
        with torch.no_grad():
            for x in self.module.parameters():
                (x.data if behind else x).mul_(-2.0)
        self.worker.version += 1


def given(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- what each semantics gives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [False, True], ids=["honest", "through data"])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_one_layer_by_hand(semantics: str, behind: bool) -> None:
    """h = tanh(x Wᵀ): dW = ((1 − h²) d)ᵀ x under all three; dx = ((1 − h²) d) W with the forward's or today's W."""
    layer = nn.Linear(3, 2, bias=False)
    alone = Alone(nn.Sequential(layer, nn.Tanh()).double())
    x, d = given(5, 3).requires_grad_(), given(5, 2, seed=1)
    old = layer.weight.detach().clone()
    _, h = alone.forward(semantics, x)
    alone.update(behind)
    alone.update(behind)
    h.backward(d)
    inner = (1 - h.detach() ** 2) * d
    torch.testing.assert_close(layer.weight.grad, inner.T @ x.detach())
    torch.testing.assert_close(x.grad, inner @ (4 * old if semantics == "current" else old))


class Qkv(nn.Module):
    """Attention whose weights are used in parts: chunks, slices, transposes, a view of one row, another dtype's copy."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Parameter(given(9, 6, seed=3))
        self.scale = nn.Parameter(given(1, 6, seed=4))
        self.register_buffer("shift", given(6, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        wq, wk, wv = self.qkv.weight.chunk(3)
        q, k, v = (F.linear(x, w, b) for w, b in zip((wq, wk, wv), self.qkv.bias.chunk(3)))
        h = F.scaled_dot_product_attention(q, k, v)
        h = h @ self.out[:6].t() * self.scale.squeeze(0) + self.get_buffer("shift") * h
        return h @ self.out[3:].t().reshape(6, 6) + self.out[8] * h


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("behind", [False, True], ids=["honest", "through data"])
def test_parts_of_weights(semantics: str, behind: bool) -> None:
    """Stash and snapshot are the graph of the weights that were; current is a graph through today's weights by hand."""
    torch.manual_seed(0)
    alone = Alone(Qkv().double())
    copies = {name: x.detach().clone().requires_grad_() for name, x in alone.module.named_parameters()}
    x, d = given(2, 5, 6), given(2, 5, 6, seed=1)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    h = torch.func.functional_call(alone.module, copies, (theirs,))
    _, again = alone.forward(semantics, mine)
    assert torch.equal(h, again)
    alone.update(behind)
    if semantics == "current":
        with torch.no_grad():
            for copy in copies.values():
                copy.data.mul_(-2.0)  # behind autograd's back: activations of the old weights, the new weights
    h.backward(d)
    again.backward(d)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    for name, parameter in alone.module.named_parameters():
        torch.testing.assert_close(parameter.grad, copies[name].grad, rtol=1e-12, atol=1e-12)


def test_buffers_are_those_of_the_forward() -> None:
    for semantics in SEMANTICS:
        module = nn.BatchNorm1d(3).double().eval()
        alone, x, d = Alone(module), given(5, 3).requires_grad_(), given(5, 3, seed=1)
        _, h = alone.forward(semantics, x)
        module.get_buffer("running_var").mul_(9.0)
        h.backward(d)
        torch.testing.assert_close(x.grad, d / (1 + module.eps) ** 0.5)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_a_weight_at_the_end_of_a_storage_is_told_from_its_neighbour(semantics: str) -> None:
    """Two weights that are parts of one tensor, as fused optimizers and sharded ones lay them out."""
    whole = given(2, 4, 4)
    body = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    body[0].weight, body[1].weight = nn.Parameter(whole[0]), nn.Parameter(whole[1])
    alone, x, d = Alone(body), given(3, 4, seed=1).requires_grad_(), given(3, 4, seed=2)
    old = whole.clone()
    _, h = alone.forward(semantics, x)
    alone.update(behind=True)
    h.backward(d)
    torch.testing.assert_close(x.grad, (4 if semantics == "current" else 1) * d @ old[1] @ old[0])


# ---- holding -----------------------------------------------------------------------------------------------------------


def test_a_version_is_kept_while_somebody_reads_from_it() -> None:
    alone = Alone(nn.Linear(3, 2))
    first, again = alone.versions.read(), alone.versions.read()
    assert alone.versions.copies == 0
    alone.update()
    assert alone.versions.copies == 4 * 8 and list(alone.versions.kept) == [0]
    alone.versions.release(first.version)
    assert alone.versions.copies == 4 * 8
    alone.versions.release(again.version)
    assert alone.versions.copies == 0 and not alone.versions.held
    alone.update()
    assert alone.versions.copies == 0  # nobody read version 1
    alone.versions.hold(3)  # yet to come
    alone.update()
    assert not alone.versions.kept
    alone.update()
    assert list(alone.versions.kept) == [3]
    alone.versions.forget()
    assert not alone.versions.kept and not alone.versions.held


def test_a_version_that_is_gone_is_asked_for_in_vain() -> None:
    alone = Alone(nn.Linear(3, 2))
    reading, h = alone.forward("stash", torch.ones(1, 3, requires_grad=True))
    alone.versions.keeps = False
    alone.update()
    sentence = r"Version 0 of the weights of stage 2 was asked for, but only \[1\] are there; hold a version before"
    with pytest.raises(UnlockedError, match=sentence):
        h.sum().backward()
    with pytest.raises(UnlockedError, match=sentence):
        alone.versions.weights(reading)


def test_an_activation_that_is_changed_in_place_is_refused() -> None:
    alone = Alone(nn.Sequential(nn.Linear(3, 2), nn.Sigmoid()))
    for semantics in SEMANTICS:
        _, h = alone.forward(semantics, torch.ones(1, 3))
        h.detach().mul_(2.0)
        with pytest.raises(UnlockedError, match="changed in place between its forward and its backward"):
            h.sum().backward()


def test_frozen_weights_stay_what_they_are() -> None:
    body = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    body[0].weight.requires_grad_(False)
    alone = Alone(body)
    assert len(alone.versions.parameters) == 3
    x = given(4, 3).requires_grad_()
    reading, h = alone.forward("stash", x)
    wanted = torch.autograd.grad(alone.module(x).sum(), x)
    alone.versions.before_update()
    with torch.no_grad():
        body[2].weight.zero_()
    alone.worker.version += 1
    assert torch.equal(torch.autograd.grad(h.sum(), x)[0], wanted[0])
    with alone.versions.in_place(reading):
        assert torch.equal(body(x), h)
    assert not body[2].weight.any()  # today's are back


# ---- what rules keep ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["pipedream", "pipedream-input", "ddg", "2bw", "pipedream-snapshot", "delayed", "petra"]
)
def test_no_more_copies_than_there_are_forwards_to_come_back(name: str) -> None:
    """J − 1 − j of the weights; one under pipedream-2bw; none where today's are used or the graph has its own."""
    case = BY_NAME[name]
    chain, _ = pair_of(4, "plain")
    k = case.fewest(4)
    session = ul.Trainer(chain, credit=case.make(), optimizer=momentum, accumulate=k)
    rows = []
    for step in range(9):
        session.step(*step_batch(step, k))
        rows.append([len(weights.versions.kept) for weights in session.weights])
        for weights, kept in zip(session.weights, rows[-1]):
            assert weights.versions.copies == kept * sum(8 * x.numel() for x in weights.parameters)
    wanted = {"2bw": [1, 1, 1, 1], "pipedream-snapshot": [0] * 4, "delayed": [0] * 4, "petra": [0] * 4}
    assert rows[5:] == [wanted.get(name, [3, 2, 1, 0])] * 4
    session.drain()
    assert all(len(weights.versions.kept) <= (name == "2bw") for weights in session.weights)


# ---- writes behind autograd's back -------------------------------------------------------------------------------------


class Plain(torch.optim.Optimizer):
    """θ ← θ − γ g, honest or through `.data`."""

    def __init__(self, parameters: Any, behind: bool) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.behind = behind

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    (x.data if self.behind else x).add_(x.grad, alpha=-group["lr"])


@pytest.mark.covering
@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("kind", ["plain", "coupled"])
def test_there_is_no_silent_fourth_semantics(case: Case, kind: str) -> None:
    ends = []
    for behind in (False, True):
        chain, _ = pair_of(4, kind)
        k = case.fewest(4)
        session = ul.Trainer(chain, credit=case.make(), optimizer=partial(Plain, behind=behind), accumulate=k)
        train(session, range(7), k)
        ends.append(state(session))
    assert_same(*ends)


def test_the_library_never_writes_through_data() -> None:
    """`.data` is a package, a field or a module's name here; nothing is assigned to it and no tensor method called on it."""
    known = {"load", "as_data"}
    for file in sorted(Path(ul.__file__).parent.rglob("*.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                written = [part for target in targets for part in ast.walk(target) if _is_data(part)]
                assert not written, f"{file}:{node.lineno} writes to .data"
            if isinstance(node, ast.Attribute) and _is_data(node.value):
                assert node.attr in known, f"{file}:{node.lineno} uses .data.{node.attr}"
            if isinstance(node, ast.Call):
                named = isinstance(node.func, ast.Name) and node.func.id in ("setattr", "getattr")
                assert not (named and any(isinstance(x, ast.Constant) and x.value == "data" for x in node.args)), file


def _is_data(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "data"


# ---- modules that recompute by themselves ------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def checkpointed(reentrant: bool | None) -> ul.Chain:
    torch.manual_seed(0)
    rows: list[list[nn.Module]] = [[nn.Linear(5, 4)], [nn.Linear(4, 4)], [nn.Linear(4, 4)], [nn.Linear(4, 3)]]
    for row in rows[:-1]:
        inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2))
        row.append(inner if reentrant is None else Checkpointed(inner, reentrant))
    return chain_of(nn.Sequential(*row).double() for row in rows)


@pytest.mark.covering
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rule", [C.PipeDream, partial(C.PipeDream, weights="snapshot"), C.DelayedGradients, C.FDG])
def test_checkpointing_inside_a_stage_is_refused_once_weights_have_moved(rule: Any, reentrant: bool) -> None:
    session = ul.Trainer(checkpointed(reentrant), credit=rule(), optimizer=momentum)
    with pytest.raises(InvalidChoice, match=r"Stage [012] runs a part of its forward again .*keep='input'"):
        for step in range(9):
            session.step(*batch(8, seed=step))


@pytest.mark.covering
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "name",
    ["pipedream-input", "2bw-input", "delayed-input", "fdg-replay", "petra", "petra-weights", "petra-input+weights"],
)
def test_checkpointing_inside_a_stage_is_welcome_where_the_input_is_kept(name: str, reentrant: bool) -> None:
    """What recomputes inside a recomputation has its weights: the forward's, or today's."""
    case, ends = BY_NAME[name], []
    k = case.fewest(4)
    for inside in (None, reentrant):
        session = ul.Trainer(checkpointed(inside), credit=case.make(), optimizer=momentum, accumulate=k)
        for step in range(7):
            session.step(*batch(8, seed=step))
        session.drain()
        ends.append({name.replace(".inner.", "."): x for name, x in state(session).items()})
    assert_same(*ends)


def test_statistics_are_left_alone_and_put_back_when_something_fails() -> None:
    norm = nn.BatchNorm1d(3)
    before = {name: x.clone() for name, x in norm.state_dict().items()}
    with pytest.raises(ZeroDivisionError), statistics_kept([norm]):
        norm(torch.randn(4, 3))
        raise ZeroDivisionError
    assert norm.track_running_stats
    assert_same(before, dict(norm.state_dict()))


class Bare(nn.Module):
    """A part with weights of its own that it hands to a function, not to a module."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.weight, self.reentrant = nn.Parameter(given(4, 4)), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_a_bare_function_is_refused_too(reentrant: bool) -> None:
    chain = chain_of([nn.Sequential(nn.Linear(5, 4).double(), Bare(reentrant)), nn.Linear(4, 3).double()])
    session = ul.Trainer(chain, credit=C.PipeDream(), optimizer=momentum)
    with pytest.raises(InvalidChoice):
        for step in range(5):
            session.step(*batch(8, seed=step))
