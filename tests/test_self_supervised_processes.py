"""Rules that learn from views give the same numbers on several processes as in one, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import unlocked as ul
from unlocked.worlds import Distributed

from methods import CONTRASTS
from processes import run_processes

CASES = [
    ("simclr", ul.consensus.AllReduce, 2),
    ("dgssl", ul.consensus.AllReduce, 1),
    ("dgssl-barlow-twins", lambda: ul.consensus.AllReduce(bucket_mb=0), 2),
    ("oracle-simclr", lambda: ul.consensus.WASH(p=0.3), 2),
    ("dgssl-llm", ul.consensus.AllReduce, 2),
    ("dgssl-llm-oracle", ul.consensus.AllReduce, 1),
    ("simclr", lambda: ul.consensus.PAPA(period=2), 1),
]


def data():
    source = torch.Generator().manual_seed(0)
    y = torch.randint(2, (32,), generator=source)
    x = torch.randn(32, 1, 4, 4, generator=source) + y[:, None, None, None]
    return ul.data.from_tensors(x, y, augment="views+crop-flip")


def session(case, world=None):
    name, consensus, accumulate = CASES[case]
    torch.manual_seed(2)
    block = [nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8)]
    chain = ul.cut(nn.Sequential(nn.Flatten(), *block), 2, like=data().x[:4])
    rule = next(row.make for row in CONTRASTS if row.name == name)()
    return ul.Trainer(
        chain,
        credit=rule,
        consensus=consensus(),
        replicas=2,
        optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        accumulate=accumulate,
        clip=1.0,
        seed=3,
        world=world,
    )


def outcome(session):
    (first, second) = session.fit(data(), 2, batch_size=8)
    tensors = {
        (weights.worker.replica, weights.worker.stage, name): x.detach().clone()
        for weights in session.weights
        for name, x in nn.Module.state_dict(weights.stage).items()
    }
    names = ("losses", "bytes", "samples", "notes")
    return tensors, [{name: record.get(name) for name in names} for record in (first, second)]


def on_processes(cluster, cases):
    torch.manual_seed(100 + cluster.rank)  # the user's own random state must not matter
    found = []
    for case in cases:
        with Distributed(cluster) as world:
            found.append(outcome(session(case, world)))
    return found


@pytest.mark.parametrize("processes", [2, 4])
def test_on_processes_as_in_one(processes):
    cases = range(len(CASES)) if processes == 2 else [0, 3, 5]
    found = run_processes(on_processes, processes, list(cases))
    for k, case in enumerate(cases):
        tensors, records = outcome(session(case))
        merged = {}
        for rows in found:
            merged |= rows[k][0]
            assert rows[k][1] == records, CASES[case]
        assert merged.keys() == tensors.keys()
        odd = [name for name, x in tensors.items() if not torch.equal(x, merged[name])]
        assert not odd, f"{CASES[case]}: these differ: {odd}"
