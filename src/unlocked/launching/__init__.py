"""`unlocked launch --processes 4 -- train …`: the processes of a run on this machine, started, watched, and started again.

Exit codes: 0 all ended well, also after SIGTERM (they saved); 130 Ctrl-C; else that of the process that failed first,
128 + the signal's number if it was killed by one. Bad input (2) and Ctrl-C (130) are never tried again.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint import Reader
from ..config import cores, require_at_least
from ..errors import InvalidChoice
from .arguments import again, complete, run_folder
from .supervisor import Plan, Supervisor
from .voices import tell

_NEVER_AGAIN = (0, 2, 130)


def launch(
    arguments: Sequence[str],
    processes: int,
    *,
    max_restarts: int = 0,
    threads: int | None = None,
    grace: float = 10.0,
    json: bool = False,
    command: Sequence[str] = (sys.executable, "-m", "unlocked"),
) -> int:
    """Run `command` with `arguments` in several processes of this machine, as ranks of one job; returns the exit code.

    Args:
        max_restarts: how often to start all again after a failure; a run goes on from its last checkpoint.
        threads: OpenMP threads per process; None: the cores shared out evenly, at least one.
        grace: seconds the others have to stop after a failure, before SIGTERM and, 3 s later, SIGKILL.
        json: print own messages as lines of JSON on standard output.

    Raises InvalidChoice. When it returns or raises, no process it started is left.
    """
    _check(arguments, processes, max_restarts, threads, grace)
    if {"-h", "--help"} & set(arguments):
        processes = 1  # one help is enough
    plan = Plan(command, processes, threads or max(1, cores() // processes), grace, json)
    arguments = complete(arguments, Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-launch-{os.getpid()}")
    with Supervisor(plan) as supervisor:
        for number in range(max_restarts + 1):
            code = supervisor.attempt(arguments, number)
            if code in _NEVER_AGAIN or supervisor.stopping or number == max_restarts:
                break
            arguments = again(arguments)
            supervisor.resize(_left(arguments, processes) if supervisor.changed else processes)
            tell(json, "restart", _starting_again(arguments, number + 1, max_restarts))
    return code


def _left(arguments: Sequence[str], processes: int) -> int:
    """How many processes a run goes on with whose members have changed: one for each replica of its last checkpoint."""
    folder = run_folder(arguments)
    if folder is None or not any((folder / "checkpoint").glob("step-*")):
        return processes
    return int(Reader(folder / "checkpoint").manifest["options"]["replicas"])


def _starting_again(arguments: Sequence[str], number: int, most: int) -> str:
    folder = run_folder(arguments)
    begun = folder is not None and any((folder / "checkpoint").glob("step-*"))
    where = f"from the last checkpoint in {folder}/checkpoint" if begun else "from the beginning"
    return f"Starting again {where} (restart {number} of {most})."


def _check(arguments: Sequence[str], processes: int, max_restarts: int, threads: int | None, grace: float) -> None:
    require_at_least("processes", processes, 1)
    require_at_least("max_restarts", max_restarts, 0)
    require_at_least("threads", threads, 1)
    if not 0 <= grace < float("inf"):
        raise InvalidChoice(f"--grace {grace} is not possible; give a number of seconds of at least 0.")
    if not arguments:
        raise InvalidChoice(
            "There is nothing to launch; write the command after --, as in 'unlocked launch --processes 4 -- train'."
        )
    if arguments[0] == "launch":
        raise InvalidChoice("launch cannot launch itself; write another command after --, such as train.")
