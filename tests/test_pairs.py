"""The allowed pairs (credit, consensus): they learn, repeat themselves, and resume bit for bit; each law takes its part."""

from __future__ import annotations

import itertools

import pytest
import torch

import unlocked as ul

from methods import assert_same, data, mlp, some_pairs, state, trainer

OPTIMIZERS = itertools.cycle(
    [
        lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True),
        lambda ps: torch.optim.AdamW(ps, lr=0.01),
        lambda ps: torch.optim.RMSprop(ps, lr=0.005, momentum=0.5),
    ]
)


def every(part, *more):
    """The pairs of a part, as parameters of a test."""
    return [pytest.param(a, b, *more, id="-".join([a.name, b.name, *map(str, more)])) for a, b in some_pairs(part)]


def session(credit, rule, optimizer=None, **options):
    options = {
        "model": mlp(2, norm=True, dropout=0.2, dtype=torch.float32),
        "stages": 2,
        "replicas": 2,
        "schedule": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20),
        "clip": 5.0,
        "accumulate": 2,
        "seed": 3,
    } | options
    optimizer = optimizer or (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9))
    return trainer(credit.make(), rule.make(), optimizer=optimizer, **options)


TRAIN, TEST = data(72, dtype=torch.float32), data(60, 1, dtype=torch.float32)
FEW = data(48, dtype=torch.float32)  # 4 updates an epoch, 2 under rules that share the data


@pytest.mark.parametrize("credit, rule", every(0))
def test_it_learns(credit, rule):
    trained = session(credit, rule, model=mlp(2, norm=True, dtype=torch.float32), schedule=None)
    before = trained.evaluate(TEST).loss
    records = trained.fit(TRAIN, 6, batch_size=12, validate=TEST)
    phase_ends = [record for record in records if record["epoch"] % 6 == 0]
    assert phase_ends[-1]["validation"]["loss"] < before
    assert phase_ends[-1]["validation"]["accuracy"] > 0.55  # chance is a third


@pytest.mark.parametrize("credit, rule", every(1))
def test_two_runs_with_one_seed_are_identical_and_another_seed_differs(credit, rule):
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(states))  # the user's own stream must not matter
        made = session(credit, rule, seed=seed)
        made.fit(FEW, 1, batch_size=12)
        states.append(state(made))
    assert_same(states[0], states[1])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


class StopAfter(ul.callbacks.Callback):
    """Stops as Ctrl-C would, after some updates."""

    def __init__(self, updates):
        self.updates = updates

    def on_step(self, trainer, record):
        if trainer.steps == self.updates:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("credit, rule, share", [*every(2, 0.35), *every(3, 0.8)])
def test_resumed_is_uninterrupted_bit_for_bit(credit, rule, share, tmp_path):
    """Stopped inside an epoch and, for greedy learning, in either phase; momentum, Adam, dropout, clipping, schedule."""
    optimizer = next(OPTIMIZERS)
    whole = session(credit, rule, optimizer)
    whole.fit(FEW, 2, batch_size=12)
    stop = int(share * whole.steps)
    stopped = session(credit, rule, optimizer)
    with pytest.raises(ul.Interrupted):
        stopped.fit(FEW, 2, batch_size=12, callbacks=[StopAfter(stop)], checkpoint=tmp_path / "run")
    assert stopped.steps == stop
    model = mlp(2, norm=True, dropout=0.2, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # everything must come from the checkpoint
    chain = ul.cut(model, 2, like=FEW.x[:4])
    resumed = ul.Trainer.resume(tmp_path / "run", chain)
    resumed.fit(FEW, 2, batch_size=12)
    assert resumed.steps == whole.steps
    assert_same(state(resumed), state(whole))
    assert resumed.bytes_sent == whole.bytes_sent
