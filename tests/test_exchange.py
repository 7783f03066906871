"""Exchanges and messages give the same numbers and the same counts wherever the workers live."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.errors import InvalidChoice, LostProcess, UnlockedError
from unlocked.links import HEADER_BYTES
from unlocked.rules.mean import ordered_mean
from unlocked.timeline import Act, Timeline
from unlocked.worker import Place
from unlocked.worlds import Distributed, InProcess, exchange
from unlocked.worlds.placement import placement
from unlocked.worlds.scheduler import Scheduler, Wait

from processes import Processes, run_processes

ahead, slots, room = 2, 4, 2  # of a world, a ring, a mailbox
some = settings(max_examples=60, deadline=None)


# ---- the programs of a group, by themselves --------------------------------------------------------------------------


class Member:
    """One of several on asyncio's loop; counts what it puts."""

    def __init__(self, rank, ways):
        self.rank, self.size, self._ways = rank, len(ways), ways
        self.sent = self.messages = 0

    def put(self, to, x):
        assert to != self.rank
        self.sent += x.numel() * x.element_size()
        self.messages += 1
        self._ways[self.rank][to].put_nowait(x)

    def get(self, source):
        assert source != self.rank
        return self._ways[source][self.rank].get()


def meet(size, program, order):
    """`program(member)` of all members, begun in this order. Nothing may be left on the way."""

    async def run():
        ways = [[asyncio.Queue() for _ in range(size)] for _ in range(size)]
        members = [Member(rank, ways) for rank in range(size)]
        tasks = {rank: asyncio.ensure_future(program(members[rank])) for rank in order}
        results = [await asyncio.wait_for(tasks[rank], 10.0) for rank in range(size)]
        assert all(way.empty() for row in ways for way in row)
        return results, members

    return asyncio.run(run())


@st.composite
def groups(draw, least=2):
    """(size, order in which members begin, a source of random numbers)."""
    size = draw(st.integers(least, 6))
    return size, draw(st.permutations(range(size))), torch.Generator().manual_seed(draw(st.integers(0, 999)))


FLOATS = (torch.float32, torch.float64, torch.bfloat16)


@given(
    groups(),
    st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(FLOATS)), min_size=1, max_size=5),
)
@some
def test_a_mean_over_members_is_the_ordered_mean_bit_for_bit(group, shapes):
    """Whoever begins first, for mixed dtypes, and for fewer values than members; and its bytes are as foretold."""
    size, order, source = group
    rows = [
        [torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for shape, dtype in shapes]
        for _ in range(size)
    ]
    given_ = [[x.clone() for x in row] for row in rows]
    results, members = meet(size, lambda member: exchange.mean(member, rows[member.rank]), order)
    for position in range(len(shapes)):
        expected = ordered_mean([row[position] for row in rows])
        plain = rows[0][position].clone()
        for row in rows[1:]:
            plain = plain + row[position]  # the one order, in the dtype itself
        plain = plain / size
        exact = sum(row[position].double() for row in rows) / size
        assert torch.equal(expected, plain)
        torch.testing.assert_close(
            expected.double(), exact, rtol=0, atol=0.05 if plain.dtype == torch.bfloat16 else 1e-6
        )
        for result in results:
            assert result[position].dtype == expected.dtype and torch.equal(result[position], expected)
    for rank, member in enumerate(members):
        assert member.sent == exchange.mean_bytes(rows[rank], rank, size)
        assert member.messages == 2 * (size - 1) * len({dtype for _, dtype in shapes})
        assert all(torch.equal(x, y) for x, y in zip(rows[rank], given_[rank]))  # what was given is untouched


def test_means_of_a_whole_group_leave_twice_the_payload_without_one_share():
    rows = [torch.rand(7), torch.rand(3, 5, dtype=torch.float64)]
    for size in range(2, 9):
        total = sum(exchange.mean_bytes(rows, rank, size) for rank in range(size))
        assert total == 2 * (size - 1) * (7 * 4 + 15 * 8)


@given(groups(), st.integers(0, 30))
@some
def test_take_gives_every_entry_from_its_owner(group, count):
    size, order, source = group
    values = torch.randn(size, count, generator=source)
    owners = (
        torch.stack([torch.randperm(size, generator=source) for _ in range(count)], 1)
        if count
        else torch.zeros(size, 0, dtype=torch.int64)
    )
    kept = values.clone()
    results, members = meet(size, lambda member: exchange.take(member, values[member.rank], owners), order)
    for rank in range(size):
        expected = [float(kept[owners[rank, i], i]) for i in range(count)]
        assert results[rank].tolist() == expected
        assert members[rank].sent == exchange.take_bytes(values[rank], owners, rank)
        assert members[rank].messages <= size - 1
    assert torch.equal(values, kept)


@given(groups(), st.integers(0, 5))
@some
def test_gather_gives_everybodys_in_order(group, count):
    size, order, source = group
    rows = [torch.randn(count + rank, generator=source) for rank in range(size)]
    results, members = meet(size, lambda member: exchange.gather(member, rows[member.rank]), order)
    for rank, result in enumerate(results):
        assert len(result) == size and all(torch.equal(x, y) for x, y in zip(result, rows))
        assert result[rank] is rows[rank]
        assert members[rank].sent == (size - 1) * 4 * (count + rank)


@given(st.integers(0, 1000), st.integers(1, 40))
@some
def test_bounds_part_a_row_without_gaps_and_evenly(count, size):
    edges = exchange.bounds(count, size)
    parts = [end - begin for begin, end in itertools.pairwise(edges)]
    assert len(parts) == size and edges[0] == 0 and edges[-1] == count
    assert min(parts) >= 0 and max(parts) - min(parts) <= 1


@given(st.integers(1, 12), st.integers(1, 12), st.data())
@some
def test_placement_is_in_rows_balanced_and_uses_every_process(replicas, stages, data):
    workers = replicas * stages
    processes = data.draw(st.integers(1, workers))
    ranks = placement(replicas, stages, processes)
    assert list(ranks) == [Place(i, j) for i in range(replicas) for j in range(stages)]
    row = list(ranks.values())
    assert row == sorted(row) and set(row) == set(range(processes))
    counts = [row.count(rank) for rank in range(processes)]
    assert max(counts) - min(counts) <= 1
    with pytest.raises(InvalidChoice, match=f"{workers + 1} processes were started for {workers} worker"):
        placement(replicas, stages, workers + 1)


# ---- the scheduler ---------------------------------------------------------------------------------------------------


def test_who_is_stuck_can_be_asked_from_another_thread_at_any_time():
    """The heartbeat asks while the main thread is woken; an error there would end the run."""
    scheduler, errors, end = Scheduler(), [], threading.Event()
    workers = [SimpleNamespace(place=Place(0, stage)) for stage in range(30)]

    async def program(key):
        while not end.is_set():
            await Wait(key, lambda: f"channel {key}")

    def ask():
        while not end.is_set():
            try:
                scheduler.stuck()
            except RuntimeError as error:
                errors.append(error)
                return

    scheduler.start([(worker, program(key)) for key, worker in enumerate(workers)])
    scheduler.run_ready()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    asking = threading.Thread(target=ask)
    asking.start()
    try:
        stop = time.monotonic() + 0.5
        while not errors and time.monotonic() < stop:
            for key in range(30):
                scheduler.wake(key)
            scheduler.run_ready()
    finally:
        sys.setswitchinterval(interval)
        end.set()
        asking.join()
        scheduler.close()
    assert errors == []


# ---- any program over any processes ----------------------------------------------------------------------------------


def plan(seed):
    """A random mesh and, for some windows, events in one global order that nobody needs to wait for in vain."""
    source = random.Random(seed)
    replicas, stages = source.choice([(1, 3), (2, 2), (3, 1), (3, 2), (4, 1), (2, 3)])
    places = [Place(i, j) for i in range(replicas) for j in range(stages)]
    windows = []
    for _ in range(source.randint(1, 4)):
        events, under_way = [], []
        for number in range(source.randint(5, 40)):
            kind = source.choice("SSSRRCM") if under_way else source.choice("SSCM")
            if kind == "S":
                a = source.choice(places)
                near = [
                    b
                    for b in places
                    if b != a and (b.stage == a.stage or (b.replica == a.replica and abs(b.stage - a.stage) == 1))
                ]
                b = source.choice(near)
                key = (a, b, source.choice("xy"))
                events.append(("S", key, source.choice([0, 1, 7, 3000]), number))
                under_way.append(key)
            elif kind == "R":
                key = source.choice(under_way)
                under_way.remove(key)
                events.append(("R", key, 0, number))
            elif kind == "C":
                events.append(("C", source.choice(places), 0, number))
            elif replicas > 1:
                events.append(
                    (
                        source.choice(["mean", "begin", "take", "gather"]),
                        source.randrange(stages),
                        source.randint(1, 9),
                        number,
                    )
                )
        source.shuffle(under_way)
        events += [("R", key, 0, number) for number, key in enumerate(under_way)]
        windows.append(events)
    return replicas, stages, windows


async def behave(worker, events, states):
    """This worker's part of the events; its state is a tensor that everything goes into."""

    def link(here, there):
        if there.stage == here.stage:
            return worker.replicas.peer(there.replica)
        return worker.above if there.stage > here.stage else worker.below

    state = states[worker.place]
    for kind, where, size, number in events:
        if kind == "S" and where[0] == worker.place:
            x = torch.full((size,), number / 3) + state.mean()
            await link(worker.place, where[1]).send(where[2], x.reshape(-1, 1) if number % 2 else x)
        elif kind == "R" and where[1] == worker.place:
            x = await link(worker.place, where[0]).recv(where[2])
            state = state * 0.75 + x.sum() / 100 + x.dim()
        elif kind == "C" and where == worker.place:
            state = await worker.run("F", lambda x: torch.sin(x) + torch.rand(3), state)
        elif where == worker.stage and kind == "mean":
            (state,) = await worker.replicas.mean("mean", [state])
        elif where == worker.stage and kind == "begin":
            later = worker.replicas.begin_mean("mean/1", [state, state.double() * size])
            worker.replicas.progress()
            first, second = await later
            state = first + second.float()
        elif where == worker.stage and kind == "take":
            count = worker.replicas.size
            generator = torch.Generator().manual_seed(number)
            owners = torch.stack([torch.randperm(count, generator=generator) for _ in range(3)], 1)
            state = await worker.replicas.take("take", state, owners)
        elif where == worker.stage and kind == "gather":
            rows = await worker.replicas.gather("gather", state)
            state = sum(row * (1 + k) for k, row in enumerate(rows)) / 10
    states[worker.place] = state


def outcome(world, seed):
    """Final states, and what every worker sent: (window, kind, place, channel, bytes)."""
    replicas, stages, windows = plan(seed)
    workers = world.mesh(replicas, stages, seed)
    states = {worker.place: torch.arange(3.0) + worker.replica + 10 * worker.stage for worker in workers}
    acts = []
    for number, events in enumerate(windows):
        for worker in workers:
            worker.at(number)
        for act in world.run([(worker, behave(worker, events, states)) for worker in workers]):
            acts.append((number, act))
    return states, acts


def outcomes(cluster, seeds, links):
    found = []
    for seed in seeds:
        with Distributed(cluster, links=links) as world:
            if cluster.size <= plan(seed)[0] * plan(seed)[1]:
                found.append((*outcome(world, seed), world.ranks))
    return found


def summary(acts):
    """Without times and wire, and in an order that is the same in all worlds."""
    return sorted((n, *act[:6], act.channel, act.peer or (-1, -1)) for n, act in acts)


@pytest.mark.parametrize("processes, links, seeds", [(2, "auto", 25), (3, "auto", 25), (2, "gloo", 1)])
def test_any_program_gives_the_same_numbers_and_counts_on_any_processes(processes, links, seeds):
    seeds = range(1000 * processes, 1000 * processes + seeds)
    found = run_processes(outcomes, processes, seeds, links)
    for k, seed in enumerate(seeds):
        states, acts = outcome(InProcess(), seed)
        merged = {place: x for rank in range(processes) for place, x in found[rank][k][0].items()}
        assert merged.keys() == states.keys()
        assert all(torch.equal(states[place], merged[place]) for place in states)
        theirs = [act for rank in range(processes) for act in found[rank][k][1]]
        assert summary(theirs) == summary(acts)
        ranks = found[0][k][2]
        for _, act in theirs:
            assert act.end >= act.start
            if act.kind == "S":
                crossed = ranks[Place(act.replica, act.stage)] != ranks[Place(*act.peer)]
                assert act.wire == (act.bytes + HEADER_BYTES if crossed else 0)
            elif act.kind == "M":
                group = {rank for place, rank in ranks.items() if place.stage == act.stage}
                apart = all(
                    ranks[place] != ranks[Place(act.replica, act.stage)]
                    for place in ranks
                    if place.stage == act.stage and place.replica != act.replica
                )
                assert (act.wire > 0) == (len(group) > 1) or act.channel == "take"
                if apart:  # all of it crosses, in whole messages
                    assert act.wire >= act.bytes and (act.wire - act.bytes) % HEADER_BYTES == 0
            else:
                assert act.wire == 0


# ---- the distributed world -------------------------------------------------------------------------------------------


def refusals(cluster):
    said = []
    with Distributed(cluster) as world:
        world.mesh(1, 2)
        with pytest.raises(UnlockedError) as refused:
            world.mesh(2, 1)
        said.append(str(refused.value))
    with pytest.raises(InvalidChoice) as refused:
        Distributed(cluster, links="carrier-pigeon")
    said.append(str(refused.value))
    cluster.hosts = ["here", "there"]
    with pytest.raises(InvalidChoice) as refused:
        Distributed(cluster, links="shared-memory")
    said.append(str(refused.value))
    return said


def test_a_second_mesh_and_wrong_links_are_refused():
    for second, links, hosts in run_processes(refusals, 2):
        assert "another mesh already" in second
        assert "carrier-pigeon" in links and "gloo" in links
        assert "these are on several" in hosts


def fast_and_slow(cluster, links, windows, size):
    """Per window, how far the slow receiver was when the fast sender had begun it."""
    world = Distributed(cluster, links=links, ahead=ahead)
    (worker,) = world.mesh(1, 2)
    gaps = []

    async def program(window):
        if worker.first:
            gaps.append(window - cluster.store.add("taken", 0))
            await worker.above.send("x", torch.full((size,), float(window)))
        else:
            x = await worker.below.recv("x")
            assert torch.equal(x, torch.full((size,), float(window)))
            time.sleep(0.01)
            cluster.store.add("taken", 1)

    for window in range(windows):
        world.run([(worker, program(window))])
    world.close()
    return gaps


@pytest.mark.parametrize("links, size", [("shared-memory", 100), ("gloo", 200000)])
def test_a_fast_sender_is_ahead_of_a_slow_receiver_by_a_bounded_number_of_windows(links, size):
    gaps, _ = run_processes(fast_and_slow, 2, links, 60, size)
    one_in_a_thread = 1
    held = ahead + room + one_in_a_thread + slots
    assert ahead <= max(gaps) <= held, max(gaps)


def kept_messages(cluster):
    """Every process holds all messages of many windows, and they are what was sent."""
    world = Distributed(cluster)
    (worker,) = world.mesh(2, 1)
    kept = []

    async def program(window):
        peer = worker.replicas.peer(1 - worker.replica)
        for k in range(10):
            await peer.send("x", torch.full((100 * k,), float(10 * window + k)))
        for _ in range(10):
            kept.append(await peer.recv("x"))

    for window in range(10):
        world.run([(worker, program(window))])
    world.close()
    return [int(x[0]) if len(x) else -1 for x in kept]


def test_messages_that_are_kept_stay_what_they_were():
    expected = [n if n % 10 else -1 for n in range(100)]
    assert run_processes(kept_messages, 2) == [expected, expected]


def gone_before_the_first(cluster):
    world = Distributed(cluster)
    (worker,) = world.mesh(1, 2)
    if not worker.first:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)

    async def program():
        await worker.above.send("x", torch.ones(3))
        await worker.above.recv("y")

    with pytest.raises(LostProcess) as lost:
        world.run([(worker, program())])
    world.close()
    return str(lost.value)


def test_a_process_gone_before_the_first_message_to_it_is_named():
    with Processes(gone_before_the_first, 2) as running:
        sentence = running.result(0, 20.0)
    assert "Process 1 " in sentence and "is gone" in sentence


def wait_for_room(cluster, links):
    """Nobody takes `y` for a while; when it is taken, all of it is there."""
    world = Distributed(cluster, links=links)
    (worker,) = world.mesh(1, 2)
    found = []

    async def program():
        if worker.first:
            for number in range(30):
                await worker.above.send("y", torch.full((2,), float(number)))
            await worker.above.send("x", torch.ones(1))
        else:
            await worker.below.recv("x")
            for _ in range(30):
                found.append(int((await worker.below.recv("y"))[0]))

    world.run([(worker, program())])
    world.close()
    return found


@pytest.mark.parametrize("links", ["auto", "gloo"])
def test_a_full_channel_does_not_hold_up_another(links):
    assert run_processes(wait_for_room, 2, links) == [[], list(range(30))]


def test_a_timeline_says_what_was_on_the_wire():
    acts = [
        Act("S", 0, 0, 0, 0, 100, 0.0, 1.0, "x", (0, 1), 292),
        Act("S", 0, 0, 0, 0, 100, 0.0, 1.0, "y", (0, 1), 0),
        Act("M", 0, 0, 0, 0, 40, 0.0, 1.0, "m", None, 232),
        Act("R", 0, 1, 0, 0, 100, 0.0, 1.0, "x", (0, 0), 0),
    ]
    assert Timeline(acts).wire_sent() == {"x": 292, "m": 232}
