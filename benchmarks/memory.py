"""Peak bytes of saved activations, ResNet-32: backprop against DGL with J = 2, 4, 8, 16 stages.

    python benchmarks/memory.py [--batch 64] [--width 1.0] [--rounds 15]

Bytes are those of distinct storages that autograd keeps for the backward, parameters left out. The bound for DGL: 1.05 ×
(largest single stage with its head + one boundary activation), each measured by itself. Then: what the meters cost, and how the
meter of live bytes agrees with torch's profiler (meters.py).
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor

import unlocked as ul
from unlocked.costs import run_once, untouched
from unlocked.probes.memory import SavedBytes

from common import result
from meters import meters


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def peak_of_step(session: ul.Trainer, x: Tensor, y: Tensor) -> int:
    with SavedBytes(ignore=session.chains[0].parameters()) as meter:
        session.step(x, y)
    return meter.peak


def alone(stage: ul.Stage, x: Tensor, y: Tensor) -> int:
    """Saved bytes of one stage with its head and loss, forward and backward, by itself."""
    with untouched(stage), SavedBytes(ignore=stage.parameters()) as meter:
        stage.train()
        stage.loss(stage.read(stage.body(x)), y).backward()
    return meter.peak


def bound(chain: ul.Chain, x: Tensor, y: Tensor) -> tuple[int, int]:
    """(largest stage, largest boundary activation) in bytes."""
    stages, boundary, h = [], 0, x
    for stage in chain:
        stages.append(alone(stage, h, y))
        h = run_once(stage.body, h)
        if stage is not chain[len(chain) - 1]:
            boundary = max(boundary, h.numel() * h.element_size())
    return max(stages), boundary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=15, help="of the timing of the meters")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ul.models.build("resnet32", input_shape=(3, 32, 32), classes=10, width=arguments.width)
    x, y = torch.randn(arguments.batch, 3, 32, 32), torch.randint(10, (arguments.batch,))
    mebibyte = 2**20
    whole = {}
    for stages in (1, 16):
        session = ul.Trainer(ul.cut(copy.deepcopy(model), stages, like=x), credit=ul.credit.Backprop(), optimizer=sgd)
        whole[stages] = peak_of_step(session, x, y)
    backprop = whole[1]
    print(f"backprop        peak {backprop / mebibyte:7.2f} MiB (over 16 stages {whole[16] / mebibyte:.2f} MiB)")
    rows = {}
    for stages in (2, 4, 8, 16):
        for balance in ("flops", "memory"):
            chain = ul.cut(copy.deepcopy(model), stages, like=x, balance=balance)
            session = ul.Trainer(chain, credit=ul.credit.DGL(head="linear"), optimizer=sgd)
            largest, boundary = bound(session.chains[0], x, y)
            peak = peak_of_step(session, x, y)
            rows[f"J={stages}, balanced by {balance}"] = {
                "peak": peak,
                "of_backprop": round(peak / backprop, 4),
                "of_bound": round(peak / (largest + boundary), 4),
            }
            print(
                f"dgl J={stages:<2d} {balance:7s} peak {peak / mebibyte:7.2f} MiB = {peak / backprop:6.1%} of backprop; "
                f"largest stage + boundary {(largest + boundary) / mebibyte:7.2f} MiB, ratio {peak / (largest + boundary):.3f}"
            )
    print("meters: time over that of a bare step; peak of live bytes over the profiler's")
    found = meters(arguments.batch, arguments.rounds)
    result(
        "memory", backprop=backprop, backprop_over_16_stages=whole[16], dgl=rows, meters=found, batch=arguments.batch
    )


if __name__ == "__main__":
    main()
