"""The rules that average now and then, on several processes: the numbers of one process, bit for bit."""

from __future__ import annotations

import time

import torch

import unlocked as ul
from test_averaging import session as quiet
from test_averaging import still, train
from test_distributed import here
from unlocked.worlds import Distributed, InProcess

from methods import data, mlp
from processes import run_processes

rules = ul.consensus
TRAIN, TEST = data(96, dtype=torch.float32), data(36, 1, dtype=torch.float32)

TWO = {
    "papa": rules.PAPA(alpha=0.3, period=3),
    "papa overlapped": rules.PAPA(alpha=0.3, period=5, overlap=4, compression="topk:0.2"),
    "local-sgd": rules.LocalSGD(period=3, optimizer_state="average", shared=2),
    "local-sgd overlapped": rules.LocalSGD(period=(3, 5), overlap=2, staggered=True),
    "local-sgd int8": rules.LocalSGD(period=2, compression="int8:32"),
    "slowmo": rules.SlowMo(period=3, compression="bf16"),
    "diloco": rules.DiLoCo(period=3),
    "diloco streaming": rules.DiLoCo(period=6, fragments=3, overlap=5, mixing=0.5, compression="int8"),
    "co2": rules.CO2(period=3, clip=0.1),
    "co2 topk": rules.CO2(period=4, compression="topk:0.2"),
    "easgd": rules.EASGD(period=3),
    "easgd overlapped": rules.EASGD(period=4, overlap=3, compression="bf16"),
    "papa-all": rules.PAPAAll(epochs=1, shared=1, compression="int8"),
    "papa-2": rules.PAPA2(epochs=1),
    "btm": rules.BTM(shared=2),
}
FOUR = {
    "hierarchy": rules.LocalSGD(hierarchy=((2, 2), (6, 4)), optimizer_state="average"),
    "hierarchy overlapped": rules.LocalSGD(hierarchy=((3, 2), (6, 4)), overlap=2, compression="int8"),
    "papa": rules.PAPA(alpha=0.3, period=4, overlap=3),
    "papa-2": rules.PAPA2(epochs=1, shared=1),
    "diloco streaming": rules.DiLoCo(period=4, fragments=2, overlap=3, mixing=0.5),
}


def session(name, world=None, replicas=2, **options):
    """Two stages with everything on; four replicas: one stage."""
    rule = (TWO if replicas == 2 else FOUR)[name]
    stages = 2 if replicas == 2 else 1
    model = mlp(2, norm=True, dropout=0.2, dtype=torch.float32)
    return ul.Trainer(
        ul.cut(model, stages, like=TRAIN.x[:4]),
        credit=ul.credit.DGL(head="linear", budget=None) if "streaming" in name else None,
        consensus=rule,
        replicas=replicas,
        optimizer=lambda ps: torch.optim.Adam(ps, lr=0.02),
        schedule=lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20),
        batchnorm="average" if "papa" in name or "hierarchy" in name else "local",
        accumulate=2,
        seed=3,
        world=world or InProcess(),
        **options,
    )


def outcome(made):
    """What must be alike in all worlds; validation after every epoch settles what is under way."""
    records = made.fit(TRAIN, 3, batch_size=12, validate=TEST)
    kept = ("step", "losses", "validation", "learning_rates", "samples")
    made.settle()
    average = made.averaged()
    return here(made), [{k: r[k] for k in kept} for r in records], average and dict(average.state_dict())


def on_processes(cluster, names, replicas, links):
    torch.manual_seed(100 + cluster.rank)
    found = []
    for name in names:
        with Distributed(cluster, links=links) as world:
            found.append(outcome(session(name, world, replicas)))
    return found


def compare(processes, names, replicas, links="auto"):
    found = run_processes(on_processes, processes, list(names), replicas, links)
    for k, name in enumerate(names):
        parameters, records, average = outcome(session(name, replicas=replicas))
        merged = {}
        for rows in found:
            merged |= rows[k][0]
        assert merged.keys() == parameters.keys()
        odd = [place for place, x in parameters.items() if not torch.equal(x, merged[place])]
        assert not odd, f"{name}: these differ: {odd}"
        assert all(rows[k][1] == records for rows in found), name
        assert all(torch.equal(x, found[0][k][2][key]) for key, x in average.items()), name


def test_two_processes_equal_one():
    compare(2, TWO, 2)


def test_four_processes_equal_one():
    compare(4, ["papa overlapped", "local-sgd", "diloco streaming", "co2 topk", "easgd", "papa-2"], 2)


def test_four_replicas_on_two_and_four_processes():
    compare(4, list(FOUR)[::2], 4)
    compare(2, list(FOUR)[1::2], 4)


def test_over_gloo():
    compare(2, ["papa overlapped", "local-sgd overlapped", "co2"], 2, links="gloo")


# ---- saved in one world, gone on with in another ---------------------------------------------------------------------

CARRIED = [
    "papa overlapped",
    "local-sgd overlapped",
    "slowmo",
    "diloco streaming",
    "co2 topk",
    "easgd overlapped",
    "papa-all",
]


def steps(made, begin, end):
    for k in range(begin, end):
        made.step(TRAIN.x[4 * k : 4 * k + 24], TRAIN.y[4 * k : 4 * k + 24])
        if k % 3 == 2:
            made.end_epoch()
    return made


def saved(cluster, folder, stop):
    for name in CARRIED:
        with Distributed(cluster) as world:
            made = steps(session(name, world), 0, stop)
            made.save(folder / name)
            steps(made, stop, stop + 1).settle()  # saving changed nothing here


def resumed(cluster, folder, stop):
    found = []
    for name in CARRIED:
        with Distributed(cluster) as world:
            chain = ul.cut(mlp(2, norm=True, dropout=0.2, dtype=torch.float32), 2, like=TRAIN.x[:4])
            made = steps(ul.Trainer.resume(folder / name, chain, world=world), stop, 14)
            made.settle()
            found.append(here(made))
    return found


def test_saved_on_processes_and_resumed_on_others_and_in_one(tmp_path):
    """After 7 updates most exchanges are under way, some before and some after their turn."""
    for stop in (7,):
        folder = tmp_path / str(stop)
        run_processes(saved, 2, folder, stop)
        on_four = run_processes(resumed, 4, folder, stop)
        in_one = resumed_here(folder, stop)
        for k, name in enumerate(CARRIED):
            expected = here(steps(session(name), 0, 14))
            merged = {}
            for rows in on_four:
                merged |= rows[k]
            for found in (merged, in_one[k]):
                odd = [place for place, x in expected.items() if not torch.equal(x, found[place])]
                assert not odd, f"{name} after {stop}: these differ: {odd}"


def resumed_here(folder, stop):
    found = []
    for name in CARRIED:
        chain = ul.cut(mlp(2, norm=True, dropout=0.2, dtype=torch.float32), 2, like=TRAIN.x[:4])
        found.append(here(steps(ul.Trainer.resume(folder / name, chain), stop, 14)))
    return found


def test_saved_in_one_process_and_resumed_on_two(tmp_path):
    for name in CARRIED:
        steps(session(name), 0, 7).save(tmp_path / name)
    rows = run_processes(resumed, 2, tmp_path, 7)
    for k, name in enumerate(CARRIED):
        expected = here(steps(session(name), 0, 14))
        merged = rows[0][k] | rows[1][k]
        odd = [place for place, x in expected.items() if not torch.equal(x, merged[place])]
        assert not odd, f"{name}: these differ: {odd}"


# ---- asynchronous EASGD ----------------------------------------------------------------------------------------------


def elastic(cluster, replicas):
    """Replicas apart that make no step; settled now and then. Their weights, replica 0's centre and the averaged network."""
    with Distributed(cluster) as world:
        made = quiet(rules.EASGD(rho=0.2, period=2, asynchronous=True), replicas=replicas, optimizer=still, world=world)
        source = torch.Generator().manual_seed(0)
        begin = [
            torch.randn(sum(x.numel() for x in mlp().parameters()), generator=source).double() for _ in range(replicas)
        ]
        found = []
        with torch.no_grad():
            for weights in made.weights:
                row = begin[weights.worker.replica]
                for x, part in zip(weights.parameters, row.split([x.numel() for x in weights.parameters])):
                    x.copy_(part.view_as(x))
        for k in range(30):
            time.sleep(0.003 * ((cluster.rank + k) % 3))
            train(made, k, k + 1)
            if k % 7 == 6:
                made.settle()
                average = made.averaged()
                rows = {
                    w.worker.replica: torch.cat([x.detach().reshape(-1) for x in w.parameters]) for w in made.weights
                }
                holder = [torch.cat(w.centre) for w in made.weights if w.worker.replica == 0]
                flat = None if average is None else torch.cat([x.detach().reshape(-1) for x in average.parameters()])
                found.append((rows, holder, flat))
    return begin, found


def test_asynchronous_easgd_on_processes_keeps_the_sum():
    for processes, replicas in ((2, 2), (3, 3)):
        rows = run_processes(elastic, processes, replicas)
        begin = rows[0][0]
        expected = sum(begin) + begin[0]
        for k in range(len(rows[0][1])):
            merged = {}
            for row in rows:
                merged |= row[1][k][0]
            (centre,) = rows[0][1][k][1]
            torch.testing.assert_close(sum(merged.values()) + centre, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(rows[0][1][k][2], centre)
        assert not torch.equal(begin[0], centre)
