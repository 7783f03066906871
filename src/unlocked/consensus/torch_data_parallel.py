"""PyTorch's own DistributedDataParallel, as a baseline (Li et al., 2020).

    θ ← OPT(θ, (1/N) Σ_n ∇f_n(θ))

N replicas, f_n the loss of replica n on its own shard of the batch. Gradients go into buckets of `bucket_mb`
megabytes; a bucket is reduced by the backend while the backward is still at work on the next one. This is
`DistributedDataParallel`, put on a stage's body and head in place (`replicate`), so modules and names are the user's
own. BatchNorm statistics stay local, as under `all-reduce`, and the same policies average or refresh them.

With `accumulate` only the last micro-batch's backward communicates. `torch-gpipe` and `torch-1f1b` reduce in the last
backward of the batch, as PyTorch does. A `hook` makes gradients smaller on their way; see torch_hooks.py.

    memory per replica   weights Ψ_P, gradients Ψ_P (the buckets; they stay between steps), optimizer state whole;
                         powersgd: Ψ_P more for the error
    bytes per update     2(N−1)/N Ψ_P; bf16, fp16: two bytes per number instead of its own; powersgd: 2(N−1)/N times
                         the size of the factors and of what is not factored

Limits: N = 1 is ordinary training, whatever the hook. Without a hook parameters are those of `all-reduce`: bit for bit
for N = 2, and for more replicas up to the rounding of a sum in another order (each gradient is divided by N before the
sum, which costs nothing for powers of 2).

What it needs: one worker per process, and every parameter in use in every forward. What torch sends stands in the
timeline as one moment per update, with the bytes of a ring all-reduce of what it was given.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

from torch import nn

from ..chain import Chain, Stage
from ..errors import InvalidChoice, choose
from ..sharding import filled, skeleton
from ..worker import Place, Worker
from .base import Consensus, Properties, Store, Weights
from .torch_hooks import HOOKS, Hook, HookName, make_hook, reduce_bucket


class Synchronised(Protocol):
    """A module whose backward reduces its gradients, unless told to wait for a later one."""

    def set_requires_gradient_sync(self, requires_gradient_sync: bool) -> None: ...


class ReducedInBackward(Weights):
    """Weights whose gradients are reduced by hooks; only the last micro-batch of an update lets them."""

    channel: ClassVar[str] = "torch-ddp"

    async def reduce(self) -> None:
        """Nothing is left to do; the traffic is noted as that of a ring."""
        hooks, size = self._hooks, self.worker.replicas.size
        whole = sum(parameter.numel() * parameter.element_size() for parameter in self.parameters)
        payload = sum(hook.finish() for hook in hooks.values()) if hooks else whole
        if size > 1:
            note(self.worker, "M", self.channel, 2 * (size - 1) * payload // size)

    @property
    def _hooks(self) -> dict[str, Hook]:
        """The hooks of body and head."""
        return _HOOKS.get(self.stage, {})

    def carried(self) -> dict[str, Any]:
        return {part: hook.carried() for part, hook in self._hooks.items()}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        for part, hook in self._hooks.items():
            hook.load_carried(state[part])

    async def read(self) -> None:
        self._synchronise(self.completes)

    @property
    def completes(self) -> bool:
        """Whether the micro-batch at hand is the last one before the update."""
        return self.pending + 1 == self.store.accumulate

    def plain_copy(self) -> Stage:
        return filled(_SKELETONS[self.stage], self.stage)

    def postpone(self) -> None:
        """For one micro-batch: no backward reduces on its own; torch's pipelines say themselves which one does."""
        self._synchronise(False)

    def _synchronise(self, now: bool) -> None:
        for module in trained_parts(self.stage):
            cast(Synchronised, module).set_requires_gradient_sync(now)


@dataclass(frozen=True)
class TorchDDP(Consensus):
    """Every update uses the mean gradient of all replicas, reduced by `DistributedDataParallel`.

    Args:
        bucket_mb: size of a bucket in megabytes (2²⁰ bytes), > 0.
        hook: None, "bf16", "fp16", "powersgd" or "powersgd-bf16"; see torch_hooks.py.
        rank: columns of powersgd's factors, ≥ 1.
        start: updates with whole gradients before powersgd begins, ≥ 2 (PyTorch's own default is 1000; it advises a
            tenth of the training).
    """

    bucket_mb: float = 25.0
    hook: HookName | None = None
    rank: int = 1
    start: int = 10

    name: ClassVar[str] = "torch-ddp"
    properties: ClassVar[Properties] = Properties(
        title="DistributedDataParallel, PyTorch's (Li et al. 2020)",
        source="torch.nn.parallel",
        barrier="all replicas, every update",
        bytes="2(N−1)/N Ψ_P; less with a hook",
        replicas="equal",
        result="any replica",
    )
    shares_data: ClassVar[bool] = True
    needs_equal_start: ClassVar[bool] = True
    needs_processes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.bucket_mb > 0:
            raise InvalidChoice(f"bucket_mb={self.bucket_mb} is no size; give a positive number of megabytes.")
        if self.hook is not None:
            choose("hook", self.hook, HOOKS)
        if not isinstance(self.rank, int) or self.rank < 1:
            raise InvalidChoice(f"rank={self.rank} is not possible; give a whole number of at least 1.")
        if not isinstance(self.start, int) or self.start < 2:
            raise InvalidChoice(
                f"start={self.start} is not possible; PyTorch deals its buckets anew after the first update, so give a "
                "whole number of at least 2."
            )

    def distribute(self, worker: Worker, stage: Stage) -> None:
        """Put DDP on body and head: on their parameters, so buffers stay local."""
        from torch.distributed._composable import replicate  # no public API; the one way that does not wrap the module

        keep_skeleton(stage)
        group = worker.transport.process_group(worker, "replicas")
        for module in trained_parts(stage):
            replicate(
                module,
                process_group=group,
                bucket_cap_mb=None if self.bucket_mb == 25 else self.bucket_mb,  # None: 25, the first bucket smaller
                gradient_as_bucket_view=True,
            )
            if self.hook is not None and worker.replicas.size > 1:
                hook = make_hook(self.hook, group, module, self.rank, self.start)
                _HOOKS.setdefault(stage, {})["body" if module is stage.body else "head"] = hook
                cast(Any, module).register_comm_hook(hook, reduce_bucket)  # `replicate` has given it this method

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        return ReducedInBackward(worker, chain, store)


# of a stage, as it was before PyTorch's hooks, which cannot be copied
_SKELETONS: weakref.WeakKeyDictionary[Stage, Stage] = weakref.WeakKeyDictionary()
_HOOKS: weakref.WeakKeyDictionary[Stage, dict[str, Hook]] = weakref.WeakKeyDictionary()


def keep_skeleton(stage: Stage) -> None:
    """To be called by `distribute` before it changes the stage; `plain_copy` needs it."""
    _SKELETONS[stage] = skeleton(stage)


def note(
    worker: Worker, kind: str, channel: str, size: int, there: Place | None = None, begin: float | None = None
) -> None:
    """Put into the timeline what torch has sent or received, `size` bytes; `begin`: since when the worker waited."""
    wire = 0 if kind == "R" else size
    worker.transport.record(worker, kind, channel, size, there, begin, waited=begin is not None, wire=wire)


def trained_parts(stage: Stage) -> Iterator[nn.Module]:
    """The stage's body and head, if they have anything to train."""
    for module in (stage.body, stage.head):
        if module is not None and any(parameter.requires_grad for parameter in module.parameters()):
            yield module


def expect_backward(module: nn.Module) -> None:
    """Let the next backward through `module` reduce, whatever its forward was told. Nothing without DDP."""
    ddp = _ddp_of(module)
    if ddp is not None:
        ddp.require_backward_grad_sync = True
        ddp.reducer.prepare_for_backward([])


def _ddp_of(module: nn.Module) -> Any:
    """The DistributedDataParallel that `replicate` has put on the module (it is made in the first forward), or None."""
    from torch.distributed._composable import replicate

    state = replicate.state(module)  # type: ignore[attr-defined]
    return getattr(state, "_ddp", None)
