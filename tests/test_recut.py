"""A run goes on with its network cut into another number of stages, or on another number of processes, or says why not."""

from __future__ import annotations

import pytest
import torch

import unlocked as ul
from unlocked.worlds import Distributed

from methods import data, mlp, state, trainer
from processes import run_processes

TRAIN = data(60)
# rounding differs between cuts, and Adam divides by small numbers
CLOSE = {"rtol": 1e-7, "atol": 1e-9}
RULES = {row.name: row for row in [ul.consensus.Independent(), ul.consensus.AllReduce(), ul.consensus.WASH(p=0.3)]}


def session(rule, stages, **options):
    """Two replicas, Adam and a schedule, no clipping (its norms are per stage), no dropout (its seeds are per stage)."""
    options = {"model": mlp(norm=True), "replicas": 2, "seed": 3} | options
    options.setdefault("optimizer", lambda ps: torch.optim.Adam(ps, lr=0.01))
    options.setdefault("schedule", lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20))
    return trainer(ul.credit.Backprop(), RULES[rule], stages=stages, **options)


def by_user_name(session):
    return [dict(chain.state_dict()) for chain in session.chains]


def go_on(folder, stages, world=None):
    model = mlp(norm=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-9, 9)  # everything must come from the checkpoint
    resumed = ul.Trainer.resume(folder, ul.cut(model, stages, like=TRAIN.x[:4]), stages=stages, world=world)
    resumed.fit(TRAIN, 2, batch_size=12)
    return resumed


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("before, after", [(4, 2), (2, 3), (1, 4), (3, 1)])
def test_cut_anew_it_ends_where_the_old_cut_would_have(rule, before, after, tmp_path):
    whole, stopped = session(rule, before), session(rule, before)
    whole.fit(TRAIN, 2, batch_size=12)
    stopped.fit(TRAIN, 1, batch_size=12, checkpoint=tmp_path)
    resumed = go_on(tmp_path, after)
    assert len(resumed.chains[0]) == after and resumed.steps == whole.steps
    for mine, theirs in zip(by_user_name(resumed), by_user_name(whole)):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    assert resumed.workers[0].version == whole.workers[0].version
    assert resumed.learning_rates() == pytest.approx([whole.learning_rates()[0]] * after)


def on_three(cluster, folder):
    with Distributed(cluster) as world:
        resumed = go_on(folder, 3, world)
        average = resumed.averaged()
    return None if average is None else dict(average.state_dict())


def test_cut_anew_onto_other_processes(tmp_path):
    whole = session("wash", 2)
    whole.fit(TRAIN, 1, batch_size=12, checkpoint=tmp_path)
    whole.fit(TRAIN, 2, batch_size=12)
    found = run_processes(on_three, 3, tmp_path)[0]
    torch.testing.assert_close(found, dict(whole.averaged().state_dict()), **CLOSE)


def saved_by(folder, credit, **options):
    made = trainer(credit, stages=3, **options)
    made.fit(TRAIN, 1, batch_size=12, checkpoint=folder)
    return made


def test_heads_belong_to_their_cut(tmp_path):
    saved_by(tmp_path, ul.credit.DGL(head="linear", budget=None))
    with pytest.raises(
        ul.errors.BadCheckpoint, match="dgl's heads belong to the stages they were made for; resume with 3"
    ):
        go_on(tmp_path, 2)


def test_groups_of_parameters_cannot_be_dealt_out(tmp_path):
    def grouped(parameters):
        return torch.optim.SGD([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:]}], lr=0.01)

    saved_by(tmp_path, ul.credit.Backprop(), optimizer=grouped)
    with pytest.raises(ul.errors.BadCheckpoint, match="several groups"):
        ul.Trainer.resume(tmp_path, ul.cut(mlp(), 2, like=TRAIN.x[:4]), stages=2, optimizer=grouped)


def test_a_chain_of_another_length_must_be_meant(tmp_path):
    saved_by(tmp_path, ul.credit.Backprop())
    with pytest.raises(ul.errors.BadCheckpoint, match=r"has 3 stages, the given chain 2; .* stages=2"):
        ul.Trainer.resume(tmp_path, ul.cut(mlp(), 2, like=TRAIN.x[:4]))


def test_a_network_of_our_own_needs_no_chain(tmp_path):
    torch.manual_seed(0)
    model = ul.models.build("mlp", input_shape=(5,), classes=3)
    whole = ul.Trainer(
        ul.cut(model.double(), 3, like=TRAIN.x[:4]), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1), seed=1
    )
    whole.fit(TRAIN, 1, batch_size=12, checkpoint=tmp_path)
    resumed = ul.Trainer.resume(tmp_path, stages=2)
    for run in (whole, resumed):
        run.fit(TRAIN, 2, batch_size=12)
    torch.testing.assert_close(by_user_name(resumed), by_user_name(whole), **CLOSE)
    assert not torch.equal(next(iter(state(resumed).values())), torch.zeros(()))
