"""Short trainings of a narrow RevResNet-18 on CIFAR-10, with the instruments looking on."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch

import unlocked as ul
from unlocked.callbacks import Callback, GradientCosine, ReconstructionError
from unlocked.credit import Credit
from unlocked.data import Data

MICRO_BATCH = 16
COSINES = {
    "backprop": (ul.credit.Backprop(), 1),
    "pipedream": (ul.credit.PipeDream(), 1),
    "delayed-gradients": (ul.credit.DelayedGradients(), 1),
    "features-replay": (ul.credit.FeaturesReplay(), 1),
    "fdg": (ul.credit.FDG(), 1),
    "petra k=1": (ul.credit.PETRA(), 1),
    "petra k=4": (ul.credit.PETRA(), 4),
}


def trained(
    data: Data, credit: Credit, stages: int, k: int, lr: float, updates: int, width: float, probe: Callback
) -> list[float]:
    """Train for `updates` steps of k micro-batches, the pipeline never emptied in between; the losses of the last stage."""
    torch.manual_seed(0)
    model = ul.models.revresnet18(data.input_shape, data.classes, width=width)
    trainer = ul.Trainer(
        ul.cut(model, stages, like=data.samples(torch.arange(2))[0]),
        credit=credit,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4),
        accumulate=k,
    )
    losses = []
    probe.on_start(trainer, 1)
    for x, y in _batches(data, k * MICRO_BATCH, updates):
        losses.append(trainer.step(x, y)[-1])
        probe.on_step(trainer, {})
    trainer.drain()
    probe.on_stop(trainer, "finished")
    return [loss for loss in losses if loss is not None]


def _batches(data: Data, size: int, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    epoch = 0
    while count > 0:
        for x, y in data.batches(size, epoch=epoch, seed=0):
            if count > 0 and len(x) == size:
                yield x, y
                count -= 1
        epoch += 1


def delay_rows(data: Data, stages: int, k: int, lr: float, updates: int, width: float) -> list[dict[str, Any]]:
    """PETRA's error at each stage, mean over the second half of the steps."""
    probe = ReconstructionError(every=1)
    losses = trained(data, ul.credit.PETRA(), stages, k, lr, updates, width, probe)
    rows = []
    for stage in range(stages - 1):
        late = [r for r in probe.records if r["stage"] == stage and r["step"] > updates // 2]
        if late:
            means = {key: fmean(r[key] for r in late) for key in ("delay", "error", "worst")}
            rows.append({"stages": stages, "k": k, "lr": lr, "stage": stage, **means, "loss": fmean(losses[-5:])})
    return rows


def cosine_rows(data: Data, name: str, stages: int, lr: float, updates: int, width: float) -> list[dict[str, Any]]:
    """A method's cosine and ratio at each stage, mean over the second half of the steps."""
    credit, k = COSINES[name]
    probe = GradientCosine(every=max(1, updates // 8))
    losses = trained(data, credit, stages, k, lr, updates, width, probe)
    rows = []
    for stage in range(stages):
        late = [
            r for r in probe.records if r["stage"] == stage and r["step"] > updates // 2 and r["cosine"] is not None
        ]
        if late:
            means = {key: fmean(r[key] for r in late) for key in ("cosine", "ratio")}
            lowest = min(r["cosine"] for r in late)
            row = {"method": name, "stages": stages, "stage": stage, **means, "lowest": lowest}
            rows.append({**row, "loss": fmean(losses[-5:])})
    return rows
