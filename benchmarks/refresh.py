"""What estimating BatchNorm anew gives the averaged network of finished runs (WASH and other populations).

    python benchmarks/refresh.py RUN [RUN …]        e.g. runs/cifar10/runs/backprop--wash-p-0.01--x3-seed0

Test accuracy of the mean of the replicas with the mean of their BatchNorm statistics, with statistics estimated anew from up to
50 training batches, and of the first replica.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import unlocked as ul
from unlocked.run_files import read_config
from unlocked.running import load_data

from common import accuracy, result


def accuracies(run: Path) -> dict[str, float | None]:
    config = read_config(run)
    train, test = load_data(config)
    session = ul.Trainer.resume(run / "checkpoint")
    networks = {
        "averaged": session.averaged(),
        "averaged, refreshed": session.averaged(refresh=train),
        "first replica": session.chains[0],
    }
    return {name: accuracy(chain, test) for name, chain in networks.items()}


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    rows = {}
    for run in map(Path, sys.argv[1:]):
        rows[run.name] = accuracies(run)
        print(
            f"{run.name:44s}"
            + "   ".join(f"{name} {100 * (value or 0):5.1f} %" for name, value in rows[run.name].items())
        )
    result("refresh", accuracies=rows)


if __name__ == "__main__":
    main()
