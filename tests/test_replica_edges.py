"""What a second reading of cyclic data parallelism and ACCO found: checkpoints of other rules, ensembles, memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import unlocked as ul
from unlocked.errors import BadCheckpoint, InvalidChoice

from methods import batch, mlp, momentum

CDP = ul.consensus.CDP


def session(rule, optimizer=momentum, model=None, **options):
    chain = ul.cut(model or mlp(5), 3, like=batch()[0])
    options = {"accumulate": rule.fewest} | options
    return ul.Trainer(chain, consensus=rule, replicas=3, optimizer=optimizer, **options)


def trained(*arguments, steps=3, **options):
    made = session(*arguments, **options)
    for k in range(steps):
        made.step(*batch(12, k))
    return made


@pytest.mark.parametrize("form", ["ring", "single-device", "model-parallel", "zero"])
def test_nothing_outlives_a_trainer(form):
    made = trained(CDP("v1", form=form))
    references = [weakref.ref(x) for x in made.chains[0].parameters()]
    del made
    gc.collect()
    assert not any(reference() is not None for reference in references)


@pytest.mark.parametrize("form", ["ring", "single-device", "model-parallel", "zero"])
def test_the_ensemble_of_equal_replicas_is_the_network(form):
    made, (x, _) = trained(CDP(form=form)), batch(4)
    expected = torch.softmax(made.chains[0].eval()(x), dim=-1)
    torch.testing.assert_close(made.ensemble(x), expected)


def test_statistics_that_cannot_be_averaged_are_refused():
    with pytest.raises(InvalidChoice, match="BatchNorm statistics cannot be averaged"):
        session(CDP(form="zero"), model=mlp(3, norm=True), batchnorm="average")


@pytest.mark.parametrize("foreach", [False, True])
def test_weight_prediction_uses_the_same_gradient_twice(foreach):
    def nesterov(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, foreach=foreach)

    made, plain = (
        trained(ul.consensus.WP(), nesterov, steps=4),
        trained(
            ul.consensus.WP(),
            lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, foreach=False),
            steps=4,
        ),
    )
    for x, y in zip(made.chains[0].parameters(), plain.chains[0].parameters()):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "rule", [ul.consensus.ACCO(), ul.consensus.DPU(), ul.consensus.WP()], ids=lambda rule: rule.name
)
def test_an_optimizer_in_parts_goes_on_under_its_own_rule_only(rule, tmp_path):
    trained(rule).save(tmp_path)
    chain = ul.cut(mlp(5), 3, like=batch()[0])
    with pytest.raises(BadCheckpoint, match=f"in the form of {rule.name}, which all-reduce cannot read"):
        ul.Trainer.resume(tmp_path, chain, consensus=ul.consensus.AllReduce())
    with pytest.raises(BadCheckpoint, match="another number of stages"):
        ul.Trainer.resume(tmp_path, ul.cut(mlp(5), 2, like=batch()[0]), stages=2)


def test_a_whole_optimizer_does_not_go_on_in_parts(tmp_path):
    trained(ul.consensus.AllReduce()).save(tmp_path)
    with pytest.raises(BadCheckpoint, match="in the form of all-reduce, which dpu cannot read"):
        ul.Trainer.resume(tmp_path, ul.cut(mlp(5), 3, like=batch()[0]), consensus=ul.consensus.DPU())


def test_an_option_may_change_on_resuming(tmp_path):
    trained(ul.consensus.ACCO()).save(tmp_path)
    resumed = ul.Trainer.resume(tmp_path, ul.cut(mlp(5), 3, like=batch()[0]), consensus=ul.consensus.ACCO(estimate=0.5))
    assert all(weights.optimizer_state() for weights in resumed.weights)


@pytest.mark.parametrize("form", ["model-parallel", "zero"])
def test_replicas_that_saved_nothing_are_no_damage(form, tmp_path):
    trained(CDP(form=form)).save(tmp_path)
    chain = ul.cut(mlp(5), 2, like=batch()[0])
    resumed = ul.Trainer.resume(tmp_path, chain, consensus=ul.consensus.AllReduce(), stages=2)
    resumed.step(*batch(12, 3))
    first = resumed.chains[0].state_dict()
    for other in resumed.chains[1:]:
        assert all(torch.equal(x, first[name]) for name, x in other.state_dict().items())
