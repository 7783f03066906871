"""The kernel: FIFO channels, exchanges, deadlocks in words, timelines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.errors import Deadlock, UnlockedError
from unlocked.simulation.retiming import retimed
from unlocked.timeline import Act, Timeline
from unlocked.worlds import InProcess


def run(replicas, stages, program):
    world = InProcess()
    workers = world.mesh(replicas, stages)
    return world.run([(worker, program(worker)) for worker in workers])


@given(st.lists(st.sampled_from(["a", "b"]), max_size=12), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_a_channel_is_first_in_first_out_whatever_the_order_of_receives(channels, rng):
    received = {"a": [], "b": []}
    order = list(channels)
    rng.shuffle(order)

    async def program(worker):
        if worker.first:
            for k, channel in enumerate(channels):
                await worker.above.send(channel, torch.tensor(k))
        else:
            for channel in order:
                received[channel].append(int(await worker.below.recv(channel)))

    run(1, 2, program)
    for channel in "ab":
        assert received[channel] == [k for k, name in enumerate(channels) if name == channel]


@given(st.permutations(range(6)))
@settings(deadline=None, max_examples=20)
def test_the_result_does_not_depend_on_who_starts_first(order):
    results = {}

    async def program(worker):
        x = torch.tensor([float(worker.stage + 1)])
        if not worker.last:
            await worker.above.send("up", x)
        if not worker.first:
            x = x * 10 + await worker.below.recv("up")
        (mean,) = await worker.replicas.mean("m", [x])
        results[worker.place] = (mean * (worker.replica + 1)).item()

    world = InProcess()
    workers = world.mesh(2, 3)
    world.run([(workers[k], program(workers[k])) for k in order])
    expected = {0: 10.0 * 0.1, 1: 21.0, 2: 32.0}
    assert results == {(r, s): pytest.approx(expected[s] * (r + 1)) for r in range(2) for s in range(3)}


def test_a_deadlock_says_who_waits_for_which_channel_from_whom():
    async def program(worker):
        link = worker.above if worker.first else worker.below
        await link.recv("ping")

    with pytest.raises(Deadlock) as error:
        run(1, 2, program)
    assert "replica 0 stage 0 waits for channel 'ping' from replica 0 stage 1" in str(error.value)
    assert "replica 0 stage 1 waits for channel 'ping' from replica 0 stage 0" in str(error.value)


def test_a_deadlock_in_an_exchange_names_the_absent_replicas():
    async def program(worker):
        if worker.replica != 1:
            await worker.replicas.mean("grads", [torch.ones(1)])

    with pytest.raises(Deadlock, match=r"exchange 'grads' of stage 0 with replica\(s\) 1"):
        run(3, 1, program)


def test_a_message_nobody_takes_is_an_error_and_the_world_is_clean_afterwards():
    world = InProcess()
    workers = world.mesh(1, 2)

    async def sends(worker):
        await worker.above.send("lost", torch.ones(1))

    async def receives(worker):
        await worker.below.recv("lost")

    async def nothing(worker):
        pass

    with pytest.raises(UnlockedError, match="'lost' from replica 0 stage 0 to replica 0 stage 1 were never taken"):
        world.run([(workers[0], sends(workers[0])), (workers[1], nothing(workers[1]))])
    with pytest.raises(Deadlock):  # the lost message must not turn up in the next run
        world.run([(workers[0], nothing(workers[0])), (workers[1], receives(workers[1]))])


def test_a_failing_program_closes_the_others():
    closed = []

    async def program(worker):
        if worker.first:
            raise ZeroDivisionError
        try:
            await worker.below.recv("x")
        finally:
            closed.append(worker.stage)

    world = InProcess()
    workers = world.mesh(1, 3)
    with pytest.raises(ZeroDivisionError):
        world.run([(worker, program(worker)) for worker in reversed(workers)])
    assert sorted(closed) == [1, 2]


def test_waiting_above_the_last_stage_is_refused_in_a_sentence():
    async def program(worker):
        await worker.above.recv("gradient")

    with pytest.raises(UnlockedError, match="last stage waits on channel 'gradient'"):
        run(1, 1, program)


@given(st.integers(1, 4), st.integers(0, 5))
@settings(deadline=None, max_examples=20)
def test_mean_take_gather_and_swap_are_what_they_say(n, k):
    source = torch.Generator().manual_seed(k)
    values = torch.randn(n, k, generator=source, dtype=torch.float64)
    owners = torch.rand(n, k, generator=source).argsort(0)
    seen = {}

    async def program(worker):
        i = worker.replica
        (mean,) = await worker.replicas.mean("mean", [values[i]])
        taken = await worker.replicas.take("take", values[i], owners)
        rows = await worker.replicas.gather("gather", values[i])
        swapped = await worker.replicas.peer((i ^ 1) if (i ^ 1) < n else i).swap("swap", values[i])
        seen[i] = (mean, taken, torch.stack(list(rows)), swapped)

    run(n, 1, program)
    for i in range(n):
        mean, taken, rows, swapped = seen[i]
        torch.testing.assert_close(mean, values.mean(0))
        assert torch.equal(taken, torch.tensor([values[owners[i, c], c] for c in range(k)], dtype=torch.float64))
        assert torch.equal(rows, values)
        assert torch.equal(swapped, values[(i ^ 1) if (i ^ 1) < n else i])


def test_bytes_are_those_a_cluster_would_send():
    x = torch.zeros(6, dtype=torch.float32)

    async def program(worker):
        await worker.above.send("up", x)
        if not worker.first:
            await worker.below.recv("up")
        await worker.replicas.mean("mean", [x, x])
        await worker.replicas.gather("gather", x)
        await worker.replicas.take("take", x[:3], torch.tensor([[0, 1, 2], [1, 0, 1], [2, 2, 0]]))

    sent = run(3, 2, program).bytes_sent()
    assert sent["up"] == 3 * 24  # the last stage's send goes nowhere
    assert sent["mean"] == 6 * (2 * 2 * 48 // 3)  # 2(N−1)/N of the payload, for each of 6 workers
    assert sent["gather"] == 6 * 2 * 24
    assert sent["take"] == 2 * 4 * (2 + 1 + 1)  # entries whose owner is another replica, both stages


def test_random_numbers_depend_on_the_micro_batch_and_the_place_only():
    drawn = []

    def one_run(order):
        numbers = {}

        async def program(worker):
            for number in order:
                worker.at(number)
                first = await worker.run("F", torch.rand, 1)
                second = await worker.run("F", torch.rand, 1)
                numbers[(worker.place, number)] = (first.item(), second.item())

        run(2, 2, program)
        drawn.append(numbers)

    torch.manual_seed(1)
    one_run([0, 1, 2])
    torch.manual_seed(2)
    one_run([2, 0, 1])
    assert drawn[0] == drawn[1]
    assert len({x for pair in drawn[0].values() for x in pair}) == 24


def test_timeline_prints_and_survives_json():
    async def program(worker):
        worker.at(4)
        worker.version = 7
        await worker.run("F", int)
        await worker.above.send("up", torch.zeros(2))
        if worker.last:
            await worker.below.recv("up")

    timeline = run(1, 2, program)
    assert str(timeline) == "replica 0 stage 0: F4@7 S4@7\nreplica 0 stage 1: F4@7 R4@7"
    assert timeline.table().row_count == 4
    assert Timeline.from_json(timeline.to_json()).acts == timeline.acts


def test_a_median_step_has_median_durations_and_ignores_other_steps():
    def step(length, kind="F"):
        return Timeline([Act(kind, 0, 0, 0, 0, 0, 5.0, 5.0 + length), Act("U", 0, 0, 0, 0, 0, 9.0, 9.0 + 2 * length)])

    steps = [step(100.0, "B"), step(1.0), step(9.0), step(2.0)]
    assert [act.end - act.start for act in Timeline.median(steps)] == [2.0, 4.0]
    assert [act.kind for act in Timeline.median(steps)] == ["F", "U"]


def test_retiming_times_a_pipeline_as_its_dependencies_allow():
    acts = []
    for stage, begin in ((0, 0.0), (1, 10.0)):  # in process: one after the other
        for number in range(2):
            if stage == 1:
                acts.append(Act("R", 0, 1, number, 0, 4, begin, begin, "up", (0, 0)))
            acts.append(Act("F", 0, stage, number, 0, 0, begin, begin + 1.0))
            if stage == 0:
                acts.append(Act("S", 0, 0, number, 0, 4, begin + 1, begin + 1, "up", (0, 1)))
    parallel = retimed(Timeline(acts))
    times = {(act.stage, act.micro_batch): (act.start, act.end) for act in parallel if act.kind == "F"}
    assert times == {(0, 0): (0, 1), (0, 1): (1, 2), (1, 0): (1, 2), (1, 1): (2, 3)}
    assert parallel.span() == 3.0
    assert parallel.idle_share() == pytest.approx(1 - 4 / 6)
