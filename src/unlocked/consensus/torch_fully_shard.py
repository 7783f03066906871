"""PyTorch's own fully sharded data parallelism, `fully_shard`, as a baseline (Rajbhandari et al., 2020; Zhao et al., 2023).

    θ ← OPT(θ, (1/N) Σ_n ∇f_n(θ)),          replica n holds 1/N of θ, of the gradient and of the optimizer's state

N replicas, f_n the loss of replica n on its own shard of the batch. A stage's body and its head are one unit each: whole from
its forward to the end of its backward (an all-gather), then a shard again (a reduce-scatter of the gradient). So a worker keeps
1/N of parameters, gradients and optimizer state between steps, and for N = 1 all. BatchNorm statistics stay local, as under
`all-reduce`. Checkpoints hold whole tensors (sharding.py), so a run may go on without sharding.

With `accumulate` only the last micro-batch's backward communicates; until then gradients are whole.

Limits: N = 1 is ordinary training. Parameters are those of `all-reduce` up to rounding: bit for bit for N = 2 without clipping
(the norm of a gradient is summed in another order).

What it needs: one worker per process. Optimizers must work on each number by itself, or know DTensors. What torch sends stands
in the timeline as moments: the all-gather before a forward, the reduce-scatter before the update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..chain import Chain, Stage
from ..worker import Worker
from .base import Consensus, Properties, Store, Weights
from .torch_data_parallel import ReducedInBackward, keep_skeleton, trained_parts


class _Sharded(ReducedInBackward):
    channel: ClassVar[str] = "torch-fully-shard"

    async def read(self) -> None:
        await super().read()
        self.note(1.0)  # the all-gather

    async def reduce(self) -> None:
        self.note(1.0)  # the reduce-scatter

    def postpone(self) -> None:
        super().postpone()
        if not self.completes:
            self.note(1.0)  # torch's pipelines reduce after every batch


@dataclass(frozen=True)
class TorchFullyShard(Consensus):
    """Every update uses the mean gradient of all replicas; each keeps and updates its shard of the weights."""

    name: ClassVar[str] = "torch-fully-shard"
    properties: ClassVar[Properties] = Properties(
        title="fully_shard, PyTorch's (Zhao et al. 2023)",
        source="torch.distributed.fsdp",
        barrier="all replicas, every forward and update",
        bytes="2(N−1)/N Ψ_P",
        replicas="equal, each holds 1/N",
        result="any replica",
    )
    shares_data: ClassVar[bool] = True
    needs_processes: ClassVar[bool] = True

    def distribute(self, worker: Worker, stage: Stage) -> None:
        """Shard body and head over the replicas; their parameters are DTensors from here on."""
        from torch.distributed.device_mesh import DeviceMesh  # late: they take a second
        from torch.distributed.fsdp import fully_shard

        keep_skeleton(stage)
        group = worker.transport.process_group(worker, "replicas")
        device = next(stage.parameters()).device
        mesh = DeviceMesh.from_group(group, device.type)
        for module in trained_parts(stage):
            fully_shard(module, mesh=mesh)

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return _Sharded(worker, chain, store)
