"""Peak bytes on one process while N micro-batches go through one model of N stages: really computed, small.

    one after another      N gradients, each ended before the next begins (gradient accumulation)
    dp                     all N forwards, then all N backwards: what N simultaneous replicas hold together
    cdp, forwards first    staggered by two acts; of the acts of a moment the forwards run first, so that the peak is that of
                           acts that really run at the same time
    cdp, trainer           ul.consensus.CDP(form="single-device"), as it runs

On a CPU: bytes that autograd keeps (probes/memory.py). On CUDA: `max_memory_allocated` above what was allocated before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked.chain import Chain
from unlocked.cutting import Balance
from unlocked.probes.memory import SavedBytes
from unlocked.simulation.cyclic import StageMemory, in_rounds, retained

Batch = tuple[Tensor, Tensor]
CLASSES, CONTEXT, WIDTH = 10, 32, 32


def gpt(layers: int) -> tuple[nn.Module, list[Batch]]:
    """A tiny GPT and a micro-batch for each of as many replicas."""
    model = ul.models.build("gpt", input_shape=(CONTEXT,), classes=CLASSES, layers=layers, width=WIDTH, heads=2)
    tokens = [torch.randint(CLASSES, (2, CONTEXT + 1)) for _ in range(layers)]
    return model, [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in tokens]


def vit(layers: int) -> tuple[nn.Module, list[Batch]]:
    """A tiny ViT, likewise."""
    shape, options = (3, 24, 24), {"patch": 4, "width": WIDTH, "heads": 2}
    model = ul.models.build("vit", input_shape=shape, classes=CLASSES, layers=layers, **options)
    return model, [(torch.randn(2, *shape), torch.randint(CLASSES, (2,))) for _ in range(layers)]


def resnet(replicas: int) -> tuple[nn.Module, list[Batch]]:
    """A narrow ResNet-50, whose blocks keep less the higher they are."""
    shape = (3, 64, 64)
    model = ul.models.build("resnet50", input_shape=shape, classes=CLASSES, width=0.125, stem="large")
    return model, [(torch.randn(2, *shape), torch.randint(CLASSES, (2,))) for _ in range(replicas)]


STACKS: dict[str, Callable[[int], tuple[nn.Module, list[Batch]]]] = {"GPT": gpt, "ViT-like": vit, "ResNet-50": resnet}


def measure(stack: str, replicas: int, balance: Balance, device: torch.device) -> dict[str, int]:
    """Bytes at the peak by method, and what cyclic.py says of the two kinds of CDP from the stages' measured bytes."""
    torch.manual_seed(0)
    model, batches = STACKS[stack](replicas)
    batches = [(x.to(device), y.to(device)) for x, y in batches]
    chain = ul.cut(model.to(device), replicas, like=batches[0][0], balance=balance)
    whole = SavedBytes if device.type == "cpu" else _Allocated
    found = {}
    for name, run in RUNS.items():
        step = run(chain, batches)
        step()  # gradients and the optimizer's state are there from now on
        with whole([*chain.parameters(), *chain.buffers()]) as meter:
            step()
        found[name] = meter.peak
    rows = in_rounds([StageMemory(1, 1, size) for size in _kept(chain, *batches[0])])
    found["formula"] = retained(rows, replicas).peak
    return found


class _Allocated:
    """CUDA's allocator: bytes above what is allocated now."""

    def __init__(self, ignore: Sequence[Tensor]) -> None:
        self.peak = 0

    def __enter__(self) -> _Allocated:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.cuda.synchronize()
        self.peak = torch.cuda.max_memory_allocated() - self._before


def _kept(chain: Chain, x: Tensor, y: Tensor) -> list[int]:
    """Bytes that each stage adds to what is kept, the last one's loss included."""
    with SavedBytes([*chain.parameters(), *chain.buffers()]) as meter:
        levels = [0]
        replica = Replica(chain, x, y)
        for _ in chain:
            replica.forward()
            levels.append(meter.live)
    return [after - before for before, after in pairwise(levels)]


# ---- the ways to run N micro-batches ---------------------------------------------------------------------------------


@dataclass
class Replica:
    """One micro-batch on its way through the stages."""

    chain: Chain
    x: Tensor
    y: Tensor
    graphs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    gradient: Tensor | None = None

    def forward(self) -> None:
        """Of the next stage."""
        stage = self.chain[len(self.graphs)]
        x = self.x.detach().requires_grad_(self.x.is_floating_point() and bool(self.graphs))
        self.x = stage.body(x)
        h = stage.loss(self.x, self.y) if len(self.graphs) == len(self.chain) - 1 else self.x
        self.graphs.append((x, h))

    def backward(self) -> None:
        """Of the last stage that had a forward."""
        x, h = self.graphs.pop()
        self.x = x
        h.backward(self.gradient)
        self.gradient = x.grad


def one_after_another(chain: Chain, batches: Sequence[Batch]) -> Callable[[], None]:
    """Gradient accumulation."""

    def step() -> None:
        for batch in batches:
            replica = Replica(chain, *batch)
            for act in (replica.forward, replica.backward):
                for _ in chain:
                    act()

    return step


def at_once(chain: Chain, batches: Sequence[Batch]) -> Callable[[], None]:
    """Data parallelism."""

    def step() -> None:
        replicas = [Replica(chain, *batch) for batch in batches]
        for act in (Replica.forward, Replica.backward):
            for _ in chain:
                for replica in replicas:
                    act(replica)

    return step


def staggered(chain: Chain, batches: Sequence[Batch]) -> Callable[[], None]:
    """Replica n begins two acts after replica n − 1; of the acts of a moment the forwards go first."""
    acts = 2 * len(chain)

    def step() -> None:
        replicas = [Replica(chain, *batch) for batch in batches]
        for moment in range(acts + 2 * len(batches)):
            now = [(moment - 2 * n, replica) for n, replica in enumerate(replicas)]
            for replica in [replica for k, replica in now if 0 <= k < len(chain)]:
                replica.forward()
            for replica in [replica for k, replica in now if len(chain) <= k < acts]:
                replica.backward()

    return step


def trained(chain: Chain, batches: Sequence[Batch]) -> Callable[[], None]:
    """The library's own."""
    trainer = ul.Trainer(
        chain,
        credit=ul.credit.Backprop(),
        consensus=ul.consensus.CDP(form="single-device"),
        replicas=len(batches),
        optimizer=lambda weights: torch.optim.SGD(weights, lr=1e-3),
    )
    xs, ys = (list(row) for row in zip(*batches))

    def step() -> None:
        trainer.step(xs, ys)

    return step


RUNS = {
    "one after another": one_after_another,
    "dp": at_once,
    "cdp, forwards first": staggered,
    "cdp, trainer": trained,
}
