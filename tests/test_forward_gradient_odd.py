"""Forward gradients of unusual networks: lower precision, parts without forward mode, buffers, sparse and cut-off gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import unlocked as ul
from unlocked.credit.forward_gradient import ForwardGradient
from unlocked.credit.local_forward_gradient import LocalForwardGradient
from unlocked.errors import InvalidChoice, UnlockedError

SMALL: Any = {"head": "linear", "budget": None}
Y = torch.tensor([0, 1, 2, 1, 0, 2])


def session(rule: Any, *bodies: nn.Module, like: Any, **options: Any) -> ul.Trainer:
    chain = ul.Chain([ul.Stage(body) for body in bodies], like=like)
    return ul.Trainer(chain, credit=rule, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **options)


def moved(rule: Any, *bodies: nn.Module, x: Any, like: Any = None, **options: Any) -> torch.Tensor:
    """By how much one step moves the weights of the first stages."""
    made = session(rule, *bodies, like=x if like is None else like, **options)
    weights = [p for stage in list(made.chains[0])[:-1] for p in stage.body.parameters()]
    before = nn.utils.parameters_to_vector(weights).detach()
    made.step(x, Y[: len(x)])
    return nn.utils.parameters_to_vector(weights).detach() - before


# ---- half precision ----------------------------------------------------------------------------------------------------


def maps(norm: str) -> list[nn.Module]:
    torch.manual_seed(0)
    norms: Any = {
        "batch": lambda: nn.BatchNorm2d(4),
        "group": lambda: nn.GroupNorm(2, 4),
        "instance": lambda: nn.InstanceNorm2d(4, affine=True),
        "frozen batch": lambda: nn.BatchNorm2d(4).eval(),
    }
    block = [nn.Conv2d(2, 4, 3, bias=False), norms[norm](), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), norms[norm]()]
    return [
        nn.Sequential(*block),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
    ]


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "frozen batch"])
@pytest.mark.parametrize(
    "rule",
    [
        lambda mode: ForwardGradient(mode=mode, **SMALL),
        lambda mode: ForwardGradient(mode=mode, scalars="shared", **SMALL),
        lambda mode: ForwardGradient("gaussian", mode=mode, scalars="shared"),
        lambda mode: ForwardGradient("gaussian", mode=mode, space="activity"),
        lambda mode: LocalForwardGradient(mode=mode, **SMALL),
    ],
    ids=["tensor", "shared", "gaussian, shared", "activity", "local forward gradient"],
)
def test_in_half_precision_both_modes_agree_to_its_rounding(rule: Any, norm: str) -> None:
    x = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    forward, backward = (moved(rule(mode), *maps(norm), x=x, precision="bf16") for mode in ("forward", "two-backward"))
    assert backward.norm() > 0
    assert (forward - backward).norm() < 0.06 * backward.norm()  # bfloat16 has 8 bits


# ---- what has no forward mode, or cannot be run again --------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm, space", [(weight_norm, "weight"), (spectral_norm, "weight"), (spectral_norm, "activity")]
)
def test_parts_that_forward_mode_cannot_take_are_refused_before_the_first_step(norm: Any, space: Any) -> None:
    x = torch.randn(6, 5)
    bodies = [nn.Sequential(norm(nn.Linear(5, 6)), nn.Tanh()), nn.Linear(6, 3)]
    with pytest.raises(InvalidChoice, match=r"Stage 0: .*two-backward"):
        session(ForwardGradient("gaussian", space=space), *bodies, like=x)
    session(ForwardGradient("gaussian", space=space, mode="two-backward"), *bodies, like=x).step(x, Y)


@pytest.mark.parametrize(
    "rule",
    [
        lambda mode: ForwardGradient("gaussian", space="activity", mode=mode),
        lambda mode: LocalForwardGradient(mode=mode, **SMALL),
    ],
)
def test_a_part_whose_weights_have_no_forward_mode_is_welcome_where_none_is_pushed(rule: Any) -> None:
    x, found = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), []
    for mode in ("forward", "two-backward"):
        torch.manual_seed(0)
        bodies = [nn.Sequential(weight_norm(nn.Linear(5, 6)), nn.Tanh()), nn.Linear(6, 6), nn.Linear(6, 3)]
        found.append(moved(rule(mode), *(body.double() for body in bodies), x=x))
    assert torch.allclose(*found, rtol=0, atol=1e-12)


class Counting(nn.Module):
    """Replaces its buffer in every forward; `read`: and its output depends on it."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.layer, self.read = nn.Linear(5, 5), read
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return self.layer(x) * (1 + self.calls if self.read else 1)


def test_a_buffer_may_change_if_the_output_does_not_depend_on_it() -> None:
    x, rule = torch.randn(6, 5), ForwardGradient("gaussian", space="activity")
    with pytest.raises(InvalidChoice, match=r"Stage 0: Its output depends on a buffer"):
        session(rule, Counting(read=True), nn.Linear(5, 3), like=x)
    counting = Counting(read=False)
    made = session(rule, counting, nn.Linear(5, 3), like=x)
    assert counting.calls == 0  # looking at it changed nothing
    made.step(x, Y)


class Centred(nn.Module):
    """Mixes samples, and is no BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.read(x)
        return torch.tanh(h - h.mean(0))


def test_samples_that_are_mixed_are_found_from_an_example_of_one_sample() -> None:
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for mode in ("forward", "two-backward"):
        torch.manual_seed(0)
        bodies = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()), Centred(), nn.Linear(5, 3)]
        rule = ForwardGradient("gaussian", space="activity", mode=mode)  # type: ignore[arg-type]
        found.append(moved(rule, *(body.double() for body in bodies), x=x, like=x[:1]))
    assert torch.allclose(*found, rtol=0, atol=1e-12)


# ---- gradients that are sparse, or that nothing carries ------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["forward", "two-backward"])
@pytest.mark.parametrize("scalars", ["tensor", "shared"])
def test_a_sparse_gradient_is_a_guess_as_the_dense_one_is(scalars: Any, mode: Any) -> None:
    tokens, found = torch.tensor([[1, 2], [3, 0], [4, 4], [6, 1], [5, 2], [2, 2]]), []
    for sparse in (True, False):
        torch.manual_seed(0)
        bodies = [nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Flatten()), nn.Linear(8, 3)]
        found.append(moved(ForwardGradient(scalars=scalars, mode=mode, **SMALL), *bodies, x=tokens))
    assert torch.equal(*found) and found[0].norm() > 0


class CutOff(nn.Module):
    """Its output has no graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()


@pytest.mark.parametrize(
    "rule",
    [
        ForwardGradient(mode="two-backward", **SMALL),
        ForwardGradient(**SMALL),
        ForwardGradient("gaussian", space="activity"),
        LocalForwardGradient(mode="two-backward", **SMALL),
        ul.credit.NodePerturbation(),
    ],
    ids=lambda rule: f"{rule.name}",
)
@pytest.mark.parametrize("where", [0, 1])
def test_a_body_that_hides_its_weights_is_a_sentence(where: int, rule: Any) -> None:
    x, bodies = torch.randn(6, 4), [nn.Sequential(nn.Linear(4, 4)) for _ in range(3)]
    bodies[where].append(CutOff())
    with pytest.raises(UnlockedError, match="gives depends neither on its weights nor on its input"):
        session(rule, *bodies, like=x).step(x, Y)


# ---- options from Python --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ForwardGradient(guess=None), "forward-gradient's guess must be 'local' or .*; given None"),  # type: ignore[arg-type]
        (lambda: ForwardGradient(space=3), "space must be 'weight' or 'activity'; given 3"),  # type: ignore[arg-type]
        (lambda: ForwardGradient(budget="x"), "budget must be a number or None; given 'x'"),  # type: ignore[arg-type]
        (lambda: ForwardGradient(normalise="yes"), "normalise must be True or False or None; given 'yes'"),  # type: ignore[arg-type]
        (lambda: ForwardGradient(groups="2"), "groups must be a whole number; given '2'"),  # type: ignore[arg-type]
        (lambda: LocalForwardGradient(mask="no"), "mask must be True or False; given 'no'"),  # type: ignore[arg-type]
        (lambda: ul.credit.MeZO(epsilon="a"), "epsilon must be a number; given 'a'"),  # type: ignore[arg-type]
        (lambda: ul.credit.NodePerturbation(sigma=None), "sigma must be a number; given None"),  # type: ignore[arg-type]
        (lambda: ul.credit.NodePerturbation(antithetic="no"), "antithetic must be True or False; given 'no'"),  # type: ignore[arg-type]
        (lambda: ul.consensus.AllReduce(bucket_mb="1"), "all-reduce's bucket_mb must be a number; given '1'"),  # type: ignore[arg-type]
        (lambda: ul.credit.DGSSL(dimension="8"), "dimension=8 is not possible; give a whole number"),  # type: ignore[arg-type]
    ],
)
def test_options_of_another_type_are_sentences(make: Any, words: str) -> None:
    with pytest.raises(InvalidChoice, match=words):
        make()


def test_numbers_of_numpy_are_numbers() -> None:
    assert ul.credit.MeZO(epsilon=np.float32(1e-3)).epsilon == np.float32(1e-3)  # type: ignore[arg-type]
    assert ForwardGradient(budget=np.float64(0.1)).budget == 0.1


def test_options_that_cannot_be_looked_up_are_left_to_the_rule() -> None:
    @dataclasses.dataclass(frozen=True)
    class Own(ForwardGradient):
        extra: Unknown = 3  # type: ignore[name-defined]  # noqa: F821

    session(Own(**SMALL), nn.Linear(4, 4), nn.Linear(4, 3), like=torch.randn(2, 4)).step(torch.randn(6, 4), Y)
