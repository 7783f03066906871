"""The files of a run's folder: what is written where, and how it is read back.

RUN/config.json     the resolved configuration
RUN/events.jsonl    one line per epoch, and each start and stop
RUN/step.json       the timeline of the last training step, the activation curve of the first
RUN/timeline.json   the acts of the latest steps of all processes, on one clock (`unlocked trace` makes RUN/trace.json of it)
RUN/memory.json     what tensors took in an early step of each phase, measured and predicted: a list, see probes/step.py
RUN/probes.json     what each stage has made of the data, written by unlocked probe (probes/explanation.py)
RUN/summary.json    what came out; written when the run is complete, so its presence says so
RUN/checkpoint/     see checkpoint.py
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .config import RunConfig, cores
from .errors import BadCheckpoint, InvalidChoice


def write_text(file: Path, text: str) -> None:
    """Write `file` as `aside` does."""
    with aside(file) as place:
        place.write_text(text)


@contextlib.contextmanager
def aside(file: Path) -> Iterator[Path]:
    """Where to write what is then renamed to `file`: nobody ever sees half of it. An OSError names the file itself."""
    file.parent.mkdir(parents=True, exist_ok=True)
    place = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield place
        place.replace(file)
    except OSError as error:
        error.filename = str(file)
        raise


def refuse_unwritable(file: Path) -> None:
    """Raises InvalidChoice where `file` could not be written after long work: its folder, or what is to hold that, is not to be
    written to."""
    place = next(folder for folder in (file.absolute().parent, *file.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InvalidChoice(
            f"{file} cannot be written: {place} is not a folder that you may write to; give another place."
        )


def write_json(file: Path, content: Any, indent: int | None = 1) -> None:
    """`content` as JSON, indented or in one line."""
    write_text(file, json.dumps(content, indent=indent) + "\n")


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises BadCheckpoint if it is missing or damaged."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as error:
        raise BadCheckpoint(f"There is no {file}; is {file.parent} the folder of a run?") from error
    except ValueError as error:
        raise BadCheckpoint(f"{file} cannot be read ({error}); it is damaged.") from error


@contextlib.contextmanager
def alone_in(folder: Path, taken_over: bool = False) -> Iterator[None]:
    """Nobody else writes to `folder` meanwhile; the system lifts the lock when the process dies. Raises InvalidChoice.

    taken_over: from a chief that the others hold for dead, though it may only be suspended and so have the lock still.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not taken_over:
                raise InvalidChoice(
                    f"Another process is writing to {folder}; wait for it, or give another folder."
                ) from error
        yield


def read_config(folder: Path) -> RunConfig:
    """The configuration of the run in `folder`. Raises BadCheckpoint if there is none, InvalidChoice for a comparison."""
    if (folder / "runs").is_dir() and not (folder / "config.json").exists():
        raise InvalidChoice(
            f"{folder} is a comparison of several runs; give one of them, a folder in {folder / 'runs'}."
        )
    return RunConfig.from_json(read_json(folder / "config.json"))


def machine(device: str) -> dict[str, Any]:
    """What the run was measured on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return {"cpu": _processor(), "cores": cores(), "device": name}


def versions() -> dict[str, str]:
    """Of this library, torch and Python."""
    from . import __version__

    return {"unlocked": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _processor() -> str:
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        rows = []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ---- events ----------------------------------------------------------------------------------------------------------


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All records of the run's log; a last line that is still being written is left out."""
    try:
        lines = (folder / "events.jsonl").read_text().split("\n")
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def forget_after(folder: Path, epoch: int) -> None:
    """Drop the epochs a killed run had logged beyond its last checkpoint: they are about to be trained again."""
    events = read_events(folder)
    kept = [record for record in events if record["event"] != "epoch" or record["epoch"] <= epoch]
    if len(kept) < len(events):
        write_text(folder / "events.jsonl", "".join(json.dumps(record) + "\n" for record in kept))


def write_step(folder: Path, timeline: list[dict[str, Any]], curve: list[int]) -> None:
    """RUN/step.json; a resumed run measures no curve and keeps the one that is there."""
    file = folder / "step.json"
    if not curve and file.exists():
        curve = read_json(file)["activation_curve"]
    write_text(file, json.dumps({"timeline": timeline, "activation_curve": curve}))


def summarise(folder: Path, parameters: int) -> dict[str, Any]:
    """What came out of a complete run, from its log; see the names in the project's documentation of files."""
    epochs = [record for record in read_events(folder) if record["event"] == "epoch"]
    last = epochs[-1]
    validation: Mapping[str, Any] = last["validation"] or {}
    accuracies = [record["validation"]["accuracy"] for record in epochs if record["validation"]]
    speeds = [record["samples_per_second"] for record in epochs]
    summary: dict[str, Any] = {
        name: validation.get(name) for name in ("accuracy", "loss", "members", "ensemble", "layerwise")
    }
    if validation.get("probed"):
        summary["probed"] = True  # accuracies are those of linear probes
    summary["best_accuracy"] = max((one for one in accuracies if one is not None), default=None)
    summary["samples_per_second"] = median(speeds[1:] or speeds)
    summary["activation_peak"], summary["live_peak"] = last["activation_peak"], last.get("live_peak")
    summary |= _traffic(epochs)
    return summary | {
        "parameters": parameters,
        "epochs": len(epochs),
        "updates": last["step"],
        "seconds": last["elapsed"],
    }


def _traffic(epochs: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes per update and replica, mean over the epochs: of one that was interrupted, its rest speaks for all of it."""
    counted = [record["traffic"] for record in epochs if record["traffic"]["updates"]]
    return {
        f"bytes_{way}": sum(sent[way] / sent["updates"] for sent in counted) / max(1, len(counted))
        for way in ("up", "down", "replicas")
    }
