"""What a launched `train` is told beyond what the user wrote, so that it can be started again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_KEPT = ("--world", "--interface", "--tensorboard", "--device")  # what `train --resume` takes beside the folder


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of `name VALUE` or `name=VALUE`, the last one if it is given twice; None if it is not there."""
    found = None
    for here, following in zip(arguments, [*arguments[1:], None]):
        if here == name and following is not None:
            found = following
        elif here.startswith(f"{name}="):
            found = here.removeprefix(f"{name}=")
    return found


def complete(arguments: Sequence[str], folder: Path) -> list[str]:
    """The arguments with all that every process must agree on: for `train` the world, and the run's folder if none is given."""
    full = list(arguments)
    if full[:1] != ["train"]:
        return full
    if option(full, "--world") is None:
        full += ["--world", "distributed"]
    if option(full, "--run") is None and option(full, "--resume") is None:
        full += ["--run", str(folder)]
    return full


def run_folder(arguments: Sequence[str]) -> Path | None:
    """Where the run of completed `train` arguments is; None for other commands."""
    if list(arguments[:1]) != ["train"]:
        return None
    folder = option(arguments, "--resume") or option(arguments, "--run")
    return None if folder is None else Path(folder)


def again(arguments: Sequence[str]) -> list[str]:
    """Completed arguments for going on after a failure: `--resume` if the run had begun, else the same once more."""
    folder = run_folder(arguments)
    if folder is None or option(arguments, "--resume") is not None or not (folder / "config.json").exists():
        return list(arguments)
    kept = [(name, option(arguments, name)) for name in _KEPT]
    options = [word for name, value in kept if value is not None for word in (name, value)]
    return ["train", "--resume", str(folder), *options, *(["--json"] if "--json" in arguments else [])]
