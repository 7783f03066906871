"""The commands and their options, as typed dataclasses; the texts below the fields are the help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from .comparing import MAIN_JOB
from .config import Options


@dataclass(frozen=True)
class Train(Options):
    """Train one network by one method."""

    credit: str = "dgl"
    """Credit rule, e.g. dgl or "dgl(head=mlp,budget=0.2)"; see unlocked methods."""
    consensus: str = "independent"
    """Consensus rule among the replicas, e.g. "wash(p=0.001)"."""
    replicas: int = 1
    """Number of replicas N."""
    seed: int = 0
    """Of the weights, the data order and all else that is random."""
    run: Path | None = None
    """Folder of the run; None: runs/<time>-<method>."""
    resume: Path | None = None
    """Go on with the run in this folder, with its own options; no others are needed."""
    recut: int | None = None
    """With --resume: go on with the network cut into this many stages (rules without heads only)."""
    tensorboard: Literal["auto", "on", "off"] = "auto"
    """Also write TensorBoard files to RUN/tensorboard; auto: if it is installed."""
    world: Literal["in-process", "distributed"] = "in-process"
    """distributed: one of several processes, as started by unlocked launch or torchrun."""
    reduction: Literal["ordered", "backend"] = "ordered"
    """Means over replicas: ordered, bit for bit as in process; or the backend's own all-reduce, alike up to rounding."""
    interface: str | None = None
    """Network interface, by name or address; None: that of the route to the rendezvous host."""
    stuck_after: float = 30.0
    """Seconds without a sign of life after which a process counts as stuck."""
    json: bool = False
    """Print JSON lines only: each epoch, then the result."""


@dataclass(frozen=True)
class Compare(Options):
    """Race several methods on the same data from the same weights, over several seeds."""

    methods: tuple[str, ...] = MAIN_JOB
    """Methods as credit[/consensus][@replicas]; J is the number of stages."""
    seeds: int = 3
    """Number of seeds, 0, 1, …"""
    jobs: int | None = None
    """Runs at the same time; None: as many as there are cores for their processes."""
    world: Literal["in-process", "distributed"] = "in-process"
    """distributed: every run on processes of its own."""
    processes: int | None = None
    """Processes of a distributed run; None: one per replica and stage."""
    out: Path | None = None
    """Folder of the comparison; None: runs/compare-<time>. Runs already there are not repeated."""
    json: bool = False
    """Print JSON lines only: each run, then the table."""


@dataclass(frozen=True)
class Methods:
    """List all credit and consensus rules with what they lock, keep and send, and their parameters."""

    markdown: bool = False
    """Print Markdown."""
    json: bool = False
    """Print one line of JSON."""


@dataclass(frozen=True)
class Report:
    """Write the HTML report of a run or of a comparison."""

    folder: tyro.conf.Positional[Path]
    """Folder of a run or of a comparison."""
    json: bool = False
    """Print one line of JSON."""


@dataclass(frozen=True)
class Export:
    """Write a run's trained weights as safetensors, under the network's own names."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    to: Path = Path("model.safetensors")
    """File to write."""
    member: str = "averaged"
    """averaged: the mean of the replicas; or a replica's number, from 0."""
    overwrite: bool = False
    """Replace an existing file."""
    json: bool = False
    """Print one line of JSON."""


@dataclass(frozen=True)
class Launch:
    """Run a command on several processes of this machine: unlocked launch --processes 4 -- train …"""

    processes: int
    """Number of processes."""
    max_restarts: int = 0
    """How often to start again from the last complete checkpoint after a failure."""
    threads: int | None = None
    """CPU threads per process; None: the cores shared out evenly."""
    grace: float = 10.0
    """Seconds that the others have to stop by themselves after a failure."""
    json: bool = False
    """Print JSON lines only."""


@dataclass(frozen=True)
class Trace:
    """Write the recorded steps of a run as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    to: Path | None = None
    """File to write; None: RUN/trace.json."""
    json: bool = False
    """Print one line of JSON."""


@dataclass(frozen=True)
class Doctor:
    """Examine processes, network and machine; alone, or as unlocked launch --processes 2 -- doctor, or under torchrun."""

    interface: str | None = None
    """Network interface, by name or address; None: that of the route to the rendezvous host."""
    mebibytes: float = 16
    """Size of the messages that measure the bandwidth."""
    json: bool = False
    """Print one line of JSON."""


COMMANDS: dict[str, Any] = {
    "train": Train,
    "compare": Compare,
    "launch": Launch,
    "methods": Methods,
    "report": Report,
    "trace": Trace,
    "export": Export,
    "doctor": Doctor,
}
