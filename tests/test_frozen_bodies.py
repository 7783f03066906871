"""A stage whose body is frozen: it stays what it is, its head and the other stages learn as if it were not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import unlocked as ul
from unlocked import credit as C
from unlocked.calibration.stages import measure_stages
from unlocked.errors import UnlockedError
from unlocked.simulation.profile import profile

from methods import SMALL, assert_same, batch, mlp, state

RULES = [
    C.Interlocking(1, head=SMALL, budget=None),
    C.Interlocking(3, head=SMALL, budget=None),
    C.DGL(head=SMALL, budget=None),
    C.Backprop(),
    C.GPipe(2),
    C.PipeDream(),
    C.PETRA(),
    C.PETRA(keep="input"),
    C.NodePerturbation(),
    C.SimCLR(dimension=6),
    C.DGSSL(dimension=6),
]


def cut(frozen=None, projector=False):
    """Four stages; those below the last have heads, as the rules that build none have nothing else to train there."""
    chain = ul.cut(mlp(), 4, like=batch()[0])
    for stage in list(chain)[:-1]:
        stage.head = nn.Linear(7, 6).double()
    if projector:
        chain[-1].head = nn.Linear(3, 6).double()
    if frozen is not None:
        chain[frozen].body.requires_grad_(False)
    return chain


def stepped(credit, frozen, accumulate=1):
    torch.manual_seed(0)
    chain = cut(frozen, credit.self_supervised)
    session = ul.Trainer(
        chain, credit=credit, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), accumulate=accumulate
    )
    before = state(session)
    session.step(*batch())
    session.drain()
    return before, state(session)


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("credit", RULES, ids=repr)
def test_the_others_learn_as_if_it_were_not_frozen(credit, frozen):
    accumulate = 2 if isinstance(credit, (C.Interlocking, C.DGSSL)) else 1
    before, after = stepped(credit, frozen, accumulate)
    _, expected = stepped(credit, None, accumulate)
    body = [name for name in after if name.startswith(f"0.{frozen}.body.")]
    assert body and not any(torch.equal(expected[name], before[name]) for name in body)
    assert_same(after, expected | {name: before[name] for name in body})


def test_mezo_displaces_the_others_only():
    before, after = stepped(C.MeZO(), 0)
    same = {name for name in after if torch.equal(after[name], before[name])}
    assert {name for name in after if name.startswith("0.0.body.")} <= same
    assert not any(name.split(".")[2] == "body" for name in same if not name.startswith("0.0."))


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 7).double()

    def forward(self, x):
        return self.linear(x).detach()


@pytest.mark.parametrize(
    "credit", [C.Interlocking(1, head=SMALL, budget=None), C.Backprop()], ids=lambda rule: rule.name
)
def test_a_body_that_learns_but_hides_it_is_refused(credit):
    stages = [Detached(), nn.Linear(7, 7).double(), nn.Linear(7, 3).double()]
    chain = ul.Chain([ul.Stage(body) for body in stages], like=batch()[0])
    session = ul.Trainer(chain, credit=credit, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    with pytest.raises(UnlockedError, match="stage 0 gives depends neither on its weights nor on its input"):
        session.step(*batch())


@pytest.mark.parametrize("frozen", [0, 1])
def test_its_costs_are_read_and_measured(frozen):
    chain = cut(frozen)
    assert profile(chain).stages[frozen].trained == 8 * (7 * 6 + 6)  # bytes of the head
    times = measure_stages(cut(frozen), [4], windows=1, seconds=0.01)
    assert times[frozen][4]["backward" if frozen == 0 else "input-backward"] > 0.0
