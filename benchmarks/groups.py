"""Neuron groups: Patel's speed-ups by counting operations, and the throughput of two real processes.

    python benchmarks/groups.py table            Tables 3.4 and 3.5 of the thesis, ResNet-32, within 5 %
    python benchmarks/groups.py throughput       (K, G) = (2, 1) and (1, 2) against one process with backprop
      [--width 1 2] [--batch 64] [--rounds 5] [--window 2] [--quick]

Throughput: one set of two processes, one thread each, pinned; variants take turns in windows between barriers; each ratio is
the median over the rounds of a ratio within a round. "its stages alone": what the split allows without any message; of these
also the time that the busiest process computes, which does not grow (much) while others use the machine.
"""

from __future__ import annotations

import argparse
import sys

import torch
from neuron_groups.table import HEADING, table
from neuron_groups.throughput import Plan, measure

from common import result
from pipelines.crew import Others, busy_share, run_crew

_ALLOWED = 0.05
_DEADLINE = 500.0  # seconds for each width


HEADING_RUN = (
    "| | images/s | × one process | ms that the busiest process computes per step | × one process | by MACs |\n"
    "|---|---:|---:|---:|---:|---:|"
)


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("table", "throughput"))
    parser.add_argument("--plain", action="store_true", help="count convolutions and matrix products only")
    parser.add_argument("--shared-stem", action="store_true", help="of the table: the stem as a depth of its own")
    parser.add_argument("--width", type=float, nargs="+", default=[1.0, 2.0], help="factor of ResNet-32's channels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=2.0, help="seconds of each variant in each round")
    parser.add_argument("--quick", action="store_true", help="short windows: only to see that it runs")
    return parser.parse_args()


def by_counting(plain: bool, stem: str) -> bool:
    """Print the tables; whether every entry is within 5 %."""
    rows = list(table(not plain, stem))
    print(HEADING, *rows, sep="\n")
    off = [row.training / row.patel - 1 for row in rows]
    off += [row.inference[0] / row.inference[1] - 1 for row in rows if row.inference is not None]
    worst = max(map(abs, off))
    result("groups", part="table", elementwise=not plain, stem=stem, entries=len(off), worst_deviation=round(worst, 5))
    return worst <= _ALLOWED


def by_running(given: argparse.Namespace) -> None:
    """Print throughputs and speed-ups for each width."""
    torch.set_num_threads(1)
    rounds, seconds = (2, 0.3) if given.quick else (given.rounds, given.window)
    before, others, found = busy_share(), Others(), {}
    for width in given.width:
        plan = Plan(width, given.batch, rounds, seconds)
        told = found[str(width)] = run_crew(measure, 2, plan, deadline=_DEADLINE, tell=_tell)[0]
        print(f"\nResNet-32, width {width}, batch {given.batch}\n" + HEADING_RUN)
        for name, speed in told["samples_per_second"].items():
            computing = told["computing_ms"].get(name, ""), told["speed_up_computing"].get(name, "")
            macs = told["speed_up_by_macs"].get(name, "")
            print(f"| {name} | {speed} | {told['speed_up'][name]:.2f} | {computing[0]} | {computing[1]} | {macs} |")
    busy = {"before": before, "meanwhile": others.share(), "after": busy_share()}
    print("others used of the cores' time: " + ", ".join(f"{share:.0%} {when}" for when, share in busy.items()))
    busy = {when: round(share, 3) for when, share in busy.items()}
    result("groups", part="throughput", found=found, batch=given.batch, rounds=rounds, window=seconds, busy=busy)


def main() -> int:
    given = arguments()
    if given.part == "table":
        return 0 if by_counting(given.plain, "shared" if given.shared_stem else "split") else 1
    by_running(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
