"""Asynchronous DGL over real processes: every stage makes its updates, nothing is lost uncounted."""

from __future__ import annotations

import os
import signal

import pytest
import torch

import unlocked as ul
from test_async_dgl import balanced, made
from unlocked.worlds import Distributed

from methods import batch, data, mlp
from processes import run_processes

TRAIN = data(240)
BATCHES = 20


def on_processes(cluster, cases, folder):
    torch.manual_seed(100 + cluster.rank)
    found = []
    for k, (options, slow, links) in enumerate(cases):
        with Distributed(cluster, slow=slow, links=links) as world:
            session = made(world, **options)
            records = session.fit(TRAIN, 2, batch_size=12)
            session.save(folder / f"{k}")
            found.append((records, {w.worker.stage: w.worker.version for w in session.weights}))
    return found


class Stop(ul.callbacks.Callback):
    """Ctrl-C on the process of the last stage, inside the second epoch."""

    done = False

    def on_step(self, session, record):
        if record["epoch"] == 1 and not self.done:
            self.done = True
            os.kill(os.getpid(), signal.SIGINT)


def stopped(cluster, folder):
    with Distributed(cluster, slow={0: 5.0}) as world:
        session = made(world, buffer=2)
        try:
            session.fit(TRAIN, 50, batch_size=12, checkpoint=folder, callbacks=[Stop()])
        except ul.Interrupted as stop:
            return str(stop), session.epoch, session.batch_in_epoch
    return None


def test_ctrl_c_on_one_process_ends_the_epoch_on_all_and_it_goes_on(tmp_path):
    found = run_processes(stopped, 2, tmp_path)
    sentence, epoch, batch_in_epoch = found[0]
    assert "Saved to" in sentence and found[1][1:] == (epoch, batch_in_epoch) and 1 <= epoch < 50
    resumed = ul.Trainer.resume(tmp_path, ul.cut(mlp(), 3, like=batch()[0]), world=ul.worlds.Simulated())
    record = resumed.fit(TRAIN, epoch + 1, batch_size=12)[0]
    assert [row["updates"] for row in record["buffers"]] == [BATCHES] * 3


CASES = [
    ({"buffer": 2}, {1: 3.0}, "auto"),
    ({"buffer": 3, "ends": "data", "reuse": 2, "quantise": "int8"}, {2: 4.0}, "gloo"),
    ({"buffer": 4, "policy": "uniform", "ends": "data"}, {}, "auto"),
]


@pytest.mark.parametrize("processes", [2, 3])
def test_stages_on_processes_make_their_updates_and_count_what_they_get(processes, tmp_path):
    found = run_processes(on_processes, processes, CASES, tmp_path)
    for k, (options, _, _) in enumerate(CASES):
        records = found[0][k][0]
        alike = ("step", "losses", "bytes", "samples", "buffers", "learning_rates")
        assert all(rows[k][0][e][name] == records[e][name] for rows in found for e in range(2) for name in alike)
        versions = {}
        for rows in found:
            versions |= rows[k][1]
        epochs = [record["buffers"] for record in records]
        for rows, before in zip(epochs, [None, epochs[0]]):
            balanced(rows, before)
            assert rows[0]["updates"] == BATCHES
            assert options.get("ends") == "data" or all(row["updates"] == BATCHES for row in rows)
            assert options.get("reuse", 99) >= max(int(uses) for row in rows for uses in [*row["left"], 0])
        assert versions == {j: sum(rows[j]["updates"] for rows in epochs) for j in range(3)}
        # what processes have saved goes on on a clock
        resumed = ul.Trainer.resume(tmp_path / f"{k}", ul.cut(mlp(), 3, like=batch()[0]), world=ul.worlds.Simulated())
        assert {w.worker.stage: w.worker.version for w in resumed.weights} == versions
        balanced(resumed.fit(TRAIN, 3, batch_size=12)[0]["buffers"], epochs[-1])
