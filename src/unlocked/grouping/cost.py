"""What groups cost and gain by the count of operations (Patel's thesis, section 3.3.2 "Metrics", Tables 3.4 and 3.5).

    training speed-up  = MACs(network, forward) / max over modules of MACs(body + head, forward)
    inference speed-up = MACs(network, forward) / Σ over modules of MACs(body, forward)

    MAC multiply-accumulate, for one sample; module: one group of one depth, on a machine of its own. Backward costs twice the
    forward everywhere, so it cancels; so do messages, which are not counted.

`elementwise`: what profilers of modules (ptflops and the like) add: 2 for each element that a BatchNorm with weights puts out,
1 for each element of ReLU and one for each input of a pooling. Patel's tables agree with it (docs/results/groups.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..chain import Chain, join
from ..costs import run_once


class ModuleCost(NamedTuple):
    """MACs of one sample's forward through stage `stage`, group `group` of depth `depth`: its body and its head."""

    stage: int
    depth: int
    group: int
    body: float
    head: float

    @property
    def total(self) -> float:
        """Body and head: what a training step of this module takes, up to a factor common to all."""
        return self.body + self.head


def macs(module: nn.Module, x: Tensor, elementwise: bool = False) -> float:
    """Multiply-accumulates of one forward on `x` (B, …), per sample."""
    extra: dict[Any, Callable[..., int]] = _ELEMENTWISE if elementwise else {}
    with FlopCounterMode(display=False, custom_mapping=extra) as counter:
        run_once(module, x)
    return counter.get_total_flops() / 2 / len(x)


def module_costs(
    chain: Chain, heads: Sequence[nn.Module | None] | None = None, joined: bool = False, elementwise: bool = False
) -> list[ModuleCost]:
    """The cost of every stage of a chain with an example batch, with its own head or that of `heads`.

    joined: all heads read what all groups of their depth put out (stop-gradient GN-DGL), not only those that say so.
    """
    found: list[ModuleCost] = []
    walked = list(chain.walk(chain.example(), lambda j, x: run_once(chain[j].body, x)))
    outputs = {j: h for j, _, h in walked}
    for j, x, h in walked:
        depth = chain.layout.depth(j)
        group = j - chain.layout.rows[depth][0]
        head = chain[j].head if heads is None else heads[j]
        if joined or chain[j].reads_siblings:
            h = join([outputs[k] for k in chain.layout.beside(j)])
        cost = 0.0 if head is None else macs(head, h, elementwise)
        found.append(ModuleCost(j, depth, group, macs(chain[j].body, x, elementwise), cost))
    return found


def training_speedup(end_to_end: float, costs: Sequence[ModuleCost]) -> float:
    """How much faster a step is when each module has a machine, by Patel's count."""
    return end_to_end / max(cost.total for cost in costs)


def inference_speedup(end_to_end: float, costs: Sequence[ModuleCost]) -> float:
    """How many times fewer operations the grouped network takes than the dense one."""
    return end_to_end / sum(cost.body for cost in costs)


def _per_input(factor: int) -> Callable[..., int]:
    def count(shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
        return 2 * factor * math.prod(shape)  # a MAC is 2 FLOPs

    return count


_aten = torch.ops.aten
_ELEMENTWISE: dict[Any, Callable[..., int]] = {
    operator: _per_input(factor)
    for factor, operators in (
        (2, (_aten.native_batch_norm, _aten._native_batch_norm_legit_no_training, _aten.cudnn_batch_norm)),
        (
            1,
            (
                _aten.relu,
                _aten.relu_,
                _aten._adaptive_avg_pool2d,
                _aten.mean,
                _aten.max_pool2d_with_indices,
                _aten.avg_pool2d,
            ),
        ),
    )
    for operator in operators
}
