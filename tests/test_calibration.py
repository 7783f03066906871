"""Cost files and what is in them: measured stages, links, and predictions from both."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked import calibrate_command, commands
from unlocked import simulation as sim
from unlocked.calibration import costs_of_measured, measure_stages, run_crew
from unlocked.calibration.links import LinkSeconds, line
from unlocked.calibration.stopwatch import Stopwatch
from unlocked.chain import Chain, Stage
from unlocked.cli import main
from unlocked.errors import InvalidChoice, LostProcess
from unlocked.simulation import cost_file
from unlocked.work import WORKS

HARDWARE = sim.Hardware(
    sim.Device(1.25e11, 2.5e10),
    network=sim.Network(
        sim.Edge(1e-5 / 3, math.inf),
        collective="direct",
        send=sim.Line(1e-4, 1e-10),
        receive=sim.Line(2e-4, 0.1 + 0.2),
        exchange=sim.Line(3e-4),
    ),
)


def small_chain(stages: int = 2, heads: bool = True, width: int = 8) -> Chain:
    torch.manual_seed(0)
    chain = ul.cut(ul.models.mlp((6,), 3, width=width, depth=3), stages, like=torch.randn(2, 6))
    if heads:
        ul.credit.DGL(head="linear", budget=None).prepare(chain, 0)
    return chain


def costs_of(chain: Chain) -> sim.Costs:
    return sim.costs_of(sim.profile(chain), sim.Device(1e9 / 3, 1e9), "adam")


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_cost_file_gives_back_exactly_what_was_saved(tmp_path: Path) -> None:
    chain = small_chain()
    costs = costs_of(chain)
    cost_file.save(tmp_path / "costs.json", HARDWARE, costs, about={"date": "today"}, chain={"credit": "dgl"})
    assert cost_file.load(tmp_path / "costs.json", chain) == (HARDWARE, costs)
    assert cost_file.read(tmp_path / "costs.json")["chain"]["credit"] == "dgl"
    assert cost_file.base_hardware(tmp_path / "costs.json") == HARDWARE
    assert [file.name for file in tmp_path.iterdir()] == ["costs.json"]


def test_a_cost_file_of_the_machine_alone_has_no_stages(tmp_path: Path) -> None:
    cost_file.save(tmp_path / "costs.json", HARDWARE)
    assert cost_file.load(tmp_path / "costs.json", small_chain()) == (HARDWARE, None)
    assert cost_file.base_hardware(None) == sim.Hardware()


def test_simulating_with_a_loaded_file_is_simulating_with_what_was_saved(tmp_path: Path) -> None:
    chain = small_chain()
    costs = costs_of(chain)
    cost_file.save(tmp_path / "costs.json", HARDWARE, costs)
    hardware, loaded = cost_file.load(tmp_path / "costs.json")
    assert loaded is not None

    def acts(hardware: sim.Hardware, costs: sim.Costs) -> list[Any]:
        rules = ul.credit.Interlocking(d=1, head="linear", budget=None), ul.consensus.AllReduce()
        timeline = sim.simulate(*rules, costs=costs, replicas=2, steps=3, samples=4, hardware=hardware, chain=chain)
        return timeline.acts

    assert acts(hardware, loaded) == acts(HARDWARE, costs)
    assert acts(hardware, loaded) != acts(sim.Hardware(), costs)


BROKEN: dict[str, Any] = {
    "is no cost file": lambda content: content | {"format": "something else"},
    "of version 2": lambda content: content | {"version": 2},
    "'bandwidth' is missing": lambda content: content | {"network": _without(content["network"], "bandwidth")},
    "'device' is missing": lambda content: _without(content, "device"),
    "stands where a number belongs": lambda content: content | {"device": content["device"] | {"flops": "fast"}},
    "not possible": lambda content: content | {"device": content["device"] | {"flops": -1.0}},
    "no type of numbers": lambda content: _with_stage(content, {"dtype": "nonsense"}),
    "Unknown kind of work": lambda content: _with_stage(content, {"seconds": {"sleep": [1.0, 0.0]}}),
}


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _with_stage(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    first, *rest = content["chain"]["stages"]
    return content | {"chain": content["chain"] | {"stages": [first | changes, *rest]}}


@pytest.mark.parametrize("words", BROKEN)
def test_a_damaged_cost_file_is_refused_in_a_sentence(tmp_path: Path, words: str) -> None:
    file = tmp_path / "costs.json"
    content = cost_file.save(file, HARDWARE, costs_of(small_chain()))
    file.write_text(json.dumps(BROKEN[words](content)))
    with pytest.raises(InvalidChoice, match=r"costs\.json .*\.$") as caught:
        cost_file.load(file)
    assert words in str(caught.value)


def test_files_that_are_not_there_or_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidChoice, match="There is no cost file"):
        cost_file.load(tmp_path / "nothing.json")
    (tmp_path / "costs.json").write_text('{"format": "unlocked co')
    with pytest.raises(InvalidChoice, match="not JSON"):
        cost_file.load(tmp_path / "costs.json")
    (tmp_path / "costs.json").write_bytes(b"\xff\x00")
    with pytest.raises(InvalidChoice, match="not JSON"):
        cost_file.load(tmp_path / "costs.json")
    with pytest.raises(InvalidChoice, match="cannot be read"):
        cost_file.load(tmp_path)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: small_chain(3), "cut into 3"),
        (lambda: small_chain(width=9), "another network"),
        (lambda: small_chain(heads=False), "--credit"),
    ],
)
def test_a_cost_file_of_another_chain_is_refused(tmp_path: Path, other: Any, words: str) -> None:
    cost_file.save(tmp_path / "costs.json", HARDWARE, costs_of(small_chain()))
    with pytest.raises(InvalidChoice, match=words):
        cost_file.load(tmp_path / "costs.json", other())


# ---- stages ----------------------------------------------------------------------------------------------------------


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        time.sleep(0.005)
        return x + weight

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(0.010)
        return gradient, gradient.sum(0)


class Sleeper(nn.Module):
    """Takes 5 ms forward and 10 ms backward, whatever the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta or type(x) is not Tensor:  # shapes only
            return x + self.weight
        return _Sleep.apply(x, self.weight)  # type: ignore[no-any-return]


def test_the_prediction_for_stages_of_known_duration_is_right() -> None:
    chain = Chain([Stage(Sleeper()), Stage(Sleeper())], like=torch.randn(2, 3))
    costs = costs_of_measured(chain, measure_stages(chain, (2, 8), windows=2, seconds=0.15), "momentum")
    for stage in costs.stages:
        assert stage.of(("forward",), 4) == pytest.approx(0.005, rel=0.15)
        assert stage.of(("backward",), 4) == pytest.approx(0.010, rel=0.15)
    steps = 10
    backprop = sim.simulate(ul.credit.Backprop(), costs=costs, steps=steps, samples=4)
    assert backprop.span() / steps == pytest.approx(0.030, rel=0.15)
    pipelined = sim.simulate(ul.credit.GPipe(4), costs=costs, steps=steps, samples=4)
    assert pipelined.span() / steps == pytest.approx(5 * 0.015, rel=0.15)  # (M + J − 1)(forward + backward)


def test_measured_costs_have_all_kinds_of_work_in_positive_seconds() -> None:
    chain = small_chain()
    before = [x.clone() for x in chain.parameters()]
    state = torch.get_rng_state()
    costs = costs_of_measured(chain, measure_stages(chain, (2, 16), "adam", windows=1, seconds=0.02), "adam")
    first, last = costs.stages
    assert set(last.seconds) == set(WORKS)
    assert set(first.seconds) == set(WORKS) - {"input-backward", "weight-backward"}  # the data need no gradient
    for stage in costs.stages:
        for part in stage.seconds:
            assert stage.of((part,), 2) > 0.0
            assert stage.of((part,), 64) >= stage.of((part,), 2)
    assert last.state == 2 * last.profile.trained
    for x, y in zip(before, chain.parameters()):
        assert torch.equal(x, y) and y.grad is None
    assert torch.equal(state, torch.get_rng_state())


def test_a_stage_without_a_loss_of_its_own_has_no_head_to_be_measured_or_kept() -> None:
    chain = small_chain(heads=False)
    first, last = costs_of_measured(chain, measure_stages(chain, (4,), windows=1, seconds=0.01), "sgd").stages
    assert not any(part.startswith("head") for part in first.seconds)
    assert first.profile.head_kept.at(100) == 0.0
    assert last.profile.head_kept.at(100) > 0.0
    with pytest.raises(InvalidChoice, match="at least 1 sample"):
        measure_stages(chain, (0,))
    with pytest.raises(InvalidChoice, match="Unknown optimizer"):
        measure_stages(chain, (4,), "adma")


def test_the_line_through_messages_is_the_nearest_one() -> None:
    assert line({100: 3.0, 300: 5.0}) == pytest.approx((2.0, 0.01))
    assert line({0: 1.0, 1: 2.0, 2: 6.0}) == pytest.approx((0.5, 2.5))
    assert line({100: 3.0, 300: 2.0}) == (2.5, 0.0)  # a message is not cheaper for being larger
    found = LinkSeconds({10: 3.0, 20: 5.0}, {10: 1.0, 20: 1.5}, {10: 0.5, 20: 0.7}, {10: 7.0, 20: 8.0}).network()
    assert found.edge == pytest.approx((0.2, 1 / 0.13))  # 0.2 − 0.05 − 0.02 seconds per byte are nobody's work
    assert found.collective == "direct" and found.exchange == pytest.approx((6.0, 0.1))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not count the waiting for a core")
def test_the_stopwatch_stands_still_while_another_program_has_the_core() -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    other = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])  # inherits the core
    try:
        time.sleep(0.2)
        with Stopwatch() as watch:
            wall, stopped, processor = time.perf_counter(), watch.now(), time.thread_time()
            while time.thread_time() - processor < 0.2:
                pass
            wall, stopped = time.perf_counter() - wall, watch.now() - stopped
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, cores)
    assert stopped == pytest.approx(0.2, rel=0.1)
    assert wall > 1.5 * stopped


def test_a_core_lost_within_a_reading_does_not_set_the_stopwatch_back(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, waited, loses = 10.0, 0.0, False

    def perf_counter() -> float:
        nonlocal wall, waited, loses
        read = wall
        if loses:  # as soon as the wall clock is read
            wall, waited, loses = wall + 1.0, waited + 1.0, False
        return read

    monkeypatch.setattr(time, "perf_counter", perf_counter)
    monkeypatch.setattr(Stopwatch, "_waited", lambda self: waited)
    with Stopwatch() as watch:
        before = watch.now()
        loses = True
        assert watch.now() == before


# ---- processes -------------------------------------------------------------------------------------------------------


def _hangs(member: Any) -> None:
    member.tell("going to sleep")
    time.sleep(60)


def _dies(member: Any) -> int:
    if member.cluster.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return 0


def test_a_crew_that_hangs_or_dies_is_ended() -> None:
    told: list[str] = []
    with pytest.raises(LostProcess, match="not done after 30 s"):
        run_crew(_hangs, 2, deadline=30.0, tell=told.append)
    assert told == ["going to sleep"]
    with pytest.raises(LostProcess, match="Measuring process 1 died"):
        run_crew(_dies, 2, deadline=30.0)
    assert not _children(os.getpid())


def _children(pid: int) -> list[int]:
    """Processes whose parent this is and that are no zombies, without those that multiprocessing keeps."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if (
                int(fields[1]) == pid
                and fields[0] != "Z"
                and b"tracker" not in command
                and b"forkserver" not in command
            ):
                found.append(int(entry.name))
    return found


def test_calibrate_writes_a_cost_file_and_leaves_no_process(tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    command = [sys.executable, "-m", "unlocked", "calibrate", "--json", "--out", str(out)]
    network = ["--model", "mlp", "--input", "6", "--classes", "3", "--width", "8", "--depth", "3", "--batch-size", "8"]
    heads = ["--credit", "dgl(head=linear,budget=None)"]
    started = subprocess.Popen(
        [*command, *network, *heads], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        printed, errors = started.communicate(timeout=100)
    finally:
        started.kill()
    assert started.returncode == 0, errors
    deadline = time.monotonic() + 5.0  # Python's resource tracker ends a moment after the process it served
    while _of_session(started.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _of_session(started.pid)
    told = json.loads(printed)
    assert told["event"] == "result" and told["costs"] == str(out) and told["chain"]["samples"] == [2, 8]
    hardware, costs = cost_file.load(out, small_chain())
    assert costs is not None and costs[1].of(("backward",), 8) > 0.0
    assert hardware.device.flops > 1e8 and hardware.network.send.fixed >= 0.0 and hardware.network.exchange.fixed > 0.0


def _of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "mlp"], "--input"),
        (["--model", "mlp", "--input", "6", "--data", "digits"], "once"),
        (["--input", "6"], "--model"),
        (["--model", "mlp", "--input", "6xx"], "no shape"),
        (["--model", "mpl", "--input", "6"], "did you mean 'mlp'"),
        (["--model", "mlp", "--input", "6", "--stages", "0"], "--stages"),
        (["--model", "mlp", "--input", "6", "--stages", "99"], "stages=99"),
        (["--model", "mlp", "--input", "6", "--credit", "dgll"], "did you mean 'dgl'"),
        (["--out", "/nowhere/at/all/costs.json"], "--out"),
    ],
)
def test_calibrate_refuses_bad_options_in_one_sentence(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = time.perf_counter()
    assert main(["calibrate", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and "Traceback" not in error
    assert time.perf_counter() - begin < 20.0  # before anything is measured


def test_self_supervised_rules_are_measured_on_the_encoder():
    """As it is trained: else no run could take its costs."""
    options = {"model": "cnn", "input": "1x8x8", "width": 4, "stages": 2}
    for credit, encoder in (("dgl", None), ("dgssl", True)):
        assert (
            calibrate_command._plan(commands.Calibrate(**options, credit=credit)).recipe["model"].get("encoder")
            is encoder
        )


@pytest.mark.parametrize("credit", ["oracle-simclr", "dgssl-llm"])
def test_rules_with_an_oracle_are_measured_without_asking_it(credit):
    """On two views of each sample; their losses compare the stages' own projections in the oracle's place."""
    model = ul.models.encoder(ul.models.mlp((6,), 3, width=8, depth=2))
    recipe = ul.cut(model, 2, like=torch.randn(2, 6)).recipe
    plan = calibrate_command.Plan(recipe, (6,), classes=3, credit=f"{credit}(oracle=nowhere)", samples=5)
    chain = plan.chain()
    assert plan.rows(chain) == (2, 10)
    for stage in measure_stages(chain, (10,), windows=1, seconds=0.01):
        assert stage[10]["head-forward"] > 0 and stage[10]["head-backward"] > 0
    assert chain[0].loss.reads_oracle
