"""PETRA's two approximations: what is reconstructed, and which way the gradients point.

    python benchmarks/reconstruction.py [--data parquet:DIR] [--parts rounding delay cosine] [--figures docs/figures] …

1. rounding: reversible networks run upwards and backwards with the same weights, against depth, in three precisions.
2. delay: PETRA's reconstruction error while a narrow RevResNet-18 trains, by stages J, micro-batches per update k, and γ.
3. cosine: of each stage's update to backpropagation's gradient at today's weights (F Eq. 4.6), by method, over short trainings.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import unlocked as ul

from common import result
from reconstructions.drawn import draw
from reconstructions.rounding import PRECISIONS, RESNETS, gpt_row, resnet_row
from reconstructions.training import COSINES, MICRO_BATCH, cosine_rows, delay_rows

Rows = list[dict[str, Any]]
_PARTS = ("rounding", "delay", "cosine")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS))
    parser.add_argument("--data", default="parquet:../shared/data/cifar10")
    parser.add_argument("--subset", type=int, default=1024, help="training images")
    parser.add_argument("--size", type=int, default=16, help="side of the images in pixels")
    parser.add_argument("--width", type=float, default=0.125, help="of the RevResNet-18 that is trained")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 24, 32, 48], help="of the GPTs")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 6, 8, 10], help="J, for the delay")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 8], help="micro-batches per update, for the delay")
    parser.add_argument("--rates", type=float, nargs=2, default=[0.005, 0.05], help="learning rates, for the delay")
    parser.add_argument("--updates", type=int, default=20, help="of each training for the delay")
    parser.add_argument("--cosine-stages", type=int, nargs="+", default=[4, 10])
    parser.add_argument("--cosine-rate", type=float, default=0.02)
    parser.add_argument("--cosine-updates", type=int, default=40)
    parser.add_argument("--figures", type=Path, default=None, help="folder for the pictures; default: none are drawn")
    return parser.parse_args()


def main() -> int:
    given, console, begin = arguments(), Console(width=130), time.perf_counter()
    torch.set_num_threads(1)
    rounding: Rows = []
    delays: Rows = []
    cosines: Rows = []
    if "rounding" in given.parts:
        rounding = [gpt_row(layers) for layers in given.layers] + [resnet_row(name) for name in RESNETS]
        show_rounding(rounding, console)
    if {"delay", "cosine"} & set(given.parts):
        data = ul.data.load(given.data, subset=given.subset, size=given.size)[0]
    if "delay" in given.parts:
        for stages in given.stages:
            for k in given.k:
                for lr in given.rates:
                    delays += delay_rows(data, stages, k, lr, given.updates, given.width)
        show_delays(delays, given, console)
    if "cosine" in given.parts:
        for stages in given.cosine_stages:
            mine = [
                row
                for name in COSINES
                for row in cosine_rows(data, name, stages, given.cosine_rate, given.cosine_updates, given.width)
            ]
            show_cosines(mine, stages, given, console)
            cosines += mine
    if given.figures is not None:
        console.print("drawn: " + ", ".join(str(file) for file in draw(given.figures, rounding, delays, cosines)))
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    seconds = round(time.perf_counter() - begin, 1)
    found = {"rounding": rounding, "delay": delays, "cosine": cosines}
    result("reconstruction", options=options, micro_batch=MICRO_BATCH, seconds=seconds, **_short(found))
    return 0


def _short(value: Any) -> Any:
    """Three digits are enough."""
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_short(part) for part in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("network", "method") else "right", no_wrap=True)
    return table


def show_rounding(rows: Rows, console: Console) -> None:
    """A row per network."""
    headings = [heading for precision in PRECISIONS for heading in (precision, "worst")]
    title = "Rounding: relative error of the lowest reconstructed input, and the worst"
    table = _table(title, "network", "couplings", *headings)
    for row in rows:
        name = row["model"] + (f"-{row['layers']}" if "layers" in row else "")
        errors = [f"{row[precision][what]:.1e}" for precision in PRECISIONS for what in ("lowest", "worst")]
        table.add_row(name, str(row["reversible"]), *errors)
    console.print(table)
    for name in ("revgpt", RESNETS[0]):
        row = next((row for row in rows if row["model"] == name), None)
        if row is not None:
            kinds = ", ".join(f"{precision}: {row[precision]['streams']}" for precision in PRECISIONS)
            console.print(f"streams of {name}: {kinds}")


def show_delays(rows: Rows, given: argparse.Namespace, console: Console) -> None:
    """The lowest stage of each training that reconstructs something; `delay`: of stage 0, in updates."""
    columns = [f"γ {lr:g}: {what}" for lr in given.rates for what in ("error", "loss")]
    table = _table("Delay: relative error of PETRA's lowest reconstruction", "J", "k", "delay", *columns)
    for stages in given.stages:
        for k in given.k:
            cells = []
            for lr in given.rates:
                mine = [row for row in rows if (row["stages"], row["k"], row["lr"]) == (stages, k, lr)]
                cells += [f"{mine[0]['error']:.1e}", f"{mine[0]['loss']:.2f}"] if mine else ["–", "–"]
            table.add_row(str(stages), str(k), f"{2 * (stages - 1) / k:.2f}", *cells)
    console.print(table)


def show_cosines(rows: Rows, stages: int, given: argparse.Namespace, console: Console) -> None:
    """A row per method, a column per stage: the cosine, and below it the ratio of norms."""
    title = (
        f"Cosine to backpropagation's gradient, below it the ratio of norms; J = {stages}, γ = {given.cosine_rate:g}"
    )
    table = _table(title, "method", *(str(stage) for stage in range(stages)), "loss")
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = {row["stage"]: row for row in rows if row["method"] == name}
        cells = [f"{mine[j]['cosine']:.2f}\n{mine[j]['ratio']:.2f}" if j in mine else "–" for j in range(stages)]
        table.add_row(name, *cells, f"{next(iter(mine.values()))['loss']:.2f}")
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
