"""What benchmarks/petra_memory.py should find, from shapes alone.

    D_j = hop · (J − 1 − j)     micro-batches in flight between two turns of stage j of J (from 0); one more during its backward
    x_j, G_j, P_j               bytes of the stage's input, of its graph (the last one's with its loss), of its trained weights
    G_j \\ x_j                   the graph without the input, which may be part of it
    S_j                         inputs of the runs of units that are not reversible; W_j: largest graph of one unit alone

    method                         waiting          working          copies
    backprop                       0                G_j              0
    checkpoint, stage by stage     x_j              G_j \\ x_j        0
    pipedream (hop 1)              D_j G'_j         G'_j             D_j P_j         G': and copies of BatchNorm's buffers
    petra graph (hop 2)            D_j G'_j         G'_j             D_j P_j
    petra input+weights            D_j x_j          x_j + G_j \\ x_j  D_j P_j
    petra input                    D_j x_j          x_j + G_j \\ x_j  0
    petra weights                  D_j S_j          S_j + W_j        D_j P_j
    petra nothing                  D_j S_j          S_j + W_j        0

The last stage has D = 0 and keeps its graph in all of them. A coupling's graph holds both streams, as they are one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unlocked.chain import Chain, Stage
from unlocked.credit.reconstructing import segments
from unlocked.probes.memory import SavedBytes
from unlocked.reversible import is_reversible


@dataclass(frozen=True)
class Parts:
    """Bytes of one stage: x_j, G_j, G_j without the input, G'_j, S_j, W_j, P_j."""

    input: int
    graph: int
    graph_without_input: int
    graph_and_buffers: int
    irreversible: int
    largest: int
    weights: int


def expected(method: str, parts: list[Parts]) -> list[dict[str, int]]:
    """Bytes of each stage: "waiting", "working", "copies"; see above."""
    hop = 1 if method == "pipedream" else 2
    return [_stage(method, part, hop * (len(parts) - 1 - j)) for j, part in enumerate(parts)]


def _stage(method: str, part: Parts, depth: int) -> dict[str, int]:
    if method == "backprop" or depth == 0:
        return {"waiting": 0, "working": part.graph, "copies": 0}
    if method == "checkpoint":
        return {"waiting": part.input, "working": part.graph_without_input, "copies": 0}
    versions = method not in ("petra input", "petra nothing")
    once, more = {
        "pipedream": (part.graph_and_buffers, 0),
        "petra graph": (part.graph_and_buffers, 0),
        "petra input": (part.input, part.graph_without_input),
        "petra input+weights": (part.input, part.graph_without_input),
        "petra weights": (part.irreversible, part.largest),
        "petra nothing": (part.irreversible, part.largest),
    }[method]
    return {"waiting": depth * once, "working": once + more, "copies": depth * part.weights * versions}


def as_in_paper(keep: str, parts: list[Parts]) -> int:
    """What waits, counted so that it comes near the paper's table: see petra_memory.py. Only for a piece per stage."""
    inputs = weights = 0
    for j, part in enumerate(parts[:-1]):
        depth = 2 * (len(parts) - 1 - j)
        inputs += (depth + 1) * (part.irreversible or part.input // 2 * (keep in ("input", "input+weights")))
        weights += depth * part.weights * (keep in ("weights", "input+weights"))
    return inputs + weights


def parts_of(chain: Chain, x: Tensor, y: Tensor) -> list[Parts]:
    """The parts of each stage. Meant for tensors without values (FakeTensorMode); otherwise weights get gradients."""
    found = []
    for j, stage in enumerate(chain):
        part, x = _parts(stage, x, y, first=j == 0, last=j == len(chain) - 1)
        found.append(part)
    return found


def _parts(stage: Stage, x: Tensor, y: Tensor, first: bool, last: bool) -> tuple[Parts, Tensor]:
    weights, buffers = list(stage.parameters()), list(stage.buffers())

    def graph(ignored: Iterable[Tensor]) -> int:
        given = x if first else x.detach().requires_grad_()
        with SavedBytes(ignore=ignored) as meter:
            h = stage.body(given)
            loss = stage.loss(h, y) if last else h
            assert loss.requires_grad
            return meter.live

    return Parts(
        input=_bytes([x]),
        graph=graph([*weights, *buffers]),
        graph_without_input=graph([*weights, *buffers, x]),
        graph_and_buffers=graph(weights),
        irreversible=0 if last else sum(_bytes([z]) for part, z in _inputs(stage.body, x) if not is_reversible(part)),
        largest=0
        if last
        else max(_work(part, z, first and k == 0) for k, (part, z) in enumerate(_inputs(stage.body, x))),
        weights=_bytes(w for w in weights if w.requires_grad),
    ), _outcome(stage.body, x)


def _outcome(body: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return body(x)


def _inputs(body: nn.Module, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """The parts of a body (credit/reconstructing.py), each with its input."""
    row = []
    for part in segments(body):
        row.append((part, x))
        x = _outcome(part, x)
    return row


def _work(part: nn.Module, x: Tensor, data: bool) -> int:
    """Bytes kept while this part alone is reversed or run again; its input is counted elsewhere if it waits there."""
    fixed = [*part.parameters(), *part.buffers()]
    if is_reversible(part):
        z = _outcome(part, x)
        with SavedBytes(ignore=fixed) as meter:
            part.reverse(z, torch.zeros_like(z))
        return meter.peak
    x = x if data else x.detach().requires_grad_()
    with SavedBytes(ignore=[*fixed, x]) as meter:
        h = part(x)
        assert h.requires_grad
        return meter.live


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
