"""The command line: `unlocked train | compare | methods | report | export`.

Exit codes: 0 done, 1 training failed, 2 bad input, 130 stopped by Ctrl-C (or SIGTERM). Errors are one sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from . import __version__
from .callbacks import Callback, TensorBoard
from .commands import COMMANDS, Compare, Methods, Report, Train
from .comparing import compare, default_folder, plan
from .config import RunConfig, cores, require_at_least, resolve
from .errors import Deadlock, InvalidChoice, NonFiniteLoss, UnlockedError, choose
from .exporting import export
from .listing import LEGEND, as_markdown, as_rich, rules
from .live import LiveTable, in_bytes, in_percent
from .method_names import Method, parse_call
from .run_files import read_config
from .running import JsonLines, is_complete, run
from .session import Interrupted
from .table import as_rich as comparison_table


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, and prints every error as a sentence, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    try:
        with _terminated_like_interrupted():
            if arguments == ["--version"]:
                print(f"unlocked {__version__}")
                return 0
            return _run(_parse(arguments or ["--help"], as_json), shlex.join(["unlocked", *arguments]))
    except SystemExit as stop:  # tyro has said it all
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "Stopped before anything was trained.", as_json, 130)
    except (NonFiniteLoss, Deadlock) as error:
        return _fail(str(error), as_json, 1)
    except UnlockedError as error:
        return _fail(str(error), as_json, 2)
    except BrokenPipeError:  # whoever read our output has gone
        sys.stdout = None  # type: ignore[assignment]
        return 1
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        return _fail(f"{where}{error.strerror or error}.", as_json, 2)


def _fail(sentence: str, as_json: bool, code: int) -> int:
    if as_json:
        print(json.dumps({"event": "error", "message": sentence}), flush=True)
    else:
        print(f"error: {sentence}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _terminated_like_interrupted() -> Any:
    """SIGTERM does what Ctrl-C does. Only the main thread may set handlers; elsewhere it stays as it is."""
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parse(arguments: list[str], as_json: bool) -> Any:
    """The command's options. Raises SystemExit (tyro, having printed a box) or InvalidChoice (with --json)."""
    if not arguments[0].startswith("-"):
        choose("command", arguments[0], COMMANDS)
    printed = io.StringIO()
    silently = contextlib.redirect_stderr(printed) if as_json else contextlib.nullcontext()
    try:
        with silently:
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="unlocked",
                description="Train networks without backpropagation's locks and without data parallelism's barriers.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as stop:
        if as_json and stop.code:
            raise InvalidChoice(" ".join(re.sub(r"[╭╮╰╯│─]+", " ", printed.getvalue()).split())) from None
        raise


def _run(command: Any, text: str) -> int:
    if isinstance(command, Train):
        return _train(command, text)
    if isinstance(command, Compare):
        return _compare(command, text)
    if isinstance(command, Methods):
        return _methods(command)
    from .report import write_report  # brings matplotlib with it

    if isinstance(command, Report):
        return _wrote("report", write_report(command.folder), command.json)
    written = export(command.run, command.to, command.member, command.overwrite)
    return _wrote("weights", written, command.json)


def _console() -> Console:
    """Standard output; where it is no terminal there is no width to keep to."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 160))


def _wrote(what: str, path: Path, as_json: bool) -> int:
    print(json.dumps({"event": "result", what: str(path)}) if as_json else str(path))
    return 0


# ---- train -----------------------------------------------------------------------------------------------------------


def _train(command: Train, text: str) -> int:
    config, folder = _resumed(command) if command.resume is not None else _fresh(command)
    console = _console()
    if not command.json:
        again = " (already complete)" if is_complete(folder, config) else ""
        console.print(f"{config.method} on {config.data}, run {folder}{again}", highlight=False, soft_wrap=True)
    callbacks: list[Callback] = [JsonLines() if command.json else LiveTable(console)]
    if command.tensorboard == "on" or (command.tensorboard == "auto" and find_spec("tensorboard")):
        callbacks.append(TensorBoard(folder / "tensorboard"))
    try:
        summary = run(config, folder, callbacks=callbacks, command=text)
    except Interrupted as stop:
        where = shlex.join(["unlocked", "train", "--resume", str(folder)])
        raise KeyboardInterrupt(f"Stopped; everything so far is saved in {folder}. Go on with: {where}") from stop
    if command.json:
        print(json.dumps({"event": "result", "run": str(folder), **summary}), flush=True)
        return 0
    ensemble = "" if summary["ensemble"] is None else f", ensemble {in_percent(summary['ensemble'])}"
    console.print(
        f"test accuracy {in_percent(summary['accuracy'])}{ensemble}, {summary['samples_per_second']:,.0f} samples/s, "
        f"peak activations {in_bytes(summary['activation_peak'])}. Report: "
        f"{shlex.join(['unlocked', 'report', str(folder)])}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _fresh(command: Train) -> tuple[RunConfig, Path]:
    """The configuration of a new run and its folder. Raises InvalidChoice, also if there is a run already."""
    require_at_least("replicas", command.replicas, 1)
    method = Method(parse_call(command.credit), parse_call(command.consensus), command.replicas)
    config = resolve(command, method, command.seed, threads=cores())
    folder = command.run or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{method.slug}"
    if (folder / "config.json").exists():
        raise InvalidChoice(f"{folder} already holds a run; go on with --resume {folder}, or give another --run.")
    return config, folder


def _resumed(command: Train) -> tuple[RunConfig, Path]:
    """The configuration found in the folder. Raises InvalidChoice if another option contradicts it."""
    folder = command.resume
    assert folder is not None
    config = read_config(folder)
    free = ("run", "resume", "tensorboard", "json", "device")
    for field in dataclasses.fields(Train):
        given = getattr(command, field.name)
        if field.name not in free and given != field.default and given != getattr(config, field.name):
            option = "--" + field.name.replace("_", "-")
            raise InvalidChoice(f"--resume goes on with the options in {folder / 'config.json'}; leave out {option}.")
    return config, folder


# ---- compare, methods ------------------------------------------------------------------------------------------------


def _compare(command: Compare, text: str) -> int:
    folder = command.out or default_folder()
    jobs = cores() if command.jobs is None else command.jobs
    if not command.methods:
        raise InvalidChoice("--methods needs at least one method; leave it out for the standard ten.")
    made = plan(command.methods, command, command.seeds, jobs, folder, text)
    console = _console()
    if not command.json:
        runs = len(made.methods) * made.seeds
        console.print(f"{len(made.methods)} methods × {made.seeds} seeds = {runs} runs in {folder}", soft_wrap=True)
    try:
        rows = compare(made, console, command.json)
    except KeyboardInterrupt as stop:
        again = text if command.out is not None else f"{text} --out {shlex.quote(str(folder))}"
        raise KeyboardInterrupt(f"Stopped; everything so far is saved in {folder}. Go on with: {again}") from stop
    from .report import write_report

    report = write_report(folder)
    failed = any(row["failed"] for row in rows)
    if command.json:
        print(json.dumps({"event": "result", "out": str(folder), "table": rows, "report": str(report)}), flush=True)
        return int(failed)
    console.print(comparison_table(rows, console.width))
    for row in rows:
        if row["failed"]:
            console.print(f"{row['method']} failed: {row['failed']}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"Report: {report}", soft_wrap=True, highlight=False)
    return int(failed)


def _methods(command: Methods) -> int:
    listed = rules()
    if command.json:
        print(json.dumps({"event": "result", **listed}))
    elif command.markdown:
        print("\n".join([*(as_markdown(kind, rows) for kind, rows in listed.items()), LEGEND]))
    else:
        for kind, rows in listed.items():
            _console().print(as_rich(kind, rows))
        _console().print(LEGEND, style="dim", highlight=False)
    return 0
