"""Loss on held-out text against samples and against (simulated) time: four replicas in one process."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

import unlocked as ul
from unlocked.consensus import Consensus
from unlocked.data import Data

from .clocked import REPLICAS, seconds_per_update
from .task import Size, adamw, chain_of

SIZE = Size(layers=2, width=48, context=32, micro=2)
COUNT = 10  # micro-batches per update and replica
RATE = 3e-3


@dataclass(frozen=True)
class Way:
    """A rule; whether one of the replicas is four times slower on the clock."""

    rule: Consensus
    slow: bool = False


def ways() -> dict[str, Way]:
    """Those that are compared. With one slow replica ACCO lets it do one micro-batch a round where the others do all."""
    plain = {
        "all-reduce": ul.consensus.AllReduce(),
        "dpu": ul.consensus.DPU(),
        "wp": ul.consensus.WP(),
        "acco": ul.consensus.ACCO(),
    }
    found = {name: Way(rule) for name, rule in plain.items()}
    half = COUNT // 2
    found["all-reduce, one slow"] = Way(plain["all-reduce"], True)
    found["acco, one slow"] = Way(ul.consensus.ACCO((half, half, half, 1)), True)
    return found


def measure(text: str, seeds: int, updates: int, every: int, ratios: tuple[float, ...]) -> list[dict[str, Any]]:
    """A row for each way and seed: samples, simulated seconds (by the delay) and held-out loss, every `every` updates."""
    train, test = ul.data.load(f"text:{text}", context=SIZE.context)
    held_out = test.samples(torch.arange(0, len(test), max(1, len(test) // 256))[:256])
    rows = []
    known: dict[tuple[Consensus, int], list[float]] = {}
    for name, way in ways().items():
        clocks = {ratio: seconds_per_update(way.rule, ratio, way.slow, COUNT) for ratio in ratios}
        for seed in range(seeds):
            if (way.rule, seed) not in known:
                known[way.rule, seed] = _train(way.rule, train, held_out, seed, updates, every)
            losses = known[way.rule, seed]
            samples = sum(clocks[ratios[0]][1]) * SIZE.micro
            rows.append(
                {
                    "way": name,
                    "seed": seed,
                    "samples": [round(k * every * samples) for k in range(len(losses))],
                    "seconds": {
                        ratio: [k * every * seconds for k in range(len(losses))]
                        for ratio, (seconds, _) in clocks.items()
                    },
                    "losses": losses,
                }
            )
        print(f"  {name}: {losses[-1]:.3f} after {updates} updates", flush=True)
    return rows


def _train(rule: Consensus, train: Data, held_out: Any, seed: int, updates: int, every: int) -> list[float]:
    trainer = ul.Trainer(
        chain_of(SIZE, seed),
        consensus=rule,
        replicas=REPLICAS,
        accumulate=COUNT,
        optimizer=adamw(RATE),
        seed=seed,
        clip=1.0,
    )
    source = torch.Generator().manual_seed(seed)
    losses = [_loss(trainer, held_out)]
    for step in range(updates):
        x, y = train.samples(torch.randint(len(train), (REPLICAS * COUNT * SIZE.micro,), generator=source))
        trainer.step(x, y)
        if (step + 1) % every == 0:
            losses.append(_loss(trainer, held_out))
    return losses


@torch.no_grad()
def _loss(trainer: ul.Trainer, held_out: Any) -> float:
    chain = trainer.chains[0]
    x, y = held_out
    return float(torch.nn.functional.cross_entropy(chain(x).flatten(0, -2), y.flatten()))


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation over the seeds: at the most samples and at the most time that all have reached, and at the end."""
    samples = min(row["samples"][-1] for row in rows)
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        alike = [row for row in rows if row["way"].endswith("slow") == way.endswith("slow")]
        values = {f"{samples:,} samples": [_at(row["samples"], row["losses"], samples) for row in mine]}
        for ratio in mine[0]["seconds"]:
            limit = min(row["seconds"][ratio][-1] for row in alike)
            values[f"{ratio}: time"] = [_at(row["seconds"][ratio], row["losses"], limit) for row in mine]
        values["the end"] = [row["losses"][-1] for row in mine]
        line: dict[str, Any] = {"way": way}
        for key, row in values.items():
            line[key] = [fmean(row), stdev(row) if len(row) > 1 else 0.0]
        lines.append(line)
    return lines


def _at(where: list[float], losses: list[float], limit: float) -> float:
    """The loss there, between two measurements on a line."""
    for k in range(1, len(where)):
        if where[k] >= limit:
            share = (limit - where[k - 1]) / (where[k] - where[k - 1])
            return losses[k - 1] + share * (losses[k] - losses[k - 1])
    return losses[-1]


def show(lines: list[dict[str, Any]]) -> None:
    """The table."""
    print(
        f"\nHeld-out loss (nats per byte), AdamW with rate {RATE}, after as many samples, after as much time, and at the end."
    )
    print(
        "Time is SIMULATED, with all-reduces that take so many times what a step computes: until the first of the rules above,"
    )
    print("or of those with one slow worker, has made all its updates.")
    keys = [key for key in lines[0] if key != "way"]
    print(f"\n{'':22s}" + "".join(f"{key:>17s}" for key in keys))
    for line in lines:
        print(f"{line['way']:22s}" + "".join(f"{line[key][0]:9.3f} ± {line[key][1]:.3f}" for key in keys))
