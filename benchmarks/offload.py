"""A GPT trained with one stage in memory, beside the same with everything resident: peak memory, and time per step.

    python benchmarks/offload.py [--depths 16 32 64] [--width 256] [--batch 8] [--context 128] [--rounds 7] [--quick]

A stage is a block with its head (a linear layer to the 256 bytes) and its AdamW; the first one has the embedding besides, the
last one the output. DGL, float32, one computing thread; random tokens, as only time and memory are looked at. Every variant is
a process of its own; they take turns, a step each (A B C C B A), so what else the machine does disturbs all alike; "cpu s" is
the processor's time of a step, all threads of the process together, which says what the copying costs. Memory is the
resident set of a process (VmHWM) above what it was before the network was made: "start" from there on, "training" from the
second step on. "all" is the ordinary trainer; "disk" and "disk, no prefetch" build the chain stage by stage (OneStage.chain).
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import unlocked as ul
from unlocked.models.transformer import Block, Embedding, Output

from common import machine, ratio, result

_VARIANTS = {"all": None, "disk": True, "disk, no prefetch": False}  # whether it prefetches
_VOCABULARY, _HEADS = 256, 4


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[16, 32, 64], help="blocks")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--context", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="for the stages' files")
    parser.add_argument("--quick", action="store_true", help="small: 4 and 8 blocks, 3 rounds")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.depths, given.rounds = [4, 8], 3
    return given


# ---- a variant, in its own process -----------------------------------------------------------------------------------


def makers(given: argparse.Namespace) -> list[Callable[[], nn.Module]]:
    """What makes each stage's body."""

    def make(j: int) -> nn.Module:
        torch.manual_seed(j)
        parts: list[nn.Module] = [] if j else [Embedding(_VOCABULARY, given.context, given.width, 0.0)]
        parts.append(Block(given.width, _HEADS, 0.0))
        return nn.Sequential(*parts, *([Output(given.width, _VOCABULARY)] if j == given.depth - 1 else []))

    return [partial(make, j) for j in range(given.depth)]


def trainer_of(given: argparse.Namespace, x: torch.Tensor) -> ul.Trainer:
    """The trainer of a variant."""
    prefetch = _VARIANTS[given.child]
    resident = None if prefetch is None else ul.OneStage("disk", given.folder, prefetch)
    if resident is None:
        chain = ul.Chain([ul.Stage(make()) for make in makers(given)], like=x)
    else:
        chain = resident.chain(makers(given), like=x)
    return ul.Trainer(
        chain,
        credit=ul.credit.DGL(head="linear", budget=None),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        resident=resident,
    )


def memory(line: str) -> int:
    """A line of /proc/self/status, in bytes."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{line}:"))


def restart_peak() -> None:
    """VmHWM begins anew at today's resident set."""
    Path("/proc/self/clear_refs").write_text("5")


def child(given: argparse.Namespace) -> None:
    """Makes a step for each line that comes, and says how long it took; at the end, how much memory there was at most."""
    torch.set_num_threads(1)
    ul.keep_freed_memory()
    x, y = (torch.randint(_VOCABULARY, (given.batch, given.context)) for _ in range(2))
    small = argparse.Namespace(**{**vars(given), "width": 16, "depth": 2})
    trainer_of(small, x).step(x, y)  # what PyTorch loads at first use
    gc.collect()
    before = memory("VmRSS")
    restart_peak()
    trainer = trainer_of(given, x)
    trainer.step(x, y)
    start = memory("VmHWM") - before
    restart_peak()
    state = max(size(trainer, j) for j in range(given.depth))
    for _ in sys.stdin:
        begin, worked = time.perf_counter(), time.process_time()
        trainer.step(x, y)
        print(json.dumps([time.perf_counter() - begin, time.process_time() - worked]), flush=True)
    print(json.dumps({"start": start, "training": memory("VmHWM") - before, "stage": state}), flush=True)


def size(trainer: ul.Trainer, j: int) -> int:
    """Bytes of a stage: parameters, and AdamW's two moments."""
    return 3 * sum(x.nbytes for x in trainer.chains[0][j].parameters())


# ---- the comparison ----------------------------------------------------------------------------------------------------


def measure(given: argparse.Namespace, depth: int) -> dict[str, Any]:
    """All variants at one depth, by turns."""
    options = {
        "width": given.width,
        "batch": given.batch,
        "context": given.context,
        "folder": given.folder,
        "depth": depth,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    running = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--child", name, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in _VARIANTS
    }
    try:
        for process in running.values():
            step(process)  # warm-up
        rows: dict[str, list[list[float]]] = {name: [] for name in running}
        for k in range(given.rounds):
            for name in list(running)[:: 1 if k % 2 else -1]:
                rows[name].append(step(running[name]))
        return {name: {"times": rows[name], **last(process)} for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def step(process: Any) -> list[float]:
    """Seconds of a step of that process: of the clock, and of the processor, all its threads together."""
    process.stdin.write("step\n")
    process.stdin.flush()
    return list(json.loads(process.stdout.readline()))


def last(process: Any) -> dict[str, Any]:
    """What it says at the end."""
    process.stdin.close()
    return dict(json.loads(process.stdout.readline()))


def main() -> int:
    """Print a row for each depth and variant."""
    given = arguments()
    torch.set_num_threads(1)
    if given.child is not None:
        child(given)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        given.folder = given.folder or Path(folder)
        print(f"width {given.width}, {given.batch} x {given.context} tokens a step, {given.rounds} rounds; {machine()}")
        print(
            f"{'blocks':>6s} {'variant':18s} {'stage MB':>8s} {'start MB':>8s} {'training MB':>11s} "
            f"{'s/step':>8s} {'/ all':>6s} {'cpu s':>7s} {'/ all':>6s}"
        )
        found = {}
        for depth in given.depths:
            rows = measure(given, depth)
            both = {name: row.pop("times") for name, row in rows.items()}
            times, worked = ({name: [pair[k] for pair in pairs] for name, pairs in both.items()} for k in (0, 1))
            for name, row in rows.items():
                row |= {"seconds": median(times[name]), "ratio": ratio(times, name, "all")}
                row |= {"cpu": median(worked[name]), "cpu_ratio": ratio(worked, name, "all")}
                print(
                    f"{depth:6d} {name:18s} {row['stage'] / 1e6:8.1f} {row['start'] / 1e6:8.1f} {row['training'] / 1e6:11.1f} "
                    f"{row['seconds']:8.3f} {row['ratio']:6.2f} {row['cpu']:7.3f} {row['cpu_ratio']:6.2f}",
                    flush=True,
                )
            found[depth] = rows
    result("offload", width=given.width, tokens=given.batch * given.context, rounds=given.rounds, depths=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
