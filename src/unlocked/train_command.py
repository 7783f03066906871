"""`unlocked train`: one run, in this process or on all processes of a launch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from .callbacks import Callback, EventLog, TensorBoard
from .cluster import Cluster, Crew
from .commands import Probe, Train
from .config import RunConfig, cores, require_at_least, resolve
from .errors import InvalidChoice, LostProcess, MembersChanged
from .live import LiveTable, in_bytes, in_percent
from .loop import Interrupted, interrupted
from .method_names import Method, parse_call
from .residency import OneStage
from .run_files import read_config
from .running import JsonLines, groups_of, is_complete, refuse_unprobed, run
from .simulation.options import CLUSTER_OPTIONS, described, in_words
from .worlds import Distributed, InProcess, World

_HOW = (
    "tensorboard",
    "json",
    "probe",
    "device",
    "world",
    "reduction",
    "interface",
    "stuck_after",
    "resident",
)  # options that do not say what is trained
_LAST_RESORT = 8.0  # seconds that a process which knows of a failure has to come to an end by itself


def train(command: Train, text: str, console: Console, cluster: Cluster | None = None) -> int:
    """Train as the command says; returns the exit code. Raises KeyboardInterrupt (saved) and UnlockedError kinds.

    cluster: of the processes, if they have come together already. Where members may be lost or come, it goes on with those
    that are left, from what they have saved.
    """
    while True:
        try:
            with _world(command, cluster) as world:
                return _train(command, text, world, console if world.crew.chief else Console(quiet=True))
        except MembersChanged as change:
            cluster, folder = change.cluster, Path(change.folder).parent
            if cluster.chief:
                _note(folder, change, command.json, console)
            command = dataclasses.replace(_only_how(command), resume=folder)


def _only_how(command: Train) -> Train:
    """Without the options that say what is trained: those are in the run's folder."""
    blank = Train()
    return dataclasses.replace(blank, **{name: getattr(command, name) for name in _HOW})


def _note(folder: Path, change: MembersChanged, as_json: bool, console: Console) -> None:
    """Say who goes on, and write it into the run's records."""
    EventLog(folder / "events.jsonl").note(change.record)
    if as_json:
        print(json.dumps(change.record), flush=True)
    else:
        console.print(str(change), highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _world(command: Train, cluster: Cluster | None = None) -> Iterator[World]:
    if command.world != "distributed":
        yield InProcess()  # a simulated world is made when the run is known
        return
    if cluster is None:
        cluster = Cluster.join(command.interface, stuck_after=command.stuck_after)
    cluster.on_failure(lambda sentence: _exit_soon(sentence, command.json))
    try:
        world = Distributed(cluster, reduction=command.reduction)
        try:
            yield world
        except (KeyboardInterrupt, LostProcess, MembersChanged):
            raise
        except BaseException as error:
            cluster.fail(error)
            raise
        finally:
            world.close()
    finally:
        cluster.close()


def _exit_soon(sentence: str, as_json: bool) -> None:
    """Should the main thread sit where nothing wakes it (in PyTorch's own communication), end without it."""

    def end() -> None:
        message = json.dumps({"event": "error", "message": sentence}) if as_json else f"error: {sentence}"
        print(message, file=sys.stdout if as_json else sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(_LAST_RESORT, end)
    timer.daemon = True
    timer.start()


def _train(command: Train, text: str, world: World, console: Console) -> int:
    crew = world.crew
    config, folder = _resumed(command, crew) if command.resume is not None else _fresh(command, crew)
    crew.agree(config.to_json(), "the run")
    if command.probe:
        refuse_unprobed(config)
    if not command.json:
        again = " (already complete)" if is_complete(folder, config) else ""
        on = config.data if config.probe_on is None else f"{config.data}, probed on {config.probe_on}"
        console.print(f"{config.method} on {on}, run {folder}{again}", highlight=False, soft_wrap=True)
        if isinstance(world, Distributed):
            console.print(_where(world.crew), highlight=False, soft_wrap=True)
            if (
                "pairing=available" in config.consensus.replace(" ", "")
                and world.crew.seat.hosted
                and world.crew.size > 1
            ):
                seat = world.crew.seat
                console.print(f"Another replica joins with: unlocked join {seat.host}:{seat.port}", highlight=False)
        if config.cluster is not None:
            console.print(in_words(config.cluster), highlight=False, soft_wrap=True)
    callbacks: list[Callback] = []
    if crew.chief:
        callbacks.append(JsonLines() if command.json else LiveTable(console))
        drawn = command.tensorboard == "on" or (command.tensorboard == "auto" and find_spec("tensorboard"))
        if drawn and not is_complete(folder, config):
            callbacks.append(TensorBoard(folder / "tensorboard"))
    try:
        resident = _resident(command.resident, folder)
        summary = run(config, folder, callbacks=callbacks, command=text, world=world, resident=resident)
    except Interrupted as stop:
        where = shlex.join(["unlocked", "train", "--resume", str(folder)])
        sentence = f"Stopped; everything so far is saved in {folder}. Go on with: {where}"
        raise interrupted(sentence, "terminate" if stop.terminated else None) from stop
    if crew.chief:
        if command.probe:
            from .probe_command import probe_runs

            probe_runs([folder], console, Probe((folder,), device=command.device), quiet=command.json)
        _tell(command, folder, summary, console)
    return 0


def _resident(where: str, folder: Path) -> OneStage | None:
    return None if where == "all" else OneStage("disk", folder) if where == "disk" else OneStage("host")


def _where(cluster: Cluster) -> str:
    hosts = len(set(cluster.hosts))
    return (
        f"{cluster.size} processes on {hosts} host{'s' * (hosts > 1)}, interface {cluster.interface.name} "
        f"({cluster.interface.address})"
    )


def _tell(command: Train, folder: Path, summary: dict[str, Any], console: Console) -> None:
    if command.json:
        print(json.dumps({"event": "result", "run": str(folder), **summary}), flush=True)
        return
    ensemble = "" if summary["ensemble"] is None else f", ensemble {in_percent(summary['ensemble'])}"
    if summary["layerwise"] is not None:
        ensemble += f", all heads together {in_percent(summary['layerwise'])}"
    whose = "linear probe" if summary.get("probed") else "test"
    console.print(
        f"{whose} accuracy {in_percent(summary['accuracy'])}{ensemble}, {summary['samples_per_second']:,.0f} samples/s, "
        f"peak activations {in_bytes(summary['activation_peak'])}. Report: "
        f"{shlex.join(['unlocked', 'report', str(folder)])}",
        highlight=False,
        soft_wrap=True,
    )


def _fresh(command: Train, crew: Crew) -> tuple[RunConfig, Path]:
    """The configuration of a new run and its folder. Raises InvalidChoice, also if there is a run already."""
    require_at_least("replicas", command.replicas, 1)
    if command.recut is not None:
        raise InvalidChoice("--recut is for a run that goes on; add --resume RUN, or give --stages.")
    mitigation = None if command.mitigation is None else parse_call(command.mitigation)
    method = Method(parse_call(command.credit), parse_call(command.consensus), command.replicas, mitigation)
    cluster = described(command, command.world)
    config = resolve(command, method, command.seed, threads=cores(), cluster=cluster)
    chosen = command.run or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{method.slug}"
    folder = Path(crew.broadcast(str(chosen)))
    if crew.broadcast((folder / "config.json").exists()):
        raise InvalidChoice(f"{folder} already holds a run; go on with --resume {folder}, or give another --run.")
    return config, folder


def _resumed(command: Train, crew: Crew) -> tuple[RunConfig, Path]:
    """The configuration found in the folder. Raises InvalidChoice if another option contradicts it."""
    folder = command.resume
    assert folder is not None
    config = read_config(folder)
    free = ("run", "resume", "recut", *_HOW)
    saved = {**dict.fromkeys(CLUSTER_OPTIONS), **(config.cluster or {}), **config.to_json()}
    for field in dataclasses.fields(Train):
        given = getattr(command, field.name)
        given = str(given) if isinstance(given, Path) else given
        if field.name not in free and given != field.default and given != saved[field.name]:
            option = "--" + field.name.replace("_", "-")
            longer = " To train for longer, take Trainer.resume(…).fit(…) in Python." if option == "--epochs" else ""
            raise InvalidChoice(
                f"--resume goes on with the options in {folder / 'config.json'}; leave out {option}.{longer}"
            )
    require_at_least("recut", command.recut, 1)
    if command.recut is None:
        return config, folder
    if groups_of(config) is not None:
        raise InvalidChoice("A network cut into neuron groups cannot be cut anew; leave out --recut.")
    return dataclasses.replace(config, stages=command.recut), folder
