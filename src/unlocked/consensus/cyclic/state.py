"""An optimizer's state as messages, so that it can go from one worker to another.

The first message is a description (bytes of JSON), the others the values, a row for each dtype. Learning rates do not travel:
every worker steps its own schedule.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...flat import flat, put
from ...worker import Worker

_UNDER_WAY: weakref.WeakKeyDictionary[Any, dict[int, list[Tensor]]] = weakref.WeakKeyDictionary()


def under_way(worker: Worker) -> dict[int, list[Tensor]]:
    """The messages of each stage's states that were sent and not yet taken, where all workers are in one process.

    They are the only ones of their kind, and a step that fails empties the mailboxes. (On several processes it ends the run.)
    """
    transport: Any = worker.transport
    return {} if transport.crew.size > 1 else _UNDER_WAY.setdefault(transport, {})


def pack(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The state of these parameters."""
    described, tensors = [], []
    for k, x in enumerate(parameters):
        for key, value in optimizer.state.get(x, {}).items():
            if isinstance(value, Tensor):
                dtype = str(value.dtype).removeprefix("torch.")
                described.append([k, key, dtype, list(value.shape), value.device == x.device])
                tensors.append(value.to(x.device))  # Adam counts its steps on the CPU
            else:
                described.append([k, key, None, value, True])
    text = json.dumps(described).encode()
    return [torch.frombuffer(bytearray(text), dtype=torch.uint8), *flat(tensors)]


def dtypes(header: Tensor) -> int:
    """How many messages follow the description."""
    return len({dtype for _, _, dtype, _, _ in _read(header) if dtype is not None})


def unpack(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], header: Tensor, rows: Sequence[Tensor]
) -> None:
    """Put the state into the optimizer."""
    described = _read(header)
    tensors = [
        torch.empty(shape, dtype=getattr(torch, dtype), device=rows[0].device)
        for _, _, dtype, shape, _ in described
        if dtype is not None
    ]
    put(rows, tensors)
    arrived = iter(tensors)
    for k, key, dtype, value, beside in described:
        if dtype is not None:
            value = next(arrived) if beside else next(arrived).cpu()
        optimizer.state[parameters[k]][key] = value


def drop(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    """It is somewhere else now."""
    for x in parameters:
        optimizer.state.pop(x, None)


def _read(header: Tensor) -> list[tuple[int, str, str | None, Any, bool]]:
    return json.loads(bytes(header.cpu().tolist()))
