"""Data of its own for each replica."""

from __future__ import annotations

import pytest
import torch

import unlocked as ul
from unlocked.data import Domains
from unlocked.errors import BadData

from methods import assert_same, data, mlp, state, trainer


def sets(*sizes):
    return [data(size, seed=k) for k, size in enumerate(sizes)]


def fit(domains, rule, epochs=2, **options):
    made = trainer(ul.credit.Backprop(), rule, replicas=len(domains.sets), **options)
    made.fit(domains, epochs, batch_size=12)
    return made


def test_each_replica_trains_on_its_own_domain():
    domains = Domains(sets(36, 36, 36))
    together = fit(domains, ul.consensus.Independent())
    for n, one in enumerate(domains.sets):
        alone = trainer(
            ul.credit.Backprop(), replicas=n + 1
        )  # replica n of an independent population on that set alone
        alone.fit(one, 2, batch_size=12)
        for a, b in zip(together.chains[n].parameters(), alone.chains[n].parameters()):
            assert torch.equal(a, b)


def test_an_epoch_is_as_long_as_the_smallest_domain_allows():
    made = fit(Domains(sets(60, 36)), ul.consensus.BTM(shared=1))
    assert made.steps == 2 * 3
    assert len(Domains(sets(60, 36))) == 36


def test_branches_share_gradients_in_the_common_phase_only():
    made = fit(Domains(sets(36, 36)), ul.consensus.BTM(shared=1), epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(*(chain.parameters() for chain in made.chains)))
    made.fit(Domains(sets(36, 36)), 2, batch_size=12)
    assert not all(torch.equal(a, b) for a, b in zip(*(chain.parameters() for chain in made.chains)))


def test_a_resumed_epoch_goes_on_in_every_domain(tmp_path):
    domains = Domains(sets(60, 48))
    whole = fit(domains, ul.consensus.PAPA(period=2), 2)
    part = trainer(ul.credit.Backprop(), ul.consensus.PAPA(period=2), replicas=2)

    class Stop(ul.callbacks.Callback):
        def on_step(self, session, record):
            if session.steps == 3:
                session.save(tmp_path)
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        part.fit(domains, 2, batch_size=12, callbacks=[Stop()])
    chain = ul.cut(mlp(), 3, like=domains.sets[0].x[:4])
    resumed = ul.Trainer.resume(tmp_path, chain)
    resumed.batch_in_epoch = 3  # saved by hand inside a step, before the loop counted it
    resumed.fit(domains, 2, batch_size=12)
    assert_same(state(resumed), state(whole))


def test_statistics_are_refreshed_from_all_domains():
    first, second = sets(36, 36)
    mixed = list(Domains([first, second]).mixed(12, epoch=0, seed=5))
    assert len(mixed) == 6
    rows = [{tuple(x.tolist()) for one in mixed[k::2] for x in one[0]} for k in range(2)]
    assert rows[0] == {tuple(x.tolist()) for x in first.x} and rows[1] == {tuple(x.tolist()) for x in second.x}


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Domains([]), "a list of at least one Data"),
        (
            lambda: Domains([data(20), ul.data.from_tensors(torch.zeros(9, 4), torch.zeros(9).long())]),
            "differ: samples",
        ),
        (lambda: fit(Domains(sets(36, 36)), ul.consensus.AllReduce()), "splits one data set"),
        (
            lambda: trainer(ul.credit.Backprop(), replicas=3).fit(Domains(sets(36, 36)), 1, batch_size=12),
            "2 domains and a replica 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(make, words):
    with pytest.raises(BadData, match=words):
        make()
