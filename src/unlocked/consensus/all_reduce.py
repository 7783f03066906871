"""Synchronous data parallelism by all-reduce (F Example 2).

    θ ← OPT(θ, (1/N) Σ_n ∇f_n(θ))

    N replicas, f_n the loss of replica n on its own shard of the batch. The replicas stay equal (BatchNorm statistics apart).

With overlap, gradients are put into buckets in the order in which the backward completes them, and a full bucket's exchange
begins while the backward goes on. Which bucket a gradient is in changes no number: the mean is element by element, and summed
in the order of the replicas.

Limits: N = 1 is ordinary training; N equal shards are one big batch (without BatchNorm, which sees its own shard only).
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..chain import Chain
from ..errors import InvalidChoice
from ..flat import blank, flat, views
from ..worker import Worker
from .averaging.codecs import codec
from .averaging.exchange import Exchange
from .base import Consensus, Properties, Store, Weights

_FEWEST = 8  # buckets of a small network, about: one or two would leave nothing to overlap


class _MeanGradient(Weights):
    """After the backward: the mean of all gradients at once."""

    one_gradient: ClassVar[bool] = True

    async def reduce(self) -> None:
        await mean_gradient(self)


class _Compressed(Weights):
    """After the backward, through a codec."""

    one_gradient: ClassVar[bool] = True

    def __init__(self, worker: Worker, chain: Chain, store: Store, compression: str) -> None:
        super().__init__(worker, chain, store)
        real = store.optimizer is not None
        self._exchange = Exchange(worker, "all-reduce", range(worker.replicas.size), codec(compression), "rows", real)

    async def reduce(self) -> None:
        rows = blank(self.parameters) if self.store.optimizer is None else self._rows()
        means = views(await self._exchange.mean(rows), self.parameters)
        present = [(x.grad, mean) for x, mean in zip(self.parameters, means) if x.grad is not None]
        if self.store.optimizer is not None:
            _put([gradient for gradient, _ in present], [mean for _, mean in present])

    def _rows(self) -> list[Tensor]:
        """As long at every update: what is left out of one goes into the next."""
        return flat([torch.zeros_like(x) if x.grad is None else x.grad for x in self.parameters])

    def carried(self) -> dict[str, Any]:
        return {"exchange": self._exchange.carried()}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        self._exchange.load_carried(state["exchange"])


async def mean_gradient(weights: Weights) -> None:
    """Put the mean of all replicas' gradients in the place of this one's."""
    # a parameter without a gradient here may have one in no replica: the programs are the same
    gradients = [parameter.grad for parameter in weights.parameters if parameter.grad is not None]
    _put(gradients, await weights.worker.replicas.mean("all-reduce", gradients))


class _Bucket:
    """Parameters whose gradients travel together, and the exchange once it has begun."""

    def __init__(self, channel: str, parameters: list[nn.Parameter]) -> None:
        self.channel, self.parameters = channel, parameters
        self.missing = len(parameters)
        self.gradients: list[Tensor] = []
        self.means: Awaitable[Sequence[Tensor]] | None = None


class _Overlapped(Weights):
    """Buckets whose exchange begins during the backward of the update's last micro-batch."""

    one_gradient: ClassVar[bool] = True

    def __init__(self, worker: Worker, chain: Chain, store: Store, bucket_bytes: int) -> None:
        super().__init__(worker, chain, store)
        size = min(bucket_bytes, sum(x.numel() * x.element_size() for x in self.parameters) // _FEWEST)
        self._buckets = [_Bucket(f"all-reduce/{k}", row) for k, row in enumerate(_rows(self.parameters, size))]
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._one_more(bucket))

    def _one_more(self, bucket: _Bucket) -> None:
        """A gradient of the bucket is complete; the last one lets the exchange begin."""
        if self.pending + 1 < self.store.accumulate:
            return
        bucket.missing -= 1
        if bucket.missing == 0:
            self._begin(bucket)
        self.worker.replicas.progress()

    def _begin(self, bucket: _Bucket) -> None:
        bucket.gradients = [parameter.grad for parameter in bucket.parameters if parameter.grad is not None]
        bucket.means = self.worker.replicas.begin_mean(bucket.channel, bucket.gradients)

    async def reduce(self) -> None:
        for bucket in self._buckets:
            if bucket.means is None:  # some of its parameters had no part in this loss
                self._begin(bucket)
        for bucket in self._buckets:
            assert bucket.means is not None
            _put(bucket.gradients, await bucket.means)
        self._clear()

    def forget(self) -> None:
        super().forget()
        self._clear()

    def _clear(self) -> None:
        for bucket in self._buckets:
            bucket.missing, bucket.gradients, bucket.means = len(bucket.parameters), [], None


def _rows(parameters: list[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """Parameters from the last to the first, as the backward reaches them, in rows of about `size` bytes."""
    rows: list[list[nn.Parameter]] = []
    room = 0
    for parameter in reversed(parameters):
        if room <= 0:
            rows.append([])
            room = size
        rows[-1].append(parameter)
        room -= parameter.numel() * parameter.element_size()
    return rows


def _put(gradients: Sequence[Tensor], means: Sequence[Tensor]) -> None:
    for gradient, mean in zip(gradients, means):
        if mean is not gradient:
            gradient.copy_(mean)


@dataclass(frozen=True)
class AllReduce(Consensus):
    """Every update uses the mean gradient of all replicas; an epoch is split among them.

    Args:
        compression: how gradients travel: "none", "bf16", "int8" or "int8:BLOCK", "topk:SHARE", with error feedback; then after
            the backward.
        bucket_mb: largest size of the buckets (10⁶ bytes) whose exchange begins during the backward; 0: one exchange after it.
            Only under credit rules that complete a gradient in one backward (backprop, dgl, …); the others exchange after it.
    """

    bucket_mb: float = 1.0
    compression: str = "none"

    name: ClassVar[str] = "all-reduce"
    properties: ClassVar[Properties] = Properties(
        title="Data parallelism",
        source="F Example 2",
        barrier="all replicas, every update",
        bytes="2(N−1)/N Ψ_P",
        replicas="equal",
        result="any replica",
    )
    shares_data: ClassVar[bool] = True
    needs_equal_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.bucket_mb < float("inf"):
            raise InvalidChoice(
                f"bucket_mb={self.bucket_mb} is not a size; give a number of at least 0 (0: no overlap)."
            )
        codec(self.compression)

    def weights(self, worker: Worker, chain: Chain, store: Store, seed: int) -> Weights:
        if self.compression != "none" and worker.replicas.size > 1:
            return _Compressed(worker, chain, store, self.compression)
        if self.bucket_mb == 0 or not store.overlap or worker.replicas.size == 1:
            return _MeanGradient(worker, chain, store)
        return _Overlapped(worker, chain, store, int(1e6 * self.bucket_mb))
