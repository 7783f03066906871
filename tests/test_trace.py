"""A trace is what Perfetto can read, and says what the recording says: every act, every message, every byte."""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict, deque
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.errors import BadCheckpoint, BadData, InvalidChoice, UnlockedError
from unlocked.report.recording import Recording
from unlocked.simulation.retiming import retimed
from unlocked.timeline import BUSY, Act, Timeline
from unlocked.trace import LOOKS, TINY, trace, write_trace

MILLISECOND = 1e-3
ACTIVATION, GRADIENTS = 65_536, 131_072  # bytes


# ---- a run that might have been ----------------------------------------------------------------------------------------


def program(rule: str, replica: int, stage: int, stages: int, noise: random.Random, updates: int) -> deque[tuple]:
    """What one worker does: (kind, micro-batch, version, milliseconds or bytes, channel, peer)."""
    rows: list[tuple] = []
    length = lambda mean: mean * noise.uniform(0.85, 1.3)  # noqa: E731
    for t in range(updates):
        below, above = (replica, stage - 1), (replica, stage + 1)
        if stage > 0:
            rows.append(("R", t, t, ACTIVATION, "activation", below))
        rows.append(("F", t, t, length(2.0), "", None))
        if stage < stages - 1:
            rows.append(("S", t, t, ACTIVATION, "activation", above))
            if rule == "backprop":
                rows.append(("R", t, t, ACTIVATION, "gradient", above))
            else:
                rows.append(("L", t, t, length(0.5), "", None))
        rows.append(("B", t, t, length(4.0), "", None))
        if stage > 0 and rule == "backprop":
            rows.append(("S", t, t, ACTIVATION, "gradient", below))
        rows.append(("M", t, t, GRADIENTS, "mean", None))
        rows.append(("U", t, t, length(0.3), "", None))
    return deque(rows)


def simulate(rule: str, updates: int = 8, seed: int = 0, apart: bool = True) -> dict[str, Any]:
    """timeline.json of 2 replicas × 2 stages on one process each, or all on one (`apart=False`)."""
    noise, workers = random.Random(seed), [(0, 0), (0, 1), (1, 0), (1, 1)]
    left = {worker: program(rule, *worker, 2, noise, updates) for worker in workers}
    clock = {worker: 100.0 + noise.uniform(0, 1) * MILLISECOND for worker in workers}
    flying: dict[tuple, deque[float]] = defaultdict(deque)
    met: dict[tuple, dict] = defaultdict(dict)
    acts: list[Act] = []
    while any(left.values()):
        for worker, rows in left.items():
            while rows:
                kind, batch, version, amount, channel, peer = rows[0]
                start, wire = clock[worker], amount + 64 if apart and kind in "SM" else 0
                if kind == "S":
                    end = start + 0.05 * MILLISECOND
                    flying[(worker, peer, channel)].append(end + 0.02 * MILLISECOND)
                elif kind == "R":
                    if not flying[(peer, worker, channel)]:
                        break
                    end = max(start, flying[(peer, worker, channel)].popleft()) + 0.01 * MILLISECOND
                elif kind == "M":
                    meeting = met[(worker[1], batch)]
                    meeting.setdefault(worker, start)
                    if len(meeting) < 2:
                        break
                    end = max(meeting.values()) + 0.4 * MILLISECOND
                else:
                    end = start + amount * MILLISECOND
                rows.popleft()
                size = amount if kind in "SRM" else 0
                acts.append(Act(kind, *worker, batch, version, size, start, end, channel, peer, wire))
                clock[worker] = end + 0.02 * MILLISECOND
    ranks = [[*worker, rank if apart else 0] for rank, worker in enumerate(workers)]
    acts = Timeline(acts).to_json()
    return {"measured": apart, "ranks": ranks, "steps": [101, 100 + updates], "acts": acts}


def recording_of(content: dict[str, Any]) -> Recording:
    ranks = {(replica, stage): rank for replica, stage, rank in content["ranks"]}
    return Recording(content["measured"], ranks, *content["steps"], Timeline.from_json(content["acts"]))


@pytest.fixture(params=["dgl", "backprop"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "timeline.json").write_text(json.dumps(simulate(request.param)))
    return tmp_path


# ---- an independent reader ---------------------------------------------------------------------------------------------


def check(content: dict[str, Any]) -> None:
    """What the Trace Event Format and Perfetto's import of it ask for."""
    assert isinstance(content["traceEvents"], list)
    slices, flows = defaultdict(list), defaultdict(dict)
    names: dict[tuple, str] = {}
    counters: defaultdict[tuple, list] = defaultdict(list)
    for event in content["traceEvents"]:
        assert event["ph"] in "MXsfC" and event["name"]
        assert isinstance(event["pid"], int) and event["pid"] > 0  # 0 is the idle task
        assert isinstance(event["ts"], (int, float)) and event["ts"] >= 0
        if event["ph"] == "M" and event["name"] in ("process_name", "thread_name"):
            names[(event["pid"], event.get("tid"))] = event["args"]["name"]
        if event["ph"] == "X":
            assert event["dur"] > 0 and event["cat"] and re.fullmatch(r"[a-z_]+", event["cname"])
            slices[(event["pid"], event["tid"])].append(event)
        if event["ph"] in "sf":
            assert event["ph"] not in flows[event["id"]], "an arrow has one start and one end"
            flows[event["id"]][event["ph"]] = event
        if event["ph"] == "C":
            counters[(event["pid"], event["name"])].append(event)
            assert all(isinstance(value, (int, float)) for value in event["args"].values())
    processes = {thread[0] for thread in slices}
    assert {(process, None) for process in processes} <= names.keys() and slices.keys() <= names.keys()
    threads = [thread for _, thread in names if thread is not None]
    assert len(threads) == len(set(threads)) and not processes & set(threads)
    times = [event["ts"] for event in content["traceEvents"] if event["ph"] != "M"]
    assert times == sorted(times)
    for rows in slices.values():
        check_nesting(rows)
    for flow in flows.values():
        assert flow.keys() == {"s", "f"} and flow["f"]["bp"] == "e"
        assert flow["s"]["name"] == flow["f"]["name"] and flow["s"]["cat"] == flow["f"]["cat"]
        out, into = (innermost(slices[(e["pid"], e["tid"])], e["ts"]) for e in (flow["s"], flow["f"]))
        assert out["ts"] <= into["ts"], "Perfetto turns an arrow round whose first slice begins later"
    for rows in counters.values():
        for before, after in pairwise(rows):
            assert all(after["args"][key] >= before["args"][key] for key in before["args"])
        assert set(rows[0]["args"].values()) == {0}


def nanoseconds(microseconds: float) -> int:
    return round(1000 * microseconds)


def check_nesting(rows: list[dict]) -> None:
    """Slices of a thread lie in each other or apart."""
    around: list[int] = []
    for event in rows:
        begin, end = nanoseconds(event["ts"]), nanoseconds(event["ts"]) + nanoseconds(event["dur"])
        while around and around[-1] <= begin:
            around.pop()
        assert not around or end <= around[-1], event
        around.append(end)


def innermost(rows: list[dict], when: float) -> dict:
    """The slice an arrow at `when` is bound to; `when` is strictly inside it, so all viewers find the same."""
    inside = [event for event in rows if event["ts"] < when < event["ts"] + event["dur"]]
    assert inside, "an arrow with no slice around its end"
    return min(inside, key=lambda event: event["dur"])


def of_phase(content: dict[str, Any], phase: str) -> list[dict]:
    return [event for event in content["traceEvents"] if event["ph"] == phase]


# ---- what must hold ----------------------------------------------------------------------------------------------------


def test_the_file_is_a_valid_trace(run: Path) -> None:
    path = write_trace(run)
    assert path == run / "trace.json"
    check(json.loads(path.read_text()))


@pytest.mark.parametrize("rule", ["dgl", "backprop"])
def test_every_act_is_a_slice_at_its_time_in_its_thread(rule: str) -> None:
    recorded = simulate(rule)
    content, acts = trace(recording_of(recorded)), recorded["acts"]
    origin = min(act["start"] for act in acts)
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in of_phase(content, "M") if e["name"] == "thread_name"}
    processes = {e["pid"]: e["args"]["name"] for e in of_phase(content, "M") if e["name"] == "process_name"}
    ranks = {(replica, stage): rank for replica, stage, rank in recorded["ranks"]}
    seen = Counter(
        (processes[e["pid"]], threads[(e["pid"], e["tid"])], e["name"], e["cat"], e["ts"], round(e["dur"], 3))
        for e in of_phase(content, "X")
        if e["name"] != "taken"
    )
    expected: Counter[tuple] = Counter()
    for act in acts:
        worker = (act["replica"], act["stage"])
        begin, end = (round(1e9 * (act[key] - origin)) for key in ("start", "end"))
        name, words = f"{act['kind']} {act['micro_batch']}", LOOKS[act["kind"]][0]
        place = (f"rank {ranks[worker]}", f"replica {worker[0]} stage {worker[1]}")
        expected[(*place, name, words, begin / 1000, (end - begin) / 1000)] += 1
    assert seen == expected
    assert content["otherData"]["largest_shift_us"] == 0


def test_arguments_are_those_of_the_act() -> None:
    content = trace(recording_of(simulate("dgl")))
    found = {e["name"][0]: e["args"] for e in reversed(of_phase(content, "X")) if e["name"] != "taken"}
    assert found["F"] == {"micro-batch": 0, "version": 0}
    sent = {"micro-batch": 0, "version": 0, "channel": "activation", "bytes": ACTIVATION}
    assert found["S"] == {**sent, "wire": ACTIVATION + 64, "peer": "replica 0 stage 1"} or found["S"] == {
        **sent,
        "wire": ACTIVATION + 64,
        "peer": "replica 1 stage 1",
    }
    assert found["R"]["peer"] in ("replica 0 stage 0", "replica 1 stage 0") and "wire" not in found["R"]
    assert found["M"]["wire"] == GRADIENTS + 64 and "peer" not in found["M"]


def test_kinds_have_colours_of_their_own() -> None:
    assert len({colour for _, colour in LOOKS.values()}) == len(LOOKS) == 7


@pytest.mark.parametrize("rule, arrows", [("dgl", 16), ("backprop", 32)])
def test_every_message_is_an_arrow_from_its_sending_to_its_taking(rule: str, arrows: int) -> None:
    content = trace(recording_of(simulate(rule)))
    slices = defaultdict(list)
    for event in of_phase(content, "X"):
        slices[(event["pid"], event["tid"])].append(event)
    starts = {e["id"]: innermost(slices[(e["pid"], e["tid"])], e["ts"]) for e in of_phase(content, "s")}
    ends = {e["id"]: innermost(slices[(e["pid"], e["tid"])], e["ts"]) for e in of_phase(content, "f")}
    assert len(starts) == arrows and starts.keys() == ends.keys()
    for number, sent in starts.items():
        taken = ends[number]
        assert sent["name"].startswith("S ") and taken["cat"] == "receive"
        # in these rules a message is taken in the micro-batch it was sent in, by the one it was sent to
        assert sent["args"]["micro-batch"] == taken["args"]["micro-batch"]
        assert sent["args"]["channel"] == taken["args"]["channel"]
        assert taken["args"]["peer"] == thread_names(content)[sent["tid"]]


def thread_names(content: dict[str, Any]) -> dict[int, str]:
    return {e["tid"]: e["args"]["name"] for e in of_phase(content, "M") if e["name"] == "thread_name"}


def test_waiting_is_seen_and_its_arrow_points_to_its_end() -> None:
    content = trace(recording_of(simulate("backprop")))
    waits = [e for e in of_phase(content, "X") if e["name"].startswith("R ") and e["dur"] > 1000]
    assert waits
    taken = {(e["tid"], nanoseconds(e["ts"] + e["dur"])) for e in of_phase(content, "X") if e["name"] == "taken"}
    assert all((e["tid"], nanoseconds(e["ts"] + e["dur"])) in taken for e in waits)


def test_counters_end_at_the_bytes_that_were_sent() -> None:
    recorded = simulate("backprop")
    content = trace(recording_of(recorded))
    last = {(e["pid"] - 1, e["name"]): e["args"] for e in of_phase(content, "C")}
    expected: defaultdict[tuple, Counter] = defaultdict(Counter)
    ranks = {(replica, stage): rank for replica, stage, rank in recorded["ranks"]}
    for act in recorded["acts"]:
        if act["kind"] in "SM":
            rank = ranks[(act["replica"], act["stage"])]
            expected[(rank, f"bytes sent, {act['channel']}")].update(payload=act["bytes"], wire=act["wire"])
    assert last == {key: dict(total) for key, total in expected.items()}


def test_one_process_is_retimed_and_the_file_says_so() -> None:
    recorded = simulate("dgl", apart=False)
    content = trace(recording_of(recorded))
    check(content)
    assert content["otherData"]["measured"] is False and content["otherData"]["how"].startswith("Not measured")
    assert {e["args"]["labels"] for e in of_phase(content, "M") if e["name"] == "process_labels"} == {
        "re-timed, not measured"
    }
    assert {e["pid"] for e in of_phase(content, "X")} == {1}
    parallel = retimed(Timeline.from_json(recorded["acts"]))
    ends = {e["ts"] + e["dur"] for e in of_phase(content, "X")}
    assert max(ends) == pytest.approx(1e6 * parallel.span(), abs=1e-3 * TINY * len(parallel))
    measured = trace(recording_of(simulate("dgl")))["otherData"]
    assert measured["measured"] is True and measured["how"] == "Acts as they were timed, on one clock."
    assert (measured["processes"], measured["first_update"], measured["last_update"]) == (4, 101, 108)


def test_exchanges_beside_other_acts_get_threads_of_their_own() -> None:
    times = {"B": (0.0, 4.0), "mean 0": (1.0, 3.0), "mean 1": (2.0, 5.0), "mean 2": (3.5, 4.5), "U": (5.0, 6.0)}
    acts = [Act(name[0] if len(name) == 1 else "M", 0, 0, 0, 0, 8, *when, name[1:]) for name, when in times.items()]
    content = trace(Recording(True, {(0, 0): 0}, 1, 1, Timeline(acts)))
    check(content)
    found = {e["args"].get("channel", e["name"][0]): thread_names(content)[e["tid"]] for e in of_phase(content, "X")}
    here = "replica 0 stage 0"
    assert found == {
        "B": here,
        "ean 0": f"{here}, exchanges 1",
        "ean 1": f"{here}, exchanges 2",
        "ean 2": f"{here}, exchanges 1",
        "U": here,
    }


def test_clocks_that_disagree_cannot_turn_an_arrow_round() -> None:
    early = 30e-6  # the taker's clock is so much behind
    acts = [
        Act("S", 0, 0, 0, 0, 8, 1.0, 1.00001, "a", (0, 1)),
        Act("R", 0, 1, 0, 0, 8, 0.9, 1.0 - early, "a", (0, 0)),
        Act("F", 0, 1, 0, 0, 0, 1.0 - early, 1.1),
    ]
    content = trace(Recording(True, {(0, 0): 0, (0, 1): 1}, 1, 1, Timeline(acts)))
    check(content)
    assert content["otherData"]["largest_shift_us"] == pytest.approx(1e6 * early + 2 * TINY / 1000, abs=0.01)
    ((_, forward),) = [(e["ts"], e) for e in of_phase(content, "X") if e["name"] == "F 0"]
    assert forward["ts"] + forward["dur"] == pytest.approx(2e5)  # only what must be moved is


def test_a_taking_waits_for_a_sending_that_waits_itself() -> None:
    acts = [
        Act("R", 0, 0, 0, 0, 8, 1.0, 1.00001, "a", (0, 1)),
        Act("R", 0, 1, 0, 0, 8, 1.0, 1.00002, "a", (0, 2)),
        Act("S", 0, 1, 0, 0, 8, 1.00003, 1.00004, "a", (0, 0)),  # after it was taken, by this clock
        Act("S", 0, 2, 0, 0, 8, 1.0, 1.00001, "a", (0, 1)),
    ]
    content = trace(Recording(True, {(0, stage): stage for stage in range(3)}, 1, 1, Timeline(acts)))
    check(content)
    assert len(of_phase(content, "s")) == 2


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    """Any acts at all: no order, no times that make sense, messages lost at both ends."""
    workers = [(r, s) for r in range(2) for s in range(2)]
    acts = []
    for _ in range(draw(st.integers(1, 30))):
        kind, here = draw(st.sampled_from("FBLUSRM")), draw(st.sampled_from(workers))
        start = draw(st.integers(0, 20)) * 1e-6
        end = start + draw(st.integers(0, 5)) * 1e-6
        peer = draw(st.sampled_from(workers)) if kind in "SR" else None
        acts.append(Act(kind, *here, 0, 0, 8, start, end, "c" if kind in "SRM" else "", peer, 9))
    ranks = {worker: draw(st.integers(0, 2)) for worker in workers}
    return Recording(draw(st.booleans()), ranks, 1, 1, Timeline(acts))


@settings(deadline=None, max_examples=60)
@given(recordings())
def test_any_recording_gives_a_valid_trace(recording: Recording) -> None:
    content = trace(recording)
    check(content)
    if recording.measured:
        assert len([e for e in of_phase(content, "X") if e["name"] != "taken"]) == len(recording.acts)
        assert len(of_phase(content, "s")) <= len(recording.acts.messages())


# ---- files -------------------------------------------------------------------------------------------------------------


def test_another_file_and_the_same_again(run: Path) -> None:
    path = write_trace(run, run / "deep" / "other.json")
    assert path == run / "deep" / "other.json" and not (run / "trace.json").exists()
    before = path.read_bytes()
    assert write_trace(run, path).read_bytes() == before


def test_a_run_without_recorded_steps(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"There are no recorded steps in .*timeline\.json; give the folder"):
        write_trace(tmp_path)
    (tmp_path / "timeline.json").write_text(json.dumps(simulate("dgl") | {"acts": []}))
    with pytest.raises(BadCheckpoint, match="no recorded steps"):
        write_trace(tmp_path)


def test_a_target_that_cannot_be_written(run: Path) -> None:
    with pytest.raises(InvalidChoice, match="is a folder; give the name of a file"):
        write_trace(run, run)
    with pytest.raises(UnlockedError, match="cannot be written"):
        write_trace(run, run / "timeline.json" / "trace.json")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"measured": None}, "does not say whether it was 'measured'"),
        ({"ranks": [[0, 0]]}, "3 whole numbers were expected"),
        ({"ranks": [[0, 0, -1]]}, "3 whole numbers were expected"),
        ({"ranks": [[0, 0, 0]]}, "has acts of replica 0 stage 1, which is not in its 'ranks'"),
        ({"steps": [1, "2"]}, "2 whole numbers were expected"),
        ({"steps": None}, "2 whole numbers were expected"),
        ({"steps": [2, 1]}, "from update 2 to 1, backwards"),
        ({"acts": [{"kind": "F"}]}, "an act that cannot be read"),
        ({"acts": {"kind": "F"}}, "where a list was expected"),
    ],
)
def test_a_damaged_recording_is_a_sentence(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    (tmp_path / "timeline.json").write_text(json.dumps(simulate("dgl") | change))
    with pytest.raises(BadData, match=re.escape(sentence)) as caught:
        write_trace(tmp_path)
    assert "timeline.json" in str(caught.value) and str(caught.value).endswith(".")


def test_an_act_with_bytes_no_file_can_have_is_a_sentence(tmp_path: Path) -> None:
    recorded = simulate("dgl")
    for wrong in (10**400, "8", None, 1.5):
        recorded["acts"][0]["wire"] = wrong
        (tmp_path / "timeline.json").write_text(json.dumps(recorded))
        with pytest.raises(BadData, match="act 0 is no act"):
            write_trace(tmp_path)


# ---- what a timeline can tell ------------------------------------------------------------------------------------------


def test_acts_of_older_files_have_no_wire_bytes() -> None:
    rows = simulate("dgl")["acts"]
    assert Timeline.from_json([{key: row[key] for key in row if key != "wire"} for row in rows]).wire_sent() == {}
    assert Timeline.from_json(rows).to_json() == [{**row, "peer": row["peer"] and tuple(row["peer"])} for row in rows]


def test_bytes_by_channel() -> None:
    timeline = Timeline.from_json(simulate("backprop")["acts"])
    assert timeline.bytes_sent() == {"activation": 16 * ACTIVATION, "gradient": 16 * ACTIVATION, "mean": 32 * GRADIENTS}
    wires = {"activation": 16 * (ACTIVATION + 64), "gradient": 16 * (ACTIVATION + 64), "mean": 32 * (GRADIENTS + 64)}
    assert timeline.wire_sent() == wires
    assert Timeline.from_json(simulate("dgl", apart=False)["acts"]).wire_sent() == {}


@settings(deadline=None, max_examples=50)
@given(recordings(), st.floats(0, 2e-5), st.floats(0, 2e-5))
def test_idle_is_what_a_ruler_finds(recording: Recording, one: float, other: float) -> None:
    begin, end = sorted((one, other))
    acts = [act for act in recording.acts if act.kind in BUSY]
    for worker, share in recording.acts.idle_shares(begin, end).items():
        mine = [act for act in acts if (act.replica, act.stage) == worker]
        inside = [(max(begin, a.start), min(end, a.end)) for a in mine if a.end > begin and a.start < end]
        busy = sum(right - left for left, right in inside)
        assert share == pytest.approx(max(0.0, 1 - busy / (end - begin)) if end > begin else 0.0)
    whole = recording.acts.idle_shares()
    assert whole == recording.acts.idle_shares(
        min(act.start for act in recording.acts), max(act.end for act in recording.acts)
    )


def test_waiting_is_idle() -> None:
    acts = [
        Act("F", 0, 0, 0, 0, 0, 0.0, 1.0),
        Act("S", 0, 0, 0, 0, 8, 1.0, 2.0, "a", (0, 1)),
        Act("M", 0, 0, 0, 0, 8, 2.0, 3.0, "mean"),
        Act("U", 0, 0, 0, 0, 0, 3.0, 4.0),
        Act("R", 0, 1, 0, 0, 8, 0.0, 1.5, "a", (0, 0)),
        Act("L", 0, 1, 0, 0, 0, 1.5, 2.5),
    ]
    assert Timeline(acts).idle_shares() == {(0, 0): 0.5, (0, 1): 0.75}
    assert Timeline(acts).idle_shares(0.0, 2.0) == {(0, 0): 0.5, (0, 1): 0.75}
    assert Timeline().idle_shares() == {}


def test_messages_sent_before_the_record_began_are_left_out() -> None:
    def message(kind: str, when: float) -> Act:
        here, there = ((0, 0), (0, 1)) if kind == "S" else ((0, 1), (0, 0))
        return Act(kind, *here, 0, 0, 8, when, when, "a", there)

    taken, sent = [message("R", t) for t in (1, 2, 3)], [message("S", t) for t in (1.5, 2.5)]
    assert Timeline([*taken, *sent]).messages() == [(sent[0], taken[1]), (sent[1], taken[2])]
    assert Timeline([*sent, taken[1]]).messages() == [(sent[0], taken[1])]
    assert Timeline([message("S", 0), *sent]).messages() == []


def test_meetings_are_the_exchanges_of_all_replicas() -> None:
    meetings = Timeline.from_json(simulate("backprop")["acts"]).meetings()
    assert len(meetings) == 16
    for acts in meetings:
        assert sorted(act.replica for act in acts) == [0, 1]
        assert len({(act.stage, act.micro_batch) for act in acts}) == 1


def test_steps_begin_with_the_first_forward_with_new_weights() -> None:
    timeline = Timeline.from_json(simulate("backprop")["acts"])
    assert timeline.step_starts() == [act.start for act in timeline.of(0, 0) if act.kind == "F"]
    doubled = Timeline(act._replace(version=act.version // 2) for act in timeline)
    assert doubled.step_starts() == timeline.step_starts()[::2]


def test_between_cuts_what_sticks_out() -> None:
    acts = [Act("F", 0, 0, k, 0, 0, float(k), k + 1.0) for k in range(4)] + [Act("S", 0, 0, 9, 0, 8, 1.0, 1.0)]
    inside = Timeline(acts).between(0.5, 2.0)
    assert [(act.micro_batch, act.start, act.end) for act in inside] == [(0, 0.5, 1.0), (1, 1.0, 2.0), (9, 1.0, 1.0)]
