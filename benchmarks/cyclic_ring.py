"""Cyclic data parallelism on several processes: bytes, step time against PyTorch's DDP, communication hidden.

    python benchmarks/cyclic_ring.py [--processes 2 4] [--stages 2] [--rounds 3] [--window 0.5] [--cases gpt mlp]

Each process has a replica; cyclics/ring.py says what is compared and how. Bytes must be those of a ring all-reduce, to
the byte, for every method. `--ratios`: how long an all-reduce takes on the limited network, as a multiple of what a
step computes. The network is limited where this may run in a network namespace of its own (root): its loopback is one
device, which all processes share; the library's links are gloo's there, as DDP's. Else only the simulated lines tell of
it. With more processes than cores: to be read, not to be judged.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from typing import Any

import torch

from common import result
from cyclics.ring import Plan, measure, show, show_simulated, simulated
from pipelines.crew import Others, busy_share, run_crew

_IDLE_BELOW = 0.05  # share of the cores' time that others may use


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--stages", type=int, default=2, help="of a replica, all in its process")
    parser.add_argument("--cases", nargs="+", choices=("gpt", "mlp"), default=["gpt", "mlp"])
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.5, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=float, default=0.5, help="seconds of each variant in each round")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def may_limit() -> bool:
    """Whether a network namespace can be made, and its loopback limited."""
    tools = all(map(shutil.which, ("unshare", "ip", "tc")))
    trial = "ip link set lo up && tc qdisc add dev lo root tbf rate 8mbit burst 128kb limit 1mb"
    return tools and subprocess.run(["unshare", "--net", "sh", "-c", trial], capture_output=True).returncode == 0


def main() -> int:
    given = arguments()
    if not given.inside and may_limit():
        os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv, "--inside"])
    if given.inside:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    else:
        print("No network namespace can be made here, so bandwidth is limited in the simulated lines only.")
    torch.set_num_threads(1)
    before, others = busy_share(), Others()
    found: list[dict[str, Any]] = []
    for count in given.processes:
        plan = Plan(given.cases, given.stages, given.rounds, given.window, [0.0, *given.ratios])
        one = run_crew(measure, count, plan, given.inside, deadline=400)[0]
        lines = simulated(count, given.stages, given.ratios)
        for name, rows in one["cases"].items():
            for row in rows:
                show(name, row)
        print()
        show_simulated(lines)
        found.append({"processes": count, **one, "simulated": lines})
    busy = {"before": before, "meanwhile": others.share()}
    idle = max(busy.values()) < _IDLE_BELOW
    if not idle:
        told = ", ".join(f"{share:.0%} {when}" for when, share in busy.items())
        print(f"Others used this machine ({told}): do not trust these times.")
    limited = "loopback of a network namespace" if given.inside else None
    settings = {name: value for name, value in vars(given).items() if name != "inside"}
    result("cyclic_ring", runs=found, limited=limited, **settings, busy=busy, idle=idle)
    return 0


if __name__ == "__main__":
    sys.exit(main())
