"""Gossip and A²CiD² over real processes: with drawn clocks the numbers of one process; free ones conserve."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import unlocked as ul
from test_distributed import here
from test_gossip import Recorded, Stop, Watch, blank, everything
from unlocked.rng import generator
from unlocked.worlds import Distributed

from methods import batch, data, mlp
from processes import run_processes

Gossip, ACiD = ul.consensus.Gossip, ul.consensus.ACiD
TRAIN, TEST = data(96, dtype=torch.float32), data(36, 1, dtype=torch.float32)
RULES = {"gossip": Gossip(graph="complete", rate=1.5), "acid": ACiD(rate=2.0, eta=0.4, alpha_tilde=0.8)}


def session(name, replicas, world=None):
    return everything(RULES[name], world, replicas=replicas)


def outcome(made):
    """What must be alike in all worlds."""
    records = made.fit(TRAIN, 2, batch_size=4, validate=TEST)
    kept = ("step", "losses", "validation", "learning_rates", "samples", "bytes")
    average = made.averaged()
    return here(made), [{k: r[k] for k in kept} for r in records], average and dict(average.state_dict())


def on_processes(cluster, cases, folder):
    torch.manual_seed(100 + cluster.rank)
    found = []
    for name, replicas, links in cases:
        with Distributed(cluster, links=links) as world:
            made = session(name, replicas, world)
            made.fit(TRAIN, 1, batch_size=4)
            made.save(folder / f"{name}{replicas}")
            found.append(outcome(made))
    return found


@pytest.mark.parametrize(
    ("processes", "cases"),
    [
        (2, [("gossip", 2, "gloo"), ("acid", 4, "auto")]),
        (3, [("gossip", 4, "auto"), ("acid", 3, "auto")]),
    ],
    ids=["two", "three"],
)
def test_with_clocks_processes_give_the_numbers_of_one_and_what_they_save_goes_on_in_one(processes, cases, tmp_path):
    found = run_processes(on_processes, processes, cases, tmp_path)
    for k, (name, replicas, _) in enumerate(cases):
        made = session(name, replicas)
        made.fit(TRAIN, 1, batch_size=4)
        parameters, records, average = outcome(made)
        resumed, *_ = outcome(ul.Trainer.resume(tmp_path / f"{name}{replicas}", blank()))
        everywhere = {}
        for rows in found:
            everywhere |= rows[k][0]
        for other in (everywhere, resumed):
            assert other.keys() == parameters.keys()
            odd = [place for place, x in parameters.items() if not torch.equal(x, other[place])]
            assert not odd, f"{name}: these differ: {odd}"
        assert all(rows[k][1] == records for rows in found), name
        assert all(torch.equal(x, found[0][k][2][key]) for key, x in average.items()), name


# ---- replicas that run freely ----------------------------------------------------------------------------------------

BATCHES = 180


class Slow(nn.Module):
    """Takes its time on one process."""

    seconds = 0.0

    def forward(self, x):
        time.sleep(Slow.seconds)
        return x


def chain():
    return ul.cut(nn.Sequential(Watch(), Slow(), *mlp(1)), 1, like=batch()[0])


def freely(world, replicas, rule):
    made = ul.Trainer(chain(), consensus=rule, replicas=replicas, optimizer=Recorded, world=world)
    with torch.no_grad():
        for replica, one in enumerate(made.chains):
            for k, x in enumerate(one.parameters()):
                if x.device.type != "meta":
                    source = torch.Generator().manual_seed(10 * replica + k)
                    x.copy_(torch.randn(x.shape, generator=source, dtype=x.dtype))
    return made


def weights_here(made):
    """(replica) → x and x̃ in a row."""
    found = {}
    for weights in made.weights:
        x = torch.cat([x.detach().reshape(-1) for x in weights.parameters])
        found[weights.worker.replica] = x, weights.copies.tilde[0].clone() if weights.copies.tilde else x
    return found


def drawn(made, worker):
    """The exchanges due after each gradient: Poisson of half the exchanges that a replica takes part in."""
    half = torch.tensor(0.5 * made.consensus.rate)
    place = ("exchanges due", worker.stage, worker.replica)
    return sum(int(torch.poisson(half, generator(made.seed, *place, k))) for k in range(worker.version))


def books(made, begin, records):
    return {
        "begin": begin,
        "end": weights_here(made),
        "moved": {w.worker.replica: w.store.optimizer.moved for w in made.weights},
        "versions": {w.worker.replica: w.worker.version for w in made.weights},
        "exchanges": {w.worker.replica: w.exchanges for w in made.weights},
        "due": {w.worker.replica: w._due for w in made.weights},
        "drawn": {w.worker.replica: drawn(made, w.worker) for w in made.weights},
        "seen": [tuple(values) for _, values in Watch.seen],
        "samples": [record["samples"] for record in records],
        "steps": made.steps,
    }


def free_run(cluster, replicas, rule):
    with Distributed(cluster) as world:
        Slow.seconds = 0.004 if cluster.rank == 0 else 0.0005
        made = freely(world, replicas, rule)
        begin = weights_here(made)
        Watch.seen.clear()
        records = made.fit(data(4 * BATCHES), 1, batch_size=4)
        return books(made, begin, records)


def merged(found, key):
    return {replica: value for row in found for replica, value in row[key].items()}


def order(epoch=0):
    return sorted(tuple(x[:, 0].tolist()) for x, _ in data(4 * BATCHES).batches(4, epoch=epoch, seed=0))


@pytest.mark.parametrize(("processes", "replicas"), [(3, 3), (2, 4)])
def test_free_replicas_end_conserve_and_use_every_batch_once(processes, replicas):
    rule = (ACiD if replicas == 3 else Gossip)(graph="complete", pairing="available", rate=1.5)
    found = run_processes(free_run, processes, replicas, rule)
    begin, end, moved = (merged(found, key) for key in ("begin", "end", "moved"))
    mean = sum(x for x, _ in begin.values()) + sum(moved.values())
    torch.testing.assert_close(sum(x for x, _ in end.values()), mean, rtol=0, atol=1e-11)
    if rule.name == "acid":
        torch.testing.assert_close(sum(x for _, x in end.values()), mean, rtol=0, atol=1e-11)
    for k in (0, 1) if rule.name == "acid" else (0,):
        assert max(float((x[k] - mean / replicas).abs().max()) for x in end.values()) > 1e-3  # they differ
    assert all(row["samples"] == [4 * BATCHES] and row["steps"] == BATCHES // replicas for row in found)
    assert sorted(used for row in found for used in row["seen"]) == order()
    versions = merged(found, "versions")
    assert sum(versions.values()) == BATCHES
    assert 0 < versions[0] < max(versions.values())  # it is on the slow process
    assert all(versions.values())
    exchanges = merged(found, "exchanges")
    for i, row in exchanges.items():
        assert all(exchanges[j][i] == count for j, count in row.items())
    total = sum(sum(row.values()) for row in exchanges.values()) / 2
    drawn = sum(merged(found, "drawn").values())  # what was not made for want of time is still due
    assert total > 0 and total + sum(merged(found, "due").values()) == drawn
    assert 0.75 < drawn / (0.75 * BATCHES) < 1.3  # λ/2 for each gradient


def stopped(cluster, folder, rule):
    with Distributed(cluster) as world:
        Slow.seconds = 0.002
        made = freely(world, 3, rule)
        begin = weights_here(made)
        Watch.seen.clear()
        callbacks = [Stop(15)] if cluster.rank == 1 else []
        with pytest.raises(ul.Interrupted):  # all hear of it with the next signs of life
            made.fit(
                data(4 * BATCHES), 10_000, batch_size=4, callbacks=callbacks, checkpoint=folder, checkpoint_every=10_000
            )
        return books(made, begin, [])


def gone_on(cluster, folder, rule):
    with Distributed(cluster) as world:
        Watch.seen.clear()
        made = ul.Trainer.resume(folder, chain(), optimizer=Recorded, world=world)
        begin = weights_here(made)
        records = made.fit(data(4 * BATCHES), made.epoch + 1, batch_size=4)
        return books(made, begin, records)


def test_free_replicas_stop_together_at_a_whole_round_and_go_on(tmp_path):
    rule = ACiD(pairing="available")
    first = run_processes(stopped, 3, tmp_path, rule)
    (steps,) = {row["steps"] for row in first}
    assert steps >= 5
    assert sum(len(row["seen"]) for row in first) == sum(merged(first, "versions").values()) == 3 * steps
    second = run_processes(gone_on, 3, tmp_path, rule)
    for replica, kept in merged(first, "end").items():
        assert all(torch.equal(x, y) for x, y in zip(merged(second, "begin")[replica], kept))
    epochs = -(-3 * steps // BATCHES)
    assert [(row["samples"], row["steps"]) for row in second] == [([4 * BATCHES], epochs * BATCHES // 3)] * 3
    used = sorted(used for row in [*first, *second] for used in row["seen"])
    assert used == sorted(one for epoch in range(epochs) for one in order(epoch))
    x, tilde = (sum(row[k] for row in merged(second, "end").values()) for k in (0, 1))
    torch.testing.assert_close(x, tilde, rtol=0, atol=1e-11)


def spread(cluster):
    with Distributed(cluster) as world:
        made = everything(Gossip(pairing="available"), world, replicas=1)
        made.fit(TRAIN, 2, batch_size=4)
        return here(made)


def test_the_stages_of_a_free_replica_on_two_processes_get_the_same_batches():
    """It has nobody to gossip with: then it is ordinary training, bit for bit."""
    found = run_processes(spread, 2)
    alone = everything(ul.consensus.Independent(), None, replicas=1)
    alone.fit(TRAIN, 2, batch_size=4)
    expected, together = here(alone), found[0] | found[1]
    assert expected.keys() == together.keys()
    assert all(torch.equal(x, together[place]) for place, x in expected.items())
