"""What an answer costs: the reason to average weights instead of predictions."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from .. import costs
from .averaging import network_parameters
from .ensemble import Ensemble

SAMPLES = 2  # of which the operations are counted


@dataclass(frozen=True)
class Cost:
    """Of one sample's inference.

    passes: forwards through a network of the members' architecture. flops: of matrix products and convolutions, a multiply-add
    is 2. parameters: that must be held. seconds: measured, per sample of a batch; None: not measured.
    """

    passes: int
    flops: float
    parameters: int
    seconds: float | None = None


def inference_cost(model: nn.Module, x: Tensor, measure: bool = False, repeats: int = 5) -> Cost:
    """The cost of `model` (a network or an Ensemble) on samples like the batch x; `measure`: time forwards on all of x."""
    members = list(model.members) if isinstance(model, Ensemble) else [model]
    few = x[:SAMPLES]
    return Cost(
        len(members),
        costs.flops(model, few) / len(few),
        sum(parameter.numel() for member in members for parameter in network_parameters(member)),
        inference_seconds(model, x, repeats) / len(x) if measure else None,
    )


def inference_seconds(model: nn.Module, x: Tensor, repeats: int = 5) -> float:
    """Median wall-clock seconds of a forward on the batch x in evaluation mode, one warm-up excluded."""
    samples = []
    with costs.untouched(model), torch.no_grad():
        model.eval()
        for _ in range(repeats + 1):
            costs._wait_for(x.device)
            begin = time.perf_counter()
            model(x)
            costs._wait_for(x.device)
            samples.append(time.perf_counter() - begin)
    return median(samples[1:])
