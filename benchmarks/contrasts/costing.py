"""Table 3.2's costs: multiply-accumulates of the slowest stage, and memory, by counting; no training.

MACs are of one view's forward through a stage and its projector, half the floating-point operations of its matrix products and
convolutions. Memory is what the trainer's meters say of the second update: of a process that holds all stages (as in the
theses), and of the greediest stage. What does not grow with the batch (weights, gradients, Adam's state) and what does are told
apart by measuring two batch sizes; the larger batch of the table is extrapolated.
"""

from __future__ import annotations

from typing import Any

import torch

import unlocked as ul
from unlocked.costs import flops, run_once

from .training import cut, memory

THESIS = {1: ("1310 M", "13.5 GB"), 4: ("349 M", "8.7 GB"), 8: ("196 M", "6.3 GB"), 16: ("123 M", "5.6 GB")}
HEADING = (
    "| J | MACs of the slowest stage | F T3.2 | all stages in one process | F T3.2 | the largest stage | kept for backward "
    "by one stage |\n|---:|---:|---:|---:|---:|---:|---:|"
)


def trainer(network: str, width: float, size: int, stages: int) -> ul.Trainer:
    """An untrained one."""
    torch.manual_seed(0)
    model = ul.models.encoder(ul.models.build(network, input_shape=(3, size, size), classes=10, width=width))
    return ul.Trainer(
        cut(model, network, stages, torch.zeros(2, 3, size, size)),
        credit=ul.credit.SimCLR() if stages == 1 else ul.credit.DGSSL(),
        optimizer=lambda ps: torch.optim.Adam(ps, 1e-3, weight_decay=1e-6),
    )


def macs(made: ul.Trainer) -> int:
    """Of the slowest stage with its projector."""
    chain = made.chains[0]
    x, most = chain.example()[:1], 0
    for stage in chain:
        h = run_once(stage.body, x)
        spent = flops(stage.body, x) + (0 if stage.head is None else flops(stage.head, h))
        x, most = h, max(most, spent // 2)
    return most


def bytes_of(network: str, width: float, size: int, stages: int, batch: int) -> dict[str, int]:
    """`memory` of an update of this many images."""
    made = trainer(network, width, size, stages)
    x = torch.randint(256, (2 * batch, 3, size, size), dtype=torch.uint8)
    made.fit(ul.data.from_tensors(x, torch.arange(2 * batch) % 10, augment="views+flip"), 1, batch_size=batch)
    return memory(made)


def costs(network: str, width: float, size: int, stages: list[int], batch: int, small: int) -> list[dict[str, Any]]:
    """A line for each J. batch: images of an update; small: what is measured instead, and twice that."""
    lines = []
    for j in stages:
        one, two = (bytes_of(network, width, size, j, b) for b in (small, 2 * small))
        grown = {name: round(one[name] + (two[name] - one[name]) / small * (batch - small)) for name in one}
        lines.append({"stages": j, "macs": macs(trainer(network, width, size, j)), **grown})
    return lines


def table(lines: list[dict[str, Any]], thesis: bool) -> None:
    """Printed; thesis: beside Table 3.2, whose GB are taken for 2³⁰ bytes."""
    print(HEADING)
    for line in lines:
        published = THESIS.get(line["stages"], ("–", "–")) if thesis else ("–", "–")
        told = [f"{line[name] / 2**20:.1f} MiB" if not thesis else f"{line[name] / 2**30:.2f} GiB" for name in BYTES]
        print(
            f"| {line['stages']} | {line['macs'] / 1e6:.{0 if thesis else 2}f} M | {published[0]} | {told[0]} | {published[1]} "
            f"| {told[1]} | {told[2]} |"
        )


BYTES = ("process", "stage", "kept")
