"""The command line: what it writes, what it refuses, and that stopping loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from unlocked import Trainer, consensus, credit, models
from unlocked.checkpoint import save_tensors
from unlocked.cli import main
from unlocked.config import Options, RunConfig, resolve
from unlocked.errors import InvalidChoice
from unlocked.loop import Interrupted
from unlocked.method_names import Call, Method, OfStages, parse_call, parse_method
from unlocked.run_files import alone_in, forget_after, read_config, read_events, write_text
from unlocked.running import Stopper, load_data, make_chain, make_trainer, run

TINY = ["--subset", "100", "--width", "8", "--batch-size", "25", "--threads", "1", "--device", "cpu"]
SMALL = Options(subset=100, width=8, batch_size=25, epochs=2, device="cpu")


def config_of(method: str, options: Options = SMALL) -> RunConfig:
    return resolve(options, parse_method(method), seed=0, threads=1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the run's newest checkpoint."""
    newest = folder / "checkpoint" / (folder / "checkpoint" / "LATEST").read_text()
    return {f"{file.name} {name}": x for file in newest.glob("*.safetensors") for name, x in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def after(steps: int) -> Stopper:
    """Wants to stop after that many updates."""
    counts = iter(range(steps, 0, -1))
    return Stopper(lambda: next(counts) == 1)


# ---- texts -----------------------------------------------------------------------------------------------------------

WORDS = st.from_regex(r"[A-Z_a-z][A-Za-z]{0,4}(-[a-z]{1,3})?", fullmatch=True)
VALUES = st.one_of(
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    st.text(max_size=10),
    WORDS,
    st.builds(OfStages, st.sampled_from(["-", "+", "//"]), st.integers(1, 9)),
    st.just(OfStages()),
)
KEYS = st.sampled_from(["head", "budget", "p", "d", "beta"])


def calls(rules: Any) -> st.SearchStrategy[Call]:
    options = st.dictionaries(KEYS, VALUES, max_size=4).map(lambda found: tuple(found.items()))
    return st.builds(Call, st.sampled_from([rule.name for rule in rules]), options)


@settings(deadline=None, max_examples=30)
@given(st.builds(Method, calls(credit.ALL), calls(consensus.ALL), st.integers(1, 9)))
def test_a_method_is_its_text(method: Method) -> None:
    assert parse_method(str(method)) == method


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("1c2f", "1c2f"),
        ("1c2f(hidden=8)", "1c2f(hidden=8)"),
        ("1c2f(convolutions=2)", "1c2f(convolutions=2)"),
        ("0c1f(dense=3)", "1c2f(convolutions=0,dense=3)"),
        ("dgl-mlp(reductions=2)", "dgl-mlp-sr(reductions=2)"),
        ("man(momentum=0.9)", "man(momentum=0.9)"),
    ],
)
def test_a_head_with_options_is_its_text(head: str, said: str) -> None:
    method = parse_method(f"dgl(head={head},budget=None)")
    assert str(method) == f"dgl(head={said},budget=None)"
    assert parse_method(str(method)) == method
    with pytest.raises(InvalidChoice, match="head linear has no options; leave out 'x'"):
        parse_method("dgl(head=linear(x=1))")


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 30))
def test_j_is_the_number_of_stages(stages: int) -> None:
    for text, expected in (("J", stages), ("J-1", stages - 1), ("J+2", stages + 2), ("J//2", stages // 2)):
        ((_, found),) = parse_call(f"interlocking(d={text})").options
        assert found.at(stages) == expected


def test_a_slug_is_a_folder_name() -> None:
    assert parse_method("dgl(head=mlp)/wash(p=0.001)@3").slug == "dgl-head-mlp--wash-p-0.001--x3"
    assert re.fullmatch(r"[\w.-]+", parse_method("dgl(head='../x y')").slug)


# ---- refusals: an exit code and a sentence, never a traceback --------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["tain"], "did you mean 'train'"),
        (["train", "--bach-size", "3"], "--batch-size"),
        (["train", "--epochs", "two"], "--epochs"),
        (["train", "--schedule", "cosin"], "cosine"),
        (["train", "--epochs", "0"], "--epochs 0 is not possible"),
        (["train", "--lr", "-1"], "--lr -1.0 is not possible"),
        (["train", "--replicas", "0"], "--replicas 0 is not possible"),
        (["train", "--credit", "dgll"], "did you mean 'dgl'"),
        (["train", "--credit", "dgl(hed=mlp)"], "did you mean 'head'"),
        (["train", "--credit", "dgl(head=mpl)"], "did you mean 'mlp'"),
        (["train", "--credit", "interlocking(d=near)"], "must be a whole number"),
        (["train", "--credit", "interlocking(d=1.5)"], "must be a whole number"),
        (["train", "--credit", "predsim(statistic=flat)"], "did you mean 'flatten'"),
        (["train", "--consensus", "independent(d=1)"], "has no parameters"),
        (["train", "--credit", "dgl(head=mlp"], "cannot be read"),
        (["train", "--credit", "dgl(budget=__import__('os'))"], "is no value"),
        (["train", "--credit", "dgl(budget=0.001)", *TINY], "the budget is 0.1 %"),
        (["train", "--consensus", "wahs"], "did you mean 'wash'"),
        (["train", "--consensus", "wash(p=2)"], "not a probability"),
        (["train", "--model", "cnm"], "did you mean 'cnn'"),
        (["train", "--model", "cnn", "--model-options", "widht=3"], "did you mean 'width'"),
        (["train", "--model-options", "width"], "key=value"),
        (["train", "--model", "vgg8b", "--depth", "3"], "vgg8b has no depth"),
        (["train", "--stages", "40"], "stages=40 is not possible"),
        (["train", "--optimizer", "adam", "--momentum", "0.5"], "adam has no momentum"),
        (["train", "--data", "digit"], "did you mean 'digits'"),
        (["train", "--data", "folder:/nowhere"], "/nowhere"),
        (["train", "--device", "cuda:99"], "There is no device 'cuda:99'"),
        (["train", "--resume", "nowhere"], "nowhere"),
        (["compare", "--methods", "dgl/wsh"], "did you mean 'wash'"),
        (["compare", "--methods", "dgl", "dgl@1"], "given twice"),
        (["compare", "--methods", "dgl@3@2"], "cannot be read"),
        (["compare", "--seeds", "0"], "--seeds 0 is not possible"),
        (["report", "nowhere"], "nowhere"),
        (["export", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused_in_words(
    argv: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    said = capsys.readouterr()
    assert expected in said.err and "Traceback" not in said.err
    assert main([*argv, "--json"]) == 2
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert record["event"] == "error" and expected in record["message"]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert all(command in capsys.readouterr().out for command in ("train",))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("unlocked ")


def test_a_loss_that_is_not_finite_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", *TINY, "--lr", "1e30", "--epochs", "3", "--run", str(tmp_path / "run")]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: The loss of stage") and "Traceback" not in error
    assert read_events(tmp_path / "run")[-1]["reason"] == "failed"


# ---- train -----------------------------------------------------------------------------------------------------------


def test_train_writes_the_files_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    argv = ["train", *TINY, "--epochs", "2", "--credit", "dgl", "--consensus", "wash(p=0.5)", "--replicas", "2"]
    assert main([*argv, "--run", str(folder), "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["event"] for record in records] == ["epoch", "epoch", "result"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["credit"], config["consensus"], config["replicas"]) == ("dgl", "wash(p=0.5)", 2)
    assert len(config["heads"]) == 3 and "FLOPs" in config["heads"][0] and sum(config["stage_sizes"]) == 6
    assert {"versions", "machine", "command", "model_options", "schedule", "lr"} <= config.keys()
    step = json.loads((folder / "step.json").read_text())
    assert {act["kind"] for act in step["timeline"]} >= {"F", "B", "U", "S", "R", "M"} and max(
        step["activation_curve"]
    ) > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] == 8 and summary["epochs"] == 2 and len(summary["members"]) == 2
    assert summary["activation_peak"] == max(step["activation_curve"])
    assert {**summary, "event": "result", "run": str(folder)} == records[-1]
    assert [record["event"] for record in read_events(folder)] == ["start", "epoch", "epoch", "stop"]
    assert main([*argv, "--run", str(folder)]) == 2 and "--resume" in capsys.readouterr().err
    assert main(["report", str(folder)]) == 0 and (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("method", "schedule"), [("dgl/wash(p=0.3)@2", "cosine"), ("greedy", "step"), ("interlocking(d=J-1)", "constant")]
)
def test_going_on_equals_never_having_stopped(method: str, schedule: Any, tmp_path: Path) -> None:
    config = config_of(method, Options(**{**vars(SMALL), "schedule": schedule, "optimizer": "adam"}))
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "parts", callbacks=[after(6)])  # in the middle of the second epoch
    assert not (tmp_path / "parts" / "summary.json").exists()
    assert main(["train", "--resume", str(tmp_path / "parts")]) == 0
    starts = [record["step"] for record in read_events(tmp_path / "parts") if record["event"] == "start"]
    assert starts == [0, 6]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    parts = json.loads((tmp_path / "parts" / "summary.json").read_text())
    for name in ("accuracy", "loss", "updates", "activation_peak", "bytes_up", "bytes_down"):
        assert parts[name] == whole[name]
    before = weights(tmp_path / "parts")
    assert main(["train", "--resume", str(tmp_path / "parts")]) == 0  # complete: nothing is done again
    assert same(before, weights(tmp_path / "parts"))


def test_resume_refuses_other_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config_of("backprop"), tmp_path / "run")
    assert main(["train", "--resume", str(tmp_path / "run"), "--batch-size", "10"]) == 2
    assert "leave out --batch-size" in capsys.readouterr().err


def test_a_run_belongs_to_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone_in(tmp_path / "run"):
        assert main(["train", *TINY, "--run", str(tmp_path / "run")]) == 2
    assert "Another process" in capsys.readouterr().err


def test_a_killed_runs_log_is_cut_back_to_its_checkpoint(tmp_path: Path) -> None:
    lines = [{"event": "start", "epoch": 0}, *({"event": "epoch", "epoch": k} for k in (1, 2, 3))]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "ep')
    forget_after(tmp_path, 2)
    assert [record["epoch"] for record in read_events(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("method", ["backprop", "greedy", "dgl/all-reduce@2"])
def test_the_cosine_of_every_stage_ends_at_zero(method: str, tmp_path: Path) -> None:
    run(config_of(method), tmp_path)
    rates = [record["learning_rates"] for record in read_events(tmp_path) if record["event"] == "epoch"]
    assert rates[-1] == pytest.approx([0.0] * 4, abs=1e-9)
    assert max(rates[0]) > 0


@pytest.mark.parametrize("method", ["backprop", "dgl", "backprop/all-reduce@2"])
def test_bytes_are_those_of_the_tensors(method: str, tmp_path: Path) -> None:
    """Up: every boundary activation of a batch; down: the same for backprop, 0 for DGL; all-reduce: 2(N−1)/N Ψ_P."""
    config = config_of(method)
    summary = run(config, tmp_path)
    train, _ = load_data(config)
    x = train.samples(torch.arange(config.batch_size))[0]
    chain, boundaries = make_chain(config, train), 0
    for stage in list(chain.eval())[:-1]:
        x = stage(x)
        boundaries += x.numel() * x.element_size()
    assert summary["bytes_up"] == boundaries
    assert summary["bytes_down"] == (0 if method == "dgl" else boundaries)
    parameters = sum(x.numel() for x in chain.parameters())
    assert summary["parameters"] == parameters
    assert summary["bytes_replicas"] == (2 * 1 / 2 * 4 * parameters if "@2" in method else 0)


def test_all_methods_of_a_seed_start_equal() -> None:
    states = []
    for method in ("backprop", "dgl/wash@2", "greedy"):
        config = config_of(method)
        chain = make_trainer(config, load_data(config)[0]).chains[-1]
        states.append(dict(chain.state_dict()))
    assert same(states[0], states[1]) and same(states[0], states[2])
    other = resolve(SMALL, parse_method("backprop"), seed=1, threads=1)
    assert not same(states[0], dict(make_chain(other, load_data(other)[0]).state_dict()))


# ---- export, methods -------------------------------------------------------------------------------------------------


def test_export_is_the_averaged_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config_of("backprop/wash(p=0.5)@2"), tmp_path / "run")
    trainer = Trainer.resume(tmp_path / "run" / "checkpoint")
    to = tmp_path / "model.safetensors"
    argv = ["export", str(tmp_path / "run"), "--to", str(to)]
    assert main(argv) == 0
    assert same(load_file(to), dict(trainer.averaged().state_dict()))
    with safe_open(to, "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    model = models.from_recipe(recipe)
    model.load_state_dict(load_file(to))  # the user's own names
    assert main(argv) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*argv, "--overwrite", "--member", "1"]) == 0
    assert same(load_file(to), dict(trainer.chains[1].state_dict()))
    assert not same(load_file(to), dict(trainer.averaged().state_dict()))
    assert main([*argv, "--overwrite", "--member", "2"]) == 2 and "0, 1" in capsys.readouterr().err


def test_what_cannot_be_written_is_a_sentence_before_the_work_and_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config_of("backprop"), tmp_path / "run")
    with pytest.raises(OSError, match="it could not be written"):
        save_tensors(tmp_path / "nowhere" / "x.safetensors", {})
    (tmp_path / "a file").touch()
    for place in (tmp_path / "a file" / "x.safetensors", tmp_path / "a file" / "deeper" / "x.safetensors"):
        assert main(["export", str(tmp_path / "run"), "--to", str(place)]) == 2
        assert "is not a folder that you may write to" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda place, how: False)
    for argv in (
        ["export", str(tmp_path / "run"), "--to", str(tmp_path / "x.safetensors")],
        ["probe", str(tmp_path / "run")],
        ["calibrate", "--out", str(tmp_path / "costs.json")],
    ):
        assert main(argv) == 2
        assert "is not a folder that you may write to" in capsys.readouterr().err
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError) as refused:
        write_text(tmp_path / "taken", "text")
    assert refused.value.filename == str(tmp_path / "taken")


def test_a_comparison_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    for command in (["train", "--resume"], ["export"], ["soup"]):
        assert main([*command, str(tmp_path)]) == 2
        assert (
            f"is a comparison of several runs; give one of them, a folder in {tmp_path}/runs" in capsys.readouterr().err
        )
    run(config_of("backprop"), tmp_path)  # a run whose folder also holds others
    assert main(["export", str(tmp_path), "--to", str(tmp_path / "x.safetensors")]) == 0


def test_a_complete_run_that_is_resumed_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config_of("backprop"), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", "--resume", str(tmp_path), "--tensorboard", "on"]) == 0
    assert "(already complete)" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["train", "--resume", str(tmp_path), "--epochs", "77"]) == 2
    assert "leave out --epochs. To train for longer" in capsys.readouterr().err


def test_methods_lists_every_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    names = [rule.name for rule in credit.ALL] + [rule.name for rule in consensus.ALL]
    assert [row["name"] for row in listed["credit"] + listed["consensus"]] == names
    for option in ([], ["--markdown"]):
        assert main(["methods", *option]) == 0
        assert all(name in text for text in [capsys.readouterr().out] for name in names)


def test_listing_methods_and_the_digits_bring_no_heavy_imports() -> None:
    heavy = "transformers matplotlib sklearn scipy pyarrow"
    code = (
        "import sys; from unlocked.cli import main; from unlocked.data import load; main(['methods']); load('digits'); "
    )
    code += f"print([name for name in '{heavy}'.split() if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.splitlines()[-1] == "[]"


# ---- compare ---------------------------------------------------------------------------------------------------------


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    methods = ["backprop", "dgl/wash(p=0.1)@2", "predsim(budget=0.001)"]
    common = ["--seeds", "2", "--epochs", "2", "--jobs", "1", "--out", str(out), *TINY]
    assert main(["compare", "--methods", *methods, *common]) == 1  # one method fails, the others go on
    assert "the budget is 0.1 %" in capsys.readouterr().out
    table = {row["method"]: row for row in json.loads((out / "table.json").read_text())}
    assert list(table) == methods and [row["runs"] for row in table.values()] == [2, 2, 0]
    assert table["predsim(budget=0.001)"]["failed"].startswith("The head 'predsim'")
    assert "| dgl/wash(p=0.1)@2 |" in (out / "table.md").read_text() and (out / "report.html").exists()
    alone = run(config_of("backprop"), tmp_path / "alone")
    first = json.loads((out / "runs" / "backprop-seed0" / "summary.json").read_text())
    assert first["accuracy"] == alone["accuracy"] and read_config(out / "runs" / "backprop-seed1").seed == 1
    accuracies = [
        json.loads((out / "runs" / f"backprop-seed{k}" / "summary.json").read_text())["accuracy"] for k in (0, 1)
    ]
    assert table["backprop"]["accuracy_mean"] == pytest.approx(sum(accuracies) / 2)
    times = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/summary.json")}
    assert main(["compare", "--methods", *methods[:2], *common, "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["event"] == "result" and len(last["table"]) == 2 and last["table"][1]["ensemble"] is not None
    assert times == {file: file.stat().st_mtime_ns for file in out.glob("runs/*/summary.json")}  # nothing was repeated
    assert main(["compare", "--methods", "backprop", *common, "--lr", "0.1"]) == 2
    assert "lr 0.05, not 0.1" in capsys.readouterr().err


# ---- signals ---------------------------------------------------------------------------------------------------------


def wait_for(what: Callable[[], Any], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def start(argv: list[str]) -> subprocess.Popen[str]:
    """The command in a group of its own, as a terminal would have it."""
    command = [sys.executable, "-m", "unlocked", *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def children(parent: int) -> list[int]:
    """Processes whose parent it is, zombies left out."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[1]) == parent and after_name[0] != "Z":
            found.append(int(status.parent.name))
    return found


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = Options(**{**vars(SMALL), "epochs": 40})
    process = start(["train", *TINY, "--epochs", "40", "--credit", "backprop", "--run", str(folder)])
    wait_for(lambda: len(read_events(folder)) > 2)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--resume {folder}" in error and "Traceback" not in error
    assert read_events(folder)[-1]["reason"] == "interrupted"
    config = config_of("backprop", options)
    assert read_config(folder) == config
    run(config, folder)
    run(config, tmp_path / "whole")
    assert same(weights(folder), weights(tmp_path / "whole"))


def test_sigterm_saves_and_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def terminate() -> None:
        wait_for(lambda: len(read_events(tmp_path / "run")) > 2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    assert main(["train", *TINY, "--epochs", "5000", "--run", str(tmp_path / "run")]) == 0
    thread.join()
    assert "--resume" in capsys.readouterr().err and (tmp_path / "run" / "checkpoint" / "LATEST").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_ctrl_c_of_a_comparison_leaves_no_process_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["compare", "--methods", "backprop", "dgl", "--seeds", "1", "--epochs", "40", "--jobs", "2", *TINY]
    process = start([*argv, "--out", str(out)])
    logs = [out / "runs" / f"{method}-seed0" / "events.jsonl" for method in ("backprop", "dgl")]
    wait_for(lambda: all(log.exists() for log in logs))
    born = children(process.pid)
    workers = [pid for pid in born if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert all(os.getpgid(pid) != process.pid for pid in workers)  # else Ctrl-C would come twice: at once, unsaved
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--out {out}" in error and "Traceback" not in error
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in born), seconds=10)
    steps = [read_events(folder)[-1] for folder in (out / "runs").iterdir() if read_events(folder)]
    assert steps and all(record["event"] == "stop" for record in steps)
    assert main([*argv, "--out", str(out), "--jobs", "1"]) == 0
    config = config_of("backprop", Options(**{**vars(SMALL), "epochs": 40}))
    run(config, tmp_path / "whole")
    assert same(weights(out / "runs" / "backprop-seed0"), weights(tmp_path / "whole"))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    argv = ["compare", "--methods", "backprop", "--seeds", "1", "--epochs", "100000", "--jobs", "1", *TINY]
    process = start([*argv, "--out", str(tmp_path)])
    log = tmp_path / "runs" / "backprop-seed0" / "events.jsonl"
    wait_for(lambda: log.exists() and "epoch" in log.read_text())
    born = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in born), seconds=15)


def test_tensorboard_files_are_written_where_it_is_installed_unless_refused(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    tiny = ["train", "--subset", "64", "--epochs", "1", "--stages", "2", "--threads", "1"]
    for switch in ("auto", "off"):
        assert main([*tiny, "--run", str(tmp_path / switch), "--tensorboard", switch]) == 0
        assert bool(list(tmp_path.glob(f"{switch}/tensorboard/events.*"))) == (switch == "auto")
    capsys.readouterr()
