"""The byte-level GPT and the text all parts train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import unlocked as ul
from unlocked.rng import seed_of


@dataclass(frozen=True)
class Size:
    """A GPT of `layers` blocks of `width` on windows of `context` bytes; `micro` of them are a micro-batch."""

    layers: int
    width: int
    context: int
    micro: int


def chain_of(size: Size, seed: int = 0) -> ul.Chain:
    """The whole network as one stage."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "model"))
        model = ul.models.gpt((size.context,), 256, layers=size.layers, width=size.width, heads=2)
    return ul.cut(model, 1, like=torch.zeros(2, size.context, dtype=torch.long))


def adamw(rate: float) -> Any:
    """The optimizer's factory."""
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.1)


def parameter_bytes(chain: ul.Chain) -> int:
    """Ψ_P."""
    return sum(x.numel() * x.element_size() for x in chain.parameters())
