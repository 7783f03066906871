"""What the kernel costs: Trainer.step against hand-written PyTorch loops, side by side, one thread.

    python benchmarks/overhead.py [--rounds 60] [--stages 4]

A hand-written backprop loop has one optimizer for the whole network; a hand-written DGL loop one per stage, as here.
To beat: ratio ≤ 1.03 where a step takes ≥ 10 ms.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

import unlocked as ul

from common import interleaved, ratio, result


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def hand_written_backprop(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    """The loop of every tutorial; the loss is read, as the Trainer reads it."""
    optimizer = sgd(list(model.parameters()))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = ul.losses.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def hand_written_dgl(chain: ul.Chain, x: Tensor, y: Tensor) -> Callable[[], list[float]]:
    """Stage after stage: forward, local loss, backward, update."""
    optimizers = [sgd(list(stage.parameters())) for stage in chain]

    def step() -> list[float]:
        h, losses = x, []
        for stage, optimizer in zip(chain, optimizers):
            h = stage.body(h.detach())
            loss = stage.loss(stage.read(h), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses

    return step


def tasks() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    torch.manual_seed(0)
    cnn = ul.models.build("cnn", input_shape=(3, 32, 32), classes=10, width=32, depth=4)
    gpt = ul.models.build("gpt", input_shape=(64,), classes=256, layers=4, width=128, heads=4)
    return {
        "cnn, batch 128": (cnn, torch.randn(128, 3, 32, 32), torch.randint(10, (128,))),
        "gpt, 16 × 64 tokens": (gpt, torch.randint(256, (16, 64)), torch.randint(256, (16, 64))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--stages", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ratios = {}
    for name, (model, x, y) in tasks().items():
        head = "linear" if "gpt" in name else "mlp"
        for method in ("backprop", "dgl"):
            credit = ul.credit.DGL(head=head, budget=None) if method == "dgl" else ul.credit.Backprop()
            session = ul.Trainer(ul.cut(copy.deepcopy(model), arguments.stages, like=x), credit=credit, optimizer=sgd)
            if method == "dgl":
                by_hand = hand_written_dgl(copy.deepcopy(session.chains[0]), x, y)
            else:
                by_hand = hand_written_backprop(copy.deepcopy(model), x, y)
            times = interleaved(
                {"trainer": functools.partial(session.step, x, y), "by hand": by_hand}, arguments.rounds
            )
            ratios[f"{method}, {name}"] = round(ratio(times, "trainer", "by hand"), 4)
            print(
                f"{method:9s} {name:22s} by hand {1e3 * median(times['by hand']):7.2f} ms   "
                f"Trainer.step {1e3 * median(times['trainer']):7.2f} ms   ratio {ratios[f'{method}, {name}']:.3f}"
            )
    result("overhead", ratios=ratios, stages=arguments.stages, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
