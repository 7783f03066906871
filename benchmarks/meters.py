"""The meters of memory: what they cost, and how they agree with torch's profiler. Used by memory.py.

A step is forward, cross-entropy, backward, SGD with momentum; one thread. Cost: the median over interleaved rounds of
metered / bare. Agreement: the meter's peak of live bytes over the profiler's, both above the parameters and the optimizer's
state; the profiler also sees what kernels take for themselves while they run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import unlocked as ul
from unlocked.probes.live import LiveBytes
from unlocked.probes.memory import SavedBytes

from common import interleaved, ratio

Step = Callable[[], None]
MODELS = {
    "resnet18 width 0.25": ("resnet18", (3, 32, 32), {"width": 0.25}),
    "vgg6a width 0.25": ("vgg6a", (3, 32, 32), {"width": 0.25}),
    "cnn": ("cnn", (1, 28, 28), {}),
    "mlp": ("mlp", (784,), {}),
    "gpt": ("gpt", (64,), {}),
}


def made(name: str, batch: int) -> tuple[nn.Module, Step]:
    """A model and a training step of it."""
    kind, shape, options = MODELS[name]
    torch.manual_seed(0)
    model = ul.models.build(kind, input_shape=shape, classes=10, **options)
    tokens = kind == "gpt"
    x = torch.randint(10, (batch, *shape)) if tokens else torch.randn(batch, *shape)
    y = torch.randint(10, (batch, *shape) if tokens else (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        output: Tensor = model(x)
        nn.functional.cross_entropy(output.flatten(0, -2), y.flatten()).backward()
        del output
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def overhead(name: str, batch: int, rounds: int) -> dict[str, float]:
    """Time of a step under each meter, and under both, over that of the bare one."""
    model, step = made(name, batch)

    def saved() -> None:
        with SavedBytes(ignore=model.parameters()):
            step()

    def live() -> None:
        with LiveBytes():
            step()

    def both() -> None:
        with LiveBytes() as meter, SavedBytes(ignore=model.parameters(), on_save=lambda x: meter.mark("saved", x)):
            step()

    times = interleaved({"bare": step, "saved": saved, "live": live, "both": both}, rounds, warm_up=2)
    return {meter: round(ratio(times, meter, "bare"), 3) for meter in ("saved", "live", "both")}


def agreement(name: str, batch: int) -> float:
    """The meter's peak over the profiler's."""
    _, step = made(name, batch)
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    level = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        level += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, level)
    with LiveBytes() as meter:
        step()
    return round(meter.peak / peak, 4)


def meters(batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Print a line for each model."""
    found = {}
    for name in MODELS:
        found[name] = {**overhead(name, batch, rounds), "of_profiler": agreement(name, batch)}
        print(f"{name:20s} " + "  ".join(f"{key} {value:.3f}" for key, value in found[name].items()))
    return found
