"""The thesis' figures about populations as recipes at the size of a CPU: 6.2, 6.4, 6.5, 6.6, D.1.

    python benchmarks/population_figures.py                       all, on digits (8×8 pixels, nothing to download)
    python benchmarks/population_figures.py --figure 6.5 --seeds 3
    python benchmarks/population_figures.py --data DIR            on CIFAR-10 at 16×16 pixels: DIR holds train.parquet, …

    6.2   distance to consensus during training: independent members, PAPA, PAPA-all, WASH, WASH+Opt, all beginning equal
    6.4   the same of WASH's three layer schedules, per quarter of the weights in the order of depth
    6.5   accuracy of the ensemble and of the averaged network against WASH's base probability p
    6.6   the same against the epoch in which shuffling begins, and against that in which it ends
    D.1   accuracy of the networks between the members: independent ones, and those of WASH

Each figure has a table and a picture in --to. A small CNN with BatchNorm (statistics averaged, not estimated anew), N members,
SGD with momentum 0.9, weight decay 1e-4, learning rate 0.3, a cosine to a thousandth of it. The test images are seen at the
end only.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import unlocked as ul
from unlocked.allocator import keep_freed_memory
from unlocked.report.drawing import whole_ticks

from common import result
from populations import recipes
from populations.drawing import curves, figure, heat_maps, title
from populations.recipes import Bench, Row
from populations.scoring import shown, spread
from populations.training import Recipe

PROBABILITIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
QUARTERS = ("first", "second", "third", "last")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--figure", choices=[*FIGURES, "all"], default="all")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.3, help="the first learning rate")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--p", type=float, default=0.05, help="WASH's base probability where it is not varied")
    parser.add_argument("--alpha", type=float, default=0.1, help="PAPA's share of the mean")
    parser.add_argument("--seeds", type=int, default=2, help="of Figures 6.5 and 6.6")
    parser.add_argument("--subset", type=int, default=2000, help="training images, where the data are a folder")
    parser.add_argument("--to", type=Path, default=Path("docs/figures"))
    return parser.parse_args()


def bench_of(options: argparse.Namespace) -> Bench:
    """The data and the training."""
    if options.data == "digits":
        train, test = ul.data.load("digits")
    else:
        train, test = ul.data.load(f"parquet:{options.data}", augment="crop-flip", subset=options.subset, size=16)
        assert test.y is not None
        test = dataclasses.replace(test, x=test.x[:2000], y=test.y[:2000])
    recipe = Recipe("cnn", options.epochs, options.batch, options.rate, options={"width": options.width, "depth": 4})
    return Bench(recipe, train, test, options.p, options.alpha, options.members)


# ---- figures ---------------------------------------------------------------------------------------------------------


def distances(bench: Bench, options: argparse.Namespace) -> list[Row]:
    """Figure 6.2."""
    rows = list(recipes.of_methods(bench))

    def fill(panels: Sequence[Any]) -> None:
        curves(panels[0], {row["name"]: (row["epochs"], row["distances"]) for row in rows}, "epoch", "distance")
        panels[0].legend(frameon=False, fontsize=8.5)
        title(panels[0], f"Distance to consensus, N = {bench.members}")

    figure(options.to / "population_distances.png", 1, fill, width=5.6)
    _print_distances(rows)
    return rows


def schedules(bench: Bench, options: argparse.Namespace) -> list[Row]:
    """Figure 6.4."""
    rows = list(recipes.of_schedules(bench))

    def fill(panels: Sequence[Any]) -> None:
        for k, (axes, name) in enumerate(zip(panels, QUARTERS)):
            curves(axes, {row["name"]: (row["epochs"], row["quarters"][k]) for row in rows}, "epoch", "distance")
            whole_ticks(axes)
            title(axes, f"{name} quarter of the weights")
        panels[0].legend(frameon=False, fontsize=8.5)

    figure(options.to / "population_schedules.png", 4, fill, width=4.0)
    _print_distances(rows)
    return rows


def _print_distances(rows: Sequence[Row]) -> None:
    print(
        f"{'':28s}{'at half':>9s}{'at end':>9s}   {'quarters at end':24s}{'ensemble':>9s}{'averaged':>9s}{'disagree':>9s}"
    )
    for row in rows:
        whole = row["distances"]
        quarters = " ".join(f"{quarter[-1]:5.2f}" for quarter in row["quarters"])
        found = "".join(f"{row[kind]:9.1f}" for kind in ("ensemble", "averaged", "disagreement"))
        print(f"{row['name']:28s}{whole[len(whole) // 2]:9.2f}{whole[-1]:9.2f}   {quarters:24s}{found}")


def probabilities(bench: Bench, options: argparse.Namespace) -> list[Row]:
    """Figure 6.5."""
    rows = list(recipes.of_probabilities(bench, PROBABILITIES, options.seeds))

    def fill(panels: Sequence[Any]) -> None:
        lines = {kind: _means(rows, "p", kind) for kind in ("ensemble", "averaged")}
        curves(panels[0], lines, "base probability p", "test accuracy (%)", marker="o")
        panels[0].set_xscale("log")
        panels[0].xaxis.set_major_formatter("{x:g}")
        panels[0].legend(frameon=False, fontsize=8.5)
        title(panels[0], f"WASH, N = {bench.members}")

    figure(options.to / "population_probability.png", 1, fill, width=5.6)
    _print_against(rows, "p")
    return rows


def times(bench: Bench, options: argparse.Namespace) -> list[Row]:
    """Figure 6.6."""
    last = bench.recipe.epochs
    rows = list(recipes.of_times(bench, [round(last * share) for share in (0, 0.25, 0.5, 0.75, 1)], options.seeds))
    lines = {"from": "shuffling from this epoch on", "until": "shuffling until this epoch"}

    def fill(panels: Sequence[Any]) -> None:
        for kind, label in lines.items():
            here = [row for row in rows if row["kind"] == kind]
            found = {what: _means(here, "epoch", what) for what in ("ensemble", "averaged")}
            axes = panels[0] if kind == "from" else panels[1]
            curves(axes, found, "epoch", "test accuracy (%)", marker="o")
            whole_ticks(axes)
            title(axes, label)
        panels[0].legend(frameon=False, fontsize=8.5)

    figure(options.to / "population_times.png", 2, fill, width=4.2)
    for kind, label in lines.items():
        print(label)
        _print_against([row for row in rows if row["kind"] == kind], "epoch")
    return rows


def _means(rows: Sequence[Row], by: str, kind: str) -> tuple[list[float], list[float]]:
    values = list(dict.fromkeys(row[by] for row in rows))
    return values, [fmean(row[kind] for row in rows if row[by] == value) for value in values]


def _print_against(rows: Sequence[Row], by: str) -> None:
    kinds = ("ensemble", "averaged", "member", "disagreement")
    print(f"{by:>8s}" + "".join(f"{kind:>14s}" for kind in kinds))
    for value in dict.fromkeys(row[by] for row in rows):
        here = [row for row in rows if row[by] == value]
        print(f"{value:8g}" + "".join(f"{shown(spread(row[kind] for row in here)):>14s}" for kind in kinds))


def interpolations(bench: Bench, options: argparse.Namespace) -> list[Row]:
    """Figure D.1."""
    maps, rows = dict(recipes.of_interpolations(bench, steps=6)), []
    heat_maps(options.to / "population_heat.png", maps)
    for name, found in maps.items():
        values = [100 * value for value in found.values]
        corners, lowest = [values[k] for k in found.corners], min(values)
        rows.append({"name": name, "centre": values[0], "lowest": lowest, "corners": corners})
        members = ", ".join(f"{value:.1f}" for value in corners)
        print(f"{name:10s}members {members} %, mean of all {values[0]:.1f} %, lowest of {len(values)} {lowest:.1f} %")
    return rows


FIGURES: dict[str, Callable[[Bench, argparse.Namespace], list[Row]]] = {
    "6.2": distances,
    "6.4": schedules,
    "6.5": probabilities,
    "6.6": times,
    "d1": interpolations,
}


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    keep_freed_memory()
    bench, found = bench_of(options), {}
    for name, make in FIGURES.items():
        if options.figure in (name, "all"):
            print(f"\nFigure {name}", flush=True)
            found[name] = make(bench, options)
    settings = {name: value for name, value in vars(options).items() if name not in ("to", "figure")}
    result("population_figures", figures=found, settings=settings)


if __name__ == "__main__":
    main()
