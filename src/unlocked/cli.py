"""The command line: `unlocked train | compare | launch | methods | report | timeline | plan | trace | export | graph | …`.

Exit codes: 0 done (also when SIGTERM made it save and stop), 1 training failed, 2 bad input, 130 stopped by Ctrl-C.
Errors are one sentence.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from . import __version__
from .commands import (
    COMMANDS,
    Calibrate,
    Compare,
    Doctor,
    Graph,
    Join,
    Launch,
    Methods,
    Plan,
    Probe,
    Report,
    Soup,
    Timeline,
    Trace,
    Train,
)
from .comparing import compare, default_folder, plan
from .errors import Deadlock, InvalidChoice, LostProcess, NonFiniteLoss, UnlockedError, choose
from .listing import LEGEND, as_markdown, as_rich, rules
from .loop import Interrupted
from .running import refuse_unprobed
from .simulation.options import described
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
            own, launched = _split(arguments)
            return _run(_parse(own or ["--help"], as_json), shlex.join(["unlocked", *arguments]), launched)
    except SystemExit as stop:  # tyro has said it all
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Interrupted) and stop.terminated
        return _fail(str(stop) or "Stopped before anything was trained.", as_json, 0 if terminated else 130)
    except (NonFiniteLoss, Deadlock, LostProcess) as error:
        return _fail(str(error), as_json, 1)
    except UnlockedError as error:
        return _fail(str(error), as_json, 2)
    except BrokenPipeError:  # whoever read our output has gone
        sys.stdout = None  # type: ignore[assignment]
        return 1
    except OSError as error:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return _fail(f"{where}{error.strerror or error}.", as_json, 2)


def _fail(sentence: str, as_json: bool, code: int) -> int:
    if as_json:
        print(json.dumps({"event": "error" if code else "stopped", "message": sentence}), flush=True)
    else:
        print(f"error: {sentence}" if code else sentence, file=sys.stderr)
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


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is ours, and what `launch` passes on: all behind the first --."""
    if arguments[:1] != ["launch"] or "--" not in arguments:
        return arguments, []
    cut = arguments.index("--")
    return arguments[:cut], arguments[cut + 1 :]


def _run(command: Any, text: str, launched: list[str]) -> int:
    if isinstance(command, Train):
        from .train_command import train

        return train(command, text, _console())
    if isinstance(command, Compare):
        return _compare(command, text)
    if isinstance(command, Methods):
        return _methods(command)
    if isinstance(command, Launch):
        from .launching import launch

        return launch(
            launched,
            command.processes,
            max_restarts=command.max_restarts,
            threads=command.threads,
            grace=command.grace,
            json=command.json or "--json" in launched,
        )
    if isinstance(command, Calibrate):
        from .calibrate_command import run as calibrate

        return calibrate(command, _console())
    if isinstance(command, Doctor):
        from .doctor import doctor

        return doctor(command.json, command.interface, command.mebibytes)
    if isinstance(command, Timeline):
        from .timeline_command import timeline

        return timeline(command, _console())
    if isinstance(command, Plan):
        from .planning.command import run as plan_command

        return plan_command(command, _console())
    if isinstance(command, Soup):
        from .soup_command import soup

        return soup(command, _console())
    if isinstance(command, Probe):
        from .probe_command import probe

        return probe(command, _console())
    if isinstance(command, Join):
        from .join_command import join

        return join(command, _console())
    if isinstance(command, Graph):
        from .graph_command import graph

        return graph(command, _console())
    return _write(command)


def _write(command: Any) -> int:
    """The commands that write a file."""
    if isinstance(command, Trace):
        from .trace import write_trace

        return _wrote("trace", write_trace(command.run, command.to), command.json)
    if isinstance(command, Report):
        from .report import write_report  # brings matplotlib with it

        return _wrote("report", write_report(command.folder), command.json)
    from .exporting import export

    written = export(command.run, command.to, command.member, command.overwrite)
    return _wrote("weights", written, command.json)


def _console() -> Console:
    """Standard output; where it is no terminal there is no width to keep to."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 160))


def _wrote(what: str, path: Path, as_json: bool) -> int:
    print(json.dumps({"event": "result", what: str(path)}) if as_json else str(path))
    return 0


# ---- compare, methods ------------------------------------------------------------------------------------------------


def _compare(command: Compare, text: str) -> int:
    folder = command.out or default_folder()
    if not command.methods:
        raise InvalidChoice("--methods needs at least one method; leave it out for the standard ten.")
    cluster = described(command, command.world)
    made = plan(
        command.methods, command, command.seeds, command.jobs, folder, text, command.world, command.processes, cluster
    )
    if command.probe:
        for method in made.methods:
            refuse_unprobed(made.configs[method][0])
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

    if command.probe:
        from .probe_command import probe_comparison

        probe_comparison(folder, console, command.device, command.json)
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
