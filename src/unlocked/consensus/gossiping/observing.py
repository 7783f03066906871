"""What there is to tell about replicas that differ: how far they are from their mean, and how often each edge was used.

distance   √( (1/N) Σ_n ‖θ_n − θ̄‖² ) / ‖θ̄‖        over all stages
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...flat import flat
from ...graphs import Graph
from ...worker import Worker

Row = dict[str, Any]


async def distance_to_mean(worker: Worker, parameters: Sequence[Tensor]) -> Row:
    """One worker's part: ‖θ_n − θ̄‖² and ‖θ̄‖² of its stage. All replicas call it."""
    rows = flat(parameters)
    means = await worker.replicas.mean("distance", rows)
    with torch.no_grad():
        square = sum(float((row - mean).double().square().sum()) for row, mean in zip(rows, means))
        norm = sum(float(mean.double().square().sum()) for mean in means)
    return {"replica": worker.replica, "stage": worker.stage, "square": square, "norm": norm, "updates": worker.version}


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Of all workers: the distance."""
    replicas = len({row["replica"] for row in rows})
    norm = sum(row["norm"] for row in rows) / replicas
    square = sum(row["square"] for row in rows) / replicas
    return {"distance": math.sqrt(square / norm) if norm else 0.0}


def usage(graph: Graph, rows: Sequence[Row]) -> dict[str, Any]:
    """Exchanges of each edge so far, a stage's on average, and how many its rate stands for; how many came in while a
    gradient was computed, on average."""
    stages = len({row["stage"] for row in rows})
    updates = sum(row["updates"] for row in rows) / len(rows)
    counts: dict[tuple[int, int], float] = {}
    for row in rows:
        for neighbour, count in row["exchanges"]:
            edge = (min(row["replica"], neighbour), max(row["replica"], neighbour))
            counts[edge] = counts.get(edge, 0.0) + count / (2 * stages)  # both ends count
    total = sum(row["updates"] for row in rows)
    return {
        "exchanges": {f"{i}-{j}": count for (i, j), count in sorted(counts.items())},
        "nominal": {f"{i}-{j}": rate * updates for i, j, rate in graph.pairs()},
        "staleness": sum(row["stale"] for row in rows) / total if total else 0.0,
    }
