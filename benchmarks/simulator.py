"""How fast the simulated world is where nothing is computed, and how many workers it takes.

    python benchmarks/simulator.py            about two minutes
    python benchmarks/simulator.py --workers 1000

Acts per second: a row of meshes and methods, each from the making of the programs to the end of the run (drawing excluded).
Thousands of workers: 100 steps of all-reduce, and of a pairwise exchange as gossip has it (every step each replica swaps its
weights with one partner, drawn anew), each in a process of its own, whose peak memory is read off the kernel.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

import unlocked as ul
from unlocked import simulation as sim
from unlocked.chain import Chain
from unlocked.consensus.base import Consensus, Properties, Store, Weights
from unlocked.rng import mix
from unlocked.worker import Worker

from common import machine, result

CLUSTER = sim.Hardware(network=sim.uniform(latency=1e-4, bandwidth=1e9))
SPEEDS = (
    ("backprop, J=4", ul.credit.Backprop(), ul.consensus.Independent(), 1, 4),
    ("gpipe(8), J=8", ul.credit.GPipe(8), ul.consensus.Independent(), 1, 8),
    ("dgl × all-reduce, N=8, J=4", ul.credit.DGL(), ul.consensus.AllReduce(bucket_mb=0), 8, 4),
    ("the same with overlap", ul.credit.DGL(), ul.consensus.AllReduce(), 8, 4),
    ("dgl × all-reduce, N=64, J=16", ul.credit.DGL(), ul.consensus.AllReduce(bucket_mb=0), 64, 16),
    ("interlocking(1), N=16, J=8", ul.credit.Interlocking(1), ul.consensus.Independent(), 16, 8),
)


class _Swapped(Weights):
    """After every step, all weights to one partner, and the partner's back."""

    async def mix(self) -> None:
        replicas, here = self.worker.replicas, self.worker
        # a shift of the ring that is its own inverse: replica r meets (k − r) mod N
        partner = (mix(7, here.version) % replicas.size - here.replica) % replicas.size
        if partner != here.replica:
            for parameter in self.parameters:
                await replicas.peer(partner).swap("gossip", parameter)


@dataclass(frozen=True)
class Pairwise(Consensus):
    """Gossip as far as its traffic goes."""

    name: ClassVar[str] = "pairwise"
    properties: ClassVar[Properties] = Properties("", "", "", "", "", "")

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return _Swapped(worker, chain, store)


def acts_per_second(credit: Any, consensus: Any, replicas: int, stages: int, acts: int) -> float:
    """Of one run with about so many acts."""
    costs = sim.unit(stages, backward=2.0, head=0.5, update=0.1, weights=1000, activation=100)
    options = {"costs": costs, "replicas": replicas, "samples": 8, "hardware": CLUSTER}
    each = len(sim.simulate(credit, consensus, steps=1, **options))
    begin = time.perf_counter()
    timeline = sim.simulate(credit, consensus, steps=max(2, acts // each), **options)
    return len(timeline) / (time.perf_counter() - begin)


def crowd(rule: str, workers: int, steps: int) -> dict[str, float]:
    """Thousands of workers, in this process: acts, seconds, peak bytes."""
    consensus = ul.consensus.AllReduce(bucket_mb=0) if rule == "all-reduce" else Pairwise()
    begin = time.perf_counter()
    timeline = sim.simulate(
        ul.credit.Backprop(),
        consensus,
        costs=sim.unit(1, weights=1_000_000),
        replicas=workers,
        steps=steps,
        hardware=CLUSTER.but(slow_downs=sim.SlowDowns(0.1, 2.0)),
    )
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"acts": len(timeline), "seconds": seconds, "peak": peak, "simulated_seconds": timeline.span()}


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--acts", type=int, default=300_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--crowd", choices=("all-reduce", "pairwise"), help="only this, as one line of JSON")
    options = parser.parse_args()
    if options.crowd:
        print(json.dumps(crowd(options.crowd, options.workers, options.steps)))
        return
    print(machine())
    speeds = {}
    for name, credit, consensus, replicas, stages in SPEEDS:
        rows = [acts_per_second(credit, consensus, replicas, stages, options.acts) for _ in range(options.repeats + 1)]
        speeds[name] = median(rows[1:])
        print(
            f"{name:32s} {speeds[name]:10,.0f} acts/s   (of {options.repeats}: {min(rows[1:]):,.0f} to {max(rows[1:]):,.0f})"
        )
    crowds = {}
    for rule in ("all-reduce", "pairwise"):
        command = [
            sys.executable,
            __file__,
            "--crowd",
            rule,
            "--workers",
            str(options.workers),
            "--steps",
            str(options.steps),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        crowds[rule] = found = json.loads(done.stdout)
        print(
            f"{options.workers:,} workers × {options.steps} steps of {rule:10s} {found['seconds']:6.1f} s, "
            f"{found['acts']:,} acts, peak {found['peak'] / 2**30:.2f} GiB"
        )
    result("simulator", acts_per_second=speeds, crowds=crowds, median_acts_per_second=median(speeds.values()))


if __name__ == "__main__":
    main()
