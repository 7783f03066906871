"""What the kernel costs: Trainer.step against hand-written PyTorch loops, side by side, one thread.

    python benchmarks/overhead.py [--rounds 60] [--stages 4] [--allocator keep|default]

A hand-written backprop loop has one optimizer for the whole network; a hand-written DGL loop one per stage, as here.
To beat: ratio ≤ 1.03 where a step takes ≥ 10 ms. The hand-written loop against a twin of itself (control) shows what the
machine's noise is worth. `--allocator keep` (as the command line does) lets glibc keep freed memory, for all of them; with
`default` the page faults of large activations are part of what is measured.
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
from unlocked.allocator import keep_freed_memory

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


def hand_written_dgl(chain: nn.Module, x: Tensor, y: Tensor) -> Callable[[], list[float]]:
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
    """The CNN; the GPT with the command line's defaults, and with a quarter of the tokens, where overhead weighs more."""
    torch.manual_seed(0)
    cnn = ul.models.build("cnn", input_shape=(3, 32, 32), classes=10, width=32, depth=4)
    gpt = ul.models.build("gpt", input_shape=(128,), classes=256)
    return {
        "cnn, batch 128": (cnn, torch.randn(128, 3, 32, 32), torch.randint(10, (128,))),
        "gpt, 32 × 128 tokens": (gpt, torch.randint(256, (32, 128)), torch.randint(256, (32, 128))),
        "gpt, 16 × 64 tokens": (gpt, torch.randint(256, (16, 64)), torch.randint(256, (16, 64))),
    }


def variants(method: str, model: nn.Module, stages: int, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """The hand-written loop, the Trainer, and the hand-written loop once more, each on a copy of its own."""
    head = "linear" if x.dim() == 2 else "mlp"
    credit = ul.credit.DGL(head=head, budget=None) if method == "dgl" else ul.credit.Backprop()
    session = ul.Trainer(ul.cut(copy.deepcopy(model), stages, like=x), credit=credit, optimizer=sgd)
    loop, network = (hand_written_dgl, session.chains[0]) if method == "dgl" else (hand_written_backprop, model)
    return {
        "by hand": loop(copy.deepcopy(network), x, y),
        "trainer": functools.partial(session.step, x, y),
        "twin": loop(copy.deepcopy(network), x, y),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--allocator", choices=("keep", "default"), default="keep")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = arguments.allocator == "keep" and keep_freed_memory()
    ratios, controls = {}, {}
    for name, (model, x, y) in tasks().items():
        for method in ("backprop", "dgl"):
            times = interleaved(variants(method, model, arguments.stages, x, y), arguments.rounds)
            key = f"{method}, {name}"
            ratios[key] = round(ratio(times, "trainer", "by hand"), 4)
            controls[key] = round(ratio(times, "twin", "by hand"), 4)
            print(
                f"{method:9s} {name:22s} by hand {1e3 * median(times['by hand']):7.2f} ms   Trainer.step "
                f"{1e3 * median(times['trainer']):7.2f} ms   ratio {ratios[key]:.3f}   control {controls[key]:.3f}"
            )
    result(
        "overhead",
        ratios=ratios,
        controls=controls,
        freed_memory_kept=kept,
        stages=arguments.stages,
        rounds=arguments.rounds,
    )


if __name__ == "__main__":
    main()
