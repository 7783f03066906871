"""Seconds of real processes, a stage each, the middle one slowed by sleeping: synchronous DGL against buffers.

A forward takes `pad` seconds at least, by sleeping, so that three processes do not slow each other down on fewer cores; the
slow stage's computations take `factor` times as long (`Distributed(slow=…)`). The rules take turns; a ratio is of one round.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import unlocked as ul
from unlocked.worlds import Distributed

from .task import BATCH, PLAIN, STAGES, Pad, digits, trainer
from pipelines.crew import Member

Row = dict[str, Any]
RULES: dict[str, Any] = {
    "dgl": ul.credit.DGL(**PLAIN),
    "data": ul.credit.AsyncDGL(buffer=4, ends="data", **PLAIN),
    "updates": ul.credit.AsyncDGL(buffer=4, **PLAIN),
    "updates, reuse 1": ul.credit.AsyncDGL(buffer=4, reuse=1, **PLAIN),
}


def measure(member: Member, pad: float, factors: Sequence[float], rounds: int, epochs: int, width: int) -> list[Row]:
    """A row for each training."""
    rows = []
    _train(member, "dgl", pad, 1.0, 1, width, 0)  # warm-up
    for seed in range(rounds):
        for factor in factors:
            for name in RULES if seed % 2 == 0 else reversed(RULES):
                rows.append(_train(member, name, pad, factor, epochs, width, seed))
                if member.cluster.chief:
                    print(f"round {seed}, × {factor:g}, {name}: {rows[-1]['seconds']:.2f} s", flush=True)
    return rows


def _train(member: Member, name: str, pad: float, factor: float, epochs: int, width: int, seed: int) -> Row:
    train, test = digits()
    Pad.on = True
    with Distributed(member.cluster, slow={1: factor}) as world:
        session = trainer(RULES[name], seed, width, 0.05, pad, world=world)
        records = session.fit(train, epochs, batch_size=BATCH)
        Pad.on = False
        accuracies = [100 * accuracy for _, accuracy in session.evaluate(test).to_json()["stages"]]
        versions = {w.worker.stage: w.worker.version for w in session.weights}
        versions = {int(j): n for part in member.cluster.share(list(versions.items())) for j, n in part}
    buffers = [row for record in records for row in record.get("buffers", ())]
    return {
        "rule": name,
        "factor": factor,
        "round": seed,
        "seconds": sum(record["seconds"] for record in records),
        "accuracies": accuracies,
        "updates": [versions[j] for j in range(STAGES)],
        "unused": [sum(row["overwritten"] for row in buffers if row["stage"] == j) for j in range(STAGES)],
        "forwarded": [sum(row["forwarded"] for row in buffers if row["stage"] == j) for j in range(STAGES)],
    }


def show(rows: Sequence[Row], processes: int) -> None:
    """Medians over the rounds."""
    print(f"\n{processes} processes, stage 1 slowed by sleeping: seconds to finish, and against DGL in the same round")
    for factor in dict.fromkeys(row["factor"] for row in rows):
        base = {row["round"]: row["seconds"] for row in rows if (row["factor"], row["rule"]) == (factor, "dgl")}
        for name in RULES:
            mine = [row for row in rows if (row["factor"], row["rule"]) == (factor, name)]
            ratio = median(row["seconds"] / base[row["round"]] for row in mine)
            middle = [median(column) for column in zip(*(row["accuracies"] for row in mine))]
            updates, unused, passed = (
                "/".join(f"{median(column):.0f}" for column in zip(*(row[what] for row in mine)))
                for what in ("updates", "unused", "forwarded")
            )
            print(
                f"  × {factor:g}  {name:17s} {median(row['seconds'] for row in mine):6.2f} s   {ratio:5.2f} of DGL   heads "
                + " ".join(f"{one:5.1f}" for one in middle)
                + f" %   updates {updates}   never used {unused}   only passed on {passed}"
            )
