"""Members that die and come: who agrees on what, that nobody hangs, and that nothing of the weights is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import unlocked as ul
from test_launched import finish, start, unlocked, wait_for, with_text
from unlocked.cluster import joining
from unlocked.cluster.elastic import Members, Succession, bury
from unlocked.cluster.rendezvous import Seat, open_store
from unlocked.errors import CannotJoin, InvalidChoice, LostProcess
from unlocked.run_files import read_events
from unlocked.saving import HandOver

import methods
from members_worker import (
    Comer,
    Killed,
    Plan,
    come,
    first_without,
    killing,
    knock_and_die,
    live,
    progress,
    taken,
    wait,
)
from processes import Failed, Processes

DEADLINE = 180.0  # against hangs, not slowness
RULES = {
    "gossip": ul.consensus.Gossip(graph="complete", pairing="available"),
    "acid": ul.consensus.ACiD(graph="ring", pairing="available"),
}

# ---- the roll call, in threads ----------------------------------------------------------------------------------------


class Registry:
    """A store, and members of generation 0 or a later one, each with a connection of its own."""

    def __init__(self, folder: Path) -> None:
        self._host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.port, self._folder = self._host.port, folder

    def connect(self) -> dist.Store:
        return open_store(Seat(0, 1, "127.0.0.1", self.port, True, 0), 10.0)

    def first(self, count: int) -> list[Members]:
        found = [
            self.member(Seat(rank, count, "127.0.0.1", self.port, True, 0), list(range(count))) for rank in range(count)
        ]
        found[0].publish({"folder": str(self._folder / "checkpoint")})
        return found

    def member(self, seat: Seat, numbers: list[int]) -> Members:
        return Members(seat, self.connect(), numbers)

    def next(self, successions: list[Succession]) -> list[Members]:
        return [self.member(one.seat, one.numbers) for one in successions]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path)


def late(seconds: float = 30.0) -> Callable[[], str | None]:
    end = time.monotonic() + seconds
    return lambda: "This test waits in vain." if time.monotonic() > end else None


def call(members: list[Members], left: tuple[int, ...] = (), pauses: list[float] | None = None) -> list[Any]:
    """All come to a roll call, each with its number to say; successions, or what was raised."""

    def one(k: int) -> Any:
        time.sleep(0.0 if pauses is None else pauses[k])
        try:
            return members[k].roll_call(members[k].numbers[members[k].seat.rank], left=k in left, failed=late())
        except LostProcess as lost:
            return str(lost)

    with ThreadPoolExecutor(len(members)) as threads:
        return list(threads.map(one, range(len(members))))


def assert_alike(found: list[Succession]) -> None:
    """All are told the same, and each has a seat of its own."""
    assert all(one.numbers == found[0].numbers and one.survivors == found[0].survivors for one in found)
    assert all((one.joined, one.said, one.lost) == (found[0].joined, found[0].said, found[0].lost) for one in found)
    assert [one.seat.rank for one in found] == list(range(len(found)))
    assert {one.seat.size for one in found} == {len(found[0].numbers)}
    assert len({one.seat.generation for one in found}) == 1


def test_a_roll_call_of_everybody_changes_nothing_and_can_be_repeated(registry: Registry) -> None:
    members = registry.first(3)
    for _ in range(3):
        for k, found in enumerate(call(members)):
            assert found == Succession(members[k].seat, [0, 1, 2], [0, 1, 2], 0, [0, 1, 2], [])


@pytest.mark.parametrize("dead", [[1], [0], [3, 0]])
def test_the_others_agree_on_who_is_left(registry: Registry, dead: list[int]) -> None:
    members = registry.first(4)
    call(members)
    alive = [member for member in members if member.seat.rank not in dead]
    for rank in dead:
        alive[0].bury(rank, f"Process {rank} is no more.")
    found = call(alive)
    numbers = [member.seat.rank for member in alive]
    assert_alike(found)
    assert found[0].numbers == found[0].survivors == found[0].said == numbers
    assert sorted(found[0].lost) == sorted(f"Process {rank} is no more." for rank in dead)
    later = registry.next(found)
    assert [one.numbers for one in call(later)] == [numbers] * len(numbers)  # and that generation is one like any other
    later[-1].bury(0, "And this one.")
    last = call(later[1:])
    assert_alike(last)
    assert last[0].numbers == numbers[1:] and last[0].survivors == list(range(1, len(numbers)))


def test_what_only_one_has_heard_of_changes_all_alike(registry: Registry) -> None:
    """A connection broke to one that is alive: all go on together, with new connections."""
    members = registry.first(3)
    members[2].lose(0, "its end of a channel was closed")
    found = call(members)
    assert_alike(found)
    assert found[0].numbers == [0, 1, 2] and found[0].lost == [] and found[0].seat.generation > 0


def test_one_that_dies_at_the_roll_call_is_decided_upon_by_all_alike(registry: Registry) -> None:
    """It has come, and is buried: some know of it, others do not, and all the same nobody goes another way."""
    source = random.Random(0)
    for _ in range(8):
        another = Registry(registry._folder)
        members = another.first(4)
        base = another.connect()

        def perish(rank: int = 3, members: list[Members] = members, base: dist.Store = base) -> None:
            base.set(f"roll/0/{rank}", json.dumps(rank))
            time.sleep(source.uniform(0.0, 0.03))
            bury(base, rank, "It died.")
            members[source.randrange(3)].look()

        with ThreadPoolExecutor(1) as threads:
            dying = threads.submit(perish)
            found = call(members[:3], pauses=[source.uniform(0.0, 0.04) for _ in range(3)])
            dying.result()
        assert len({json.dumps([one.numbers, one.survivors, one.seat.generation]) for one in found}) == 1


def test_one_that_was_taken_for_lost_is_told(registry: Registry) -> None:
    members = registry.first(3)
    members[0].bury(1, "It was silent.")
    found = call([members[0], members[2]])
    assert_alike(found)
    (told,) = call([members[1]])
    assert told == "The others took this process for lost and went on without it."


def test_a_run_that_has_failed_ends_the_roll_call(registry: Registry) -> None:
    members = registry.first(2)
    with pytest.raises(LostProcess, match="Everything is lost"):
        members[0].roll_call(None, failed=lambda: "Everything is lost.")


def test_losses_are_told_once_and_who_has_left_is_heard_of(registry: Registry) -> None:
    members = registry.first(3)
    heard: list[tuple[int, str]] = []
    members[0].on_loss(lambda rank, sentence: heard.append((rank, sentence)))
    members[1].bury(2, "Process 2 is no more.")
    for _ in range(2):
        members[0].look()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(members[1].roll_call, None, left=True, failed=late())
        end = time.monotonic() + 30
        while len(heard) < 2 and time.monotonic() < end:
            members[0].look()
        members[0].roll_call(None, failed=late())
        waiting.result(30)
    assert heard[0] == (2, "Process 2 is no more.") and heard[1][0] == 1 and len(heard) == 2
    assert "waits for the others" in heard[1][1]


# ---- who comes ---------------------------------------------------------------------------------------------------------


def admitted(registry: Registry, members: list[Members], comers: int = 1) -> tuple[list[Any], list[Succession]]:
    """So many knock; the members come to roll calls until all are let in."""
    with ThreadPoolExecutor(comers) as threads:
        knocking = [threads.submit(joining.knock, "127.0.0.1", registry.port, 30.0) for _ in range(comers)]
        end = time.monotonic() + 30
        while len(members[0]._waiting()) < comers and time.monotonic() < end:
            time.sleep(0.01)
        found = call(members)
        return [one.result(30) for one in knocking], found


def test_who_knocks_is_let_in_once_and_numbers_are_never_used_again(registry: Registry) -> None:
    members = registry.first(2)
    for member in members:
        member.look()
        assert not member.knocked
    (admission,), found = admitted(registry, members)
    assert_alike(found)
    assert found[0].numbers == [0, 1, 2] and found[0].survivors == [0, 1] and found[0].joined == 1
    assert admission.numbers == [0, 1, 2] and admission.seat == found[0].seat._replace(rank=2)
    assert admission.folder == registry._folder / "checkpoint"
    trio = [*registry.next(found), registry.member(admission.seat, admission.numbers)]
    for one in call(trio):
        assert one.numbers == [0, 1, 2] and one.joined == 0  # it was let in before
    trio[0].bury(2, "The new one is no more.")
    pair = registry.next(call(trio[:2]))
    second, found = admitted(registry, pair, comers=2)
    assert found[0].numbers == [0, 1, 3, 4] and found[0].joined == 2
    assert sorted(one.seat.rank for one in second) == [2, 3]


def test_one_that_gave_up_is_not_waited_for(registry: Registry) -> None:
    members = registry.first(2)
    with pytest.raises(CannotJoin, match="Nobody let this process in within 0 s"):
        joining.knock("127.0.0.1", registry.port, 0.1)
    members[0].look()
    assert not members[0].knocked
    for k, found in enumerate(call(members)):
        assert found.seat == members[k].seat and found.joined == 0


def test_what_cannot_be_joined_is_a_sentence(registry: Registry, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(CannotJoin, match="cannot be joined: only replicas that run freely"):
        joining.knock("127.0.0.1", registry.port, 5.0)
    members = registry.first(2)
    members[0].publish({"folder": str(tmp_path / "nowhere" / "checkpoint")})
    with pytest.raises(CannotJoin, match="not to be seen from here"):
        joining.knock("127.0.0.1", registry.port, 5.0)
    monkeypatch.setattr(joining, "_REACHED_WITHIN", 1.0)
    with pytest.raises(CannotJoin, match=r"Nobody answers at 127\.0\.0\.1:1 "):
        joining.knock("127.0.0.1", 1, 5.0)
    assert joining.address_of("[::1]:2000") == ("::1", 2000) and joining.address_of("lab:65535") == ("lab", 65535)
    for wrong in ("lab", "lab:", ":2000", "lab:x", "lab:0", "lab:65536", "lab:-1"):
        with pytest.raises(InvalidChoice, match="give HOST:PORT"):
            joining.address_of(wrong)


@st.composite
def successions(draw: st.DrawFn, count: int) -> tuple[list[int], int]:
    """Who survives of so many, at least one, and how many join."""
    survivors = draw(st.sets(st.integers(0, count - 1), min_size=1))
    return sorted(survivors), draw(st.integers(0, 3))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 6))
def test_two_successions_are_one(data: st.DataObject, count: int) -> None:
    """On lists of names, which say who has become what."""
    names, seat = [f"first {k}" for k in range(count)], Seat(0, 1, "", 0, True, 0)
    whole, now = None, names
    for turn in range(data.draw(st.integers(1, 4))):
        survivors, joined = data.draw(successions(len(now)))
        now = [now[k] for k in survivors] + [f"{turn} {k}" for k in range(joined)]
        one = Succession(
            seat._replace(generation=turn), list(range(len(now))), survivors, joined, [turn], [f"lost {turn}"]
        )
        whole = one if whole is None else whole.then(one)
    assert whole is not None
    of_the_first = [name for name in now if name.startswith("first")]
    assert [names[k] for k in whole.survivors] == of_the_first
    assert now[: len(of_the_first)] == of_the_first and whole.joined == len(now) - len(of_the_first)
    assert whole.seat.generation == turn and whole.numbers == list(range(len(now))) and whole.said == [0]
    assert whole.lost == [f"lost {k}" for k in range(turn + 1)]


# ---- what they go on with ----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 8))
def test_every_new_number_is_written_exactly_once(data: st.DataObject, count: int) -> None:
    former, joined = data.draw(successions(count))
    hand_over = HandOver(None, former, joined, ul.consensus.Gossip())  # type: ignore[arg-type]
    written = [number for replica in former for number in hand_over.numbers(replica)]
    assert sorted(written) == list(range(len(former) + joined)) and hand_over.replicas == len(written)
    assert all(hand_over.numbers(replica)[0] == k for k, replica in enumerate(former))


def test_a_graph_with_a_name_is_made_anew_or_becomes_a_ring() -> None:
    rule = ul.consensus.Gossip(graph="ring", rate=2.0)
    assert rule.among([0, 2, 3], 0, 4) == rule and rule.among([0, 1], 3, 2).graph_of(5).name == rule.graph_of(5).name
    cube = ul.consensus.ACiD(graph="hypercube", rates="metropolis")
    assert cube.among([0, 1, 2, 3], 0, 8) == cube
    ring = cube.among([0, 1, 2, 4, 5, 6, 7], 0, 8)
    assert (ring.graph, ring.rates, ring.name) == ("ring", "uniform", "acid")
    assert len(ring.graph_of(7)) == 7 and ring.graph_of(7).connected
    pair = ul.consensus.Gossip(graph="hypercube").among([3], 0, 4)
    assert pair.graph_of(1).n == 1


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(2, 7), st.sampled_from(["given", "uniform", "degree"]))
def test_edges_are_kept_with_their_rates_and_the_graph_stays_connected(
    data: st.DataObject, count: int, rates: str
) -> None:
    source = random.Random(data.draw(st.integers(0, 10**6)))
    pairs = {(source.randrange(k), k) for k in range(1, count)}
    pairs |= {(i, j) for i in range(count) for j in range(i + 1, count) if source.random() < 0.2}
    edges = tuple((i, j, source.uniform(0.1, 3.0)) for i, j in sorted(pairs))
    former, joined = data.draw(successions(count))
    rule = ul.consensus.Gossip(graph=edges, rates=rates, rate=1.5)  # type: ignore[arg-type]
    before, new = rule.graph_of(count), rule.among(former, joined, count)
    after = new.graph_of(len(former) + joined)
    assert after.n == len(former) + joined and after.connected
    kept = {(a, b) for a in range(len(former)) for b in range(a + 1, len(former)) if before.rate(former[a], former[b])}
    for a, b in kept:
        assert after.rate(a, b) == pytest.approx(before.rate(former[a], former[b]), rel=1e-12)
    around = {tuple(sorted((k, (k + 1) % after.n))) for k in range(after.n)}
    assert {(int(i), int(j)) for i, j in after.edges} - kept <= around  # others only on the ring
    if not joined and len(former) == count:
        assert {(int(i), int(j)) for i, j in after.edges} == kept


# ---- killed ------------------------------------------------------------------------------------------------------------

# rule, workers, kills, seed, whether somebody buries them; the first two always, all of them (20 kills) with --all-pairs
KILLINGS = [
    ("gossip", 5, 2, 1, True),
    ("acid", 4, 2, 2, False),
    ("acid", 6, 4, 3, True),
    ("gossip", 6, 4, 4, False),
    ("acid", 5, 3, 5, True),
    ("gossip", 5, 3, 6, False),
    ("gossip", 4, 2, 7, True),
]


def assert_nothing_lost(plan: Plan, rows: list[dict[str, Any]], everybody: int, killed: int = 0) -> float:
    """Of those who came to the end; the largest error of what is conserved, as a share of the largest weight.

    Each that was killed may have taken one batch without having written it down.
    """
    numbers = sorted(row["number"] for row in rows)
    assert all(sorted(row["numbers"]) == numbers for row in rows)
    assert len({(row["steps"], row["epoch"], row["batch_in_epoch"]) for row in rows}) == 1
    assert (rows[0]["steps"], rows[0]["epoch"]) == (plan.epochs * plan.rounds, plan.epochs)
    batches = [(row.epoch, row.number) for number in range(everybody) for row in taken(plan, number)]
    assert len(set(batches)) == len(batches) and set(batches) <= plan.batches
    assert len(plan.batches) - len(batches) <= killed
    errors, scale = [], 1.0
    for row in rows:
        assert torch.isfinite(row["end"]).all()
        scale = max(scale, float(row["start"].abs().max()))
        moved = row["gradients"] + sum(row["exchanges"].values())
        errors.append(row["end"] - row["start"] - moved)
        for other in rows:
            if other["number"] in row["exchanges"]:
                errors.append(row["exchanges"][other["number"]] + other["exchanges"][row["number"]])
    of_all = sum(row["end"] - row["start"] - row["gradients"] for row in rows)
    lost = sum(x for row in rows for number, x in row["exchanges"].items() if number not in numbers)
    errors.append(of_all - lost)
    error = max(float(one.abs().max()) for one in errors) / scale
    assert error < 1e-9
    return error


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "name, workers, kills, seed, buried", KILLINGS if methods.ALL_PAIRS else KILLINGS[:2], ids=lambda value: str(value)
)
def test_whoever_is_killed_the_others_go_on_and_nothing_of_theirs_is_lost(
    name: str, workers: int, kills: int, seed: int, buried: bool, tmp_path: Path
) -> None:
    plan = Plan(RULES[name], workers, tmp_path / "checkpoint", epochs=6 + 2 * kills)
    found: Killed = killing(plan, kills, seed, buried, DEADLINE + 20 * kills)
    assert len(found.rows) == workers - kills == len({row["number"] for row in found.rows} - set(found.victims))
    error = assert_nothing_lost(plan, found.rows, workers, kills)
    for row in found.rows:
        assert sum(len(record["lost"]) for record in row["changes"]) == kills
        assert row["edges"] >= workers - kills - 1
    told = {"kills": kills, "seconds": [round(x, 2) for x in found.seconds], "error": error}
    print("RESULT", json.dumps(told | {"left": found.rows[0]["left"], "buried": buried}))


# ---- stopped -----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_one_that_is_stuck_is_left_behind_and_ends_with_a_sentence_when_it_wakes(tmp_path: Path) -> None:
    plan, end, stopped = Plan(RULES["gossip"], 3, tmp_path / "checkpoint", epochs=10), time.monotonic() + DEADLINE, 0
    with Processes(live, 3, plan, join={"stuck_after": 6.0}) as running:
        wait(lambda: progress(plan) >= 0.2 * len(plan.batches), running, [1, 2], end)
        os.kill(running.processes[stopped].pid or 0, signal.SIGSTOP)
        wait(lambda: first_without(plan, [1, 2], stopped) is not None, running, [1, 2], end)
        os.kill(running.processes[stopped].pid or 0, signal.SIGCONT)
        with pytest.raises(Failed, match="LostProcess: The others took this process for lost"):
            running.result(stopped, 60.0)
        rows = [running.result(number, end - time.monotonic()) for number in (1, 2)]
    assert_nothing_lost(plan, rows, 3)
    (lost,) = rows[0]["changes"][0]["lost"]
    assert "Process 0 " in lost


# ---- joining -----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_one_that_joins_begins_with_a_neighbours_weights_and_ends_with_the_others(tmp_path: Path) -> None:
    plan, end = Plan(RULES["acid"], 2, tmp_path / "checkpoint", epochs=14), time.monotonic() + DEADLINE
    with Processes(live, 2, plan) as running:
        wait(lambda: progress(plan) >= 0.1 * len(plan.batches), running, [0, 1], end)
        with Comer(come, plan, running.store.port) as comer:
            rows = [running.result(number, end - time.monotonic()) for number in (0, 1)]
            rows.append(comer.result(60.0))
    assert [row["number"] for row in rows] == [0, 1, 2]
    assert_nothing_lost(plan, rows, 3)
    assert any(torch.equal(rows[2]["start"], row["resumed"][0]) for row in rows[:2])
    assert [record["joined"] for record in rows[0]["changes"]] == [1] and len(taken(plan, 2)) > 0


@pytest.mark.timeout(300)
def test_one_that_dies_at_the_door_does_not_keep_the_others(tmp_path: Path) -> None:
    plan = Plan(RULES["gossip"], 2, tmp_path / "checkpoint", epochs=10, come_within=8.0)
    end = time.monotonic() + DEADLINE
    with Processes(live, 2, plan) as running:
        wait(lambda: progress(plan) >= 0.1 * len(plan.batches), running, [0, 1], end)
        with Comer(knock_and_die, plan, running.store.port) as comer:
            comer.process.join(60.0)
            assert comer.process.exitcode == -signal.SIGKILL
        rows = [running.result(number, end - time.monotonic()) for number in (0, 1)]
    assert_nothing_lost(plan, rows, 2)


# ---- from the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[tuple[Path, Any]]:
    run = tmp_path / "run"
    rule = "gossip(graph=complete,pairing=available)"
    options = [
        "--data",
        "digits",
        "--subset",
        "300",
        "--width",
        "8",
        "--batch-size",
        "10",
        "--stages",
        "1",
        "--threads",
        "1",
    ]
    train = ["train", "--credit", "backprop", "--consensus", rule, "--replicas", "3", "--epochs", "10", *options]
    argv = unlocked(
        "launch", "--processes", "3", "--", *train, "--device", "cpu", "--tensorboard", "off", "--run", str(run)
    )
    yield run, start(argv)


@pytest.mark.timeout(400)
def test_a_launch_goes_on_without_a_child_that_is_killed(launched: tuple[Path, Any]) -> None:
    run, process = launched
    wait_for(lambda: (run / "events.jsonl").exists() and len(read_events(run)) > 1, process)
    victim = [pid for pid in with_text(str(run)) if pid != process.pid][-1]
    os.kill(victim, signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, out + err
    assert not with_text(str(run))
    said = " ".join((out + err).split())
    assert f"(pid {victim}) was killed by signal 9" in said and "The others go on without it." in said
    assert "2 of 3 replicas go on" in said and "χ₁" in said and "χ₂" in said
    (record,) = [event for event in read_events(run) if event["event"] == "members"]
    assert record["before"] == 3 and record["replicas"] == 2 and record["joined"] == 0 and len(record["lost"]) == 1
    assert str(victim) in record["lost"][0] and record["chi1"][0] != record["chi1"][1]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["epochs"] == 10
