"""The table of methods, printed from what the rules declare about themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from . import consensus, credit, mitigation
from .method_names import parameters, show

_FIRST = ("name", "title", "source", "parameters")
LEGEND = (
    "J stages, N replicas; Ψ_A bytes of a boundary activation, Ψ_P of the parameters; bytes are per batch and worker (credit), "
    "per update and replica (consensus); delay in updates. Sources: F Fournier's thesis, O Oyallon's habilitation, P Patel's "
    "thesis, I Interlocking Backpropagation. Every credit rule works with every consensus rule; those named "
    "torch-… are PyTorch's own and need the distributed world."
)

_HEADINGS = {"up": "bytes up", "down": "bytes down", "bytes": "bytes per update"}


def rules() -> dict[str, list[dict[str, Any]]]:
    """All credit and consensus rules and mitigations: name, declared properties, parameters with their defaults."""
    return {
        "credit": _declared(credit.ALL),
        "consensus": _declared(consensus.ALL),
        "mitigation": _declared(mitigation.ALL),
    }


def _declared(kinds: Iterable[Any]) -> list[dict[str, Any]]:
    return [
        {"name": kind.name, **dataclasses.asdict(kind.properties), "parameters": parameters(kind)} for kind in kinds
    ]


def as_rich(kind: str, rows: list[dict[str, Any]]) -> Table:
    """One table for the terminal, whose first column says what the rule is; `kind` is the table's title."""
    table = Table(title=f"{kind} rules", box=SIMPLE_HEAD, show_lines=True, padding=(0, 1, 0, 0), show_edge=False)
    columns = [column for column in rows[0] if column not in _FIRST]
    table.add_column("rule", overflow="fold", min_width=16)
    for column in columns:
        table.add_column(_HEADINGS.get(column, column), overflow="fold")
    for row in rows:
        rule = f"[bold]{row['name']}[/bold]\n{escape(row['title'])}\n[dim]{escape(_text(row['parameters']))}[/dim]"
        table.add_row(rule, *(escape(_text(row[column])) for column in columns))
    return table


def as_markdown(kind: str, rows: list[dict[str, Any]]) -> str:
    """The same in Markdown."""
    columns = list(rows[0])
    lines = [f"### {kind.capitalize()} rules", "", "| " + " | ".join(_HEADINGS.get(c, c) for c in columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    lines += ["| " + " | ".join(_text(entry).replace("|", "\\|") for entry in row.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _text(entry: Any) -> str:
    if isinstance(entry, dict):
        return ", ".join(f"{key}={show(default)}" for key, default in entry.items()) or "–"
    return str(entry)
