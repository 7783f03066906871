"""Throughput of pipelines with delayed gradients when full, beside torch's schedules and what the stages could do alone.

    python benchmarks/delays.py [--processes 2] [--micro-batches 4] [--rounds 5] [--window 1.0] [--models mlp gpt …]

One set of pinned single-thread processes; variants take turns in windows. A batch is M micro-batches and one update in every
method. Steps before and after those that are timed keep the pipeline full, and it is never emptied in between. Against

    the ceiling       every process does the work of the slowest stage, at the same time, in a plain loop: F, B, update
    its own bound     the same with what the method has to do: F, F, B (features-replay), F and the fused reverse (PETRA)

each with stages balanced by what they cost that way. To beat: pipedream-2bw and petra ≥ 0.95 of their own bound. With more
processes than cores the bound is that of the cores: all stages at once, until the last is done; to be read, not to be judged.
"""

from __future__ import annotations

import argparse
import sys

import torch

from common import result
from pipelines.crew import Others, busy_share, run_crew
from pipelines.delayed import Plan, measure, methods

_NAMES = ("mlp", "gpt", "revresnet18", "revgpt")
_GOAL, _JUDGED = 0.95, ("pipedream-2bw", "petra")
_IDLE_BELOW = 0.05  # share of the cores' time that others may use


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="one stage each")
    parser.add_argument("--micro-batches", type=int, default=4, help="per update, in every method")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=1.0, help="seconds of each variant in each round")
    parser.add_argument("--models", nargs="+", choices=_NAMES, default=list(_NAMES))
    parser.add_argument("--methods", nargs="+", choices=list(methods(4)), default=list(methods(4)))
    return parser.parse_args()


def main() -> int:
    given = arguments()
    torch.set_num_threads(1)
    before, others = busy_share(), Others()
    print(f"others use {before:.1%} of the cores' time before", flush=True)
    plan = Plan(given.models, given.methods, given.micro_batches, given.rounds, given.window)
    found = run_crew(measure, given.processes, plan, deadline=1500, tell=lambda words: print(words, flush=True))[0]
    busy = {"before": before, "meanwhile": others.share(), "after": busy_share()}
    told = ", ".join(f"{share:.1%} {when}" for when, share in busy.items())
    idle = max(busy.values()) < _IDLE_BELOW
    print(f"others used the machine: {told}" + ("" if idle else "; do not trust these numbers"))
    missed = {
        f"{method}, {task}": row["methods"][method]["of_own_bound"]
        for task, row in found["tasks"].items()
        for method in _JUDGED
        if method in row["methods"] and row["methods"][method]["of_own_bound"] < _GOAL
    }
    print(f"below {_GOAL} of their own bound: {missed or 'none'}")
    busy = {when: round(share, 3) for when, share in busy.items()}
    result("delays", **found, missed=missed, settings=vars(given), busy=busy, idle=idle)
    return 0


if __name__ == "__main__":
    sys.exit(main())
