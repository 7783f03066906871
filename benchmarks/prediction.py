"""Step time and memory as the simulated world predicts them from a calibration, beside what two processes really take.

    python benchmarks/prediction.py [--rounds 5] [--window 0.4] [--patience 30] [--models mlp resnet18 gpt]

Two pinned single-thread processes measure the machine and the stages of each network (as `unlocked calibrate` does), then train
by every method in windows between barriers that take turns. A prediction knows the calibration only, nothing of the trainings.
Both numbers are the fastest of several windows, as other programs only ever add; the medians are in the result, too.
"""

from __future__ import annotations

import argparse
import sys
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from unlocked.calibration.crew import Member, run_crew
from unlocked.calibration.links import measure_links
from unlocked.calibration.measuring import measured_points, merged
from unlocked.calibration.stages import Points, costs_of_measured
from unlocked.chain import Chain
from unlocked.simulation import Costs, Hardware

from common import result
from pipelines.crew import Others, busy_share
from pipelines.tasks import Task, tasks
from predictions.measured import measure
from predictions.methods import Cut, Method, chains, methods
from predictions.predicted import predict

_NAMES = ("mlp", "resnet18", "gpt")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=0.4, help="seconds of each method in each round")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds per model to repeat disturbed windows")
    parser.add_argument("--models", nargs="+", choices=_NAMES, default=list(_NAMES))
    return parser.parse_args()


def both(member: Member, names: list[str], *measuring: Any) -> dict[str, Any]:
    """Calibrate, predict, measure: the network, and a row for each model and method. On every process."""
    member.tell("links")
    hardware = Hardware(network=measure_links(member).network())
    rows = [row for task in tasks(names, "mlp") for row in _rows(member, task, hardware, *measuring)]
    network = {part: list(getattr(hardware.network, part)) for part in ("send", "receive", "exchange")}
    return {"network": network | {"latency": hardware.network.edge.latency}, "rows": rows}


def _rows(member: Member, task: Task, hardware: Hardware, *measuring: Any) -> list[dict[str, Any]]:
    cuts, chosen = chains(task), methods(task)
    before = _points(member, task, cuts)
    member.tell(f"{task.name}: methods")
    found = measure(member, task, cuts, chosen, *measuring)
    after = _points(member, task, cuts)  # a machine's speed changes with what else it does
    costs = {cut: costs_of_measured(cuts[cut], merged(before[cut], after[cut]), "momentum") for cut in cuts}
    return [
        _row(member, task, method, costs[method.cut], hardware, cuts[method.cut], found[method.name])
        for method in chosen
    ]


def _row(
    member: Member,
    task: Task,
    method: Method,
    costs: Costs,
    hardware: Hardware,
    chain: Chain,
    found: dict[str, Any],
) -> dict[str, Any]:
    told = predict(method, costs, hardware, chain, len(task.x), found["steps"])
    saved = {worker: size for row in member.cluster.share(found["saved"]) for worker, size in sorted(row.items())}
    return {
        "model": task.name,
        "method": method.name,
        "steps": found["steps"],
        "predicted_ms": 1e3 * told["seconds"],
        "measured_ms": 1e3 * min(found["seconds"]),
        "median_ms": 1e3 * median(found["seconds"]),
        "others": min(found["others"]),
        "saved": {worker: [told["saved"][worker], size] for worker, size in saved.items()},
    }


def _points(member: Member, task: Task, cuts: dict[Cut, Chain]) -> dict[Cut, list[Points]]:
    """The stages of all cuts, by a batch and by GPipe's micro-batch."""
    member.tell(f"{task.name}: stages")
    samples = len(task.x)
    return {
        cut: measured_points(member, chain, (samples,) if cut == "whole" else (samples // 4, samples), windows=2)
        for cut, chain in cuts.items()
    }


def main() -> int:
    given = arguments()
    console = Console(width=130)
    before, others = busy_share(), Others()
    measuring = given.rounds, given.window, given.patience
    found = run_crew(both, 2, given.models, *measuring, deadline=600, tell=console.print)[0]
    rows = found["rows"]
    busy = {"before": round(before, 3), "meanwhile": round(others.share(), 3)}
    time = [abs(row["predicted_ms"] / row["measured_ms"] - 1) for row in rows]
    memory = [abs(told / size - 1) for row in rows for told, size in row["saved"].values()]
    show(rows, console)
    worst = rows[time.index(max(time))]
    console.print(
        f"step time: median error {median(time):.1%}, worst {max(time):.1%} ({worst['method']} on {worst['model']})\n"
        f"memory: median error {median(memory):.1%}, worst {max(memory):.1%}\nothers used {busy} of the machine"
    )
    result(
        "prediction",
        **found,
        time={"median": round(median(time), 4), "worst": round(max(time), 4)},
        memory={"median": round(median(memory), 4), "worst": round(max(memory), 4)},
        busy=busy,
        settings=vars(given),
    )
    return 0


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Predicted and measured, side by side."""
    table = Table("model", "method", "predicted ms", "fastest ms", "error", "median ms", "predicted MB", "measured MB")
    for row in rows:
        saved = row["saved"].values()
        table.add_row(
            row["model"],
            row["method"],
            f"{row['predicted_ms']:.1f}",
            f"{row['measured_ms']:.1f}",
            f"{row['predicted_ms'] / row['measured_ms'] - 1:+.1%}",
            f"{row['median_ms']:.1f}",
            " : ".join(f"{told / 1e6:.2f}" for told, _ in saved),
            " : ".join(f"{size / 1e6:.2f}" for _, size in saved),
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
