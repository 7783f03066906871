"""The supervisor of several processes: what it starts, what it does when they end, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.errors import InvalidChoice
from unlocked.launching import launch
from unlocked.launching.arguments import again, complete, option, run_folder
from unlocked.launching.voices import HOLD, Voices, sentence_of

LIMIT = 40.0
STARTER = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner in the background ignores it
from unlocked.launching import launch
options = json.loads(sys.argv[1])
script = options.pop("script")
sys.exit(launch(options.pop("arguments"), options.pop("processes"), command=(sys.executable, "-c", script), **options))
"""
BEGIN = """
import os, signal, subprocess, sys, time
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def note(name, text=""):
    with open(os.path.join(sys.argv[1], name), "a") as file:
        file.write(text)
def wait_for(*names):
    while not all(os.path.exists(os.path.join(sys.argv[1], name)) for name in names):
        time.sleep(0.01)
"""


class Launched:
    """A supervisor in a process of its own; its children run `script` and get `folder` as their argument."""

    def __init__(self, folder: Path, script: str, processes: int, arguments: list[str] | None = None, **options: Any):
        self.folder, self.mark = folder, f"mark-{os.getpid()}-{time.monotonic_ns()}"
        words = [str(folder), *(arguments or []), self.mark]
        options |= {"script": BEGIN + script, "processes": processes, "arguments": words}
        command = [sys.executable, "-c", STARTER, json.dumps(options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait(self) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        out, error = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, out, error

    def pids(self) -> list[int]:
        """All processes of this job (beside the supervisor) that still exist, zombies not counted."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and self.mark in (entry / "cmdline").read_text().split("\0"):
                    found.append(int(entry.name))
        return found

    def await_files(self, *names: str) -> None:
        deadline = time.monotonic() + LIMIT
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline and self.process.poll() is None, f"{names} did not come"
            time.sleep(0.01)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Any]:
    """Starts a supervisor; after the test neither it nor anything it started may be there."""
    started: list[Launched] = []

    def start(script: str, processes: int, **options: Any) -> Launched:
        started.append(Launched(tmp_path, script, processes, **options))
        return started[-1]

    yield start
    left = [pid for one in started for pid in one.pids()]
    for one in started:
        one.process.kill()
        one.process.communicate()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


# ---- arguments -------------------------------------------------------------------------------------------------------

FOLDER = Path("runs/chosen")
NAMES = st.sampled_from(["--run", "--resume", "--world", "--device", "--tensorboard"])
OPTIONS = st.lists(st.tuples(NAMES, st.sampled_from(["a", "b/c", "x y"]), st.booleans()), max_size=5)


def written(options: list[tuple[str, str, bool]]) -> list[str]:
    """The options as words, with = or without."""
    return [word for name, value, joined in options for word in ([f"{name}={value}"] if joined else [name, value])]


@settings(deadline=None, max_examples=60)
@given(OPTIONS)
def test_the_last_value_of_an_option_counts(options: list[tuple[str, str, bool]]) -> None:
    words, values = ["train", *written(options)], {name: value for name, value, _ in options}
    assert all(option(words, name) == values.get(name) for name in ("--run", "--resume", "--world", "--device"))


@settings(deadline=None, max_examples=60)
@given(OPTIONS)
def test_train_gets_a_world_and_a_folder_and_keeps_what_was_given(options: list[tuple[str, str, bool]]) -> None:
    words, values = ["train", *written(options)], {name: value for name, value, _ in options}
    full = complete(words, FOLDER)
    assert full[: len(words)] == words and complete(full, Path("other")) == full
    assert option(full, "--world") == values.get("--world", "distributed")
    given_folder = values.get("--resume") or values.get("--run")
    assert run_folder(full) == Path(given_folder or FOLDER)
    assert (option(full, "--run") == str(FOLDER)) == (given_folder is None)


def test_other_commands_are_passed_as_they_are() -> None:
    for words in (["doctor"], ["doctor", "--run", "x"], ["trian"], ["--version"]):
        assert complete(words, FOLDER) == again(words) == words
        assert run_folder(words) is None


@pytest.mark.parametrize("form", [["--run", "{}"], ["--run={}"]])
def test_a_run_that_had_begun_is_resumed_with_what_resume_takes(tmp_path: Path, form: list[str]) -> None:
    words = ["train", "--epochs", "3", *(word.format(tmp_path) for word in form), "--tensorboard=off", "--json"]
    full = complete([*words, "--device", "cpu"], FOLDER)
    assert again(full) == full
    (tmp_path / "config.json").touch()
    resumed = ["train", "--resume", str(tmp_path), "--world", "distributed", "--tensorboard", "off", "--device", "cpu"]
    assert again(full) == [*resumed, "--json"]
    assert again(again(full)) == again(full)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (["train"], {"processes": 0}, "--processes 0"),
        ([], {"processes": 2}, "write the command after --"),
        (["launch", "--", "train"], {"processes": 2}, "launch cannot launch itself"),
        (["train"], {"processes": 2, "max_restarts": -1}, "--max-restarts -1"),
        (["train"], {"processes": 2, "threads": 0}, "--threads 0"),
        (["train"], {"processes": 2, "grace": float("nan")}, "--grace nan"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(arguments: list[str], options: Any, words: str) -> None:
    with pytest.raises(InvalidChoice, match=words):
        launch(arguments, command=("false",), **options)


# ---- output ----------------------------------------------------------------------------------------------------------


def printed(pieces: list[tuple[int, str]], *ending: Any) -> str:
    """What is on standard error after the ranks said these pieces at one time."""
    voices, error = Voices(as_json=False), io.StringIO()
    with contextlib.redirect_stderr(error):
        for rank, text in pieces:
            voices.hear(rank, "stderr", text, now=0.0)
        for rank in {rank for rank, _ in pieces}:
            voices.ended(rank, now=0.0)
        if ending:
            voices.announce(*ending, 0.0)
        voices.finish()
    return error.getvalue()


LINES = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["a", "b", "    ^^^^"])), max_size=20)


@settings(deadline=None, max_examples=100)
@given(LINES)
def test_a_line_is_printed_as_often_as_by_the_rank_that_says_it_most(lines: list[tuple[int, str]]) -> None:
    said = Counter(lines)
    most = {line: max(said[rank, line] for rank in range(4)) for _, line in lines}
    got = Counter(line.split("] ")[-1] for line in printed([(rank, f"{line}\n") for rank, line in lines]).splitlines())
    assert got == most


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=30), st.lists(st.integers(0, 30), max_size=4))
def test_rank_0_passes_unchanged_however_it_is_cut(text: str, cuts: list[int]) -> None:
    at = [0, *sorted(cuts), len(text)]
    assert printed([(0, text[a:b]) for a, b in itertools.pairwise(at)]) == text[: max(at)]


def test_lines_get_the_ranks_that_said_them() -> None:
    assert printed([(1, "one "), (2, "same\n"), (1, "line\nsame\n")]) == "[ranks 1, 2] same\n[rank 1] one line\n"


def test_what_a_rank_began_to_say_is_a_line() -> None:
    assert printed([(1, "no end"), (2, "a\r\nb\rc")]) == "".join(
        ["[rank 2] a\n[rank 2] b\n", "[rank 1] no end\n", "[rank 2] c\n"]
    )


def test_a_line_waits_but_not_rank_0() -> None:
    voices, error = Voices(as_json=False), io.StringIO()
    with contextlib.redirect_stderr(error):
        voices.hear(1, "stderr", "mine\nours\n", 0.0)
        voices.speak(HOLD - 0.1)
        assert error.getvalue() == "" and voices.due == HOLD
        voices.hear(0, "stderr", "ours\n", HOLD - 0.1)
        assert error.getvalue() == "ours\n"
        voices.speak(HOLD)
    assert error.getvalue() == "ours\n[rank 1] mine\n" and voices.due is None


def test_a_failure_is_told_once() -> None:
    lost = "Process 2 (pid 7) was killed by signal 9 (SIGKILL)."
    assert printed([], lost, None) == f"error: {lost}\n"
    survivors = [(rank, f"error: {lost} Saved in x.\n") for rank in (1, 0, 3)]
    assert printed(survivors, lost, None) == f"error: {lost} Saved in x.\n"
    # the failing process's own sentence, alone and with rank 0 saying the same
    whole = "Process 1 (pid 7) ended with exit code 1: The loss is NaN."
    assert printed([(1, "error: The loss is NaN.\n")], whole, "The loss is NaN.") == f"error: {whole}\n"
    alike = [(rank, "error: The loss is NaN.\n") for rank in (1, 0)]
    assert printed(alike, whole, "The loss is NaN.") == "error: The loss is NaN.\n"
    other = [(1, "error: Mine.\n"), (0, "error: Another thing.\n")]
    assert "Mine." in printed(other, lost, None) and "Another" in printed(other, lost, None)


def test_errors_are_known_in_both_forms() -> None:
    assert sentence_of("error: No.") == sentence_of('{"event": "error", "message": "No."}') == "No."
    assert sentence_of("an error: No.") is sentence_of('{"event": "error"') is None


# ---- processes that end well -----------------------------------------------------------------------------------------


def test_what_children_are_told(job: Any) -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR TORCHELASTIC_USE_AGENT_STORE"
    names += " TORCHELASTIC_RESTART_COUNT OMP_NUM_THREADS"
    script = (
        f"note(str(rank), repr([[os.environ[n] for n in '{names}'.split()], os.environ['MASTER_PORT'], sys.argv[2]]))"
    )
    launched = job(script, 3, threads=5, arguments=["given"])
    assert launched.wait() == (0, "", "")
    told = [eval((launched.folder / str(rank)).read_text()) for rank in range(3)]
    for rank, (values, port, given_word) in enumerate(told):
        assert values == [str(rank), "3", str(rank), "3", "127.0.0.1", "True", "0", "5"]
        assert port == told[0][1] and 0 < int(port) < 65536 and given_word == "given"


def test_output_goes_where_a_user_looks_for_it(job: Any) -> None:
    script = "print('out', rank if rank else ''); print('all the same', file=sys.stderr)"
    code, out, error = job(script, 3).wait()
    assert (code, out) == (0, "out \n")
    assert sorted(error.splitlines()) == ["[rank 1] out 1", "[rank 2] out 2", "all the same"]


def test_help_comes_from_one_process(job: Any) -> None:
    assert job("print('help')", 3, arguments=["--help"]).wait() == (0, "help\n", "")


# ---- processes that do not -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["error: Unknown command.", "a usage message"])
def test_bad_input_is_told_once_and_not_tried_again(job: Any, words: str) -> None:
    script = f"note('starts', '.'); print('{words}', file=sys.stderr); sys.exit(2)"
    launched = job(script, 3, max_restarts=3)
    assert launched.wait() == (2, "", f"{words}\n")
    assert (launched.folder / "starts").read_text() == "..."


def test_a_killed_child_is_known_to_the_others_at_once(job: Any) -> None:
    """The survivor reads it under the prefix that the library's own processes use."""
    script = """
if rank == 0:
    from unlocked.cluster.rendezvous import open_store, read_seat
    store = open_store(read_seat(), 20.0)
    note("ready")
    store.wait(["failure"])
    note("told", store.get("failure").decode())
    sys.exit(1)
wait_for("ready")
if rank == 2:
    note("killed", f"{os.getpid()} {time.time()}")
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)  # rank 1 does not care
"""
    launched = job(script, 3, grace=1.0)
    code, _, error = launched.wait()
    pid, moment = (launched.folder / "killed").read_text().split()
    told = json.loads((launched.folder / "told").read_text())
    sentence = f"Process 2 (pid {pid}) was killed by signal 9 (SIGKILL)."
    assert told == {"rank": 2, "sentence": sentence}
    assert (launched.folder / "told").stat().st_mtime - float(moment) < 2.0
    assert (code, error) == (128 + 9, f"error: {sentence}\n")
    assert time.time() - float(moment) < 1.0 + 3.0 + 8.0


def test_the_first_failure_gives_the_exit_code_and_its_reason(job: Any) -> None:
    script = """
if rank == 1:
    wait_for("here")
    print("error: The loss is NaN.", file=sys.stderr)
    sys.exit(7)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
note("here")
time.sleep(60)
"""
    code, _, error = job(script, 2, grace=0.2).wait()
    assert code == 7
    assert error.startswith("error: Process 1 (pid ") and error.endswith("ended with exit code 7: The loss is NaN.\n")


def test_stopped_and_stubborn_children_and_theirs_are_ended(job: Any) -> None:
    script = """
if rank == 0:
    wait_for("1", "2")
    time.sleep(0.2)
    sys.exit(1)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", sys.argv[2]])
signal.signal(signal.SIGTERM, lambda *_: note(f"asked {rank}"))
note(str(rank))
if rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
while True:
    time.sleep(60)
"""
    launched = job(script, 3, grace=0.3)
    launched.await_files("1", "2")
    begin = time.monotonic()
    assert launched.wait()[0] == 1
    assert 3.0 < time.monotonic() - begin < 15.0  # grace, then 3 s between SIGTERM and SIGKILL
    assert not launched.pids()
    assert (launched.folder / "asked 2").exists() and not (launched.folder / "asked 1").exists()


def test_what_a_child_leaves_behind_goes_with_it(job: Any) -> None:
    script = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', sys.argv[2]])"
    launched = job(script, 2)
    assert launched.wait()[0] == 0
    assert not launched.pids()


def test_errors_in_json_are_told_once_on_standard_output(job: Any) -> None:
    line = '{"event": "error", "message": "The loss is NaN."}'
    code, out, error = job(f"print('{line}'); sys.exit(1)", 2, json=True).wait()
    assert (code, out, error) == (1, f"{line}\n", "")


# ---- again -----------------------------------------------------------------------------------------------------------


def test_after_a_failure_it_starts_again(job: Any) -> None:
    launched = job("note('starts', f'{attempt}'); sys.exit(5 if rank == 1 and attempt < 2 else 0)", 2, max_restarts=2)
    code, _, error = launched.wait()
    assert code == 0 and (launched.folder / "starts").read_text() == "001122"
    assert error.count("ended with exit code 5.") == 2
    assert "Starting again from the beginning (restart 2 of 2)." in error


def test_it_gives_up_when_the_restarts_are_used_up(job: Any) -> None:
    launched = job("note('starts', '.'); sys.exit(5)", 1, max_restarts=2, json=True)
    code, out, error = launched.wait()
    assert code == 5 and (launched.folder / "starts").read_text() == "..." and error == ""
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["error", "restart", "error", "restart", "error"]


def test_train_goes_on_with_resume(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys; log = pathlib.Path(sys.argv[1]); words = sys.argv[2:]; first = '--resume' not in words\n"
        "log.open('a').write(' '.join(words) + '\\n')\n"
        "folder = pathlib.Path(words[words.index('--run' if first else '--resume') + 1])\n"
        "(folder / 'checkpoint' / 'step-1').mkdir(parents=True, exist_ok=True); (folder / 'config.json').touch()\n"
        "sys.exit(1 if first else 0)"
    )
    log, before = tmp_path / "log", Path.cwd()
    os.chdir(tmp_path)
    try:
        command = (sys.executable, "-c", script, str(log))
        assert launch(["train", "--epochs", "2"], 1, max_restarts=1, command=command) == 0
    finally:
        os.chdir(before)
    first, second = log.read_text().splitlines()
    folder = first.split()[-1]
    assert first == f"train --epochs 2 --world distributed --run {folder}" and folder.endswith(f"launch-{os.getpid()}")
    assert second == f"train --resume {folder} --world distributed"


# ---- signals ---------------------------------------------------------------------------------------------------------

SAVES = """
def asked(number, frame):
    note(f"asked {rank}", f"{number} ")
    global over
    over = True
over = False
signal.signal(signal.SIGINT, asked), signal.signal(signal.SIGTERM, asked)
note(f"ready {rank}")
while not over: time.sleep(0.05)
time.sleep(0.5)  # it saves
note(f"saved {rank}")
"""


@pytest.mark.parametrize(
    ("number", "theirs", "code"), [(signal.SIGTERM, 0, 0), (signal.SIGINT, 130, 130), (signal.SIGINT, 0, 130)]
)
def test_a_signal_is_passed_on_once_and_waited_for(job: Any, number: int, theirs: int, code: int) -> None:
    launched = job(SAVES + f"sys.exit({theirs})", 2, max_restarts=2, grace=0.1)
    launched.await_files("ready 0", "ready 1")
    launched.process.send_signal(number)
    if number == signal.SIGTERM:  # again, as cluster managers do
        launched.await_files("asked 0", "asked 1")
        launched.process.send_signal(number)
    assert launched.wait() == (code, "", "")
    for rank in range(2):
        assert (launched.folder / f"asked {rank}").read_text() == f"{int(number)} "
        assert (launched.folder / f"saved {rank}").exists()


def test_who_was_asked_to_stop_does_not_start_again(job: Any) -> None:
    launched = job(SAVES + "sys.exit(5)", 1, max_restarts=2)
    launched.await_files("ready 0")
    launched.process.send_signal(signal.SIGTERM)
    code, _, error = launched.wait()
    assert code == 5 and "ended with exit code 5." in error and "again" not in error
    assert (launched.folder / "saved 0").exists()


def test_a_second_ctrl_c_ends_it_at_once(job: Any) -> None:
    launched = job(SAVES + "time.sleep(60)", 2, grace=60.0)
    launched.await_files("ready 0", "ready 1")
    launched.process.send_signal(signal.SIGINT)
    launched.await_files("saved 0", "saved 1")
    launched.process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    assert launched.wait() == (130, "", "") and time.monotonic() - begin < 10.0


def test_children_are_out_of_the_terminals_reach(job: Any) -> None:
    """A terminal's Ctrl-C goes to a whole process group; each child is in another one."""
    launched = job("note(f'group {rank}', f'{os.getpgrp()} {os.getpid()}')", 2)
    assert launched.wait()[0] == 0
    groups = [(launched.folder / f"group {rank}").read_text().split() for rank in range(2)]
    assert all(group == pid for group, pid in groups)


def test_without_the_supervisor_children_do_not_live_on(job: Any) -> None:
    ignoring = "for n in (signal.SIGTERM, signal.SIGHUP): signal.signal(n, signal.SIG_IGN)\n"
    stopped = "note(str(rank))\nif rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(60)"
    launched = job(ignoring + stopped, 3)
    launched.await_files("0", "1", "2")
    assert len(launched.pids()) == 3
    launched.process.kill()
    deadline = time.monotonic() + 5.0
    while launched.pids() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not launched.pids()


def test_an_error_in_the_supervisor_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unlocked.launching import supervisor

    kept = []
    monkeypatch.setattr(supervisor.Supervisor, "_handle", lambda self, event: kept.extend(self._children) or 1 / 0)
    before = signal.getsignal(signal.SIGTERM)
    script = "import time; print('here', flush=True); time.sleep(60)"
    with pytest.raises(ZeroDivisionError):
        launch(["x"], 2, command=(sys.executable, "-c", script), json=True)
    assert len(kept) == 2 and signal.getsignal(signal.SIGTERM) is before
    for child in kept:
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)
