"""The commands and their options, as typed dataclasses; the texts below the fields are the help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from .comparing import MAIN_JOB
from .config import Optimizer, Options
from .cutting import Balance
from .simulation.options import ClusterOptions


@dataclass(frozen=True)
class Train(Options, ClusterOptions):
    """Train one network by one method."""

    credit: str = "dgl"
    """Credit rule, e.g. dgl or "dgl(head=mlp,budget=0.2)"; see unlocked methods."""
    consensus: str = "independent"
    """Consensus rule among the replicas, e.g. "wash(p=0.001)"."""
    mitigation: str | None = None
    """What is done about delayed gradients, e.g. gap-aware or "delay-compensation(lam=0.1)"; see unlocked methods."""
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
    world: Literal["in-process", "distributed", "simulated"] = "in-process"
    """distributed: one of several processes, as started by unlocked launch or torchrun. simulated: under a clock of a cluster
    that the options below describe; seconds are simulated ones."""
    reduction: Literal["ordered", "backend"] = "ordered"
    """Means over replicas: ordered, bit for bit as in process; or the backend's own all-reduce, alike up to rounding."""
    interface: str | None = None
    """Network interface, by name or address; None: that of the route to the rendezvous host."""
    stuck_after: float = 30.0
    """Seconds without a sign of life after which a process counts as stuck."""
    probe: bool = False
    """Afterwards also probe the network, as unlocked probe does; the report shows it."""
    resident: Literal["all", "disk", "host"] = "all"
    """Stages in memory: all; or one at a time, the others in files of the run's folder (disk) or, if they compute on a GPU,
    in the host's memory (host). The numbers are the same. For rules whose stages learn alone."""
    json: bool = False
    """Print JSON lines only: each epoch, then the result."""


@dataclass(frozen=True)
class Compare(Options, ClusterOptions):
    """Race several methods on the same data from the same weights, over several seeds."""

    methods: tuple[str, ...] = MAIN_JOB
    """Methods as credit[+mitigation][/consensus][@replicas]; J is the number of stages."""
    seeds: int = 3
    """Number of seeds, 0, 1, …"""
    jobs: int | None = None
    """Runs at the same time; None: as many as there are cores for their processes."""
    world: Literal["in-process", "distributed", "simulated"] = "in-process"
    """distributed: every run on processes of its own. simulated: on a cluster that the options below describe."""
    processes: int | None = None
    """Processes of a distributed run; None: one per replica and stage."""
    out: Path | None = None
    """Folder of the comparison; None: runs/compare-<time>. Runs already there are not repeated."""
    probe: bool = False
    """Afterwards also probe the networks, as unlocked probe does; the report shows it."""
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
class Soup:
    """Evaluate networks of one architecture together: each, their ensemble, their mean, the soups made of them."""

    members: tyro.conf.Positional[tuple[Path, ...]]
    """Files as unlocked export writes them, or folders of runs (all their members)."""
    data: str | None = None
    """Data as in train; None: that of the run, or digits."""
    subset: int | None = None
    """Only this many training samples."""
    model: str | None = None
    """Network of files that do not name theirs, as in train."""
    width: float | None = None
    """Width of that network, if it has one."""
    depth: int | None = None
    """Depth of that network, if it has one."""
    model_options: tuple[str, ...] = ()
    """Other options of that network, each as key=value."""
    greedy: bool = False
    """Also the greedy soup, chosen on a share of the training data."""
    refresh: bool = False
    """Also the mean with BatchNorm statistics estimated anew; those of a greedy soup and of the heat map as well."""
    repair: bool = False
    """Also the mean after REPAIR."""
    validation_share: float = 0.1
    """Share of the training data that chooses: the greedy soup, the temperatures."""
    seed: int = 0
    """Of the choice of that share, and of the samples that statistics are estimated from."""
    batch_size: int = 512
    """Samples of a batch."""
    measure: bool = False
    """Also time the inference."""
    heatmap: Path | None = None
    """Picture to write, .png or .svg: test accuracy of the networks between 3 to 5 members."""
    steps: int = 5
    """Points of the heat map from its centre to a corner."""
    to: Path | None = None
    """Write the network that --take names, as safetensors."""
    take: Literal["averaged", "refreshed", "repaired", "greedy"] = "averaged"
    """Which network --to writes; it is made even if its own option is not given."""
    overwrite: bool = False
    """Replace an existing file."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, …"""
    json: bool = False
    """Print one line of JSON."""


@dataclass(frozen=True)
class Probe:
    """Probe trained networks: what each stage has made of the data, and how far its aim is from backpropagation's."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or of comparisons (all their runs)."""
    plot: Path | None = None
    """Figure to write, .png or .svg: probes, losses, cosines and ranks by depth, and spectra."""
    data: str | None = None
    """Data as in train; None: that of the run. Of a network that learned without labels, labelled data as in train's
    --probe-on."""
    subset: int | None = None
    """Only this many training samples; None: as in the run."""
    pool: int = 1
    """Feature maps are averaged over this many windows each way; 1: over all of space."""
    gradient_samples: int = 1024
    """Training samples, about, for the gradients."""
    knn: int | None = None
    """Also a vote of this many nearest neighbours, 200 say, at every depth."""
    recipe: Literal["adam"] | None = None
    """Also a linear layer trained at every depth: adam, as networks that learned without labels are evaluated."""
    recipe_epochs: int = 200
    """Passes over the features for that layer."""
    batch_size: int = 256
    """Samples of a batch."""
    device: str = "auto"
    """Where to compute; auto: cuda if there is one, else cpu."""
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
class NetworkOptions:
    """A network by its name, of which shapes are all that is needed."""

    model: str | None = None
    """Network whose costs are taken, a name as in train; with --input or --data."""
    width: float | None = None
    """Width of the network, if it has one."""
    depth: int | None = None
    """Depth of the network, if it has one."""
    model_options: tuple[str, ...] = ()
    """Other options of the network, each as key=value."""
    input: str | None = None
    """Shape of one of the network's inputs, e.g. 3x224x224."""
    classes: int = 10
    """The network's outputs, with --input."""
    data: str | None = None
    """Data that the network is for, as in train."""


@dataclass(frozen=True)
class Timeline(NetworkOptions, ClusterOptions):
    """Draw what a method does when, on a simulated cluster: a table, idle shares, memory, staleness; --to: a picture."""

    credit: str = "backprop"
    """Credit rule, e.g. gpipe or "gpipe(micro_batches=8)"; see unlocked methods."""
    consensus: str = "independent"
    """Consensus rule among the replicas, e.g. all-reduce."""
    stages: int = 4
    """Number of stages J."""
    replicas: int = 1
    """Number of replicas N."""
    steps: int = 1
    """Updates."""
    accumulate: int = 1
    """Batches per update."""
    devices: int | None = None
    """Devices, which workers share replica by replica; None: one for each worker."""
    forward: float | None = None
    """Made-up time of a stage's forward; None: 1."""
    backward: float | None = None
    """Made-up time of a stage's backward; None: 1."""
    head: float | None = None
    """Made-up time of a head's forward and backward; None: 0."""
    update: float | None = None
    """Made-up time of an update; None: 0."""
    batch: int | None = None
    """Samples per replica and step; None: 32, or for made-up costs one per micro-batch."""
    tick: float | None = None
    """Length of a tick of the table, in the costs' seconds; None: one that suits."""
    colours: Literal["micro-batch", "kind"] = "micro-batch"
    """What the colours of the picture tell."""
    to: Path | None = None
    """Picture to write, .svg or .png."""
    json: bool = False
    """Print one line of JSON."""


@dataclass(frozen=True)
class Join:
    """Join a run of replicas that run freely (gossip, acid with pairing=available): one more of them, on this machine."""

    address: tyro.conf.Positional[str]
    """HOST:PORT, as the run printed it when it began."""
    wait: float = 600.0
    """Seconds to wait to be let in."""
    device: str = "auto"
    """Where to train; auto: cuda if there is one, else cpu."""
    interface: str | None = None
    """Network interface, by name or address; None: that of the route to HOST."""
    stuck_after: float = 30.0
    """Seconds of silence after which another process counts as stuck."""
    json: bool = False
    """Print lines of JSON."""


@dataclass(frozen=True)
class Graph:
    """Print how fast a graph of workers mixes, what the four kinds of gossip need on it, its optimal rates; and draw it."""

    topology: str | None = None
    """star, line, ring, complete, grid, torus, barbell, hypercube, exponential, random-geometric, erdos-renyi or random-tree;
    also e.g. "torus(3)", "grid(4x8)" or "erdos-renyi(p=0.3,seed=1)"."""
    n: int | None = None
    """Number of nodes."""
    edges: Path | None = None
    """Instead of a topology: a file of lines i j, or i j rate."""
    rates: Literal["given", "uniform", "degree", "metropolis"] = "given"
    """Of the edges; given: those of the file, 1 for a topology; uniform: 1; degree, metropolis: by the degrees of an edge's
    ends."""
    rate: float | None = None
    """Scale the rates so that a node exchanges so often per unit of time, on average; None: leave them."""
    epsilon: float = 1e-6
    """Share of ‖πx‖² that gossip is to bring it down to."""
    optimal: bool = False
    """Also the rates that minimise √(χ₁χ₂), under the same Tr Λ unless the following bounds are given."""
    trace: float | None = None
    """With --optimal: bound on Tr Λ, the exchanges of all nodes."""
    per_node: float | None = None
    """With --optimal: bound on the exchanges of each node."""
    cap: float | None = None
    """With --optimal: bound on the rate of each edge."""
    plot: tuple[Path, ...] | None = None
    """Draw the graph, to this .png or .svg if one is named: edges as wide as their rates, coloured by their resistances."""
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


@dataclass(frozen=True)
class Calibrate(NetworkOptions):
    """Measure this machine, and with --model the stages of a network, into a cost file for --costs."""

    stages: int = 2
    """Number of stages J the network is cut into."""
    balance: Balance = "flops"
    """What the stages share evenly."""
    batch_size: int = 32
    """Samples of a batch; a quarter of it is measured as well."""
    credit: str = "backprop"
    """Credit rule whose heads the stages get, e.g. dgl."""
    optimizer: Optimizer = "sgd"
    """Optimizer of every stage."""
    links: Literal["auto", "shared-memory", "gloo"] = "auto"
    """How the two processes are joined; auto: as they would be in training here."""
    out: Path = Path("costs.json")
    """Cost file to write."""
    json: bool = False
    """Print one line of JSON."""


@dataclass(frozen=True, kw_only=True)
class Plan(ClusterOptions):
    """Predict every method on a cluster and sort them: speed, memory, bytes; what does not fit, and why."""

    model: str
    """Network, a name as in train."""
    input: str | None = None
    """Shape of one input, e.g. 3x224x224; gpt takes --context instead."""
    devices: int
    """Number of devices."""
    batch: int = 256
    """Samples of one update of one network; replicas that train one network share it."""
    classes: int | None = None
    """Outputs of the network; None: 1000 for images of at least 128 pixels, 256 for gpt, else 10."""
    context: int = 128
    """Window of a text, in bytes."""
    width: float | None = None
    """Width of the network, if it has one."""
    depth: int | None = None
    """Depth of the network, if it has one."""
    model_options: tuple[str, ...] = ()
    """Other options of the network, each as key=value."""
    accumulate: int = 1
    """Micro-batches per update."""
    optimizer: Literal["sgd", "momentum", "adam", "adamw"] = "momentum"
    """Whose state is held; momentum: sgd with momentum."""
    objective: Literal["throughput", "memory", "bytes"] = "throughput"
    """What to sort by: samples/s of one network, the fullest device's memory, or bytes sent per sample."""
    credit: tuple[str, ...] = ()
    """Only these credit rules, e.g. backprop "gpipe(micro_batches=32)"."""
    consensus: tuple[str, ...] = ()
    """Only these consensus rules."""
    all: bool = False
    """Show all rows and reasons."""
    json: bool = False
    """Print one line of JSON."""


COMMANDS: dict[str, Any] = {
    "train": Train,
    "compare": Compare,
    "launch": Launch,
    "methods": Methods,
    "report": Report,
    "timeline": Timeline,
    "plan": Plan,
    "trace": Trace,
    "export": Export,
    "soup": Soup,
    "probe": Probe,
    "graph": Graph,
    "join": Join,
    "calibrate": Calibrate,
    "doctor": Doctor,
}
