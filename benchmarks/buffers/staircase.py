"""The paper's experiment in process: turns are drawn, one stage's are rarer; accuracy of the heads against its slow-down.

Under "updates" every stage makes as many updates as there are batches, whatever its rate: what is lost is lost because a stage
learns from features that are reused, or misses some.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import mean, pstdev
from typing import Any

import unlocked as ul

from .task import BATCH, PLAIN, STAGES, digits, trainer

Row = dict[str, Any]
SLOW_DOWNS = (1.0, 2.0, 4.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "M = 2": {"buffer": 2},
    "M = 2, reuse 1": {"buffer": 2, "reuse": 1},
    "M = 1": {"buffer": 1},
    "M = 16": {"buffer": 16},
    "M = 16, uniform": {"buffer": 16, "policy": "uniform"},
    "M = 2, int8": {"buffer": 2, "quantise": "int8"},
    "M = 2, ends data": {"buffer": 2, "ends": "data"},
}
VARIED = 4.0  # the slow-down of stage 1 under which the other variants are compared


def _rates(slow: int, slow_down: float) -> tuple[float, ...]:
    return tuple(1.0 / slow_down if stage == slow else 1.0 for stage in range(STAGES))


def _train(credit: Any, seed: int, width: int, rate: float, epochs: int) -> Row:
    train, test = digits()
    begin = time.perf_counter()
    session = trainer(credit, seed, width, rate)
    records = session.fit(train, epochs, batch_size=BATCH)
    accuracies = [100 * accuracy for _, accuracy in session.evaluate(test).to_json()["stages"]]
    buffers = [row for record in records for row in record.get("buffers", ())]
    updates = [weights.worker.version for weights in session.weights]
    unused = [sum(row["overwritten"] for row in buffers if row["stage"] == j) for j in range(STAGES)]
    return {"accuracies": accuracies, "updates": updates, "unused": unused, "seconds": time.perf_counter() - begin}


def measure(seeds: int, width: int, rate: float, epochs: int, slow_downs: Sequence[float]) -> list[Row]:
    """A row for each training."""
    rows = []
    for name, stage, slow_down, credit in _cases(slow_downs):
        for seed in range(seeds):
            found = _train(credit, seed, width, rate, epochs)
            rows.append({"variant": name, "slow": stage, "slow_down": slow_down, "seed": seed, **found})
        print(f"{name}, stage {stage} × {slow_down:g}: {rows[-1]['accuracies']}", flush=True)
    return rows


def _cases(slow_downs: Sequence[float]) -> Iterator[tuple[str, int, float, Any]]:
    main = next(iter(VARIANTS))
    yield "dgl", 0, 1.0, ul.credit.DGL(**PLAIN)
    for slow_down in slow_downs:
        for stage in range(STAGES) if slow_down > 1.0 else (0,):
            yield main, stage, slow_down, ul.credit.AsyncDGL(rates=_rates(stage, slow_down), **VARIANTS[main], **PLAIN)
    for name in list(VARIANTS)[1:]:
        yield name, 1, VARIED, ul.credit.AsyncDGL(rates=_rates(1, VARIED), **VARIANTS[name], **PLAIN)


def show(rows: Sequence[Row]) -> None:
    """Mean ± standard deviation over the seeds of each head's accuracy; updates of each stage, and what nobody used."""
    print("\nheads' test accuracy % against the slow-down of one stage, whose turns are drawn more rarely")
    for key in dict.fromkeys((row["variant"], row["slow"], row["slow_down"]) for row in rows):
        mine = [row for row in rows if (row["variant"], row["slow"], row["slow_down"]) == key]
        columns = list(zip(*(row["accuracies"] for row in mine)))
        heads = "   ".join(f"{mean(column):5.1f} ± {pstdev(column):4.1f}" for column in columns)
        updates = "/".join(f"{mean(row['updates'][j] for row in mine):.0f}" for j in range(STAGES))
        unused = "/".join(f"{mean(row['unused'][j] for row in mine):.0f}" for j in range(STAGES))
        where = "all alike       " if key[2] == 1.0 else f"stage {key[1]} × {key[2]:<4g}  "
        print(f"  {key[0]:20s} {where} {heads}   updates {updates}   never used {unused}")
