"""What the doctor says about which numbers, and that it measures and prints."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from unlocked.cluster import network
from unlocked.doctor import Clock, Connection, Facts, Report, Speed, doctor, examine, local_facts
from unlocked.doctor.connections import neighbours
from unlocked.doctor.showing import show
from unlocked.errors import InvalidChoice
from unlocked.worlds import Distributed

from processes import run_processes

GOOD = Facts(
    rank=0,
    host="lab0",
    machine="A",
    pid=1,
    python="3.11.7",
    torch="2.13.0",
    unlocked="0.1.0",
    threads=1,
    cores=(0, 1),
    core_quota=None,
    interface="eth0",
    address="10.0.0.1",
    loopback=False,
    memory_free=10**10,
    shared_memory_free=10**10,
)
OTHER = replace(GOOD, rank=1, host="lab1", machine="B", address="10.0.0.2")


def link(source: int, target: int, rate: float, kind: str = "gloo") -> Speed:
    return Speed(source, target, kind, 1e-4, rate, 2**20)


def said(**parts) -> tuple[list[str], list[str]]:
    """What is wrong, and what is only noted, in a report with these parts."""
    report = Report(**({"processes": [GOOD, OTHER]} | parts))
    sentences = {wrong: [f.sentence for f in report.findings if f.wrong is wrong] for wrong in (True, False)}
    assert report.well == (not sentences[True])
    assert all(sentence[0].isupper() and sentence.endswith(".") for row in sentences.values() for sentence in row)
    return sentences[True], sentences[False]


def test_of_a_sound_run_nothing_is_said():
    assert said() == ([], [])
    assert said(
        links=[link(0, 1, 1e8), link(1, 0, 3e8)],
        clocks=[Clock(1, 0.5, -1e6, 1e-4)],
        store_round_trips=[1e-4, 1e-4],
        connections=[Connection(0, 1, "10.0.0.2", 1e-3)],
    ) == ([], [])


@pytest.mark.parametrize("what, theirs", [("torch", "2.11.0"), ("unlocked", "0.0.9")])
def test_versions_that_differ(what, theirs):
    wrong, notes = said(processes=[GOOD, replace(OTHER, **{what: theirs})])
    ours = getattr(GOOD, what)
    assert wrong == [f"Rank 1 runs {what} {theirs}, rank 0 {ours}; install the same version."] and not notes


def test_another_python_is_noted_but_not_another_patch_release():
    assert said(processes=[GOOD, replace(OTHER, python="3.11.2")]) == ([], [])
    wrong, (note,) = said(processes=[GOOD, replace(OTHER, python="3.13.7")])
    assert not wrong and note.startswith("Rank 1 runs python 3.13, rank 0 3.11;")


def test_the_loopback_does_not_lead_to_another_machine():
    lost = replace(GOOD, interface="lo", address="127.0.1.1", loopback=True)
    (sentence,), _ = said(processes=[lost, OTHER])
    assert "Rank 0 uses the loopback interface lo (127.0.1.1), which rank 1" in sentence and "--interface" in sentence
    assert said(processes=[lost, replace(lost, rank=1)])[0] == []


def test_a_connection_that_fails():
    (sentence,), _ = said(connections=[Connection(1, 0, "10.0.0.1", None, "no answer")])
    assert sentence.startswith("Rank 1 cannot connect to rank 0 at 10.0.0.1 (no answer);")


def test_a_link_much_slower_than_back():
    (sentence,), notes = said(links=[link(0, 1, 6.1e6), link(1, 0, 40 * 6.1e6)])
    assert sentence.startswith("The link 0→1 carries 6.1 MB/s (48.8 Mbit/s), 40 times less than 1→0;") and not notes
    assert said(links=[link(0, 1, 1e9, "shared memory"), link(1, 0, 9e9, "shared memory")]) == ([], [])


def test_a_link_that_is_slow_both_ways_is_noted():
    wrong, notes = said(links=[link(0, 1, 5e6), link(1, 0, 1e9 / 8)])
    assert len(wrong) == 1  # 25 times
    wrong, notes = said(links=[link(0, 1, 5e6), link(1, 0, 6e6)])
    assert not wrong and len(notes) == 2 and "takes 2.0 s" in notes[0]


@pytest.mark.parametrize(
    "threads, cores, quota, advice",
    [
        (1, (0, 1), None, None),
        (2, (0, 1), None, "OMP_NUM_THREADS=1"),
        (2, (0, 1, 2, 3), 4.0, None),
        (3, (0, 1, 2, 3), 4.0, "OMP_NUM_THREADS=2"),
        (1, (0,), None, "start fewer there"),
        (2, (0, 1, 2, 3), 2.0, "OMP_NUM_THREADS=1"),  # two cores' worth of time for both
    ],
)
def test_more_threads_than_cores_are_noted(threads, cores, quota, advice):
    rows = [replace(GOOD, rank=rank, threads=threads, cores=cores, core_quota=quota) for rank in (0, 1)]
    wrong, notes = said(processes=rows)
    assert not wrong
    assert (not notes) if advice is None else (f"{2 * threads} threads in all" in notes[0] and advice in notes[0])


def test_threads_of_different_machines_and_of_processes_on_different_cores_do_not_add_up():
    rows = [replace(row, threads=2) for row in (GOOD, OTHER)]
    assert said(processes=rows) == ([], [])
    boxes = [replace(GOOD, rank=rank, host=f"box{rank}", core_quota=1.0) for rank in (0, 1)]
    assert said(processes=boxes) == ([], [])
    assert said(processes=[replace(facts, host="box") for facts in boxes])[1]
    pinned = [replace(GOOD, rank=rank, cores=(rank,)) for rank in (0, 1)]
    assert said(processes=pinned) == ([], [])


def test_little_memory_a_wrong_clock_and_a_slow_store_are_noted():
    wrong, (memory,) = said(processes=[GOOD, replace(OTHER, memory_free=100 * 10**6)])
    assert not wrong and memory == "Only 100 MB of memory are free for rank 1 on lab1."
    _, (clock,) = said(clocks=[Clock(1, 3.2, 1e6, 1e-4)])
    assert clock.startswith("The clock of rank 1 is 3.2 s behind rank 0's;")
    _, (clock,) = said(clocks=[Clock(1, -3.2, 1e6, 1e-4)])
    assert clock.startswith("The clock of rank 1 is 3.2 s ahead of rank 0's;")
    _, (store,) = said(store_round_trips=[1e-3, 0.25])
    assert "answers rank 1 in 250 ms" in store


def test_what_is_wrong_comes_first():
    report = Report(
        [GOOD, replace(OTHER, memory_free=1)], broken=["A."], connections=[Connection(0, 1, "x", None, "refused")]
    )
    assert [finding.wrong for finding in report.findings] == [True, True, False]


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 16])
def test_the_pairs_that_are_measured(size):
    pairs = neighbours(size)
    assert len(set(pairs)) == len(pairs) and all(0 <= a < b < size for a, b in pairs)
    if size <= 6:
        assert len(pairs) == math.comb(size, 2)
    else:
        assert len(pairs) <= 2 * size and {(r, r + 1) for r in range(size - 1)} | {(0, size - 1)} <= set(pairs)


def test_tables_fit_a_terminal_and_say_the_sentences():
    console = Console(width=80, record=True, file=io.StringIO())
    wide = replace(GOOD, address="fd00:1234:5678:9abc::2")
    show(
        Report([wide, replace(OTHER, torch="2.11.0")], "h:1", [1e-4] * 2, [], [link(0, 1, 6.1e6), link(1, 0, 2e8)]),
        console,
    )
    text = console.export_text()
    assert "0→1" in text and "6.1 MB/s (48.8 Mbit/s)" in text and "rank" in text
    assert "wrong: Rank 1 runs torch 2.11.0, rank 0 2.13.0;" in text
    assert "100 µs" in text and max(map(len, text.splitlines())) <= 80


def test_alone_only_this_process_is_looked_at(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert doctor(json=True) == 0
    (line,) = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert report["well"] and report["links"] == [] and report["rendezvous"] is None
    (facts,) = [Facts.from_json(row) for row in report["processes"]]
    assert facts.torch == local_facts().torch
    assert doctor() == 0 and "Processes" in capsys.readouterr().out


def test_impossible_arguments_are_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for size in (0, -1, math.nan, 10**6):
        with pytest.raises(InvalidChoice, match="--mebibytes"):
            doctor(mebibytes=size)
    with pytest.raises(InvalidChoice, match="nosuch0"):
        doctor(interface="nosuch0")
    monkeypatch.setattr(network, "interfaces", lambda: [])
    assert local_facts().rank == 0


# ---- with real processes -------------------------------------------------------------------------------------------------


def examined(cluster, links):
    with Distributed(cluster, links=links) as world:
        return examine(world, mebibytes=1).to_json()


def test_three_processes_of_one_host():
    reports = run_processes(examined, 3, "auto")
    assert reports[0] == reports[1] == reports[2]
    report = reports[0]
    assert report["well"] and [facts["rank"] for facts in report["processes"]] == [0, 1, 2]
    pairs = [(row["source"], row["target"]) for row in report["links"]]
    assert pairs == [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]
    for row in report["links"]:
        assert row["kind"] == "shared memory" and row["message"] == 2**20
        assert 1e-6 < row["latency"] < 0.1 and 1e7 < row["rate"] < 1e12
    assert sorted((row["source"], row["target"]) for row in report["connections"]) == sorted(pairs)
    assert all(0 < row["seconds"] < 3 for row in report["connections"])
    assert [clock["rank"] for clock in report["clocks"]] == [1, 2]
    for clock in report["clocks"]:  # one machine, one clock
        assert (
            abs(clock["wall"]) <= clock["uncertainty"] + 1e-3 and abs(clock["counter"]) <= clock["uncertainty"] + 1e-3
        )
    assert all(0 < seconds < 1 for seconds in report["store_round_trips"])


def stalled(cluster):
    import time

    from unlocked.doctor import measuring

    async def silent(link):
        while True:
            time.sleep(0.1)
            cluster.check()

    if cluster.rank == 1:
        measuring._answer = silent
    world = Distributed(cluster)
    report = examine(world, stalled_after=1.0)
    world.close()
    return report.to_json()


def test_a_link_that_hangs_does_not_hang_the_doctor():
    for report in run_processes(stalled, 2, deadline=25):
        (wrong,) = [finding["sentence"] for finding in report["findings"] if finding["wrong"]]
        assert wrong.startswith("The link between rank 0 and rank 1 was not done after 1 s") and not report["well"]


def test_without_a_rendezvous_it_says_so():
    job = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "1"}
    program = "import sys; from unlocked.doctor import doctor; sys.exit(doctor(json=True))"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **job}, capture_output=True, text=True, timeout=50
    )
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["processes"][0]["rank"] == 1
    assert "'no-such-host.invalid' is unknown" in report["findings"][0]["sentence"]
