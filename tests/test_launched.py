"""The command line on several processes: the same numbers, nothing lost, sentences, and no process left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unlocked.cli import main
from unlocked.run_files import read_events

TINY = ["--subset", "100", "--width", "8", "--batch-size", "25", "--threads", "1", "--device", "cpu", "--stages", "2"]
PAIR = ["--credit", "dgl", "--consensus", "wash(p=0.05)", "--replicas", "2"]
DEADLINE = 240  # against hangs, not slowness


def start(argv: list[str]) -> subprocess.Popen[str]:
    """The command in a session of its own, so that its processes can be found."""
    pipe = subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=environment)


def unlocked(*argv: str) -> list[str]:
    return [sys.executable, "-m", "unlocked", *argv]


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=DEADLINE)
        return process.returncode, out, err
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def with_text(text: str) -> list[int]:
    """Processes whose command line contains the text."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if text.encode() in file.read_bytes() and int(file.parent.name) != os.getpid():
                found.append(int(file.parent.name))
    return found


def weights(run: Path, to: Path) -> dict[str, torch.Tensor]:
    assert main(["export", str(run), "--to", str(to), "--overwrite"]) == 0
    return load_file(to)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def wait_for(what, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + DEADLINE
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert main(["train", *TINY, *PAIR, "--epochs", "30", "--run", str(folder), "--tensorboard", "off"]) == 0
    return folder


@pytest.mark.timeout(600)
@pytest.mark.xdist_group("launched")  # the reference is trained once
def test_four_processes_killed_and_started_again_give_the_weights_of_one(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = ["train", *TINY, *PAIR, "--epochs", "30", "--run", str(run), "--tensorboard", "off"]
    process = start(unlocked("launch", "--processes", "4", "--max-restarts", "2", "--", *train))
    wait_for((run / "checkpoint" / "LATEST").exists, process)
    victims = [pid for pid in with_text(str(run)) if pid != process.pid]
    os.kill(victims[-1], signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err
    assert "was killed by signal 9" in err and "Starting again from the last checkpoint" in err
    assert "4 processes on 1 host, interface lo (127.0.0.1)" in out
    assert not with_text(str(run))
    assert same(weights(run, tmp_path / "a.safetensors"), weights(reference, tmp_path / "b.safetensors"))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, reference)]
    for name in ("accuracy", "loss", "members", "ensemble", "bytes_up", "bytes_replicas", "updates", "epochs"):
        assert summaries[0][name] == summaries[1][name], name
    _check_files(run)


def _check_files(run: Path) -> None:
    """The recording, the trace and the report of a run on four processes."""
    recorded = json.loads((run / "timeline.json").read_text())
    assert recorded["measured"] and sorted(row[2] for row in recorded["ranks"]) == [0, 1, 2, 3]
    assert {(act["replica"], act["stage"]) for act in recorded["acts"]} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(act["wire"] > act["bytes"] for act in recorded["acts"] if act["kind"] == "S")
    assert main(["trace", str(run)]) == 0 and main(["report", str(run)]) == 0
    trace = json.loads((run / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in trace if event["name"] == "process_name"} >= {"rank 0", "rank 3"}
    assert "easured on 4 processes" in (run / "report.html").read_text()


@pytest.mark.timeout(600)
@pytest.mark.xdist_group("launched")
def test_sigterm_saves_exits_0_and_goes_on_in_one_process(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = ["train", *TINY, *PAIR, "--epochs", "30", "--run", str(run), "--tensorboard", "off"]
    process = start(unlocked("launch", "--processes", "2", "--", *train))
    wait_for(lambda: len(read_events(run)) > 3, process)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 0 and f"--resume {run}" in err and "error" not in err
    assert not with_text(str(run)) and not (run / "summary.json").exists()
    assert main(["train", "--resume", str(run), "--tensorboard", "off"]) == 0
    assert same(weights(run, tmp_path / "a.safetensors"), weights(reference, tmp_path / "b.safetensors"))


def test_torchrun_and_a_wrong_number_of_processes(tmp_path: Path) -> None:
    """One replica of two stages on three processes is refused, under torchrun; on two it works."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    train = ["unlocked", "train", *TINY, "--world", "distributed", "--epochs", "2", "--tensorboard", "off", "--json"]
    code, out, _ = finish(start([*torchrun, "2", "-m", "--", *train, "--run", str(tmp_path / "good")]))
    assert code == 0 and json.loads(out.splitlines()[-1])["event"] == "result"
    code, out, _ = finish(start([*torchrun, "3", "-m", "--", *train, "--run", str(tmp_path / "bad")]))
    assert (
        code == 1
        and "3 processes were started for 2 worker(s)" in out
        and not (tmp_path / "bad" / "config.json").exists()
    )


def test_compare_trains_on_processes_and_reaches_pytorchs_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    methods = ["torch-gpipe(micro_batches=4)", "backprop/torch-ddp@2"]
    argv = ["compare", "--world", "distributed", "--methods", *methods, "--seeds", "1", "--epochs", "1", *TINY]
    assert main([*argv, "--out", str(out), "--json"]) == 1  # 25 samples are not 4 equal micro-batches: that run fails
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    failed = {line["method"]: line["failed"] for line in lines if line["event"] == "run"}
    assert failed["backprop/torch-ddp@2"] is None
    assert "25" in failed["torch-gpipe(micro_batches=4)"] and "Traceback" not in failed["torch-gpipe(micro_batches=4)"]
    assert not with_text(str(out))


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["train", "--world", "distributed"], "unlocked launch --processes"),
        (["train", "--credit", "torch-gpipe"], "unlocked launch --processes 4 -- train"),
        (["compare", "--methods", "backprop/torch-ddp@2"], "add --world distributed"),
        (["compare", "--processes", "2"], "add --world distributed"),
        (["train", "--recut", "2"], "--resume"),
        (["launch", "--processes", "0", "--", "train"], "at least 1"),
        (["launch", "--processes", "2"], "after --"),
    ],
)
def test_refusals_name_the_remedy(argv, sentence, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert sentence in capsys.readouterr().err
