"""PyTorch's own fully sharded data parallelism: ZeRO-2 and 3 (Rajbhandari et al., 2020; Zhao et al., 2023).

    θ ← OPT(θ, (1/N) Σ_n ∇f_n(θ)),          replica n holds 1/N of θ, of the gradient and of the optimizer's state

N replicas, f_n the loss of replica n on its own shard of the batch. A unit (a stage's body, its head, or one block of
the body) is put together before it computes (an all-gather) and its gradient is summed into shards (a reduce-scatter).

                          level 2                              level 3
    weights               whole from the update's first        whole while a unit computes its forward or its backward
                          forward to its last backward
    between two steps     1/N of weights and optimizer state on both levels; gradients are dropped by the update
    at the update         1/N of the gradient on both levels; with `accumulate` whole until its last micro-batch
    bytes per update      2(N−1)/N Ψ_P                         3(N−1)/N Ψ_P: a second all-gather for the backward

PyTorch's level 2 thus keeps less than ZeRO-2, which has the weights whole at all times: they go back to shards with
the last backward, before the update. For whole weights and gradients see torch_zero1.py. Beside a whole unit there is,
while it is put together and in its forward, PyTorch's buffer of the same size. units="block" makes each block of the
body a unit, so that at level 3 one block is whole in the forward, and in the backward the next one, too, which PyTorch
gathers meanwhile.

BatchNorm statistics stay local, as under `all-reduce`. Checkpoints hold whole tensors (sharding.py), so a run may go
on without sharding. Parts are cut along a weight's first dimension and padded to equal size, so N should be small
beside it; the padding travels, too. `interlocking` goes through a stage's graph more than once, and each time gathers
its weights.

Limits: N = 1 is ordinary training. Parameters are those of `all-reduce` up to rounding: bit for bit for N = 2 without
clipping (the norm of a gradient is summed in another order).

What it needs: one worker per process. Optimizers must work on each number by itself, or know DTensors. What torch
sends stands in the timeline as moments, when it begins to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..chain import Chain, Stage
from ..errors import InvalidChoice, choose
from ..worker import Worker
from .base import Consensus, Properties, Store, Weights
from .torch_data_parallel import ReducedInBackward, keep_skeleton, note, trained_parts

Units = Literal["stage", "block"]


class _Sharded(ReducedInBackward):
    channel: ClassVar[str] = "torch-fully-shard"

    def __init__(self, worker: Worker, chain: Chain, store: Store, level: int) -> None:
        super().__init__(worker, chain, store)
        self._level = level

    async def reduce(self) -> None:
        """Done in the backward, and noted there."""

    def _synchronise(self, now: bool) -> None:
        super()._synchronise(now)
        if self._level == 2:  # until the last micro-batch of an update the weights do not change
            for module in trained_parts(self.stage):
                cast(Any, module).set_reshard_after_backward(now)


@dataclass(frozen=True)
class TorchFullyShard(Consensus):
    """Every update uses the mean gradient of all replicas; each keeps and updates its shard of the weights.

    Args:
        level: 2 (weights are whole from forward to backward) or 3 (only while they are used).
        units: what is put together at a time: "stage" (its body, its head) or "block" (each block of a body that is a
            sequence of blocks, and the head).
    """

    level: int = 3
    units: Units = "stage"

    name: ClassVar[str] = "torch-fully-shard"
    properties: ClassVar[Properties] = Properties(
        title="fully_shard, PyTorch's ZeRO-2 and 3 (Zhao et al. 2023)",
        source="torch.distributed.fsdp",
        barrier="all replicas, every forward and backward",
        bytes="3(N−1)/N Ψ_P; level 2: 2(N−1)/N Ψ_P",
        replicas="equal, each holds 1/N",
        result="any replica",
    )
    shares_data: ClassVar[bool] = True
    needs_equal_start: ClassVar[bool] = True
    needs_processes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.level not in (2, 3):
            raise InvalidChoice(
                f"level={self.level} is not possible; give 2 or 3, or for ZeRO-1 take the consensus torch-zero1."
            )
        choose("units", self.units, ("stage", "block"))

    def distribute(self, worker: Worker, stage: Stage) -> None:
        """Shard body and head over the replicas; their parameters are DTensors from here on."""
        from torch.distributed.device_mesh import DeviceMesh  # late: they take a second
        from torch.distributed.fsdp import fully_shard

        keep_skeleton(stage)
        blocks = _blocks(stage.body, worker.stage) if self.units == "block" else []
        group = worker.transport.process_group(worker, "replicas")
        mesh = DeviceMesh.from_group(group, next(stage.parameters()).device.type)
        for module in (*blocks, *trained_parts(stage)):  # a unit has what no unit inside it has
            fully_shard(module, mesh=mesh, reshard_after_forward=self.level == 3)
            module.register_forward_hook(_let_go)
            _count_bytes(module, worker)

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return _Sharded(worker, chain, store, self.level)


def _blocks(body: nn.Module, stage: int) -> list[nn.Module]:
    """The blocks of a body that have parameters. Raises InvalidChoice if they cannot be units."""
    if not isinstance(body, nn.Sequential):
        raise InvalidChoice(
            f"units='block' wants stages that are sequences of blocks (nn.Sequential); the body of stage {stage} is a "
            f"{type(body).__name__}. Take units='stage'."
        )
    blocks = [block for block in dict.fromkeys(body) if next(block.parameters(), None) is not None]
    owned = [parameter for block in blocks for parameter in block.parameters()]
    if len({id(parameter) for parameter in owned}) < len(owned):
        raise InvalidChoice(
            f"units='block' wants blocks that share no weights, but those of stage {stage} do. Take units='stage'."
        )
    return blocks


def _let_go(module: nn.Module, inputs: Any, output: Any) -> None:
    """After a forward that no backward follows (an evaluation) the weights are shards again."""
    if not torch.is_grad_enabled():
        cast(Any, module).reshard()


def _count_bytes(module: nn.Module, worker: Worker) -> None:
    """Let the exchanges of a unit note in the timeline what they send: to each of the others a shard."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives  # the defaults have no public name

    def counted(kind: Any, shard: Callable[[Tensor, Tensor], Tensor]) -> Any:
        class Counted(kind):  # type: ignore[misc]
            def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *arguments: Any, **options: Any) -> Any:
                size = (worker.replicas.size - 1) * shard(output_tensor, input_tensor).nbytes
                if size:
                    note(worker, "M", _Sharded.channel, size)
                return super().__call__(output_tensor, input_tensor, *arguments, **options)

        return Counted()

    sharded = cast(Any, module)
    sharded.set_custom_all_gather(counted(collectives.DefaultAllGather, lambda whole, shard: shard))
    sharded.set_custom_reduce_scatter(counted(collectives.DefaultReduceScatter, lambda shard, whole: shard))
