"""`unlocked doctor`: what the processes of a run are, how they are connected, and what is wrong with it, in sentences.

unlocked doctor                                    this process and this host only
unlocked launch --processes 4 -- doctor            all processes, and the links between them
torchrun --nnodes … -m unlocked doctor             across hosts

facts.py         what a process says of itself        findings.py   what the numbers mean, in sentences
connections.py   who can connect to whom              showing.py    tables for the terminal
measuring.py     latency, bandwidth, clocks, through the library's own links
"""

from __future__ import annotations

import json as json_text
import os
import sys
from dataclasses import replace
from typing import Any

from rich.console import Console

from ..cluster import Cluster
from ..cluster.network import interface_to
from ..errors import CannotJoin, InvalidChoice, LostProcess
from ..worlds.distributed import Distributed
from .connections import Connection, connections, store_round_trip
from .facts import Facts, local_facts
from .findings import Finding, Report
from .measuring import Clock, Speed, measure
from .showing import show

__all__ = ["Clock", "Connection", "Facts", "Finding", "Report", "Speed", "doctor", "examine", "local_facts"]


def doctor(json: bool = False, interface: str | None = None, mebibytes: float = 16) -> int:
    """Examine the run this process is one of, or this process alone, and print the report on rank 0.

    Args:
        json: print one line of JSON, not tables. interface: name or address of the network interface to use.
        mebibytes: size of the messages that measure the bandwidth.

    Returns the exit code, the same on all ranks: 0 if nothing is wrong. Raises InvalidChoice for an impossible argument.
    """
    if not 0 < mebibytes <= 1024:
        raise InvalidChoice(f"--mebibytes {mebibytes} is not possible; give a size above 0 and up to 1024.")
    if "RANK" not in os.environ:
        chosen = interface_to("localhost", interface) if interface is not None else None
        return _print(Report([local_facts(chosen)]), json)
    try:
        cluster = Cluster.join(interface)
    except CannotJoin as error:  # nobody knows whether the others came: each says what it knows
        return _print(Report([local_facts(rank=_rank())], broken=[str(error)]), json)
    world = Distributed(cluster)
    try:
        report = examine(world, mebibytes)
        return _print(report, json) if cluster.chief else _code(report)
    finally:
        world.close()  # waits for rank 0 to have printed, lest a starter stops it


def examine(world: Distributed, mebibytes: float = 16, stalled_after: float = 60.0) -> Report:
    """The report on all processes; all ranks call it with a new world, all get it. Links that cannot work are not measured."""
    cluster = world.crew
    mine = local_facts(cluster.interface, cluster.rank).to_json()
    report = Report(
        processes=[Facts.from_json(values) for values in cluster.share(mine)],
        rendezvous=f"{cluster.seat.host}:{cluster.seat.port}",
        store_round_trips=cluster.share(store_round_trip(cluster)),
        connections=connections(cluster),
    )
    try:
        links, clocks = measure(world, report.connections, mebibytes, stalled_after)
    except LostProcess as error:
        return replace(report, broken=[str(error)])
    return replace(report, links=links, clocks=clocks)


def _rank() -> int:
    text: Any = os.environ.get("RANK", "")
    return int(text) if text.isdigit() else 0


def _print(report: Report, json: bool) -> int:
    if json:
        print(json_text.dumps(report.to_json()), flush=True)
    else:
        show(report, Console(file=sys.stdout))
    return _code(report)


def _code(report: Report) -> int:
    return 0 if report.well else 1
