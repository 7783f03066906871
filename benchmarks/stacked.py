"""N small networks that compute as one against a loop over them: Trainer.step under backprop(stacked=True) and backprop.

    python benchmarks/stacked.py [--members 2 3 5 10] [--networks mlp gpt] [--batch 32] [--rounds 7] [--device cpu]

Both ways train the same members (SGD with momentum, a batch for each) and differ by rounding only. The optimizers' steps are a
loop in either way; `without updates` is the ratio of the rest of the step. `measured`: what backprop(stacked="measured") chose.
One thread on the CPU. The loop against a twin of itself (control) shows what the machine's noise is worth.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked.allocator import keep_freed_memory

from common import interleaved, result

Task = tuple[nn.Module, Callable[[], tuple[Tensor, Tensor]]]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def tasks(batch: int) -> dict[str, Task]:
    """The networks, and what makes a batch for each."""
    torch.manual_seed(0)
    image = (3, 16, 16)
    build = ul.models.build

    def pixels() -> tuple[Tensor, Tensor]:
        return torch.randn(batch, *image), torch.randint(10, (batch,))

    return {
        "mlp": (
            build("mlp", input_shape=(64,), classes=10),
            lambda: (torch.randn(batch, 64), torch.randint(10, (batch,))),
        ),
        "cnn": (build("cnn", input_shape=image, classes=10, width=16, depth=3), pixels),
        "gpt": (
            build("gpt", input_shape=(16,), classes=64, width=32, layers=2, heads=2),
            lambda: (torch.randint(64, (batch, 16)), torch.randint(64, (batch, 16))),
        ),
        "resnet18": (build("resnet18", input_shape=image, classes=10, width=0.125), pixels),
    }


class Way:
    """One way to train the members. updates: seconds that the optimizers took, of every call."""

    def __init__(self, stacked: Any, task: Task, members: int, device: str) -> None:
        model, make = task
        pairs = [make() for _ in range(members)]
        self._x, self._y = [x.to(device) for x, _ in pairs], [y.to(device) for _, y in pairs]
        chain = ul.cut(copy.deepcopy(model), 1, like=self._x[0])
        self.session = ul.Trainer(
            chain, credit=ul.credit.Backprop(stacked=stacked), replicas=members, optimizer=sgd, device=device
        )
        self.updates: list[float] = []

    def __call__(self) -> None:
        self.session.step(self._x, self._y)  # reads the losses, so the device has come to the end of the backward
        if self._x[0].is_cuda:
            torch.cuda.synchronize()
        self.updates.append(sum(act.end - act.start for act in self.session.timeline if act.kind == "U"))

    def peak(self) -> int:
        """Most bytes of the device in a step, beyond what there was before it."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        return torch.cuda.max_memory_allocated() - before


def compare(task: Task, members: int, rounds: int, device: str) -> dict[str, Any]:
    """Both ways, taking turns."""
    ways = {
        "stacked": Way(True, task, members, device),
        "loop": Way(False, task, members, device),
        "twin": Way(False, task, members, device),
    }
    times = interleaved(ways, rounds, warm_up=2)
    rest = {
        name: [whole - part for whole, part in zip(row, ways[name].updates[-rounds:])] for name, row in times.items()
    }
    found: dict[str, Any] = {f"{name} ms": round(1e3 * median(row), 2) for name, row in times.items()}
    for key, rows, one in [
        ("ratio", times, "stacked"),
        ("without updates", rest, "stacked"),
        ("control", times, "twin"),
    ]:
        found[key] = round(median(a / b for a, b in zip(rows[one], rows["loop"])), 3)
    measured = Way("measured", task, members, device)
    measured()
    found["measured"] = "stacked" if measured.session.stack is not None and measured.session.stack.stacked else "loop"
    if device == "cuda":
        found["peak MB"] = {name: round(ways[name].peak() / 1e6, 1) for name in ("stacked", "loop")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, nargs="+", default=[2, 3, 5, 10])
    parser.add_argument("--networks", nargs="+", choices=list(tasks(1)), default=list(tasks(1)))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    table: dict[str, dict[str, Any]] = {}
    for name in arguments.networks:
        task = tasks(arguments.batch)[name]
        for members in arguments.members:
            row = table[f"{name} x{members}"] = compare(task, members, arguments.rounds, arguments.device)
            print(
                f"{name:9s} N = {members:2d}   " + "   ".join(f"{key} {value}" for key, value in row.items()),
                flush=True,
            )
    result("stacked", device=arguments.device, batch=arguments.batch, rounds=arguments.rounds, table=table)


if __name__ == "__main__":
    main()
