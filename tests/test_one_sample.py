"""A micro-batch of one sample, where BatchNorm wants two: said in a sentence, by whatever rule and wherever it comes up."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import unlocked as ul
from unlocked.cli import main
from unlocked.errors import InvalidChoice
from unlocked.worlds import Simulated

from methods import SMALL, batch, data, mlp, momentum, trainer

SENTENCE = "Stage 0 was given a micro-batch of one sample, .* Give larger batches"


@pytest.mark.parametrize(
    "credit, norm",
    [
        (ul.credit.DGL(head=SMALL, budget=None), False),
        (ul.credit.Greedy(head=SMALL, budget=None), False),
        (ul.credit.Backprop(), True),
        (ul.credit.ForwardGradient("gaussian"), True),
        (ul.credit.MeZO(), True),
        (ul.credit.PipeDream(keep="input"), True),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_step_of_one_sample_is_refused(credit, norm):
    session = trainer(credit, model=mlp(norm=norm))
    with pytest.raises(InvalidChoice, match=SENTENCE):
        session.step(*batch(1))
    session.step(*batch(2))


@pytest.mark.parametrize("world", [None, Simulated])
def test_so_is_one_of_a_fit(world):
    session = trainer(ul.credit.DGL(head=SMALL, budget=None), accumulate=2, world=world and world())
    with pytest.raises(InvalidChoice, match=SENTENCE):
        session.fit(data(), 1, batch_size=2)


def test_the_command_line_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    options = ["--data", "digits", "--model", "mlp", "--batch-size", "1", "--credit", "dgl(head=mlp,budget=None)"]
    assert main(["train", *options, "--stages", "2", "--tensorboard", "off"]) == 2
    error = capsys.readouterr().err
    assert "micro-batch of one sample" in error and "Traceback" not in error


class Odd(nn.Linear):
    def forward(self, x):
        raise ValueError("what it says itself")


def test_other_errors_of_a_stage_stay_what_they_are():
    session = ul.Trainer(ul.Chain([ul.Stage(Odd(5, 3).double())]), optimizer=momentum)
    with pytest.raises(ValueError, match=r"^what it says itself$") as caught:
        session.step(*batch(1))
    assert not isinstance(caught.value, InvalidChoice)


@pytest.mark.parametrize(
    "credit", [ul.credit.ForwardGradient("gaussian"), ul.credit.PETRA()], ids=lambda rule: rule.name
)
def test_an_example_of_one_sample_is_enough(credit):
    chain = ul.cut(mlp(norm=True), 3, like=batch(1)[0])
    ul.Trainer(chain, credit=credit, optimizer=momentum).step(*batch(4))
