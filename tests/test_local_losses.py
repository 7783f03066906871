"""Losses beyond classification: local heads learn by the network's own loss; where none can be guessed, a sentence."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unlocked as ul
from unlocked.errors import BadCheckpoint, InvalidChoice
from unlocked.losses import PredSim, WrongTarget, cross_entropy, mean_squared_error

from methods import momentum

OUT = 3
RATE = 0.5


def vectors(outputs: int = OUT, *, flat: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, outputs))
    return (nn.Sequential(*model, nn.Flatten(0)) if flat else model).double()


def per_position() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, OUT)).double()


def picture() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 1)]
    return nn.Sequential(*layers).double()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def session(model: nn.Module, like: Tensor, credit: Any, loss: Any, stages: int = 3) -> ul.Trainer:
    chain = ul.cut(model, stages, like=like, loss=loss)
    return ul.Trainer(chain, credit=credit, optimizer=lambda weights: torch.optim.SGD(weights, lr=RATE), seed=1)


def asymmetric(output: Tensor, y: Tensor) -> Tensor:
    """A user's own: too high costs twice as much as too low."""
    return torch.where(output > y, 2 * (output - y), y - output).mean()


def smoothed(output: Tensor, y: Tensor) -> Tensor:
    """Another one, on classes."""
    return F.cross_entropy(output, y, label_smoothing=0.2)


def checked(trainer: ul.Trainer, x: Tensor, y: Tensor, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
    """One step: every stage reports the formula at its head's output, and moves along its gradient."""
    before = copy.deepcopy(trainer.chains[0])
    losses = trainer.step(x, y)
    for loss, stage, after in zip(losses, before, trainer.chains[0]):
        x = stage(x.detach())
        output = x if stage.head is None else stage.head(x)
        value = formula(output, y)
        assert loss == pytest.approx(float(value.detach()), rel=1e-12)
        gradients = torch.autograd.grad(value, list(stage.parameters()))
        for old, new, gradient in zip(stage.parameters(), after.parameters(), gradients):
            torch.testing.assert_close((old - new) / RATE, gradient, rtol=1e-9, atol=1e-12)


def squared(output: Tensor, y: Tensor) -> Tensor:
    """Written out."""
    return ((output - y) ** 2).sum() / y.numel()


def huber(output: Tensor, y: Tensor) -> Tensor:
    """Written out: quadratic up to 1, then linear."""
    size = (output - y).abs()
    return torch.where(size < 1, 0.5 * size**2, size - 0.5).mean()


CASES = [
    ("vectors", mean_squared_error, squared),
    ("numbers", mean_squared_error, squared),
    ("positions", mean_squared_error, squared),
    ("vectors", nn.HuberLoss(), huber),
    ("numbers", asymmetric, asymmetric),
    ("positions", asymmetric, asymmetric),
]


def case(shape: str) -> tuple[nn.Module, Tensor, Tensor]:
    if shape == "numbers":
        return vectors(1, flat=True), drawn(8, 5), 3 * drawn(8, seed=2)
    if shape == "vectors":
        return vectors(), drawn(8, 5), 3 * drawn(8, OUT, seed=2)
    return per_position(), drawn(8, 4, 5), 3 * drawn(8, 4, OUT, seed=2)


@pytest.mark.covering
@pytest.mark.parametrize("head", ["linear", "unembedding", ul.heads.MLPHead(6, 1)], ids=str)
@pytest.mark.parametrize(("shape", "loss", "formula"), CASES)
def test_local_regression_is_its_formula(shape: str, loss: Any, formula: Any, head: Any) -> None:
    model, x, y = case(shape)
    trainer = session(model, x, ul.credit.DGL(head, None), loss)
    checked(trainer, x, y, formula)
    scores = trainer.evaluate((x, y))
    assert scores.accuracy is None and all(stage is not None and stage[1] is None for stage in scores.stages)


def test_a_users_loss_on_classes_reaches_every_head() -> None:
    x, y = drawn(8, 5), torch.arange(8) % OUT
    checked(session(vectors(), x, ul.credit.DGL("linear", None), smoothed), x, y, smoothed)


@pytest.mark.covering
@pytest.mark.parametrize(
    "credit", [ul.credit.Greedy("linear", None), ul.credit.Interlocking(1, "linear", None), ul.credit.Backprop()]
)
def test_other_rules_take_the_networks_loss_too(credit: Any) -> None:
    model, x, y = case("vectors")
    trainer = session(model, x, credit, mean_squared_error)
    chain = copy.deepcopy(trainer.chains[0])
    losses = trainer.step(x, y)
    assert any(loss is not None for loss in losses)
    for j, loss in enumerate(losses):
        assert loss is None or loss == pytest.approx(float(squared(chain.read(x, j), y).detach()), rel=1e-12)


def test_a_loss_that_is_a_module_is_each_stages_own() -> None:
    weight = drawn(OUT).abs()
    x, y = drawn(8, 5), torch.arange(8) % OUT
    trainer = session(vectors(), x, ul.credit.DGL("linear", None), nn.CrossEntropyLoss(weight=weight))
    losses = [stage.loss for stage in trainer.chains[0]]
    assert len({id(loss) for loss in losses}) == 3
    assert len({loss.weight.data_ptr() for loss in losses}) == 3  # stages live in different processes
    checked(trainer, x, y, lambda output, y: F.cross_entropy(output, y, weight=weight))


def test_heads_for_pictures_come_from_a_function() -> None:
    x = drawn(4, 2, 6, 6)
    credit = ul.credit.DGL(lambda features, outputs: nn.Conv2d(features.shape[1], outputs, 1), None)
    trainer = session(picture(), x, credit, mean_squared_error)
    checked(trainer, x, drawn(4, 2, 6, 6, seed=3), squared)
    wrong = ul.credit.DGL(lambda features, outputs: nn.Conv2d(features.shape[1], outputs, 3), None)
    with pytest.raises(InvalidChoice, match=r"gives logits of shape \(2, 2, 4, 4\); they must have \(2, 2, 6, 6\)"):
        session(picture(), x, wrong, mean_squared_error)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_where_no_head_can_be_guessed_it_says_to_give_them_by_hand() -> None:
    by_hand = r"heads by hand, Stage\(body, head=…, loss=…\)"
    with pytest.raises(InvalidChoice, match=r"output has shape \(2, 2, 6, 6\).*" + by_hand):
        session(picture(), drawn(4, 2, 6, 6), ul.credit.DGL("linear", None), mean_squared_error)

    class Two(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    chain = ul.Chain([ul.Stage(nn.Linear(5, 7)), ul.Stage(Two(7, 3))], like=torch.randn(4, 5))
    with pytest.raises(InvalidChoice, match=f"output is a tuple; .*{by_hand}"):
        ul.Trainer(chain, credit=ul.credit.DGL("linear", None), optimizer=momentum)


def test_by_hand_works_where_nothing_is_guessed() -> None:
    parts = list(picture())
    stages = [
        ul.Stage(nn.Sequential(*parts[:2]), head=nn.Conv2d(4, 2, 1).double(), loss=mean_squared_error),
        ul.Stage(nn.Sequential(*parts[2:]), loss=mean_squared_error),
    ]
    trainer = ul.Trainer(
        ul.Chain(stages), credit=ul.credit.DGL(), optimizer=lambda weights: torch.optim.SGD(weights, lr=RATE)
    )
    checked(trainer, drawn(4, 2, 6, 6), drawn(4, 2, 6, 6, seed=3), squared)


def test_one_number_per_sample_is_no_class() -> None:
    with pytest.raises(InvalidChoice, match=r"one number per sample, shape \(2,\).*loss=ul.losses.mean_squared_error"):
        session(vectors(1, flat=True), drawn(8, 5), ul.credit.DGL("linear", None), None)


@pytest.mark.parametrize("credit", [ul.credit.PredSim(budget=None), ul.credit.InfoPro()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("loss", [mean_squared_error, nn.MSELoss(), F.l1_loss])
def test_a_loss_that_compares_classes_is_refused_for_numbers(credit: Any, loss: Any) -> None:
    with pytest.raises(
        InvalidChoice, match=rf"'{credit.name}' has a loss of its own, which compares classes, .* learns numbers"
    ):
        session(vectors(), drawn(8, 5), credit, loss)


def test_predsim_says_what_to_do_with_numbers_that_come_all_the_same() -> None:
    with pytest.raises(WrongTarget, match="as for regression"):
        PredSim()((drawn(4, OUT), drawn(4, 2)), drawn(4, OUT))


def test_other_positions_than_the_networks_are_refused() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, ::2]

    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), Halves(), nn.Linear(6, OUT)).double()
    with pytest.raises(InvalidChoice, match=r"shape \(2, 2, 3\), one row for each position.*\(2, 4, 7\)"):
        session(model, drawn(8, 4, 5), ul.credit.DGL("linear", None), mean_squared_error)


# ---- resuming --------------------------------------------------------------------------------------------------------


def test_a_resume_never_falls_back_to_cross_entropy(tmp_path: Any) -> None:
    def chain(loss: Any) -> ul.Chain:
        torch.manual_seed(0)
        return ul.cut(ul.models.mlp((5,), OUT, width=6, depth=2), 2, like=torch.randn(4, 5), loss=loss)

    assert chain(None).recipe == chain(cross_entropy).recipe != chain(mean_squared_error).recipe
    trainer = ul.Trainer(chain(mean_squared_error), credit=ul.credit.DGL("linear", None), optimizer=momentum)
    x, y = torch.randn(4, 5), torch.randn(4, OUT)
    trainer.step(x, y)
    trainer.save(tmp_path)
    with pytest.raises(BadCheckpoint, match="give the same model again"):
        ul.Trainer.resume(tmp_path)
    resumed = ul.Trainer.resume(tmp_path, chain=chain(mean_squared_error))
    assert resumed.step(x, y) == trainer.step(x, y)


def test_the_examples_of_the_page_run() -> None:
    page = (Path(__file__).parent.parent / "docs" / "local_learning.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
