"""ZeRO-1, optimizer state shared out among replicas: PyTorch's ZeroRedundancyOptimizer (Rajbhandari et al., 2020).

    g = (1/N) Σ_n ∇f_n(θ)          on every replica, by `all-reduce`
    θ_p ← OPT(θ_p, g_p)            on the owner of p only, which then sends θ_p to the others

N replicas, f_n the loss of replica n on its own shard of the batch, p a weight (a whole tensor). Weights are dealt out
by size, the largest first, each to the replica that has the least.

    memory per replica   weights Ψ_P, gradients Ψ_P, optimizer state about 1/N (as even as whole tensors can be dealt)
    bytes per update     3(N−1)/N Ψ_P: the all-reduce, and what each replica owns to N−1 others

Clipping, schedules, accumulation and the optimizer are those of `all-reduce`, for the gradient is whole everywhere.
Checkpoints hold the whole optimizer state, so a run may go on without sharding.

Limits: N = 1 is ordinary training. Parameters are those of `all-reduce`, bit for bit for every N and every optimizer
that updates each tensor by itself.

What it needs: one worker per process, and an optimizer whose state is in its `state` and `param_groups` alone (as of
all in torch.optim but LBFGS).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ..chain import Chain
from ..errors import InvalidChoice
from ..worker import Worker
from .all_reduce import AllReduce
from .base import Properties, Store, Weights
from .torch_data_parallel import note


@dataclass(frozen=True)
class TorchZeRO1(AllReduce):
    """As all-reduce, but each replica has the optimizer state of, and updates, its share of the weights only.

    Args:
        bucket_mb: as in all-reduce.
    """

    name: ClassVar[str] = "torch-zero1"
    properties: ClassVar[Properties] = Properties(
        title="ZeroRedundancyOptimizer, PyTorch's ZeRO-1 (Rajbhandari et al. 2020)",
        source="torch.distributed.optim",
        barrier="all replicas, every update",
        bytes="3(N−1)/N Ψ_P",
        replicas="equal, each holds 1/N of the optimizer state",
        result="any replica",
    )
    needs_processes: ClassVar[bool] = True

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        _Shared(worker, store.optimizer)
        return super().weights(worker, chain, store, seed)


class _Shared:
    """Turns an optimizer's step, through its hooks, into one of ZeroRedundancyOptimizer.

    To schedules, checkpoints and probes it stays the optimizer it was, with the state of this replica's share in it.
    """

    def __init__(self, worker: Worker, made: Optimizer) -> None:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # late: it takes a second

        self._worker, self._group = worker, worker.transport.process_group(worker, "replicas")
        # not optimizer_class=type(made): AdamW's defaults, for one, are not what its constructor takes
        self._zero = ZeroRedundancyOptimizer(
            made.param_groups,
            optimizer_class=lambda groups: _second(made, groups),  # type: ignore[arg-type]
            process_group=self._group,
        )
        self._mine = {x for group in self._zero.optim.param_groups for x in group["params"]}
        self._hidden: list[list[nn.Parameter]] = []
        made.register_step_pre_hook(self._step)
        made.register_step_post_hook(self._show)
        made.register_state_dict_post_hook(self._whole)
        made.register_load_state_dict_post_hook(self._forget_others)

    def _step(self, made: Optimizer, *_: Any) -> None:
        """Update this replica's share, exchange, and leave nothing to do for the optimizer itself."""
        self._zero.param_groups = made.param_groups  # loading a checkpoint makes new ones
        self._zero.optim.state = made.state
        self._zero.step()
        size = (self._worker.replicas.size - 1) * sum(x.numel() * x.element_size() for x in self._mine)
        if size:
            note(self._worker, "M", TorchZeRO1.name, size)
        self._hidden = [group["params"] for group in made.param_groups]
        for group in made.param_groups:
            group["params"] = []

    def _show(self, made: Optimizer, *_: Any) -> None:
        for group, parameters in zip(made.param_groups, self._hidden):
            group["params"] = parameters

    def _whole(self, made: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """The state of all shares; every replica must ask for it."""
        rows: list[Any] = [None] * self._worker.replicas.size
        dist.all_gather_object(rows, state["state"], group=self._group)
        entries = {index: entry for row in rows for index, entry in row.items()}
        return {**state, "state": dict(sorted(entries.items()))}

    def _forget_others(self, made: Optimizer) -> None:
        """A whole state was loaded."""
        for x in [x for x in made.state if x not in self._mine]:
            del made.state[x]


def _second(made: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """An optimizer of the same kind for these groups. Raises InvalidChoice if it would lack something."""
    second = copy.copy(made)  # as PyTorch pickles it: defaults, state, groups
    second.param_groups = groups
    lacking = [name for name in vars(made) if name not in vars(second) and not name.startswith("_") and name != "step"]
    if lacking:
        raise InvalidChoice(
            f"torch-zero1 makes a second {type(made).__name__} for a replica's share, but {', '.join(lacking)} would be"
            " missing in it; keep such things in the optimizer's defaults or groups, or take torch-fully-shard(level=2)."
        )
    return second
