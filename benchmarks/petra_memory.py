"""Bytes that PETRA keeps for its backwards, stage by stage, beside backpropagation, checkpointing and PipeDream.

    python benchmarks/petra_memory.py [--width 0.125] [--size 32] [--batch 2] [--depths 2 4 8 16 24 48] [--networks …]

Measured in process with the pipeline full, k = 1 micro-batch per update: what is saved for backwards (probes/memory.py) at each
worker's own peak, plus copies of older weights at their peak. Left out in all methods: weights, gradients, optimizer states,
messages under way. Beside each number stands what the formula says (pipelines/kept_formula.py), which also gives the figures at
the paper's size (RevNet-50, 18 stages, 224 × 224, batch 64), where nothing is computed. "as in the paper" is a way of counting
that comes within a percent of the paper's table: inputs D_j + 1 deep, one stream of the two at reversible stages (the other is
not needed for a gradient), D_j copies of weights, no memory of the backward that is running.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import unlocked as ul
from unlocked.chain import Chain
from unlocked.cutting import from_recipe_of_chain

from common import result
from pipelines.kept_formula import Parts, as_in_paper, expected, parts_of
from pipelines.kept_measured import METHODS, measured

_IMAGES = {"revresnet18": 10, "revresnet34": 18, "revresnet50": 18}  # stages: one for each piece
_PAPER = {"input+weights": 44.5, "input": 43.6, "weights": 21.2, "nothing": 20.3}  # GB
_TEXT: dict[str, Any] = {"classes": 64, "width": 32, "heads": 2}
_CONTEXT = 16


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--networks", nargs="+", choices=(*_IMAGES, "revgpt", "paper"), default=[*_IMAGES, "revgpt", "paper"]
    )
    parser.add_argument("--width", type=float, default=0.125, help="of the RevResNets, of the paper's")
    parser.add_argument("--size", type=int, default=32, help="pixels of an image's side")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[2, 4, 8, 16, 24, 48], help="blocks of the reversible GPT"
    )
    return parser.parse_args()


def images(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """The recipe of a RevResNet with a stage for every piece."""
    options = {"input_shape": (3, given.size, given.size), "classes": 10, "width": given.width}
    return {"model": ul.models.build(name, **options).recipe, "sizes": [1] * _IMAGES[name]}


def text(layers: int, fixed: bool) -> dict[str, Any]:
    """The recipe of a reversible GPT: embedding and output are stages; the blocks are two stages (`fixed`) or one each."""
    model = ul.models.build("revgpt", input_shape=(_CONTEXT,), layers=layers, **_TEXT)
    blocks = [layers, layers] if fixed else [2] * layers  # a block is two couplings
    return {"model": model.recipe, "sizes": [1, *blocks, 1]}


def compare(recipe: dict[str, Any], x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """By method, for every stage: bytes saved and of copies, as measured and as the formula says."""
    parts, found = formula_parts(recipe, x, y), {}
    for method in METHODS:
        torch.manual_seed(0)
        saved, copies, at_once = measured(method, from_recipe_of_chain(recipe, x), x, y)
        found[method] = {"saved": saved, "copies": copies, "at_once": at_once, "formula": expected(method, parts)}
    return found


def formula_parts(recipe: dict[str, Any], x: torch.Tensor, y: torch.Tensor) -> list[Parts]:
    """What every stage consists of, read off tensors without values."""
    with FakeTensorMode():
        like = torch.empty(x.shape, dtype=x.dtype)
        chain: Chain = from_recipe_of_chain(recipe, like)
        return parts_of(chain, like, torch.empty(y.shape, dtype=y.dtype))


def paper() -> dict[str, Any]:
    """The variants at the paper's size, in GB: inputs that wait, copies of weights, and the work of a backward."""
    options: dict[str, Any] = {"input_shape": (3, 224, 224), "classes": 1000, "stem": "large"}
    with FakeTensorMode():
        recipe = {"model": ul.models.build("revresnet50", **options).recipe, "sizes": [1] * 18}
    parts = formula_parts(
        recipe, torch.empty(64, 3, 224, 224, device="meta"), torch.empty(64, dtype=torch.long, device="meta")
    )
    found: dict[str, Any] = {}
    for keep, theirs in _PAPER.items():
        rows = expected(f"petra {keep}", parts)
        ours = {part: sum(row[part] for row in rows) for part in ("waiting", "working", "copies")}
        found[keep] = {part: round(size / 1e9, 2) for part, size in ours.items()}
        found[keep] |= {"as in the paper": round(as_in_paper(keep, parts) / 1e9, 2), "paper": theirs}
    return found


def show(name: str, found: dict[str, Any]) -> None:
    """A table: a row for each stage, a column for each method, in KiB; `*` where the formula says otherwise."""
    stages = len(next(iter(found.values()))["saved"])
    print(f"\n{name}, {stages} stages; KiB saved + copied; * = not what the formula says")
    print("stage " + " ".join(f"{method.removeprefix('petra '):>13s}" for method in found))
    shown = range(stages) if stages <= 18 else [0, 1, 2, stages // 2, stages - 3, stages - 2, stages - 1]
    for j in shown:
        print(
            f"{j:5d} "
            + " ".join(
                _cell(row["saved"][j] + row["copies"][j], sum(row["formula"][j].values())) for row in found.values()
            )
        )
    totals = {method: sum(row["saved"]) + sum(row["copies"]) for method, row in found.items()}
    print("  sum " + " ".join(f"{size / 1024:12.1f} " for size in totals.values()))
    print(
        " once "
        + " ".join(f"{row['at_once'] / 1024:12.1f} " for row in found.values())
        + " (saved by all stages at the same time)"
    )
    saving = 1 - totals["petra nothing"] / totals["petra input+weights"]
    print(
        f"      nothing saves {saving:.1%} of input+weights, {1 - totals['petra nothing'] / totals['petra graph']:.1%} of graph"
    )


def _cell(size: int, formula: int) -> str:
    return f"{size / 1024:12.1f}{' ' if size == formula else '*'}"


def main() -> int:
    given = arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for name in _IMAGES:
        if name in given.networks:
            x, y = torch.randn(given.batch, 3, given.size, given.size), torch.randint(10, (given.batch,))
            found[name] = compare(images(name, given), x, y)
            show(name, found[name])
    if "revgpt" in given.networks:
        x, y = (torch.randint(64, (given.batch, _CONTEXT)) for _ in range(2))
        for fixed in (True, False):
            for depth in given.depths:
                name = f"revgpt of {depth} blocks, {'4 stages' if fixed else 'a stage for each'}"
                found[name] = compare(text(depth, fixed), x, y)
                show(name, found[name])
    at_paper = paper() if "paper" in given.networks else {}
    for keep, row in at_paper.items():
        print(f"RevNet-50 at the paper's size, keep={keep:13s} {row}")
    result("petra_memory", networks=_short(found), paper=at_paper, settings=vars(given))
    return 0


def _short(found: dict[str, Any]) -> dict[str, Any]:
    """By network and method: bytes saved and copied of all stages, of the largest stage, at once; where the formula errs."""
    return {name: {method: _sums(row) for method, row in tables.items()} for name, tables in found.items()}


def _sums(row: dict[str, Any]) -> dict[str, Any]:
    both = [saved + copies for saved, copies in zip(row["saved"], row["copies"])]
    other = [j for j, (size, told) in enumerate(zip(both, row["formula"])) if size != sum(told.values())]
    parts = {part: sum(row[part]) for part in ("saved", "copies")}
    return parts | {"largest": max(both), "at_once": row["at_once"], "not_as_the_formula": other}


if __name__ == "__main__":
    sys.exit(main())
