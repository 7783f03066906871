"""What real processes gain: a network over stages on pinned single-thread processes, and all that it must be compared with.

    python benchmarks/pipeline.py [--stages 2] [--rounds 5] [--window 1.1] [--models mlp resnet18 gpt] [--head mlp]
    python benchmarks/pipeline.py --rate 100mbit      how much communication hides behind computation on a slow link

One set of processes for everything; the variants take turns in windows between barriers (throughput is wall time), each ratio
is the median over the rounds of a ratio within a round. Ceilings: as many independent processes as there are cores, each
training the whole network with a hand-written PyTorch loop, by backprop and by DGL (so that DGL's heads are paid for in both).
To beat: dgl / independent dgl ≥ 0.95 for a balanced split, and ahead of torch's best schedule. With `--stages 4` there are more
processes than cores here: to be read, not to be judged. `--rate` needs root: it limits the loopback of a network namespace.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch

from common import result
from pipelines.crew import Others, busy_share, run_crew
from pipelines.measuring import Plan, measure
from pipelines.overlapping import measure_overlap

_NAMES = ("mlp", "resnet18", "gpt")
_IDLE_BELOW = 0.05  # share of the cores' time that others may use


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=2, help="stages, one process each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=1.1, help="seconds of each variant in each round")
    parser.add_argument("--models", nargs="+", choices=_NAMES, default=list(_NAMES))
    parser.add_argument("--head", default="mlp", help="of local stages, at most 10 %% of their FLOPs: mlp, linear, …")
    parser.add_argument("--quick", action="store_true", help="short windows: only to see that it runs")
    parser.add_argument("--rate", help="of the loopback in a network namespace, as tc writes it: 100mbit")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def inside_namespace(rate: str) -> int:
    """Run this command again in a network namespace of its own, which ends with it."""
    command = ["unshare", "--net", sys.executable, *sys.argv, "--inside"]
    try:
        return subprocess.run(command).returncode
    except FileNotFoundError:
        print(f"--rate {rate} needs the command 'unshare' (util-linux).", file=sys.stderr)
        return 1


def limit_loopback(rate: str) -> None:
    """Both directions share the rate: it is one device."""
    limits = ["tbf", "rate", rate, "burst", "256kb", "latency", "400ms"]
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["tc", "qdisc", "add", "dev", "lo", "root", *limits], check=True)


def main() -> int:
    given = arguments()
    if given.rate and not given.inside:
        return inside_namespace(given.rate)
    if given.rate:
        limit_loopback(given.rate)
    torch.set_num_threads(1)
    seconds = 0.3 if given.quick else given.window
    before, others = busy_share(), Others()
    if given.rate:
        found = run_crew(measure_overlap, 2, given.rounds, seconds, deadline=600)[0]
    else:
        plan = Plan(given.models, given.head, given.rounds, seconds)
        found = run_crew(measure, given.stages, plan, deadline=900)[0]
    busy = {"before": before, "meanwhile": others.share(), "after": busy_share()}
    idle = max(busy.values()) < _IDLE_BELOW
    if not idle:
        told = ", ".join(f"{share:.0%} {when}" for when, share in busy.items())
        print(f"Others used this machine ({told}): do not trust these numbers.")
    settings = {
        "stages": given.stages,
        "head": given.head,
        "rounds": given.rounds,
        "window": seconds,
        "rate": given.rate,
    }
    result("pipeline", **found, **settings, busy={when: round(share, 3) for when, share in busy.items()}, idle=idle)
    return 0


if __name__ == "__main__":
    sys.exit(main())
