"""A process that dies, hangs, fails or is told to stop: the others notice in bounded time and nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time

import pytest
import torch

import unlocked as ul
from test_distributed import here
from unlocked.checkpoint import Writer
from unlocked.cluster import Cluster
from unlocked.cluster import cluster as cluster_module
from unlocked.cluster.rendezvous import Seat
from unlocked.errors import CannotJoin, LostProcess
from unlocked.worlds import Distributed

import methods
from methods import assert_same, data, mlp, trainer
from processes import At, Failed, Processes, Training, finished, kill_me, killed, run_processes

TRAIN = data(48, dtype=torch.float32)


def network():
    return mlp(2, norm=True, dropout=0.2, dtype=torch.float32)


def blank():
    """For a run that goes on."""
    return ul.cut(network(), 2, like=TRAIN.x[:4])


def session(world=None, **options):
    """DGL × WASH on two replicas of two stages, with dropout and momentum."""
    options = {
        "model": network(),
        "stages": 2,
        "replicas": 2,
        "seed": 3,
    } | options
    rules = ul.credit.DGL(head="linear", budget=None), ul.consensus.WASH(p=0.3)
    return trainer(*rules, world=world, **options)


def stop_me():
    os.kill(os.getpid(), signal.SIGSTOP)


def fail():
    raise ul.errors.BadData("The disk is full of bees.")


# ---- noticing --------------------------------------------------------------------------------------------------------


def chain_of_three(cluster, victim, action, links="auto"):
    """Backprop over three stages; the victim does something to itself in its third update. What others are told, and when."""
    world = Distributed(cluster, links=links)
    made = trainer(ul.credit.Backprop(), world=world, seed=3)
    callbacks = [At(3, action)] if cluster.rank == victim else []
    begin = time.monotonic()
    try:
        made.fit(data(480), 1000, batch_size=12, callbacks=callbacks)
    except LostProcess as lost:
        end = time.monotonic() - begin
        world.close()
        return str(lost), end
    raise AssertionError("trained to the end")


@pytest.mark.parametrize("links", ["auto", "gloo"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_is_noticed_by_all_and_named(victim, links):
    with Processes(chain_of_three, 3, victim, kill_me, links) as running:
        survivors = [rank for rank in range(3) if rank != victim]
        for rank in survivors:  # also the one that is not connected to the victim
            sentence, seconds = running.result(rank, 20.0)
            assert f"Process {victim} (pid {running.processes[victim].pid}" in sentence
            assert f"replica 0 stage {victim}" in sentence and "Nothing was saved yet." in sentence
            assert seconds < 5.0


def test_a_stopped_process_is_noticed_within_the_bound():
    with Processes(chain_of_three, 3, 1, stop_me, join={"stuck_after": 3.0}) as running:
        for rank in (0, 2):
            sentence, seconds = running.result(rank, 30.0)
            assert "Process 1 " in sentence and "no sign of life" in sentence
            assert 2.0 < seconds < 8.0


def test_what_a_process_fails_with_is_told_to_the_others():
    with Processes(chain_of_three, 3, 1, fail) as running:
        with pytest.raises(Failed, match="BadData: The disk is full of bees"):
            running.result(1)
        for rank in (0, 2):
            sentence, _ = running.result(rank)
            assert "Process 1 " in sentence and "full of bees" in sentence


def everybody_waits(cluster):
    world = Distributed(cluster)
    (worker,) = world.mesh(2, 1)

    async def program():
        await worker.replicas.peer(1 - worker.replica).recv("never sent")

    begin = time.monotonic()
    with pytest.raises(LostProcess) as lost:
        world.run([(worker, program())])
    world.close()
    return str(lost.value), time.monotonic() - begin


def test_a_deadlock_over_processes_says_who_waits_for_what():
    for sentence, seconds in run_processes(everybody_waits, 2):
        assert "on process 0 replica 0 stage 0 waits for channel 'never sent' from replica 1 stage 0" in sentence
        assert "on process 1 replica 1 stage 0 waits for channel 'never sent' from replica 0 stage 0" in sentence
        assert seconds < 10.0


def nobody_takes(cluster):
    """More messages than there is room for, on a channel nobody takes from, and a wait for another."""
    world = Distributed(cluster)
    (worker,) = world.mesh(1, 2)

    async def program():
        if worker.first:
            for _ in range(12):
                await worker.above.send("untaken", torch.ones(3))
            await worker.above.recv("never sent")
        else:
            await worker.below.recv("never sent either")

    with pytest.raises(LostProcess) as lost:
        world.run([(worker, program())])
    world.close()
    return str(lost.value)


def test_a_deadlock_behind_a_full_channel_is_one():
    for sentence in run_processes(nobody_takes, 2):
        assert "'never sent' from replica 0 stage 1" in sentence and "'never sent either'" in sentence


def one_too_many(cluster):
    world = Distributed(cluster)
    (worker,) = world.mesh(1, 2)

    async def program():
        if worker.first:
            await worker.above.send("x", torch.ones(3))
            await worker.above.send("x", torch.ones(3))
        else:
            await worker.below.recv("x")

    world.run([(worker, program())])
    try:
        world.close()
    except ul.errors.UnlockedError as error:
        return str(error)


def test_messages_never_taken_are_an_error_in_the_end():
    first, second = run_processes(one_too_many, 2)
    assert first is None and "1 on channel 'x' from replica 0 stage 0 to replica 0 stage 1" in second


def slow_but_alive(cluster):
    """One process computes for longer than others would be believed stuck."""
    world = Distributed(cluster)
    (worker,) = world.mesh(1, 2)

    async def program():
        if worker.first:
            await worker.run("F", time.sleep, 4.0)
            await worker.above.send("x", torch.ones(3))
        else:
            assert (await worker.below.recv("x")).sum() == 3

    world.run([(worker, program())])
    world.close()
    return True


def test_a_process_that_computes_for_long_is_not_stuck():
    with Processes(slow_but_alive, 2, join={"stuck_after": 2.0}) as running:
        assert running.results() == [True, True]


# ---- losing nothing --------------------------------------------------------------------------------------------------


def train(made, **options):
    made.fit(TRAIN, 6, batch_size=12, **options)


TRAINING = Training(session, blank, train, here)


@pytest.mark.timeout(300)
def test_killed_many_times_and_resumed_equals_never_stopped(tmp_path):
    """The four workers on two processes, every fifth time on four: a run goes on on any number of them. Twenty times with
    `--all-pairs`."""
    source = random.Random(5)
    whole = session()
    train(whole)
    kills = sorted(source.randint(1, whole.steps - 1) for _ in range(20 if methods.ALL_PAIRS else 8))
    for number, update in enumerate(kills):
        processes = 4 if number % 5 == 0 else 2
        told = killed(TRAINING, processes, tmp_path, source.randrange(processes), update)
        saved = (tmp_path / "LATEST").exists()
        assert all(("The last checkpoint is" in sentence) == saved for sentence in told)
    assert_same(finished(TRAINING, 4, tmp_path), here(whole))


def kill_while_saving(cluster, folder, victim, moment):
    """The second checkpoint is never completed."""
    world = Distributed(cluster)
    made = session(world)
    made.fit(TRAIN, 1, batch_size=12, checkpoint=folder)
    if cluster.rank == victim:
        setattr(Writer, moment, lambda *arguments: kill_me())
    try:
        made.fit(TRAIN, 2, batch_size=12, checkpoint=folder)
    except LostProcess:
        world.close()
        return made.steps


@pytest.mark.parametrize("victim, moment", [(0, "commit"), (1, "tensors"), (3, "json")])
def test_killed_during_a_save_the_previous_checkpoint_loads(tmp_path, victim, moment):
    with Processes(kill_while_saving, 4, tmp_path, victim, moment) as running:
        survivors = [rank for rank in range(4) if rank != victim]
        assert [running.result(rank, 20.0) for rank in survivors] == [8, 8, 8]
    resumed = ul.Trainer.resume(tmp_path, blank())  # on one process
    assert (resumed.steps, resumed.epoch) == (4, 1)
    resumed.fit(TRAIN, 2, batch_size=12)
    whole = session()
    whole.fit(TRAIN, 2, batch_size=12)
    assert_same(here(resumed), here(whole))


def told_to_stop(cluster, folder, number, who):
    """One process gets a signal while all train; all stop at one step and save."""
    world = Distributed(cluster)
    made = session(world)
    if cluster.rank == who:
        threading.Timer(0.7, lambda: os.kill(os.getpid(), number)).start()
    try:
        made.fit(TRAIN, 100000, batch_size=12, checkpoint=folder, checkpoint_every=1000)
    except ul.Interrupted as stop:
        world.close()
        return made.steps, stop.terminated


@pytest.mark.parametrize("number, who", [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_to_one_process_stops_all_at_one_step_saved(tmp_path, number, who):
    found = run_processes(told_to_stop, 4, tmp_path, number, who)
    assert len(set(found)) == 1
    steps, terminated = found[0]
    assert steps > 0 and terminated == (number == signal.SIGTERM)
    resumed = ul.Trainer.resume(tmp_path, blank())
    assert resumed.steps == steps
    whole = session()
    with pytest.raises(ul.Interrupted):
        whole.fit(TRAIN, 100000, batch_size=12, callbacks=[At(steps, lambda: signal.raise_signal(signal.SIGINT))])
    assert_same(here(resumed), here(whole))


# ---- coming together -------------------------------------------------------------------------------------------------


def two_seeds(cluster):
    with pytest.raises(CannotJoin) as refused:
        session(Distributed(cluster), seed=cluster.rank)
    return str(refused.value)


def two_models(cluster):
    torch.manual_seed(cluster.rank)
    with pytest.raises(CannotJoin) as refused:
        session(Distributed(cluster), model=torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)))
    return str(refused.value)


def two_rates(cluster):
    with pytest.raises(CannotJoin) as refused:
        session(Distributed(cluster), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1 * (1 + cluster.rank)))
    return str(refused.value)


def two_reductions(cluster):
    with pytest.raises(CannotJoin) as refused:
        session(Distributed(cluster, reduction=("ordered", "backend")[cluster.rank]))
    return str(refused.value)


@pytest.mark.parametrize(
    "function, fact",
    [(two_seeds, "seed"), (two_models, "initial weights"), (two_rates, "optimizer"), (two_reductions, "reduction")],
)
def test_processes_that_were_told_different_things_are_refused(function, fact):
    for sentence in run_processes(function, 2):
        assert fact in sentence and "on rank 1" in sentence and "on rank 0" in sentence


def too_many(cluster):
    with pytest.raises(ul.errors.InvalidChoice) as refused:
        session(Distributed(cluster), replicas=1)
    return str(refused.value)


def test_more_processes_than_workers_is_refused():
    assert "3 processes were started for 2 worker(s)" in run_processes(too_many, 3)[0]


def join_as(seats, **options):
    """What joining with these seats ends with, each on a thread of its own."""
    found = {}

    def join(k, seat):
        try:
            Cluster.join(seat=seat, join_within=2.0, **options).close()
            found[k] = "joined"
        except CannotJoin as refused:
            found[k] = str(refused)

    threads = [threading.Thread(target=join, args=(k, seat)) for k, seat in enumerate(seats)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    return [found[k] for k in range(len(seats))]


@pytest.fixture
def port():
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port


def test_wrong_counts_missing_ranks_and_doubled_ranks_are_sentences(port):
    alone = join_as([Seat(0, 2, "127.0.0.1", port, True, 0)])
    assert "1 of 2 processes have come" in alone[0] and "rank(s) 1 are missing" in alone[0]
    counts = join_as([Seat(0, 2, "127.0.0.1", port, True, 1), Seat(1, 3, "127.0.0.1", port, True, 1)])
    assert any("was told there are 3 processes, rank 0 was told 2" in sentence for sentence in counts)
    doubled = join_as([Seat(0, 2, "127.0.0.1", port, True, 2), Seat(0, 2, "127.0.0.1", port, True, 2)])
    assert any("Two processes say they are rank 0" in sentence for sentence in doubled)


def test_nobody_at_the_rendezvous_and_a_port_in_use_are_sentences():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (refused,) = join_as([Seat(0, 2, "127.0.0.1", taken.getsockname()[1], False, 0)])
        assert "is in use" in refused
        free = taken.getsockname()[1]
    (refused,) = join_as([Seat(1, 2, "127.0.0.1", free, False, 0)])
    assert f"Nobody answers at the rendezvous 127.0.0.1:{free}" in refused


def test_versions_that_differ_are_a_sentence(port, monkeypatch):
    honest, lock = cluster_module.describe_self, threading.Lock()
    asked = []

    def one_lies(address):
        with lock:
            asked.append(1)
            return honest(address) | ({"torch": "2.11.0"} if len(asked) == 2 else {})

    monkeypatch.setattr(cluster_module, "describe_self", one_lies)
    for sentence in join_as([Seat(rank, 2, "127.0.0.1", port, True, 0) for rank in range(2)]):
        assert "2.11.0" in sentence and "install the same version everywhere" in sentence


def test_without_a_launcher_rank_0_hosts_the_store():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    assert join_as([Seat(rank, 3, "127.0.0.1", free, False, 0) for rank in range(3)]) == ["joined"] * 3
