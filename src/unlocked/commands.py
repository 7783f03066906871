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
    tensorboard: Literal["auto", "on", "off"] = "auto"
    """Also write TensorBoard files to RUN/tensorboard; auto: if it is installed."""
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
    """Runs at the same time, one process each; None: one per core."""
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


COMMANDS: dict[str, Any] = {"train": Train, "compare": Compare, "methods": Methods, "report": Report, "export": Export}
