"""What floating point alone costs: a network run upwards, then backwards, with the same weights."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn

import unlocked as ul
from unlocked.probes.reconstruction import rounding
from unlocked.reversible import is_reversible, units

PRECISIONS = ("float32", "bf16 streams", "bf16 autocast")
RESNETS = ("revresnet18", "revresnet34", "revresnet50")


def gpt_row(layers: int) -> dict[str, Any]:
    """A reversible GPT of so many blocks, as it is initialised: 2 couplings per block."""
    torch.manual_seed(0)
    model = ul.models.revgpt((32,), 256, layers=layers, width=64, heads=4)
    x = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(1))
    return {"model": "revgpt", "layers": layers, **_row(model, x)}


def resnet_row(name: str) -> dict[str, Any]:
    """A reversible ResNet at a quarter of its width, on noise of CIFAR's shape, in training mode."""
    torch.manual_seed(0)
    model = getattr(ul.models, name)((3, 32, 32), 10, width=0.25)
    return {"model": name, **_row(model, torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)))}


def _row(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """The error at the lowest reversible unit, and the worst, in each precision; and of what type the streams are."""
    found = {precision: _errors(model, x, precision) for precision in PRECISIONS}
    row: dict[str, Any] = {"reversible": sum(map(is_reversible, units(model)))}
    for precision, (errors, kind) in found.items():
        row[precision] = {"lowest": errors[0], "worst": max(errors), "streams": kind}
    return row


def _errors(model: nn.Module, x: Tensor, precision: str) -> tuple[list[float], str]:
    halved = precision == "bf16 streams"
    model = copy.deepcopy(model).bfloat16() if halved else model
    x = x.bfloat16() if halved and x.is_floating_point() else x
    context = torch.autocast("cpu", torch.bfloat16) if precision == "bf16 autocast" else contextlib.nullcontext()
    kinds: list[str] = []
    first = next(unit for unit in units(model) if is_reversible(unit))
    hook = first.register_forward_pre_hook(lambda _, given: kinds.append(str(given[0].dtype).removeprefix("torch.")))
    try:
        with context:
            errors = rounding(model, x)
    finally:
        hook.remove()
    return errors, kinds[0]
