"""What one replica retains during a gradient, operation by operation, with tensors that hold no values.

The network runs forward and backward on fake tensors. Time is what the operations would take on a device: those of
matrix products and convolutions by its speed, bytes read and written by its memory's bandwidth. Bytes are those that
autograd keeps (each storage once, weights and buffers left out), as they come and go.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import unlocked as ul
from unlocked.probes.memory import SavedBytes
from unlocked.simulation.cyclic import StageMemory
from unlocked.simulation.hardware import Device

from pipelines.kept_measured import Checkpointed

OPERATIONS = Device(flops=1e12)  # counted operations alone
A100 = Device(flops=19.5e12, memory_bandwidth=1.555e12)  # NVIDIA's data sheet, float32 without tensor cores
DEVICES = {"operations": OPERATIONS, "roofline": A100}


@dataclass(frozen=True)
class Network:
    """A network of the thesis' Figure 5.4: how it is built, its published parameters, and the thesis' reduction.

    `lacks`: those that ours has not: ViT's class token and its position (ours takes the mean).
    """

    build: dict[str, Any]
    parameters: int
    reduction: float
    lacks: int = 0

    def model(self) -> nn.Module:
        """Without values inside a FakeTensorMode. Raises AssertionError if it is not the published network."""
        model = ul.models.build(input_shape=(3, 224, 224), classes=1000, **self.build)
        assert sum(x.numel() for x in model.parameters()) == self.parameters - self.lacks
        return model


NETWORKS = {
    "ResNet-50": Network({"name": "resnet50", "stem": "large"}, 25_557_032, 0.30),
    "ViT-B/16": Network(
        {"name": "vit", "patch": 16, "layers": 12, "width": 768, "heads": 12}, 86_567_656, 0.42, lacks=2 * 768
    ),
}


@dataclass(frozen=True)
class Track:
    """curve: (seconds, bytes from then on) of one gradient of `period` seconds. pieces: the same piece by piece; a
    tensor that two of them keep is the first one's. inputs: bytes of the input of each."""

    curve: list[tuple[float, int]]
    period: float
    pieces: list[StageMemory]
    inputs: list[int]

    @property
    def peak(self) -> int:
        """Of one replica."""
        return max(level for _, level in self.curve)


class _Clock(TorchDispatchMode):
    """Adds up the seconds of the operations that run while it is open."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device, self._moved = device, 0
        self._flops = FlopCounterMode(display=False)

    def now(self) -> float:
        """Seconds since it was opened."""
        return self._flops.get_total_flops() / self._device.flops + self._moved / self._device.memory_bandwidth

    def __enter__(self) -> _Clock:
        self._flops.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._flops.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(x.alias_info is None or x.alias_info.is_write for x in func._schema.returns):  # views move nothing
            given = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self._moved += sum(x.numel() * x.element_size() for x in given)
        return result


class _Kept(SavedBytes):
    """The meter, with the clock's time beside each value."""

    def __init__(self, clock: _Clock, ignore: list[Tensor]) -> None:
        super().__init__(ignore)
        self._clock = clock
        self.moments: list[tuple[float, int]] = [(0.0, 0)]

    def _move(self, size: int) -> None:
        super()._move(size)
        self.moments.append((self._clock.now(), self.live))


def track(network: Network, samples: int, device: Device, again: frozenset[int] = frozenset()) -> Track:
    """One forward and backward of a micro-batch of so many images; the pieces in `again` keep their input only, and
    compute the rest again in their backward."""
    with FakeTensorMode():
        model = network.model()
        x, y = torch.empty(samples, 3, 224, 224), torch.zeros(samples, dtype=torch.long)
        clock = _Clock(device)
        with clock, _Kept(clock, [*model.parameters(), *model.buffers()]) as meter:
            forwards, kept, inputs, backwards = [0.0], [0], [], []
            pieces = list(ul.models.pieces.pieces_of(model) or [])
            for k, piece in enumerate(pieces):
                inputs.append(x.numel() * x.element_size())
                x = Checkpointed(piece.module)(x) if k in again else piece.module(x)
                x.register_hook(lambda gradient: backwards.append(clock.now()))
                forwards.append(clock.now())
                kept.append(meter.live)
            loss = nn.functional.cross_entropy(x, y)
            forwards[-1], kept[-1] = clock.now(), meter.live
            del x
            loss.backward()
            period = clock.now()
    begins = [forwards[-1], *backwards[1:], period]  # the last piece's backward includes the loss's
    rows = [
        StageMemory(forwards[k + 1] - forwards[k], end - begin, kept[k + 1] - kept[k])
        for k, (begin, end) in zip(reversed(range(len(pieces))), pairwise(begins))
    ]
    return Track(meter.moments, period, rows[::-1], inputs)
