"""Asynchronous DGL with buffers: what a slow stage costs, in seconds and in accuracy.

    python benchmarks/async_buffers.py --only processes    3 stages on real processes, the middle one slowed 1 to 4 times
    python benchmarks/async_buffers.py --only staircase    in process, turns drawn: accuracy against slow-down (the paper's)

Digits, a small CNN of three stages, linear heads, SGD with momentum; one thread each.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from buffers import slowed, staircase
from common import machine, result
from pipelines.crew import Others, run_crew


def arguments() -> argparse.Namespace:
    """What to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("processes", "staircase"))
    parser.add_argument("--quick", action="store_true", help="a few short runs, to see that it works")
    parser.add_argument("--processes", type=int, nargs="+", default=[3])
    parser.add_argument("--pad", type=float, default=0.03, help="seconds of a forward at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4, help="of the staircase; the processes train one")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = arguments()
    torch.set_num_threads(1)
    quick, others = options.quick, Others()
    print(machine())
    found: dict[str, Any] = {}
    if options.only in (None, "processes"):
        factors, rounds, epochs = ((1.0, 3.0), 1, 1) if quick else ((1.0, 2.0, 3.0, 4.0), options.rounds, 1)
        for count in options.processes:
            (rows, *_) = run_crew(
                slowed.measure, count, options.pad, factors, rounds, epochs, options.width, deadline=1200.0
            )
            slowed.show(rows, count)
            found[f"processes {count}"] = rows
    if options.only in (None, "staircase"):
        seeds, slow_downs = (1, (1.0, 3.0)) if quick else (options.seeds, staircase.SLOW_DOWNS)
        rows = staircase.measure(seeds, options.width, 0.05, 1 if quick else options.epochs, slow_downs)
        staircase.show(rows)
        found["staircase"] = rows
    print(f"\nother things kept {others.share():.0%} of the cores busy")
    result("async_buffers", **found)


if __name__ == "__main__":
    main()
