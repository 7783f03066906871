"""Table 5.1 of Fournier's thesis, measured from timelines beside what it says.

    python benchmarks/cyclic_table.py [--sizes 2 3 4 8] [--rule v1|v2]

Every row's program is run on the simulated clock, N = J equal stages, one unit for a forward or backward of a stage,
shapes only (src/unlocked/simulation/cyclic_table: what is counted how, and the table's conventions). A cell that is not
what the table says is followed by a ≠ and the table's. `--rule`: of the cyclic rows but the pipelines.

    act., param.     of one device at its peak, as the table counts;   really held: weights, old versions included
    waiting          weights that were sent to the device and not yet taken
    volume Ψ_P       of one micro-batch in a step; 1 is what a replica sends in an all-reduce, 2 (N−1)/N Ψ_P
    BΨ_A^int         1 is the activations at the inner boundaries, up, and their gradients, down
    com. steps       messages that wait for each other between two units of time (the table's)
    units            of time of a training step;   occupied: share of the time in which a device has activations
"""

from __future__ import annotations

import argparse
import math
from fractions import Fraction
from typing import Any

from unlocked.simulation.cyclic_table import ROWS, Expected, Measured, Row, measure

from common import result

COLUMNS = (
    ("activations", "act. BΨ_A"),
    ("parameters", "param. Ψ_P"),
    ("versions", "really held"),
    ("waiting", "waiting"),
    ("parameter_volume", "volume Ψ_P"),
    ("activation_volume", "BΨ_A^int"),
    ("steps", "com. steps"),
    ("devices", "devices"),
    ("step", "units"),
    ("occupied", "occupied"),
)
_WIDTH = 13


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 3, 4, 8], help="N = J")
    parser.add_argument("--rule", choices=("v1", "v2"), default="v2")
    return parser.parse_args()


def steps_in_words(expected: Expected, count: int) -> str | None:
    """What the table says of the steps of communication."""
    if expected.collective is None:
        return None
    return f"≥{math.ceil(math.log2(count))}" if expected.collective else "O(1)"


def cell(found: Measured, expected: Expected, name: str, count: int) -> str:
    """What was measured, and the table's value where that is another one."""
    value = getattr(found, name)
    if name == "steps":
        said = steps_in_words(expected, count)
        return str(value) if said is None else f"{value} ({said})"
    said = getattr(expected, name, value)
    return str(value) if said == value else f"{value} ≠{said}"


def volumes(found: Measured) -> str:
    """What was sent, in words."""
    return ", ".join(f"{what} {size}" for what, size in found.volumes.items())


def show(row: Row, found: Measured, count: int) -> None:
    """One line."""
    expected = row.table(count)
    cells = "".join(f"{cell(found, expected, name, count):>{_WIDTH}s}" for name, _ in COLUMNS)
    print(f"{row.name:19s}{cells}  {volumes(found)}", flush=True)


def as_json(found: Measured) -> dict[str, Any]:
    """Fractions as texts."""
    rows = vars(found) | {"volumes": {what: str(size) for what, size in found.volumes.items()}}
    return {name: str(value) if isinstance(value, Fraction) else value for name, value in rows.items()}


def main() -> None:
    given = arguments()
    table: dict[str, dict[str, Any]] = {}
    for count in given.sizes:
        print(f"\nN = {count}, rule {given.rule}")
        print(" " * 19 + "".join(f"{title:>{_WIDTH}s}" for _, title in COLUMNS) + "  sent per micro-batch (Ψ_P)")
        for row in ROWS:
            found = measure(row, count, given.rule)
            show(row, found, count)
            table.setdefault(row.name, {})[str(count)] = as_json(found)
    print()
    for row in ROWS:
        for note in row.notes:
            print(f"{row.name}: {note}.")
    result("cyclic_table", rule=given.rule, table=table)


if __name__ == "__main__":
    main()
