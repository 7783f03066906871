"""Tensors and stages without values: what programs handle where only shapes matter.

A ghost has a shape and a dtype. What a program usually does with a tensor between two computations (detach it, ask for its
gradient or its size) costs next to nothing; any other function of torch is answered by the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..chain import Chain
from ..work import Work


class Ghost:
    """A tensor of which only shape and dtype are known. Its gradient has the same, so it is its own."""

    __slots__ = ("_itemsize", "_numel", "dtype", "shape")
    is_cuda = False
    requires_grad = True

    def __init__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        self._numel, self._itemsize = self.shape.numel(), dtype.itemsize

    def __repr__(self) -> str:
        return f"Ghost({tuple(self.shape)}, {self.dtype})"

    def __len__(self) -> int:
        return self.shape[0]

    def numel(self) -> int:
        """Number of scalars."""
        return self._numel

    def element_size(self) -> int:
        """Bytes of a scalar."""
        return self._itemsize

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def detach(self) -> Ghost:
        """Itself: there is no graph."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Ghost:
        """Itself."""
        return self

    def tensor_split(self, parts: int) -> list[Ghost]:
        """Along the first dimension, into parts as equal as can be; the larger ones first."""
        count, rest = self.shape[0], self.shape[1:]
        sizes = {count // parts: Ghost((count // parts, *rest), self.dtype)}
        sizes[count // parts + 1] = Ghost((count // parts + 1, *rest), self.dtype)
        return [sizes[count // parts + (k < count % parts)] for k in range(parts)]

    @property
    def grad(self) -> Ghost:
        """Itself."""
        return self

    def meta(self) -> Tensor:
        """A tensor of the same shape and dtype on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self.meta(), name)
        return _asking(found) if callable(found) else found

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, arguments: tuple = (), keywords: dict | None = None
    ) -> Any:
        return _asking(function)(*arguments, **(keywords or {}))


def _asking(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, answered by the meta device: ghosts in, ghosts out."""

    def ask(*arguments: Any, **keywords: Any) -> Any:
        plain = torch.utils._pytree.tree_map_only(Ghost, Ghost.meta, (arguments, keywords))
        found = function(*plain[0], **plain[1])
        return torch.utils._pytree.tree_map_only(Tensor, lambda x: Ghost(x.shape, x.dtype), found)

    return ask


class GhostParameter(Ghost):
    """A weight without values. Hooks wait for its gradient, which every backward of its stage completes."""

    __slots__ = ("__weakref__", "hooks")

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self.hooks: list[Callable[[Any], None]] = []

    def register_post_accumulate_grad_hook(self, hook: Callable[[Any], None]) -> None:
        """As a parameter of torch has it."""
        self.hooks.append(hook)


class GhostBody:
    """A stage's body: it knows the shape of its output."""

    work: tuple[Work, ...] = ("forward",)

    def __init__(self, module: nn.Module | None, output: tuple[int, ...], dtype: torch.dtype) -> None:
        self._module, self._output, self._dtype = module, output, dtype
        self._known: dict[int, Ghost] = {}

    def gives(self, x: Ghost) -> Ghost:
        """The output for an input of len(x) samples."""
        samples = x.shape[0]
        known = self._known.get(samples)
        if known is None:
            known = self._known[samples] = Ghost((samples, *self._output), self._dtype)
        return known

    __call__ = gives

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the module, on the meta device."""
        return iter(()) if self._module is None else self._module.named_parameters()


class GhostStage:
    """A stage as programs and consensus rules see it. `parameters` are this worker's own ghosts; the rest is shared."""

    def __init__(
        self,
        body: GhostBody,
        shapes: Sequence[tuple[tuple[int, ...], torch.dtype]],
        of_head: int,
        module: Any,
    ) -> None:
        self.body, self._module, self._of_body = body, module, len(shapes) - of_head
        self.head = None if module is None else module.head
        self.lends = () if module is None else module.lends
        self.borrows = None if module is None else module.borrows
        self.mixed_above = True if module is None else module.mixed_above
        self.watched = False if module is None else module.watched
        self._parameters = [GhostParameter(*shape) for shape in shapes]

    def parameters(self) -> Iterator[GhostParameter]:
        """The weights that are trained, in the order of the stage's own."""
        return iter(self._parameters)

    def modules(self) -> Iterator[nn.Module]:
        """Of the stage itself, on the meta device."""
        return iter(()) if self._module is None else self._module.modules()

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for a gradient."""
        return any(parameter.hooks for parameter in self._parameters)

    def reached(self, parts: Sequence[Work]) -> Iterator[GhostParameter]:
        """The weights whose gradients a computation of these parts completes, from the last to the first."""
        if "head-backward" in parts:
            yield from reversed(self._parameters[self._of_body :])
        if "backward" in parts or "weight-backward" in parts:
            yield from reversed(self._parameters[: self._of_body])


class GhostChain:
    """What `Consensus.weights` is given in place of a replica's chain: one stage of it is this worker's."""

    def __init__(self, stages: dict[int, GhostStage], chain: Chain | None, count: int) -> None:
        self._stages, self._chain, self._count = stages, chain, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, j: int) -> GhostStage:
        return self._stages[j]

    @property
    def names(self) -> list[tuple[str, int, str]]:
        """As in the chain."""
        return [] if self._chain is None else self._chain.names

    def layers(self, what: str = "module") -> list[Any]:
        """As in the chain."""
        return [] if self._chain is None else self._chain.layers(what)
