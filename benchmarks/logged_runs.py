"""Many runs, spread over processes of one thread each, and a log of those that are done: a line of JSON for each.

lines = read(log, settings)
missing = [task for task in tasks if task not in {… for line in lines}]
for task, row in finished(run, missing, shared, jobs):          # row = run(task, *shared)
    lines += append(log, [row | {"settings": settings}])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch

from unlocked.allocator import keep_freed_memory

T = TypeVar("T")
Line = dict[str, Any]


def read(log: Path, settings: Any = None) -> list[Line]:
    """The log's lines, of these settings only if they are given; none without a log.

    A line that a stopped process left torn is told of and left out.
    """
    found = []
    for number, text in enumerate(log.read_text().splitlines() if log.exists() else (), start=1):
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            print(f"{log}, line {number} is torn and left out: {text[:60]}", flush=True)
    return found if settings is None else [line for line in found if line["settings"] == settings]


def append(log: Path, lines: Sequence[Line]) -> Sequence[Line]:
    """Write lines to the end of the log, at once, and give them back."""
    log.parent.mkdir(parents=True, exist_ok=True)
    whole = not log.exists() or log.read_bytes()[-1:] in (b"", b"\n")
    with log.open("a") as file:
        file.write("\n" * (not whole) + "".join(json.dumps(line) + "\n" for line in lines))
    return lines


_work: Any = None  # in a process that runs tasks: what runs them, and what all of them need


def _prepare(run: Callable[..., Any], shared: tuple[Any, ...]) -> None:
    global _work
    _work = run, shared
    torch.set_num_threads(1)
    keep_freed_memory()


def _run(task: Any) -> Any:
    run, shared = _work
    return run(task, *shared)


def finished(
    run: Callable[..., Any], tasks: Sequence[T], shared: tuple[Any, ...] = (), jobs: int = 1
) -> Iterator[tuple[T, Any]]:
    """(task, run(task, *shared)) of each task, as they are done; `run` must be importable.

    A run that raises is told of, and the others go on; in the end the first such error is raised.
    """
    if not tasks:
        return
    errors: list[Exception] = []
    with ProcessPoolExecutor(jobs, initializer=_prepare, initargs=(run, shared)) as pool:
        waiting = {pool.submit(_run, task): task for task in tasks}
        for future in as_completed(waiting):
            try:
                found = future.result()
            except BrokenExecutor:  # a process died, and none will be done any more
                raise
            except Exception as error:
                print(f"{waiting[future]} failed: {error!r}", flush=True)
                errors.append(error)
            else:
                yield waiting[future], found
    if errors:
        raise errors[0]
