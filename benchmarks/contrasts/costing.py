"""Table 3.2's costs: multiply-accumulates of the slowest stage, and memory, by counting and by the meters; no accuracy.

MACs are of one view's forward, half the floating-point operations of its matrix products and convolutions: of the stages of the
network, as the thesis seems to count, and with their projectors. Memory is what the trainer's meters say of the second update:
of a process that holds all stages, as in the thesis, and of the greediest stage.

A ResNet-50 with 256 images does not fit a small machine. What it keeps for backward is measured with two small batches and
extrapolated, as it grows by the same bytes with every image; the peak of all live bytes does not, and is not given.
"""

from __future__ import annotations

from typing import Any

import torch

import unlocked as ul
from unlocked.costs import flops, run_once

from .training import cut, memory

THESIS = {1: ("1310 M", "13.5 GB"), 4: ("349 M", "8.7 GB"), 8: ("196 M", "6.3 GB"), 16: ("123 M", "5.6 GB")}
SMALL = 2  # images of the smaller batch of a ResNet-50


def trainer(network: str, width: float, size: int, stages: int) -> ul.Trainer:
    """An untrained one."""
    torch.manual_seed(0)
    model = ul.models.encoder(ul.models.build(network, input_shape=(3, size, size), classes=10, width=width))
    return ul.Trainer(
        cut(model, network, stages, torch.zeros(2, 3, size, size)),
        credit=ul.credit.SimCLR() if stages == 1 else ul.credit.DGSSL(),
        optimizer=lambda ps: torch.optim.Adam(ps, 1e-3, weight_decay=1e-6),
    )


def macs(made: ul.Trainer) -> dict[str, int]:
    """Of the slowest stage: alone, and with its projector."""
    chain = made.chains[0]
    x, bodies, whole = chain.example()[:1], [], []
    for stage in chain:
        h = run_once(stage.body, x)
        bodies.append(flops(stage.body, x) // 2)
        whole.append(bodies[-1] + (0 if stage.head is None else flops(stage.head, h) // 2))
        x = h
    return {"macs": max(bodies), "macs_projected": max(whole)}


def bytes_of(network: str, width: float, size: int, stages: int, batch: int) -> dict[str, int]:
    """`memory` of an update of this many images."""
    made = trainer(network, width, size, stages)
    x = torch.randint(256, (2 * batch, 3, size, size), dtype=torch.uint8)
    made.fit(ul.data.from_tensors(x, torch.arange(2 * batch) % 10, augment="views+flip"), 1, batch_size=batch)
    return memory(made)


def own_costs(network: str, width: float, size: int, stages: list[int], batch: int) -> list[dict[str, Any]]:
    """A line for each J, measured; printed."""
    print(
        "| J | MACs of the slowest stage | with its projector | live, all stages in one process | live, the greediest stage "
        "| kept for backward, one process | one stage |\n|---:|---:|---:|---:|---:|---:|---:|"
    )
    lines = []
    for j in stages:
        line = {"stages": j, **macs(trainer(network, width, size, j)), **bytes_of(network, width, size, j, batch)}
        told = [f"{line[name] / 1e6:.2f} M" for name in ("macs", "macs_projected")]
        told += [f"{line[name] / 2**20:.1f} MiB" for name in ("process", "stage", "kept_process", "kept")]
        print(f"| {j} | {' | '.join(told)} |", flush=True)
        lines.append(line)
    return lines


def thesis_costs(batch: int = 256) -> list[dict[str, Any]]:
    """The same of the thesis' ResNet-50, beside its numbers."""
    print(
        "| J | MACs of the slowest stage | F T3.2 | with its projector | kept for backward, one process | one stage "
        "| weights, gradients, Adam | kept in one process + these | F T3.2 |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    lines = []
    for j, (theirs, memories) in THESIS.items():
        one, two = (bytes_of("resnet50", 1.0, 32, j, images) for images in (SMALL, 2 * SMALL))
        line = {"stages": j, **macs(trainer("resnet50", 1.0, 32, j)), "fixed": two["fixed"]}
        for name in ("kept_process", "kept"):
            line[name] = round(one[name] + (two[name] - one[name]) / SMALL * (batch - SMALL))
        gigabytes = [f"{line[name] / 1e9:.2f} GB" for name in ("kept_process", "kept", "fixed")]
        whole = f"{(line['kept_process'] + line['fixed']) / 1e9:.2f} GB"
        told = [
            f"{line['macs'] / 1e6:.0f} M",
            theirs,
            f"{line['macs_projected'] / 1e6:.0f} M",
            *gigabytes,
            whole,
            memories,
        ]
        print(f"| {j} | {' | '.join(told)} |", flush=True)
        lines.append(line)
    return lines
