"""Timelines: as tables drawn by hand from the theses' figures, re-timed, measured for staleness, drawn and documented."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unlocked as ul
from unlocked import commands
from unlocked.cli import main
from unlocked.credit.base import Credit, leaf, objective
from unlocked.drawing import common_tick, lane_curves, lanes, text_table
from unlocked.drawing.picture import draw
from unlocked.errors import InvalidChoice, UnlockedError
from unlocked.planning.cuts import Cuts
from unlocked.simulation import cost_file
from unlocked.simulation.costs import costs_of, unit
from unlocked.simulation.hardware import Device, Hardware
from unlocked.simulation.memory import activation_curves, device_peaks
from unlocked.simulation.network import Edge, Network, hierarchical, uniform
from unlocked.simulation.retiming import retimed
from unlocked.simulation.simulating import simulate
from unlocked.timeline import BUSY, Act, Timeline
from unlocked.timeline_case import case_of
from unlocked.worlds.placement import placement

from methods import batch, credits, name_of, trainer

ROOT = Path(__file__).parent.parent
INTERLOCKING = ul.credit.Interlocking(1)


def data_parallel(steps: int = 1, **options: Any) -> Timeline:
    """Figure 5.1a: three replicas of three stages, a device for each replica."""
    hardware = Hardware(devices=3, **options)
    reduced = ul.consensus.AllReduce()
    return simulate(ul.credit.Backprop(), reduced, costs=unit(3), replicas=3, steps=steps, hardware=hardware)


THREE_DEVICES = placement(3, 3, 3)

# ---- tables drawn by hand ----------------------------------------------------------------------------------------------

BACKPROP = """
         0     1     2     3     4     5
stage 0  0F0@0 .     .     .     .     0B0@0|
stage 1  .     1F0@0 .     .     1B0@0|.
stage 2  .     .     2F0@0 2B0@0|.     .
"""
GPIPE = """
         0     1     2     3     4     5     6     7     8     9     10    11
stage 0  0F0@0 0F1@0 0F2@0 0F3@0 .     .     .     .     0B0@0 0B1@0 0B2@0 0B3@0|
stage 1  .     1F0@0 1F1@0 1F2@0 1F3@0 .     .     1B0@0 1B1@0 1B2@0 1B3@0|.
stage 2  .     .     2F0@0 2F1@0 2F2@0 2F3@0 2B0@0 2B1@0 2B2@0 2B3@0|.     .
"""
DGL = """
         0     1     2     3     4     5
stage 0  0F0@0 0B0@0|0F1@1 0B1@1|.     .
stage 1  .     1F0@0 1B0@0|1F1@1 1B1@1|.
stage 2  .     .     2F0@0 2B0@0|2F1@1 2B1@1|
"""
ONE_F_ONE_B = """
         0     1     2     3     4     5     6     7     8     9     10    11
stage 0  0F0@0 0F1@0 0F2@0 .     .     0B0@0 0F3@0 0B1@0 .     0B2@0 .     0B3@0|
stage 1  .     1F0@0 1F1@0 .     1B0@0 1F2@0 1B1@0 1F3@0 1B2@0 .     1B3@0|.
stage 2  .     .     2F0@0 2B0@0 2F1@0 2B1@0 2F2@0 2B2@0 2F3@0 2B3@0|.     .
"""
PIPEDREAM = """
         0     1     2     3     4     5     6     7     8     9     10    11
stage 0  0F0@0 0F1@0 0F2@0 .     .     0B0@0|0F3@1 0B1@1|0F4@2 0B2@2|.     .
stage 1  .     1F0@0 1F1@0 .     1B0@0|1F2@1 1B1@1|1F3@2 1B2@2|1F4@3 1B3@3|.
stage 2  .     .     2F0@0 2B0@0|2F1@1 2B1@1|2F2@2 2B2@2|2F3@3 2B3@3|2F4@4 2B4@4|
"""
# a backward runs the forward again, but for the last stage
PETRA = """
         0     1     2     3     4     5     6     7     8
stage 0  0F0@0 0F1@0 0F2@0 0B0@0 -----|0F3@1 0B1@1 -----|.
stage 1  .     1F0@0 1B0@0|1F1@1 1B1@1|1F2@2 1B2@2|1F3@3 1B3@3|
"""
# a tick is half a forward: carrying a gradient down without the weights' own takes that long
ONE_APART = """
         0     1     2     3     4     5     6     7     8     9     10    11
stage 0  0F0@0 ----- .     .     .     0B0@0 -----|.     .     .     .     .
stage 1  .     .     1F0@0 ----- 1B0@0 .     .     1B0@0 -----|.     .     .
stage 2  .     .     .     .     2F0@0 ----- 2B0@0 .     .     .     2B0@0 -----|
stage 3  .     .     .     .     .     .     3F0@0 ----- 3B0@0 -----|.     .
"""
DATA_PARALLEL = """
          0     1     2     3     4     5     6     7     8     9     10    11
device 0  0F0@0 1F0@0 2F0@0 2B0@0|1B0@0|0B0@0|0F1@1 1F1@1 2F1@1 2B1@1|1B1@1|0B1@1|
device 1  0F0@0 1F0@0 2F0@0 2B0@0|1B0@0|0B0@0|0F1@1 1F1@1 2F1@1 2B1@1|1B1@1|0B1@1|
device 2  0F0@0 1F0@0 2F0@0 2B0@0|1B0@0|0B0@0|0F1@1 1F1@1 2F1@1 2B1@1|1B1@1|0B1@1|
"""


def same(table: str, drawn: str) -> None:
    assert table.splitlines() == drawn.strip("\n").splitlines()


def test_backpropagation_is_figure_2_5a() -> None:
    same(text_table(simulate(ul.credit.Backprop(), costs=unit(3))), BACKPROP)


def test_gpipe_is_figure_2_5b() -> None:
    same(text_table(simulate(ul.credit.GPipe(4), costs=unit(3), samples=4)), GPIPE)


def test_one_f_one_b_is_drained_before_the_update() -> None:
    same(text_table(simulate(ul.credit.OneFOneB(4), costs=unit(3), samples=4)), ONE_F_ONE_B)


def test_pipedream_is_figure_2_5c() -> None:
    same(text_table(simulate(ul.credit.PipeDream(), costs=unit(3), steps=5)), PIPEDREAM)


def test_petra_has_two_hops_in_flight_and_runs_forwards_again() -> None:
    same(text_table(simulate(ul.credit.PETRA(), costs=unit(2), steps=4)), PETRA)


def test_dgl_goes_on_at_once() -> None:
    same(text_table(simulate(ul.credit.DGL(), costs=unit(3), steps=2)), DGL)


def test_interlocking_waits_for_one_stage() -> None:
    found = simulate(INTERLOCKING, costs=unit(4))
    assert common_tick(found) == 0.5
    same(text_table(found), ONE_APART)


def test_data_parallelism_is_figure_5_1a() -> None:
    same(text_table(data_parallel(2), devices=THREE_DEVICES), DATA_PARALLEL)


def test_the_captions_of_figure_2_5() -> None:
    """(a) one worker at a time; (b) workers in parallel, and idle ones."""

    def busy(table: str) -> list[int]:
        rows = [re.sub(r"\|", " ", line).split()[2:] for line in table.strip("\n").splitlines()[1:]]
        return [sum(cell != "." for cell in tick) for tick in zip(*rows)]

    assert busy(BACKPROP) == [1] * 6
    assert busy(GPIPE) == [1, 2, 3, 3, 2, 1, 1, 2, 3, 3, 2, 1]


def test_the_text_on_figure_5_1() -> None:
    """A step takes 2N ticks, activations peak at tick 2, and all wait for the slowest between ticks 5 and 6."""
    found = data_parallel(2)
    assert found.span() == 2 * (2 * 3)
    rows = lanes(found, THREE_DEVICES)
    for curve in lane_curves(rows, activation_curves(found, unit(3), 1)):
        full = [level == 3 * 4 for _, level in curve]
        assert [when for (when, _), now, before in zip(curve, full, [False, *full]) if now and not before] == [2.0, 8.0]
        assert max(level for _, level in curve) == 3 * 4
    slow = data_parallel(2, speeds=(1.0, 1.0, 0.5))
    assert {act.start for act in slow if act.kind == "F" and (act.stage, act.version) == (0, 1)} == {12.0}


# ---- tables ------------------------------------------------------------------------------------------------------------


def acts(*rows: tuple[str, int, float, float], replica: int = 0) -> Timeline:
    return Timeline(Act(kind, replica, stage, 0, 0, 0, start, end) for kind, stage, start, end in rows)


def test_long_acts_go_on_and_updates_that_take_time_have_cells() -> None:
    found = simulate(ul.credit.DGL(), costs=unit(2, backward=2, update=1, head=3))
    same(
        text_table(found),
        """
         0     1     2     3     4     5     6     7
stage 0  0F0@0 0B0@0 ----- ----- ----- ----- 0U0@0 .
stage 1  .     1F0@0 1B0@0 ----- ----- ----- ----- 1U0@0
""",
    )


def test_exchanges_that_take_time_are_shown_behind_computing() -> None:
    found = acts(("F", 0, 0, 2), ("M", 0, 1, 4), ("U", 0, 4, 4))
    same(text_table(found, 1.0), "         0     1     2     3\nstage 0  0F0@0 ----- 0M0@0 -----|")


def test_a_given_tick_shows_what_fills_most_of_it() -> None:
    found = acts(("F", 0, 0.0, 0.7), ("B", 0, 0.7, 2.1), ("L", 0, 2.7, 3.0), ("U", 0, 3.0, 4.6))
    same(
        text_table(found, 1.0),
        """
         0     1     2     3     4
stage 0  0F0@0 0B0@0 .     0U0@0 -----
""",
    )


def test_a_wide_table_is_cut_into_pieces_that_fit() -> None:
    found = simulate(ul.credit.GPipe(4), costs=unit(3), samples=4)
    pieces = text_table(found, width=40).split("\n\n")
    assert all(len(line) <= 40 for piece in pieces for line in piece.splitlines())
    rows = [[line.split()[2:] for line in piece.replace("|", " ").splitlines()[1:]] for piece in pieces]
    assert [list(itertools.chain(*row)) for row in zip(*rows)] == [
        line.replace("|", " ").split()[2:] for line in GPIPE.strip("\n").splitlines()[1:]
    ]


def test_ticks_that_cannot_be_are_refused() -> None:
    found = acts(("F", 0, 0.0, 1.0), ("B", 0, 1.0, 1.0 + 2**0.5))
    with pytest.raises(InvalidChoice, match="multiples of one tick; give the length"):
        text_table(found)
    for tick in (0.0, -1.0, float("nan"), 1e-6):
        with pytest.raises(InvalidChoice, match=r"A tick of .* is too short"):
            text_table(found, tick)
    assert text_table(Timeline()).split() == ["0"]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.sampled_from([1.0, 0.5, 0.1, 1 / 3, 0.025]))
def test_the_common_tick_divides_all_and_is_the_longest(lengths: list[int], tick: float) -> None:
    found, now = [], 0
    for length in lengths:
        found.append(Act("F", 0, 0, 0, 0, 0, now * tick, (now + length) * tick))
        now += length
    expected = tick * torch.gcd(*map(torch.tensor, [sum(lengths), lengths[0]])).item() if len(lengths) <= 2 else None
    common = common_tick(Timeline(found))
    assert common is not None
    assert all(abs(length * tick / common - round(length * tick / common)) < 1e-6 for length in lengths)
    assert common >= tick * (1 - 1e-9) and (expected is None or common == pytest.approx(expected))


# ---- staleness ---------------------------------------------------------------------------------------------------------


def test_staleness_is_measured_from_versions() -> None:
    """Two micro-batches of version 0: the first's gradient goes in at once, the second's an update later."""
    rows = [("F", 0, 0), ("F", 1, 0), ("B", 0, 0), ("U", 0, 0), ("F", 2, 1), ("B", 1, 1), ("B", 2, 1), ("U", 2, 1)]
    found = Timeline(Act(kind, 0, 0, number, version, 0, k, k + 1) for k, (kind, number, version) in enumerate(rows))
    assert found.staleness() == {(0, 0): [[0], [1, 0]]}
    assert found.staleness_counts() == {0: 2, 1: 1}
    assert found.between(2, 99).staleness() == {(0, 0): [[0]]}  # what was forwarded before the record is left out


@dataclass(frozen=True)
class Late(Credit):
    """The forward of micro-batch t runs before the update of t − delay."""

    delay: int
    name = "late"

    async def run(self, worker: Any, stage: Any, batches: Any, weights: Any) -> None:
        waiting: list[Any] = []
        for one in batches:
            worker.at(one.number)
            x = leaf(worker, await worker.below.recv("activation", one))
            await weights.read()
            h = await worker.run("F", stage.body, x)
            await worker.above.send("activation", h.detach())
            waiting.append((one, h))
            if len(waiting) > self.delay:
                await self._learn(worker, stage, weights, *waiting.pop(0))
        for late in waiting:
            await self._learn(worker, stage, weights, *late)

    async def _learn(self, worker: Any, stage: Any, weights: Any, one: Any, h: Any) -> None:
        worker.at(one.number)
        await worker.run("B", lambda: objective(worker, stage, h, one).backward())
        await weights.write()


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_a_rule_that_updates_in_between_is_late_by_as_much(delay: int) -> None:
    found = simulate(Late(delay), costs=unit(2), steps=8)
    expected = [[min(t, delay)] for t in range(8)]
    assert found.staleness() == {(0, 0): expected, (0, 1): expected}


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize(
    ("credit", "accumulate", "hop"),
    [
        (ul.credit.PipeDream(), 1, 1),
        (ul.credit.PipeDream(keep="input"), 1, 1),
        (ul.credit.DDG(), 1, 1),
        (ul.credit.PETRA(), 1, 2),
        (ul.credit.PETRA(keep="graph"), 1, 2),
        (ul.credit.PipeDream(), 2, 1),
        (ul.credit.PETRA(), 3, 2),
    ],
    ids=str,
)
def test_a_delayed_gradient_is_as_late_as_its_rule_says(credit: Credit, accumulate: int, hop: int, stages: int) -> None:
    """hop · (J − 1 − j) micro-batches; in updates of k of them, rounded up for some and down for the others."""
    found = simulate(credit, costs=unit(stages), steps=20, accumulate=accumulate)
    for (_, j), late in found.staleness().items():
        turns = hop * (stages - 1 - j)
        assert {tau for update in late[-3:] for tau in update} == {
            (turns + part) // accumulate for part in range(accumulate)
        }


@pytest.mark.parametrize("stages", [2, 4])
def test_two_versions_make_every_gradient_one_update_late(stages: int) -> None:
    found = simulate(ul.credit.PipeDream2BW(), costs=unit(stages), steps=6, accumulate=4)
    assert all(update == [int(t > 0)] * 4 for late in found.staleness().values() for t, update in enumerate(late))


@pytest.mark.parametrize("row", [row for row in credits() if "delayed" not in row.laws], ids=name_of)
def test_no_gradient_of_a_synchronous_rule_is_late(row: Any) -> None:
    session = trainer(row.make(), stages=3, replicas=2, consensus=ul.consensus.WASH(p=0.3))
    updates = 0
    for _ in range(3):
        session.step([batch()[0]] * 2, [batch()[1]] * 2)
        counts = session.timeline.staleness_counts()
        assert counts.keys() == {0}
        updates += counts[0]
    assert updates >= 3 * 2


# ---- re-timed ----------------------------------------------------------------------------------------------------------

NETWORKS = [
    uniform(0.25, 16.0),
    hierarchical(2, Edge(0.125, 32.0), Edge(1.0, 4.0)),
    Network(Edge(0.5, 8.0), collective="direct"),
]


def by_worker(found: Timeline) -> dict[tuple[int, int], list[Act]]:
    return {worker: found.of(*worker) for worker in found.workers()}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("credit", [ul.credit.Backprop(), ul.credit.GPipe(3), ul.credit.DGL(), INTERLOCKING])
def test_a_run_retimed_for_a_network_is_the_run_on_that_network(credit: Credit, network: Network) -> None:
    options: dict[str, Any] = {"replicas": 2, "steps": 3, "samples": 3}
    options["costs"] = unit(4, backward=2, head=0.75, update=0.5)
    free = simulate(credit, **options)
    there = simulate(credit, hardware=Hardware(network=network), **options)
    assert by_worker(retimed(free, network)) == by_worker(there)
    assert by_worker(retimed(there)) == by_worker(free)


@pytest.mark.parametrize("members", [2, 3, 5])
def test_a_retimed_exchange_goes_round_the_ring(members: int) -> None:
    found = simulate(
        ul.credit.GPipe(2),
        ul.consensus.AllReduce(),
        costs=unit(1, weights=15),
        replicas=members,
        samples=2,
        hardware=Hardware(speeds=(0.5,)),
    )
    size, (latency, bandwidth) = 15 * 4, (0.5, 8.0)
    expected = 2 * (members - 1) / members * size / bandwidth + 2 * (members - 1) * latency
    ends = {act.end for act in retimed(found, uniform(latency, bandwidth)) if act.kind == "M"}
    assert len(ends) == 1 and ends.pop() == pytest.approx(8.0 + expected)  # the slow one comes at 8


def test_what_waits_for_what_was_not_recorded_is_left_out() -> None:
    whole = simulate(ul.credit.Backprop(), ul.consensus.AllReduce(), costs=unit(3), replicas=2, steps=2)
    lost = Timeline(act for act in whole if not (act.kind == "S" and act.stage == 0 and act.micro_batch == 1))
    kept = retimed(lost)
    assert {act.stage for act in kept if act.micro_batch == 1} == {0}
    assert [act.kind for act in kept.of(0, 0) if act.micro_batch == 1] == ["F"]
    alone = Timeline(act for act in whole if not (act.kind == "M" and act.replica == 1))
    assert not any(act.kind == "U" for act in retimed(alone) if act.replica == 0)
    unread = Timeline(act for act in whole if act.stage == 0)
    assert any(act.kind == "S" for act in retimed(unread))
    assert len(retimed(Timeline())) == 0


def test_numbers_of_workers_may_have_gaps() -> None:
    found = [Act("F", 7, 5, 0, 0, 0, 3.0, 4.0), Act("S", 7, 5, 0, 0, 8, 4.0, 4.0, "up", (7, 9))]
    found += [Act("R", 7, 9, 0, 0, 8, 0.0, 0.0, "up", (7, 5)), Act("M", 7, 9, 0, 0, 4, 0.0, 0.0, "mean")]
    assert [(act.stage, act.kind, act.end) for act in retimed(Timeline(found), uniform(2.0))] == [
        (5, "F", 1.0),
        (5, "S", 1.0),
        (9, "R", 3.0),
        (9, "M", 3.0),
    ]


def test_replicas_that_only_others_speak_of_are_waited_for_by_nobody() -> None:
    found = [Act("S", replica, 0, 0, 0, 8, 0.0, 0.0, "up", (1, 0)) for replica in (4, 6)]
    found += [Act("M", replica, 0, 0, 0, 4, 0.0, 0.0, "mean") for replica in (4, 6)]
    assert [(act.replica, act.kind) for act in retimed(Timeline(found))] == [(4, "S"), (6, "S"), (6, "M"), (4, "M")]


def test_waiting_is_idle_however_long_it_is() -> None:
    found = simulate(ul.credit.Backprop(), costs=unit(4))
    assert found.idle_share() == retimed(found).idle_share() == 0.75
    assert sum(act.end - act.start for act in found if act.kind not in BUSY) > 0


# ---- pictures ----------------------------------------------------------------------------------------------------------


def test_lanes_hold_what_their_workers_hold_together() -> None:
    found, costs = data_parallel(2), unit(3)
    rows = lanes(found, THREE_DEVICES)
    curves = lane_curves(rows, activation_curves(found, costs, 1))
    peaks = device_peaks(found, costs, 1, THREE_DEVICES)
    assert [max(level for _, level in curve) + 3 * costs[0].held for curve in curves] == list(peaks.values())
    assert all(curve[-1][1] == 0 for curve in curves)
    assert [row.idle for row in rows] == [0.0] * 3


@pytest.mark.parametrize("colours", ["micro-batch", "kind"])
@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_same_timeline_gives_the_same_picture(tmp_path: Path, ending: str, colours: Any) -> None:
    found = simulate(ul.credit.GPipe(2), ul.consensus.AllReduce(), costs=unit(2), replicas=2, samples=2)
    files = [tmp_path / f"{k}.{ending}" for k in range(2)]
    for file in files:
        curves = lane_curves(lanes(found), activation_curves(found, unit(2), 1))
        draw(file, found, title="gpipe $x$", subtitle="units", memory=curves, colours=colours)
    first, second = (file.read_bytes() for file in files)
    assert first == second
    if ending == "svg":
        text = first.decode()
        assert all(f">{act.stage}{act.kind}{act.micro_batch}@0<" in text for act in found if act.kind in "FB")
        assert "gpipe $x$" in text and "replica 1 stage 1" in text and "idle 33 %" in text
    else:
        assert first.startswith(b"\x89PNG")


def test_pictures_that_cannot_be_read_or_written_are_refused(tmp_path: Path) -> None:
    def refused(found: Timeline, file: str, match: str, kind: type = InvalidChoice) -> None:
        with pytest.raises(kind, match=match):
            draw(tmp_path / file, found, title="")
        assert not (tmp_path / file).exists()

    wide = simulate(ul.credit.DGL(), costs=unit(33))
    refused(wide, "a.svg", "33 lanes cannot be read in one picture, at most 32")
    refused(simulate(ul.credit.DGL(), costs=unit(2), steps=1001), "a.svg", "6006 acts cannot be read.*fewer steps")
    small = simulate(ul.credit.DGL(), costs=unit(32))
    refused(small, "a.gif", "end in .svg or .png")
    refused(small, "none/a.svg", "cannot be written", UnlockedError)
    draw(tmp_path / "a.svg", small, title="")


# ---- the command and its page ------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["timeline", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("stages, parts", [(2, 3), (4, 4), (3, 8)])
def test_the_command_tells_the_bubble(capsys: pytest.CaptureFixture[str], stages: int, parts: int) -> None:
    facts = run(capsys, "--credit", f"gpipe(micro_batches={parts})", "--stages", str(stages), "--backward", "2")
    assert facts["bubble"] == pytest.approx((stages - 1) / (parts + stages - 1))
    assert facts["seconds"] == facts["seconds_per_step"] == 3 * (parts + stages - 1)
    assert facts["staleness"] == {"0": stages * parts}
    assert {lane["peak_bytes"] for lane in facts["lanes"]} == {4 * parts}
    assert facts["bytes_per_step"] == dict.fromkeys(("activation", "gradient"), 4.0 * (stages - 1) * parts)
    assert facts["table"].splitlines()[1].startswith("stage 0  0F0@0 0F1@0")
    assert "backward 2" in facts["assumptions"] and "takes no time" in facts["assumptions"]


def test_the_command_prints_table_and_figures_and_writes_the_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = "--credit gpipe --consensus all-reduce --stages 4 --replicas 2 --steps 2 --speeds 1,0.5"
    assert main(["timeline", *text.split(), "--to", str(tmp_path / "t.png")]) == 0
    printed = capsys.readouterr().out
    for text in ("replica 1 stage 3", "0F4@1", "A tick is 1.", "idle", "Bubble", "Staleness, measured", "all-reduce"):
        assert text in printed, text
    assert (tmp_path / "t.png").stat().st_size > 10_000
    assert "first of them" in run(capsys, "--credit", "greedy")["notes"][0]
    assert "exchanged nothing" in run(capsys, "--consensus", "wash", "--replicas", "2")["notes"][0]
    slow = run(capsys, "--speeds", "1,1,0.5")
    idle = [lane["idle"] for lane in slow["lanes"]]
    assert idle == [0.8, 0.8, 0.6, 0.8] and slow["bubble"] == pytest.approx(0.75)
    many = run(capsys, "--stages", "40")
    assert many["table"] is None and len(many["lanes"]) == 40 and "at most 32" in many["notes"][0]


def test_the_command_takes_a_real_network(capsys: pytest.CaptureFixture[str]) -> None:
    text = "--model cnn --input 3x16x16 --stages 3 --batch 8 --flops 1G"
    words = text.split()
    facts = run(capsys, *words)
    slower = run(capsys, *words, "--speeds", "0.5,0.5,0.5")
    assert 0 < facts["seconds"] == pytest.approx(slower["seconds"] / 2)
    assert facts["staleness"] == {"0": 3} and "1e+09 operations/s" in facts["assumptions"]
    assert run(capsys, "--model", "gpt", "--input", "16", "--stages", "2", "--batch", "2")["seconds"] > 0
    shuffled = run(capsys, *words, "--consensus", "wash(p=0.5)", "--replicas", "2")
    assert shuffled["bytes_per_step"]["wash"] > 0 and not shuffled["notes"]


def test_the_command_takes_a_cost_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    machine, measured = tmp_path / "machine.json", tmp_path / "measured.json"
    hardware = Hardware(Device(flops=1e9), network=uniform(1e-3, 1e6))
    cost_file.save(machine, hardware)
    words = ["--model", "mlp", "--input", "8", "--stages", "2", "--batch", "4"]
    counted, slower = (run(capsys, *words, "--flops", "1G", *more) for more in ([], ["--latency", "1ms"]))
    assert counted["seconds"] < slower["seconds"] < run(capsys, *words, "--costs", str(machine))["seconds"]
    faster = run(capsys, *words, "--costs", str(machine), "--latency", "0s", "--bandwidth", "infB/s")
    assert faster["seconds"] == pytest.approx(counted["seconds"])
    model = ul.models.build("mlp", input_shape=(8,), classes=10)
    _, found = Cuts(model, torch.zeros(2, 8)).profiled(2, ul.credit.Backprop())
    cost_file.save(measured, Hardware(), costs_of(found, Device(flops=0.25e9)))
    assert run(capsys, *words, "--costs", str(measured))["seconds"] == pytest.approx(4 * counted["seconds"])
    cost_file.save(measured, hardware, unit(3, backward=2))
    assert run(capsys, "--costs", str(measured), "--stages", "3")["seconds"] == pytest.approx(9.0, abs=0.02)
    for text, sentence in ((f"--costs {machine}", "machine only"), (f"--costs {measured}", "measured on 3 stage")):
        assert main(["timeline", *text.split()]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["timeline", *words, "--costs", str(measured)]) == 2
    assert "measured on 3 stage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "times"),
    [
        ("--credit pipedream", 4.0),
        ("--credit pipedream-2bw --accumulate 4", 4.0),
        ("--credit petra", 8 / 3),
        ("--credit petra --backward 2", 3.0),
        ("--credit petra(keep=graph)", 4.0),
    ],
)
def test_the_command_says_how_much_faster_a_full_pipeline_is(
    capsys: pytest.CaptureFixture[str], words: str, times: float
) -> None:
    """J(F + B) against F + B, and 2F + B where forwards are run again."""
    full = run(capsys, *words.split(), "--stages", "4", "--steps", "2")["full"]
    assert full["backprop"] / full["seconds_per_step"] == pytest.approx(times)
    assert main(["timeline", *words.split(), "--stages", "4"]) == 0
    assert f"{times:.3g} times as fast" in capsys.readouterr().out
    assert run(capsys, "--credit", "gpipe")["full"] is None


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--stages 0", "--stages 0 is not possible"),
        ("--credit gipe", "gpipe"),
        ("--consensus all-reduce(", "cannot be read"),
        ("--credit torch-gpipe", "cannot be simulated"),
        ("--stages 100 --replicas 100", "10000 workers are too many"),
        ("--stages 3 --steps 20000", "20000 batches of 3 workers are too many"),
        ("--forward -1", "--forward -1.0 is not possible"),
        ("--tick 0", "too short"),
        ("--to x.gif", ".svg or .png"),
        ("--devices 9", "9 processes|9 devices"),
        ("--flops 1T", "--flops is about a real network"),
        ("--model cnn", "give --input"),
        ("--model cnn --input 3xx", "is no shape"),
        ("--model cnn --input 3x16x16 --head 1", "made up"),
        ("--costs nowhere.json", "no cost file nowhere.json"),
        ("--model nothing --input 3x16x16", "nothing"),
        ("--credit gpipe --batch 2", "too few"),
        ("--bandwidth fast", "is no bandwidth"),
        ("--stages 33 --to x.svg", "33 lanes cannot be read"),
        ("--memory 8B", "would hold"),
    ],
)
def test_bad_input_is_a_sentence(capsys: pytest.CaptureFixture[str], words: str, sentence: str) -> None:
    assert main(["timeline", *words.split()]) == 2
    printed = capsys.readouterr().err
    assert re.search(sentence, printed), printed
    assert "Traceback" not in printed and printed.count("\n") == 1


def test_the_page_is_what_the_command_draws(tmp_path: Path) -> None:
    place = ROOT / "docs" / "figures"
    spec = importlib.util.spec_from_file_location("draw_figures", place / "draw.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.redraw(tmp_path)
    assert page == (ROOT / "docs" / "timelines.md").read_text()
    drawn = sorted(file.name for file in tmp_path.iterdir())
    assert drawn == sorted(re.findall(r"\(figures/([\w-]+\.svg)\)", page)) and len(drawn) >= 9
    for name in drawn:
        assert f"(figures/{name})" in page
        kept, made = (folder.joinpath(name).read_text() for folder in (place, tmp_path))
        if _maker(kept) == _maker(made):  # another Matplotlib draws the same otherwise
            assert kept == made, f"{name} is old; run: python docs/figures/draw.py"


def _maker(picture: str) -> str:
    found = re.search(r"Matplotlib v[\w.]+", picture)
    assert found is not None
    return found[0]


@pytest.mark.parametrize("options", [{}, {"model": "cnn", "input": "1x8x8", "width": 4, "batch": 8}])
def test_self_supervised_rules_have_a_timeline(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Of pairs of rows, and of the encoder."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["timeline", "--credit", "dgssl", "--stages", "2", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    case = case_of(commands.Timeline(credit="dgssl", stages=2, **options))
    assert case.samples == 2 * options.get("batch", 1)  # views
    assert f"{options.get('batch')} samples per replica" in case.assumptions or not options
    chain = case.chain
    if chain is not None:
        assert not any(isinstance(part, torch.nn.Linear) for part in chain[-1].body.modules())


def test_a_method_that_is_refused_has_no_timeline(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", "--credit", "dgssl", "--consensus", "cdp", "--replicas", "2", "--stages", "2"]) == 2
    assert "dgssl judges all views of an update together" in capsys.readouterr().err
