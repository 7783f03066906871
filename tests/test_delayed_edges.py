"""Edges of delayed rules that a second reading found: worlds used again, tied weights, steps that fail, tensors used again."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import unlocked as ul
from unlocked.reversible import Coupling, Split

from methods import assert_same, batch, mlp, state, trainer

C = ul.credit


def steps(session, begin, end, size=12):
    for k in range(begin, end):
        session.step(*batch(size, seed=k))


def test_a_world_used_again_starts_without_the_messages_of_before(tmp_path):
    world = ul.worlds.InProcess()
    first = trainer(C.PipeDream(), world=world)
    steps(first, 0, 4)
    first.save(tmp_path)
    steps(first, 4, 7)
    results = []
    for one in (world, ul.worlds.InProcess()):
        resumed = ul.Trainer.resume(tmp_path, ul.cut(mlp(), 3, like=batch()[0]), world=one)
        steps(resumed, 4, 9)
        results.append(state(resumed))
    assert_same(*results)
    steps(trainer(C.Backprop(), world=world), 0, 2)


def test_a_weight_in_two_reversible_units_is_exchanged_whole():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(
        nn.Linear(5, 8), Coupling(nn.Linear(4, 4)), Coupling(shared), Coupling(shared), nn.Linear(8, 3)
    )
    chain = ul.Chain([ul.Stage(model[:4]), ul.Stage(model[4:])]).double()
    session = ul.Trainer(
        chain,
        credit=C.PETRA(),
        consensus=ul.consensus.AllReduce(bucket_mb=1e-4),
        replicas=2,
        optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1),
    )
    steps(session, 0, 5)
    session.drain()
    one, other = (dict(chain.named_parameters()) for chain in session.chains)
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_after_a_step_that_failed_2bw_is_one_update_late_again():
    session = trainer(C.PipeDream2BW(), stages=3, accumulate=2)
    steps(session, 0, 3)
    with pytest.raises(RuntimeError):
        session.step(torch.zeros(12, 4, dtype=torch.float64), torch.zeros(12, dtype=torch.long))
    timeline = []
    for k in range(3, 9):
        steps(session, k, k + 1)
        timeline += session.timeline.acts
    late = ul.Timeline(timeline).staleness()
    assert all(set(tau) == {1} for rows in late.values() for tau in rows[2:])


@pytest.mark.parametrize("stem", ["split", "frozen"])
def test_a_first_stage_may_begin_with_what_has_nothing_to_train(stem):
    results = []
    for keep in ("weights", "graph"):
        torch.manual_seed(0)
        first = Split() if stem == "split" else nn.Sequential(nn.Linear(5, 10))
        width = 5
        for x in first.parameters():
            x.requires_grad_(False)
        body = nn.Sequential(first, Coupling(nn.Linear(width, width)))
        chain = ul.Chain([ul.Stage(body), ul.Stage(nn.Linear(2 * width, 3))]).double()
        session = ul.Trainer(chain, credit=C.PETRA(keep=keep), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
        steps(session, 0, 5)
        session.drain()
        results.append(state(session))
    for name, x in results[0].items():
        torch.testing.assert_close(x, results[1][name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("credit", [C.PipeDream(), C.PipeDream(keep="input"), C.PETRA()], ids=lambda rule: repr(rule))
def test_the_caller_may_fill_the_same_tensor_again(credit):
    results = []
    for again in (True, False):
        session = trainer(credit)
        x, y = batch()
        for k in range(6):
            fresh, y = batch(seed=k)
            session.step(x.copy_(fresh) if again else fresh, y)
        session.drain()
        results.append(state(session))
    assert_same(*results)


class Counting(nn.Module):
    """Replaces its buffer in every forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return x


@pytest.mark.parametrize("credit", [C.PipeDream(), C.PipeDream(keep="input"), C.PETRA()], ids=lambda rule: repr(rule))
def test_a_buffer_that_is_replaced_counts_a_micro_batch_once(credit):
    model = nn.Sequential(nn.Linear(5, 7), Counting(), nn.Tanh(), nn.Linear(7, 7), nn.Linear(7, 3)).double()
    session = trainer(credit, model=model)
    before = model[1].count.item()
    steps(session, 0, 6)
    session.drain()
    assert model[1].count.item() - before == 6


@pytest.mark.parametrize("credit", [C.PipeDream(keep="input"), C.PETRA()], ids=lambda rule: repr(rule))
def test_an_input_that_is_kept_must_not_be_written_into(credit):
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    chain = ul.Chain([ul.Stage(nn.Sequential(InPlace(), nn.Linear(5, 7))), ul.Stage(nn.Linear(7, 3))]).double()
    session = ul.Trainer(chain, credit=credit, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
    with pytest.raises(ul.UnlockedError, match="Stage 0 changes its input in place, but the input is kept"):
        session.step(*batch())


@pytest.mark.parametrize("credit", [C.PipeDream(), C.PipeDream(keep="input"), C.PETRA()], ids=lambda rule: repr(rule))
def test_a_trainer_that_is_gone_leaves_no_weights_behind(credit):
    session = trainer(credit)
    steps(session, 0, 4)
    weights = [weakref.ref(x) for x in session.chains[0].parameters()]
    del session
    gc.collect()
    assert not any(reference() is not None for reference in weights)


def test_batches_smaller_than_accumulate_are_refused_by_fit():
    session = trainer(C.PETRA(), accumulate=4)
    with pytest.raises(ul.UnlockedError, match="A batch of 2 cannot be split into 4 micro-batches"):
        session.fit(batch(24), 1, batch_size=2)
