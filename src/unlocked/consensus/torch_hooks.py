"""Gradients made smaller on their way: the communication hooks of PyTorch's DistributedDataParallel.

    bf16, fp16     g ← Σ_n c(g_n)/N                                c: rounding to 16 bits; so is the sum
    powersgd       M_n = G_n + E_n                                 (Vogels et al., 2019)
                   P ← Σ_n M_n Q, columns made orthonormal;  Q ← (1/N) Σ_n M_nᵀ P
                   G ← P Qᵀ;  E_n ← M_n − P Qᵀ
    powersgd-bf16  the same in bf16, from the gradient on

N replicas; g_n gradient of replica n; G_n the same of one weight as an n₁ × n₂ matrix (n₁: its first dimension); P and
Q of `rank` columns, Q kept from step to step; E_n what was left out so far. A weight is sent as P and Q where that is
less than half of it, 2 rank (n₁ + n₂) < n₁ n₂; the others are averaged whole, and so is all before the update number
`start`.

Limits: powersgd with a rank of at least that of Σ_n G_n is all-reduce, up to rounding. E_n takes Ψ_P bytes per
replica.

On gloo, powersgd's buckets are reduced one after the other, each during the backward, which waits for it.

PyTorch keeps E and Q by buckets, which it deals anew after the first backward. A checkpoint therefore has them by
weights.
"""
# annotations are objects here: DistributedDataParallel reads those of a hook

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..rng import generator

HookName = Literal["bf16", "fp16", "powersgd", "powersgd-bf16"]
HOOKS: tuple[str, ...] = get_args(HookName)

_SMALLER = 2  # a weight is sent as two factors if these are so many times smaller; PyTorch's default


def make_hook(name: str, group: Any, module: nn.Module, rank: int, start: int) -> "Hook":
    """The hook `name` (one of HOOKS) for a module that DistributedDataParallel has been put on."""
    return LowRank(name, group, module, rank, start) if name.startswith("powersgd") else Cast(name, group)


def reduce_bucket(hook: "Hook", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DistributedDataParallel calls for each bucket."""
    return hook.reduce(bucket)


class Hook(ABC):
    """What is done with the buckets of one module, and how many bytes were given to the all-reduce since `finish`."""

    def __init__(self) -> None:
        self._bytes = 0

    @abstractmethod
    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Begin a bucket's exchange."""

    def finish(self) -> int:
        """All buckets of an update are reduced; how many bytes their all-reduces were of."""
        size, self._bytes = self._bytes, 0
        return size

    def carried(self) -> dict[str, Any]:
        """What goes from one update to the next; see `Weights.carried`."""
        return {}

    def load_carried(self, state: Mapping[str, Any]) -> None:  # noqa: B027  # not every hook keeps something
        """The inverse."""


class Cast(Hook):
    """Each bucket as 16-bit numbers."""

    def __init__(self, name: str, group: Any) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks  # late: it takes a second

        super().__init__()
        self._hook = default_hooks.bf16_compress_hook if name == "bf16" else default_hooks.fp16_compress_hook
        self._group = group

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self._bytes += 2 * bucket.buffer().numel()
        return self._hook(self._group, bucket)


class LowRank(Hook):
    """PowerSGD with error feedback and warm start."""

    def __init__(self, name: str, group: Any, module: nn.Module, rank: int, start: int) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        super().__init__()
        self._bf16 = name == "powersgd-bf16"
        hook = powerSGD_hook.powerSGD_hook
        self._hook = default_hooks.bf16_compress_wrapper(hook) if self._bf16 else hook
        self._state = powerSGD_hook.PowerSGDState(
            group, matrix_approximation_rank=rank, start_powerSGD_iter=start, min_compression_rate=_SMALLER
        )
        # its exchanges wait for each other on gloo's two threads: with two buckets under way that would be for ever
        self._one_by_one = dist.get_backend(group) == "gloo"
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        self._buckets: dict[int, list[Tensor]] = {}  # the weights of each
        self._loose: dict[str, dict[str, Tensor]] = {}  # E and Q of weights that are in no bucket yet
        self._settled = False  # whether the buckets are those of the rest of the run

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        state, index, gradient = self._state, bucket.index(), bucket.buffer()
        dtype = torch.bfloat16 if self._bf16 else gradient.dtype
        self._buckets.setdefault(index, bucket.parameters())
        compressed, before = state.iter >= state.start_powerSGD_iter, state.total_numel_after_compression
        if compressed and index not in state.error_dict:
            self._fit(index, dtype)
        future = self._hook(state, bucket)
        if self._one_by_one:
            future.wait()
        sent = state.total_numel_after_compression - before if compressed else gradient.numel()
        self._bytes += sent * dtype.itemsize
        return future

    def finish(self) -> int:
        if self._buckets and not self._settled:  # after a first backward they are dealt anew
            self._settled = True
            self._loose = dict(self._parts())
            for kept in (self._buckets, self._state.error_dict, self._state.p_memory_dict, self._state.q_memory_dict):
                kept.clear()
        return super().finish()

    def carried(self) -> dict[str, Any]:
        return {"updates": self._state.iter, "parts": dict(self._parts())}

    def load_carried(self, state: Mapping[str, Any]) -> None:
        self._state.iter, self._loose = state["updates"], dict(state["parts"])

    def _parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """E and Q of every weight, flat, under its name."""
        yield from self._loose.items()
        for index, parameters in self._buckets.items():
            if index not in self._state.error_dict:
                continue  # nothing was compressed yet
            errors = self._state.error_dict[index].split([x.numel() for x in parameters])
            matrices = self._matrices(parameters)
            qs = self._state.q_memory_dict[index].split([columns * rank for _, _, columns, rank in matrices])
            factors = {x: q for (x, *_), q in zip(matrices, qs)}
            for x, error in zip(parameters, errors):
                yield self._names[x], {"error": error} | ({"q": factors[x]} if x in factors else {})

    def _fit(self, index: int, dtype: torch.dtype) -> None:
        """Put what is kept of a bucket's weights together as PyTorch wants it; at the beginning E = 0 and Q is random.

        Random numbers come from the weight's name: PyTorch's own depend on the buckets, which differ after a resume.
        """
        state, parameters, device = self._state, self._buckets[index], self._buckets[index][0].device
        kept = [self._loose.pop(self._names[x], {}) for x in parameters]
        errors = [part.get("error", torch.zeros(x.numel(), dtype=dtype)) for x, part in zip(parameters, kept)]
        known = {x: part["q"] for x, part in zip(parameters, kept) if "q" in part}
        matrices = self._matrices(parameters)
        factors = [
            known[x] if x in known else self._random(x, columns * rank, dtype) for x, _, columns, rank in matrices
        ]
        rows = sum(rows * rank for _, rows, _, rank in matrices)
        state.error_dict[index] = torch.cat([error.to(device) for error in errors])
        state.p_memory_dict[index] = torch.empty(rows, dtype=dtype, device=device)
        state.q_memory_dict[index] = torch.cat([q.to(device) for q in factors] or [state.error_dict[index][:0]])

    def _random(self, x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(count, generator=generator(0, "powersgd", self._names[x])).to(dtype)

    def _matrices(self, parameters: list[Tensor]) -> list[tuple[Tensor, int, int, int]]:
        """Weights that are sent as two factors, with rows, columns, rank; in PyTorch's order: by shape."""
        shapes: dict[tuple[int, int], list[tuple[Tensor, int, int, int]]] = {}
        for x in parameters:
            rows, columns = x.shape[0], x.numel() // x.shape[0]
            rank = min(rows, columns, self._state.matrix_approximation_rank)
            if (rows + columns) * rank * _SMALLER < rows * columns:
                shapes.setdefault((rows, columns), []).append((x, rows, columns, rank))
        return [matrix for row in shapes.values() for matrix in row]
