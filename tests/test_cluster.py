"""Agreeing where to stop, noticing who is gone, one clock, and one book: by hand, beat by beat, with a store in memory."""

from __future__ import annotations

import json
import random
import threading
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.cluster import Alone, Cluster, clock, heartbeat
from unlocked.cluster.agreement import Agreement
from unlocked.cluster.heartbeat import Heartbeat, Vitals, name_of, report
from unlocked.cluster.rendezvous import Seat, read_seat
from unlocked.errors import CannotJoin, LostProcess
from unlocked.loop import EpochBook
from unlocked.merging import measured_steps
from unlocked.timeline import Act, Timeline
from unlocked.worker import Place
from unlocked.worlds import Distributed


class Blocked(Exception):
    """The main thread would wait."""


class NoWaiting(threading.Condition):
    """A condition that says so instead of waiting."""

    def wait(self, timeout=None):
        raise Blocked


def crew(size, stuck_after=30.0):
    """Heartbeats of several processes on one store, not started: their beats are called by hand."""
    store, members = dist.HashStore(), [{"pid": 100 + rank, "name": "lab"} for rank in range(size)]
    made = []
    for rank in range(size):
        agreement, told = Agreement(), []
        agreement._change = NoWaiting()
        beat = Heartbeat(store, rank, members, agreement, Vitals(), stuck_after, told.append)
        beat.told = told
        made.append(beat)
    for beat in made:
        beat._heard = [({}, heartbeat.time.monotonic()) for _ in members]
    return store, made


@pytest.fixture
def now(monkeypatch):
    """The heartbeat's clock, set by hand; sleeping takes no time."""
    at = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: at.seconds, sleep=lambda seconds: None))
    return at


# ---- where to stop ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_all_stop_at_the_largest_step_entered_whoever_is_faster_and_whenever_they_beat(seed):
    """Each may complete a step only when all have entered it: the closest coupling there is. Nobody waits for ever."""
    source = random.Random(seed)
    size, begin, wisher = source.randint(1, 4), source.choice([0, 7]), source.randrange(4)
    _store, beats = crew(size)
    heartbeat_time, heartbeat.time = heartbeat.time, SimpleNamespace(sleep=lambda s: None, monotonic=lambda: 0.0)
    try:
        entered, inside, stopped = [begin - 1] * size, [False] * size, [None] * size
        at_wish = None
        wish_at = source.randint(0, 60)
        for turn in range(3000):
            if turn == wish_at:
                at_wish = max(entered)
                beats[wisher % size].wish("terminate")
            rank = source.randrange(size)
            if source.random() < 0.4:
                beats[rank]._look_for_wishes()
            elif stopped[rank] is None:
                if inside[rank]:
                    inside[rank] = not all(other >= entered[rank] for other in entered)
                    continue
                try:
                    stop = beats[rank]._agreement.enter(entered[rank] + 1, lambda: None)
                except Blocked:
                    continue
                if stop:
                    stopped[rank] = entered[rank]
                else:
                    entered[rank] += 1
                    inside[rank] = True
            if all(step is not None for step in stopped):
                break
        assert None not in stopped, "somebody waits for ever"
        assert len(set(stopped)) == 1 and stopped[0] == max(entered)
        assert stopped[0] >= at_wish
        assert {beat._agreement.stopped_by for beat in beats} == {"terminate"}
    finally:
        heartbeat.time = heartbeat_time


def test_a_wish_before_the_first_step_stops_all_before_it(now):
    _, beats = crew(3)
    beats[1].wish("interrupt")
    for beat in (*beats[1:], beats[0], *beats):
        beat._look_for_wishes()
    for beat in beats:
        assert beat._agreement.enter(0, lambda: None) is True
        assert beat._agreement.stopped_by == "interrupt"


def test_between_wish_and_agreement_nobody_enters_and_what_went_wrong_is_raised():
    agreement = Agreement()
    assert agreement.enter(0, lambda: None) is False
    assert agreement.propose("interrupt") == 0

    def wrong():
        raise LostProcess("Process 1 is gone.")

    with pytest.raises(LostProcess):
        agreement.enter(1, wrong)
    threading.Timer(0.05, agreement.settle, (1,)).start()
    assert agreement.enter(1, lambda: None) is False  # waits for the agreement: another had entered 1
    assert agreement.enter(2, lambda: None) is True


def test_of_two_wishes_the_first_counts_for_all(now):
    _, beats = crew(2)
    beats[0].wish("terminate")
    beats[0]._look_for_wishes()
    beats[1].wish("interrupt")
    beats[1]._look_for_wishes()
    assert [beat._agreement.stopped_by for beat in beats] == ["terminate"] * 2


def test_one_process_agrees_with_itself():
    alone = Alone()
    assert (alone.share({"a": 1}), alone.broadcast(5), alone.enter(3)) == ([{"a": 1}], 5, False)
    alone.wish("terminate")
    assert alone.enter(4) and alone.stopped_by == "terminate"


# ---- signs of life ---------------------------------------------------------------------------------------------------


def test_silence_counts_after_the_bound_and_not_before(now):
    store, beats = crew(3, stuck_after=5.0)
    for _ in range(20):
        for beat in beats:
            beat._vitals.activity += 1
            beat._beat()
        now.seconds += 0.5
    assert all(beat.told == [] for beat in beats)
    begin = now.seconds
    while not beats[0].told:
        now.seconds += 0.5
        for beat in beats[:2]:
            beat._vitals.activity += 1
            beat._beat()
        assert now.seconds - begin < 7.0
    assert now.seconds - begin >= 4.5
    assert "Process 2 (pid 102 on lab) has given no sign of life for" in beats[0].told[0]
    beats[1]._beat()
    assert set(beats[0].told + beats[1].told) == {beats[0].told[0]}  # one sentence for all
    assert json.loads(store.get("failure"))["rank"] == 2


def test_who_said_goodbye_may_be_silent(now):
    _, beats = crew(2, stuck_after=5.0)
    beats[1]._say(bye=True)
    for _ in range(40):
        beats[0]._beat()
        now.seconds += 0.5
    assert beats[0].told == []


def wait_all(beats, sent, got, full=None):
    for rank, beat in enumerate(beats):
        beat._vitals.waiting, beat._vitals.words = True, lambda rank=rank: f"waits for {rank}"
        beat._vitals.sent, beat._vitals.got = sent[rank], got[rank]
        beat._vitals.full = (full or [{}, {}])[rank]


def turns(beats, now, count, change=lambda turn: None):
    """So many beats of all; in how many of them somebody was told something first."""
    for turn in range(count):
        change(turn)
        for beat in beats:
            beat._beat()
        now.seconds += 0.5
        if any(beat.told for beat in beats):
            return turn
    return None


def test_all_waiting_with_nothing_under_way_is_a_deadlock(now):
    _, beats = crew(2)
    wait_all(beats, [{"a": 3}, {"b": 1}], [{"b": 1}, {"a": 3}])
    turn = turns(beats, now, 20)
    assert turn is not None and turn >= 5
    assert "No worker can go on: on process 0 waits for 0; on process 1 waits for 1." in beats[0].told + beats[1].told


def test_messages_of_a_full_channel_cannot_help(now):
    """They are under way until the program takes those before them, and it waits for another channel."""
    _, beats = crew(2)
    wait_all(beats, [{"a": 9}, {}], [{}, {"a": 2}], [{}, {"a": True}])
    assert turns(beats, now, 20) is not None


def test_a_message_under_way_a_busy_process_or_any_change_is_no_deadlock(now):
    _, beats = crew(2)
    wait_all(beats, [{"a": 3}, {"b": 1}], [{"b": 1}, {"a": 2}])
    assert turns(beats, now, 20) is None
    wait_all(beats, [{"a": 3}, {"b": 1}], [{"b": 1}, {"a": 3}])
    beats[1]._vitals.waiting = False
    assert turns(beats, now, 20) is None
    beats[1]._vitals.waiting = True

    def little(turn):
        beats[1]._vitals.activity += turn % 4 == 0

    assert turns(beats, now, 20, little) is None


def test_a_failure_that_is_reported_is_told_as_it_is_before_a_suspicion(now, monkeypatch):
    store, beats = crew(2)
    beats[0].suspect(1, "Process 1 is gone: closed.")
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            report(store, 1, "Process 1 failed: bees.")

    monkeypatch.setattr(heartbeat.time, "sleep", sleep)
    beats[0]._beat()
    assert beats[0].told == ["Process 1 failed: bees."] and len(slept) == 3
    assert report(store, 0, "too late") == "Process 1 failed: bees."


def test_a_suspicion_nobody_knows_better_of_is_told_after_a_moment(now, monkeypatch):
    _, beats = crew(2)
    slept = []
    monkeypatch.setattr(heartbeat.time, "sleep", slept.append)
    for how in ("first", "second"):
        beats[0].suspect(1, how)
    beats[0]._beat()
    beats[1]._beat()
    assert beats[0].told == beats[1].told == ["first"]
    assert 0.3 < sum(slept) < 1.1
    assert beats[0]._end


def test_a_store_that_is_gone_is_a_sentence(now):
    _, beats = crew(1)

    class Gone:
        def set(self, *arguments):
            raise RuntimeError("Connection reset by peer")

    beats[0]._store = Gone()
    beats[0].start()
    beats[0]._thread.join(10.0)
    assert len(beats[0].told) == 1 and "rendezvous store does not answer" in beats[0].told[0]


def test_names_are_for_sentences():
    assert name_of([{"pid": 4, "name": "lab", "workers": ": replica 0 stage 1"}], 0) == (
        "Process 0 (pid 4 on lab: replica 0 stage 1)"
    )


# ---- coming together -------------------------------------------------------------------------------------------------


def together(size, act, **options):
    """`act(cluster)` of all, each on a thread, and the store; what it returned or raised."""
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = [None] * size

    def work(rank):
        try:
            cluster = Cluster.join(seat=Seat(rank, size, "127.0.0.1", host.port, True, 0), **options)
            found[rank] = act(cluster)
            cluster.close()
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
        assert not thread.is_alive()
    for value in found:
        if isinstance(value, BaseException):
            raise value
    return found, host


def test_shares_come_in_the_order_of_ranks_and_leave_no_keys_behind():
    def act(cluster):
        got = [cluster.share([cluster.rank, turn, None, {"ä": 1.5}]) for turn in range(20)]
        said = [cluster.broadcast({"from": cluster.rank}) for _ in range(3)]
        cluster.barrier()
        return got, said, cluster.chief

    found, host = together(3, act)
    for rank, (got, said, chief) in enumerate(found):
        assert got == [[[other, turn, None, {"ä": 1.5}] for other in range(3)] for turn in range(20)]
        assert said == [{"from": 0}] * 3
        assert chief == (rank == 0)
    assert host.num_keys() < 25


def test_different_facts_are_refused_by_all_with_name_and_values():
    def act(cluster):
        cluster.agree({"a": [1, 2], "b": "x"}, "the run")
        with pytest.raises(CannotJoin) as refused:
            cluster.agree({"a": 1, "b": cluster.rank // 2}, "the run")
        return str(refused.value)

    for sentence in together(3, act)[0]:
        assert "b of the run is 1 on rank 2 but 0 on rank 0" in sentence


def test_a_failure_is_told_to_all_listeners_also_to_late_ones():
    def act(cluster):
        heard, late, come = [], [], threading.Event()
        cluster.on_failure(lambda sentence: (heard.append(sentence), come.set()))
        if cluster.rank == 1:
            cluster.fail(CannotJoin("Bees."))
            cluster.fail(CannotJoin("More bees."))
        assert come.wait(10.0)
        cluster.on_failure(late.append)
        with pytest.raises(LostProcess):
            cluster.check()
        return heard, late

    for heard, late in together(2, act)[0]:
        assert heard == late and len(heard) == 1
        assert heard[0].startswith("Process 1 (pid ") and heard[0].endswith("failed: Bees.")


def test_worlds_are_counted_alike():
    assert together(1, lambda cluster: [cluster.count_worlds() for _ in range(3)])[0] == [[0, 1, 2]]


GIVEN = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "lab", "MASTER_PORT": "29500"}


def test_a_seat_is_read_from_what_the_starter_sets():
    assert read_seat(GIVEN) == Seat(1, 3, "lab", 29500, False, 0)
    torchrun = GIVEN | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert read_seat(torchrun) == Seat(1, 3, "lab", 29500, True, 2)
    assert read_seat(torchrun).prefix != read_seat(GIVEN).prefix


@pytest.mark.parametrize(
    "change, words",
    [
        ({"RANK": "3"}, "RANK=3 is not among WORLD_SIZE=3"),
        ({"RANK": "-1"}, "RANK=-1 is not among"),
        ({"WORLD_SIZE": "many"}, "must be whole numbers"),
        ({"MASTER_PORT": None, "RANK": None}, r"\(RANK, MASTER_PORT not set\)"),
    ],
)
def test_a_wrong_seat_is_a_sentence(change, words):
    given_ = {name: value for name, value in (GIVEN | change).items() if value is not None}
    with pytest.raises(CannotJoin, match=words):
        read_seat(given_)


# ---- one clock, one book ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skews", [[0.0, 1000.0, -50.0]])
def test_offsets_bring_skewed_clocks_onto_that_of_rank_0(monkeypatch, skews):
    import time

    local = threading.local()
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + local.skew))
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = {}

    def work(rank):
        local.skew = skews[rank]
        store = dist.TCPStore("127.0.0.1", host.port, is_master=False, wait_for_workers=False)
        found[rank] = clock.clock_offset(store, rank, ["a", "b", "c"])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    for rank, skew in enumerate(skews):
        assert abs(found[rank] + skew) < 0.1
    assert found[0] == 0.0


def test_processes_of_one_kernel_need_no_offset():
    assert clock.clock_offset(dist.HashStore(), 1, ["a", "a", "b"]) == 0.0


def test_measured_steps_are_the_acts_of_all_on_one_clock():
    own = [Timeline([Act("F", 0, 0, k, k, 0, float(k), k + 0.5)]) for k in range(30)]
    other = Timeline([Act("F", 0, 1, 29, 29, 0, 129.0, 129.5)]).to_json()
    world = object.__new__(Distributed)
    shared = SimpleNamespace(offsets=[0.0, -100.0], share=lambda rows: [rows, other], rank=0)
    world.crew, world._ranks = shared, {Place(0, 0): 0, Place(0, 1): 1}
    if hasattr(Distributed, "ranks") and not hasattr(world, "_wiring"):
        world._wiring = SimpleNamespace(ranks=world._ranks)
    found = measured_steps(SimpleNamespace(world=world, crew=shared, recent=own, steps=30, workers=[]))
    assert found["measured"] is True and found["steps"] == [11, 30]
    assert sorted(found["ranks"]) == [[0, 0, 0], [0, 1, 1]]
    starts = [(act["stage"], act["start"], act["end"]) for act in found["acts"]]
    assert starts == [(0, float(k), k + 0.5) for k in range(10, 30)] + [(1, 29.0, 29.5)]


@st.composite
def books(draw):
    """The updates of an epoch: per update and worker a loss and the bytes it sent."""
    replicas, stages, updates = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    source = random.Random(draw(st.integers(0, 999)))
    places = [(i, j) for i in range(replicas) for j in range(stages)]
    rows = [
        {
            (i, j): (
                source.random(),
                Act(
                    "S",
                    i,
                    j,
                    k,
                    k,
                    source.randint(1, 99),
                    0.0,
                    1.0,
                    "x",
                    (i, j + source.choice([-1, 1])),
                    source.randint(0, 9),
                ),
                Act("M", i, j, k, k, source.randint(1, 99), 0.0, 1.0, "m", None, source.randint(0, 9)),
            )
            for i, j in places
        }
        for k in range(updates)
    ]
    owner = {place: source.randrange(3) for place in places}
    return places, rows, owner


def write(book, rows, mine):
    for row in rows:
        book.sent_in(Timeline([act for place in mine for act in row[place][1:]]))
        book.add({f"{i}.{j}": row[(i, j)][0] for i, j in mine}, 12, 0.5)


def plain(book):
    return json.loads(json.dumps(vars(book)))  # as it travels


@given(books(), st.integers(0, 4), st.data())
@settings(max_examples=80, deadline=None)
def test_books_of_processes_together_are_the_book_of_one_also_after_a_resume(epoch, before, data):
    places, rows, owner = epoch
    whole = EpochBook()
    write(whole, rows, places)
    first = EpochBook()
    write(first, rows[:before], places)
    parts = []
    for rank in range(3):
        mine = [place for place in places if owner[place] == rank]
        part = EpochBook(**plain(first)).part([f"{i}.{j}" for i, j in mine], chief=rank == 0)
        write(part, rows[before:], mine)
        parts.append(plain(part))
    merged = EpochBook.merged(parts)
    assert merged.losses == whole.losses
    assert (merged.samples, merged.seconds, merged.updates) == (whole.samples, whole.seconds, whole.updates)
    for name in ("up", "down", "replicas", "wire"):
        assert merged.traffic.get(name, 0) == whole.traffic.get(name, 0)
    acts = [act for row in rows for place in places for act in row[place][1:]]
    assert merged.sent == whole.sent == {c: sum(a.bytes for a in acts if a.channel == c) for c in "xm"}
    assert whole.traffic.get("wire", 0) == sum(act.wire for act in acts)
    stages = 1 + max(j for _, j in places)
    for stage, loss in enumerate(merged.mean_losses(stages)):
        rows_of = [row[place][0] for row in rows for place in places if place[1] == stage]
        assert loss == pytest.approx(sum(rows_of) / len(rows_of))
