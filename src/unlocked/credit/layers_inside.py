"""The layers inside a stage's body: where their outputs can be moved, and how each learns by itself.

A layer is a module that owns trained weights and gives one tensor (B, …) with a row for each sample: Linear, Conv2d,
BatchNorm2d, LayerNorm, Embedding, … Weights of any other module (an LSTM's or MultiheadAttention's, which give tuples;
positions (T, D); one that is never called) belong to the smallest module around it that does so, up to the body itself: there
learning goes through more than one operation, and is as right. So do weights that a larger layer's output sees in two places.

A layer is `rectified` if a ReLU (module or function) reads its output, and nothing else does: then its output may be moved only
where it is above zero, since elsewhere the derivative is zero. That nothing else reads it is measured: the derivative with
respect to the output is zero wherever the ReLU's is.

Calls of layers are counted in the order in which they end, the same in every run of a forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..costs import untouched
from ..forward_ad import couples_samples
from ..modes import modes_kept

Act = Callable[[int, "Layer", Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """module: its name in the body; weights: names in the body of what it learns; rectified: see above."""

    module: str
    weights: tuple[str, ...]
    rectified: bool = False


@dataclass(frozen=True)
class Inside:
    """The layers of a body. mixes: whether in training one sample's output depends on another sample."""

    layers: tuple[Layer, ...]
    mixes: bool


def look_inside(body: nn.Module, x: Tensor) -> Inside:
    """The layers of a body, from an example (B, …) of its input; without values (on "meta") none is known to be rectified.
    Nothing of the body is changed."""
    with untouched(body):
        layers = _layers(body, x)
        if not x.is_meta:
            layers = _rectified(body, x, layers)
        return Inside(layers, couples_samples(body, _samples(x, 2)))


def _samples(x: Tensor, count: int) -> Tensor:
    return x.repeat(count, *[1] * (x.dim() - 1))[:count]


# ---- which modules are layers --------------------------------------------------------------------------------------------


def _layers(body: nn.Module, x: Tensor) -> tuple[Layer, ...]:
    """Every trained weight belongs to one layer; layers in the order of the body's modules."""
    calls = [_calls(body, x, samples) for samples in (2, 3)]
    able = {name for name in calls[0] if all(seen.get(name) for seen in calls)} | {""}
    times = {name: len(seen) for name, seen in calls[0].items()}
    owners: dict[str, set[str]] = {}
    names = {id(p): name for name, p in body.named_parameters()}
    for name, module in body.named_modules():
        for p in module.parameters(recurse=False):
            if p.requires_grad:
                owners.setdefault(names[id(p)], set()).add(_around(name, able))
    every = set().union(*owners.values())
    homes = {weight: _once_inside(found, every, times) for weight, found in owners.items()}
    found = {name: tuple(w for w, home in homes.items() if name in home) for name, _ in body.named_modules()}
    return tuple(Layer(name, weights) for name, weights in found.items() if weights)


def _calls(body: nn.Module, x: Tensor, samples: int) -> dict[str, list[bool]]:
    """Of every module that is called: whether it gives a row for each sample, call by call; {} for those that do not."""
    found: dict[str, list[bool]] = {}
    hooks = []
    for name, module in body.named_modules():

        def look(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            rows = isinstance(output, Tensor) and output.is_floating_point() and output.shape[:1] == (samples,)
            found.setdefault(name, []).append(rows)

        hooks.append(module.register_forward_hook(look))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would call no module
    try:
        with torch.no_grad(), modes_kept(body):
            body.eval()
            body(_samples(x, samples))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()
    return {name: seen if all(seen) else [] for name, seen in found.items()}


def _around(name: str, able: set[str]) -> str:
    """The module itself, or the smallest one around it, that is able to be a layer."""
    while name not in able:
        name = name.rpartition(".")[0]
    return name


def _once_inside(found: set[str], layers: set[str], times: dict[str, int]) -> set[str]:
    """The layers of a weight; where another layer is around several uses of it, that one in their place."""
    for outer in sorted(layers, key=len, reverse=True):
        used = {name for name in found if _inside(name, outer)}
        if len(used | ({outer} & found)) > 1 or sum(times.get(name, 1) for name in used) > 1:
            found = found - used | {outer}
    return found


def _inside(name: str, other: str) -> bool:
    return name != other and (other == "" or name.startswith(f"{other}."))


# ---- which are read by a ReLU --------------------------------------------------------------------------------------------


class _Rectifiers(TorchFunctionMode):
    """Notes which tensors a ReLU is given."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu) and args:
            self.read.append(args[0])
        return function(*args, **(kwargs or {}))


def _rectified(body: nn.Module, x: Tensor, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    outputs: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def copied(call: int, layer: Layer, output: Tensor) -> Tensor:
        given = output if output.requires_grad else output.detach().requires_grad_()
        copy = given.clone()  # a ReLU in place would change what is differentiated
        outputs.setdefault(layer.module, []).append((given, copy))
        return copy

    with torch.enable_grad(), _Rectifiers() as seen, acting(body, layers, copied):
        h = body(x.detach())
    if not h.requires_grad:
        return layers
    pairs = [pair for found in outputs.values() for pair in found]
    towards = torch.randn(h.shape, generator=torch.Generator().manual_seed(0)).to(h)
    slopes = dict(
        zip(
            (id(given) for given, _ in pairs),
            torch.autograd.grad(h, [given for given, _ in pairs], towards, allow_unused=True),
        )
    )

    def only_rectified(given: Tensor, copy: Tensor) -> bool:
        slope = slopes[id(given)]
        return any(copy is one for one in seen.read) and slope is not None and not slope[given <= 0].any()

    return tuple(
        Layer(layer.module, layer.weights, all(only_rectified(*pair) for pair in outputs[layer.module]))
        if layer.module in outputs
        else layer
        for layer in layers
    )


# ---- doing something at their outputs ------------------------------------------------------------------------------------


@contextlib.contextmanager
def acting(body: nn.Module, layers: tuple[Layer, ...], act: Act) -> Iterator[None]:
    """While it is open, every call of a layer gives act(number of the call, layer, output)."""
    hooks, calls = [], iter(range(1 << 62))
    for layer in layers:

        def hook(module: nn.Module, inputs: Any, output: Tensor, layer: Layer = layer) -> Tensor:
            return act(next(calls), layer, output)

        hooks.append(body.get_submodule(layer.module).register_forward_hook(hook))
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def outputs_like(
    body: nn.Module, layers: tuple[Layer, ...], seen: list[Tensor]
) -> contextlib.AbstractContextManager[None]:
    """While it is open, the shapes and dtypes of the layers' outputs are added to `seen`, as tensors without values."""

    def note(call: int, layer: Layer, output: Tensor) -> Tensor:
        seen.append(torch.empty_strided((), (), dtype=output.dtype, device=output.device).expand(output.shape))
        return output

    return acting(body, layers, note)


@contextlib.contextmanager
def learning(
    body: nn.Module, layers: tuple[Layer, ...], estimate: Callable[[int, Layer, Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """While it is open, a forward of the body gives each layer's weights (∂z/∂θ)ᵀ estimate(call, layer, z), z its output.

    Yields the sums of these by the weights' names. To be opened under torch.no_grad: a layer's graph lives while that layer
    computes; what a layer reads is a constant for it. Layers around other layers keep a graph through those.
    """
    found: dict[str, Tensor] = {}
    depth = 0
    before = []

    def begin(module: nn.Module, inputs: Any) -> None:
        nonlocal depth
        depth += 1
        torch.set_grad_enabled(True)

    def end(call: int, layer: Layer, output: Tensor) -> Tensor:
        nonlocal depth
        depth -= 1
        weights = [body.get_parameter(name) for name in layer.weights] if output.requires_grad else []
        aim = estimate(call, layer, output.detach())
        slopes = torch.autograd.grad(output, weights, aim, depth > 0, allow_unused=True) if weights else ()
        for name, slope in zip(layer.weights, slopes):
            if slope is not None:
                found[name] = slope if name not in found else found[name] + slope
        torch.set_grad_enabled(depth > 0)
        return output if depth else output.detach()

    for layer in layers:
        before.append(body.get_submodule(layer.module).register_forward_pre_hook(begin))
    try:
        with acting(body, layers, end):
            yield found
    finally:
        torch.set_grad_enabled(False)
        for one in before:
            one.remove()
