"""The table of a comparison: as rows of numbers, in the terminal, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from .live import in_bytes

_MEANS = ("samples_per_second", "activation_peak", "bytes_up", "bytes_down", "bytes_replicas", "seconds", "ensemble")
_COLUMNS = (
    "method",
    "test accuracy %",
    "ensemble %",
    "samples/s",
    "peak activations",
    "up/update",
    "down/update",
    "replicas/update",
    "seconds",
)


def row_of(name: str, replicas: int, summaries: Sequence[dict[str, Any]], failed: Sequence[str]) -> dict[str, Any]:
    """One method over its seeds: means, and the standard deviation of a sample (n − 1) of the accuracy; None if unknown.

    Accuracies are shares, of the averaged network where there are several replicas; bytes are per update and replica.
    `members`: the replicas' own accuracies, one list per run. `failed`: the first sentence of a run that failed.
    """
    accuracies = _known(summaries, "accuracy")
    row: dict[str, Any] = {
        "method": name,
        "replicas": replicas,
        "runs": len(summaries),
        "accuracy_mean": fmean(accuracies) if accuracies else None,
        "accuracy_std": stdev(accuracies) if len(accuracies) > 1 else None,
    }
    row |= {key: fmean(values) if (values := _known(summaries, key)) else None for key in _MEANS}
    row["members"] = [summary["members"] for summary in summaries if summary["members"]]
    return row | {"failed": failed[0] if failed else None}


def _known(summaries: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [summary[key] for summary in summaries if summary[key] is not None]


def as_rich(rows: Sequence[dict[str, Any]]) -> Table:
    """For the terminal."""
    table = Table()
    for k, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if k == 0 else "right", no_wrap=k == 0)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def as_markdown(rows: Sequence[dict[str, Any]], command: str, machine: dict[str, Any]) -> str:
    """The same as Markdown, with the command and the machine above, and what failed below."""
    lines = ["```", command, "```", "", f"{machine['cpu']}, {machine['cores']} cores, on {machine['device']}.", ""]
    lines += ["| " + " | ".join(_COLUMNS) + " |", "|---|" + "---:|" * (len(_COLUMNS) - 1)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    lines += [f"\n`{row['method']}` failed: {row['failed']}" for row in rows if row["failed"]]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    """One text per column."""
    if row["failed"] and not row["runs"]:
        return [row["method"], "failed", *[""] * (len(_COLUMNS) - 2)]
    mean, std, ensemble = row["accuracy_mean"], row["accuracy_std"], row["ensemble"]
    accuracy = "–" if mean is None else f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")
    return [
        row["method"] + (" (some runs failed)" if row["failed"] else ""),
        accuracy,
        "–" if ensemble is None else f"{100 * ensemble:.2f}",
        "–" if row["samples_per_second"] is None else f"{row['samples_per_second']:,.0f}",
        in_bytes(row["activation_peak"]),
        in_bytes(row["bytes_up"]),
        in_bytes(row["bytes_down"]),
        in_bytes(row["bytes_replicas"]),
        "–" if row["seconds"] is None else f"{row['seconds']:.1f}",
    ]
