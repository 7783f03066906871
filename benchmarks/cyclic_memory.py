"""Activation bytes of data parallelism (DP) and cyclic data parallelism (CDP): Fournier's Figure 5.4, and measured.

    python benchmarks/cyclic_memory.py [--parts measured shapes cuts starts again] [--plot FILE.png]

measured: N micro-batches through one model of N stages in one process (cyclics/measured.py): a GPT and a ViT of equal
stages, beside (N + 1) / (2 N), and a ResNet-50, cut by operations and by bytes. On a GPU if there is one, or on
`--device`.

The other parts take ResNet-50 and ViT-B/16 with 224 × 224 images, and compute nothing (cyclics/tracking.py). shapes:
every operation is a stage of its own; what one gradient keeps is followed over time, and added up N times, shifted.
Time is counted operations alone, or these and the bytes read and written on a device (A100, float32 without tensor
cores, by its data sheet). cuts, starts, again: what may bring CDP below that (cyclics/cutting.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from unlocked.simulation.cyclic import even_starts, retained, staggered

from common import result
from cyclics.cutting import again, best_starts, cuts
from cyclics.drawn import draw
from cyclics.measured import RUNS, measure
from cyclics.tracking import DEVICES, NETWORKS, OPERATIONS, Track, track

PARTS = ("measured", "shapes", "cuts", "starts", "again")
EQUAL = {"GPT": "memory", "ViT-like": "memory"}  # stacks and what they are balanced by
UNEQUAL = [("ResNet-50", "flops"), ("ResNet-50", "memory")]
Tracks = dict[str, dict[str, Track]]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--replicas", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--samples", type=int, default=64, help="images of a micro-batch where nothing is computed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="for what is measured")
    parser.add_argument("--plot", type=Path, help="where to draw the figure (.png)")
    return parser.parse_args()


def measured(replicas: list[int], device: torch.device) -> dict[str, Any]:
    """Print, for each stack, cut and N, the peaks over that of DP."""
    found: dict[str, Any] = {}
    names = [name for name in RUNS if name != "dp"]
    print(f"Peak bytes of activations over DP's, N stages and N micro-batches in one process on {device}")
    print(
        f"{'stack':10s}{'cut by':8s}{'N':>3s}{'DP (MB)':>9s}" + "".join(f"{name:>21s}" for name in names) + "  (N+1)/2N"
    )
    for stack, balance in (*EQUAL.items(), *UNEQUAL):
        for count in (count for count in replicas if stack in EQUAL or count <= 8):
            row = measure(stack, count, balance, device)  # type: ignore[arg-type]
            target = (count + 1) / (2 * count)
            error = row["cdp, forwards first"] / row["dp"] / target - 1
            shares = "".join(f"{row[name] / row['dp']:21.4f}" for name in names)
            shown = f"{error:+8.1%}" if stack in EQUAL else ""
            print(f"{stack:10s}{balance:8s}{count:3d}{row['dp'] / 1e6:9.2f}{shares}{target:10.4f}{shown}", flush=True)
            found[f"{stack}, {balance}, {count}"] = row | {"target": target, "error": error}
    for told, run in (("formula", "cdp, forwards first"), ("formula", "cdp, trainer")):
        worst = max(abs(row[told] / row[run] - 1) for row in found.values())
        print(f"{run} against simulation/cyclic.py with the stages' measured bytes: at most {worst:.2%} apart")
    print()
    return found


def shapes(tracks: Tracks, replicas: list[int]) -> dict[str, Any]:
    """Print, for each network, way of telling time and N: GB per worker and the reduction."""
    found: dict[str, Any] = {}
    print("Activations per worker; reduction: 1 − CDP / DP; bound: 1 − mean / peak of one replica's curve")
    columns = ("DP (GB)", "CDP (GB)", "reduction", "by blocks", "bound", "thesis")
    print(f"{'network':11s}{'time':11s}{'N':>3s}" + "".join(f"{name:>11s}" for name in columns))
    for name, rows in tracks.items():
        for clock, one in rows.items():
            for count in replicas:
                row = found[f"{name}, {clock}, {count}"] = _shape(one, count)
                sizes = f"{row['dp']:11.2f}{row['cdp']:11.2f}"
                shares = f"{row['reduction']:11.1%}{row['by_blocks']:11.1%}{row['bound']:11.1%}"
                print(f"{name:11s}{clock:11s}{count:3d}{sizes}{shares}{NETWORKS[name].reduction:11.0%}")
    print()
    return found


def _shape(one: Track, count: int) -> dict[str, float]:
    cyclic = staggered(one.curve, one.period, even_starts(count))
    blocks = [retained(one.pieces, count, cyclic).peak for cyclic in (True, False)]
    return {
        "dp": one.peak / 1e9,
        "cdp": cyclic.peak / count / 1e9,
        "reduction": 1 - cyclic.peak / count / one.peak,
        "by_blocks": 1 - blocks[0] / blocks[1],
        "bound": 1 - cyclic.mean / count / one.peak,
    }


def choices(tracks: Tracks, samples: int) -> dict[str, Any]:
    """Print what the cut does, for J = N = 4 and 8."""
    found: dict[str, Any] = {}
    print("Cuts, N = J in rounds: slowest stage over the mean; reduction on one device; fullest device as a pipeline")
    for name, rows in tracks.items():
        for stages in (4, 8):
            found[f"{name}, {stages}"] = table = cuts(NETWORKS[name], rows["operations"], samples, stages)
            for row in table:
                figures = f"{row['slowest']:5.2f}×{row['reduction']:8.1%}{row['fullest']:7.2f} GB"
                print(f"{name:11s}J = {stages}  {row['cut']:15s}{figures}  {row['sizes']}")
    print()
    return found


def starts(tracks: Tracks, replicas: list[int]) -> dict[str, Any]:
    """Print what other starts than even ones gain."""
    found: dict[str, Any] = {}
    print("Starts: reduction with even ones, and with the best that were found")
    for name, rows in tracks.items():
        for count in replicas:
            one = rows["operations"]
            even, best = (1 - peak / count / one.peak for peak in best_starts(one, count))
            print(f"{name:11s}{count:3d}{even:8.2%}{best:8.2%}")
            found[f"{name}, {count}"] = {"even": even, "best": best}
    print()
    return found


def computed_again(samples: int, replicas: int) -> dict[str, Any]:
    """Print what computing pieces again in the backward does."""
    found: dict[str, Any] = {}
    print(
        f"Pieces computed again in their backward, N = {replicas}: time, GB per worker, reduction; and of DP that keeps all"
    )
    for name, network in NETWORKS.items():
        found[name] = again(network, samples, OPERATIONS, replicas, (0, 1, 2, 4, 8))
        for row in found[name]:
            sizes = f"DP {row['dp']:5.2f}  CDP {row['cdp']:5.2f}"
            print(
                f"{name:11s}{row['again']}  {row['time']:6.3f}×  {sizes}{row['reduction']:8.1%}{row['of_plain_dp']:8.1%}"
            )
    print()
    return found


def main() -> int:
    given = arguments()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if "measured" in given.parts:
        found["measured"] = measured(given.replicas, torch.device(given.device))
    tracks = {
        name: {clock: track(network, given.samples, device) for clock, device in DEVICES.items()}
        for name, network in NETWORKS.items()
    }
    if "shapes" in given.parts:
        found["shapes"] = shapes(tracks, given.replicas)
    if "cuts" in given.parts:
        found["cuts"] = choices(tracks, given.samples)
    if "starts" in given.parts:
        found["starts"] = starts(tracks, given.replicas)
    if "again" in given.parts:
        found["again"] = computed_again(given.samples, max(given.replicas))
    if given.plot is not None:
        draw(given.plot, {name: rows["operations"] for name, rows in tracks.items()}, given.replicas)
    result("cyclic_memory", samples=given.samples, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
