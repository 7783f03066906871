"""ACCO against all-reduce AdamW, DPU and weight prediction: speed behind slow links, unequal workers, loss.

    python benchmarks/acco.py TEXT        TEXT: a text file, such as tinyshakespeare's input.txt

Three parts (`--only speed|clock|loss` for one of them):

    speed    two real processes whose links are limited so that an all-reduce takes 0.5, 1 and 2 times what a step computes.
             A second line has four times as many micro-batches per update, behind which ACCO can hide its two exchanges.
    clock    four workers on a simulated clock, all alike or one of them four times slower
    loss     a byte-level GPT, four replicas in one process, three seeds; time is taken from the simulated clock
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from common import result
from overlapped import clocked, curves, throughput
from pipelines.crew import run_crew

RATIOS = (0.5, 1.0, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--only", choices=("speed", "clock", "loss"))
    parser.add_argument("--steps", type=int, default=6, help="updates that are timed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=120)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if options.only in (None, "speed"):
        (found["speed"], *_) = run_crew(throughput.measure, 2, RATIOS, (4, 16), options.steps, deadline=240.0)
        throughput.show(found["speed"])
    if options.only in (None, "clock"):
        found["clock"] = clocked.measure(RATIOS, curves.COUNT)
        clocked.show(found["clock"], curves.COUNT)
    if options.only in (None, "loss"):
        every = max(1, options.updates // 15)
        rows = curves.measure(options.text, options.seeds, options.updates, every, RATIOS)
        found["loss"] = {"table": curves.table(rows), "curves": rows}
        curves.show(found["loss"]["table"])
    result("acco", **found, settings={name: value for name, value in vars(options).items() if name != "text"})


if __name__ == "__main__":
    main()
