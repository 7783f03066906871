"""What a module costs: floating-point operations, parameters, seconds, bytes kept for its backward.

All of them are read off one example input; none changes the module (mode, buffers and gradients are put back).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .modes import modes_kept


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Run a module inside; afterwards its buffers (BatchNorm statistics; also those that were replaced), its gradients, its
    train/eval modes and the global random state are what they were."""
    owners = [(part, name, x) for part in module.modules() for name, x in part._buffers.items() if x is not None]
    buffers = [(part, name, x, x.clone()) for part, name, x in owners if _writable(x)]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(), modes_kept(module):
            yield
    finally:
        with torch.no_grad():
            for part, name, buffer, saved in buffers:
                if _writable(buffer):
                    part._buffers[name] = buffer.copy_(saved)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _writable(x: Tensor) -> bool:
    """Not an expanded one; those of a stage that is not in memory (residency/) are, too."""
    return x.numel() < 2 or 0 not in x.stride()


def run_once(module: nn.Module, x: Tensor) -> Tensor:
    """The module's output for `x` in evaluation mode, without a graph and without a trace in the module."""
    with untouched(module), torch.no_grad():
        module.eval()
        return module(x)


def flops(module: nn.Module, x: Tensor) -> int:
    """Floating-point operations of one forward on `x` (matrix products and convolutions, a multiply-add is 2)."""
    counter = FlopCounterMode(display=False)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernels are not counted
    try:
        with counter:
            run_once(module, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def parameters(module: nn.Module) -> int:
    """Number of scalars in the module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def seconds(module: nn.Module, x: Tensor, repeats: int = 5) -> float:
    """Median wall-clock seconds of a forward and a backward on `x`, in training mode, one warm-up excluded."""
    samples = []
    with untouched(module):
        for _ in range(repeats + 1):
            inputs = x.detach().requires_grad_(x.is_floating_point())
            _wait_for(x.device)
            begin = time.perf_counter()
            output = module(inputs)
            if output.requires_grad:
                output.backward(torch.ones_like(output))
            _wait_for(x.device)
            samples.append(time.perf_counter() - begin)
    return median(samples[1:])


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes a forward on `x` keeps for its backward: distinct storages, parameters and buffers not counted."""
    from .probes.memory import SavedBytes  # the meter imports nothing from here; late import keeps start-up light

    with untouched(module), SavedBytes(ignore=[*module.parameters(), *module.buffers()]) as meter:
        output = module(x.detach().requires_grad_(x.is_floating_point()))
        kept = meter.live
        del output
    return kept


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


MEASURES: dict[str, Callable[[nn.Module, Tensor], float]] = {
    "flops": flops,
    "time": seconds,
    "parameters": lambda module, x: parameters(module),
    "memory": saved_bytes,
}
