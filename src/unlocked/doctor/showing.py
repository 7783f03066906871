"""The report in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..live import in_bytes
from .findings import Report, rate_in_words

_OVERRIDE = "Interfaces: that of the route to the rendezvous host; another one with --interface NAME or ADDRESS."


def show(report: Report, console: Console) -> None:
    """Tables, then the sentences."""
    for table in _tables(report):
        console.print(table)
        console.print()
    if report.store_round_trips:
        slowest = max(report.store_round_trips)
        console.print(f"Rendezvous {report.rendezvous}: the store answers in {_short(slowest)} (slowest rank).")
    console.print(escape(_OVERRIDE))
    for finding in report.findings:
        label = "[bold red]wrong:[/bold red]" if finding.wrong else "[bold yellow]note:[/bold yellow]"
        console.print(f"{label} {escape(finding.sentence)}")
    if not report.findings:
        console.print("[bold green]All is well.[/bold green]")


def _tables(report: Report) -> Iterator[Table]:
    yield _processes(report)
    if report.links:
        yield _links(report)
    if report.clocks:
        yield _clocks(report)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _processes(report: Report) -> Table:
    columns = ("rank", "host", "interface", "torch", "unlocked", "python", "threads", "memory", "/dev/shm")
    table = _table("Processes: threads of cores; memory and shared memory that are free", *columns)
    table.columns[1].min_width, table.columns[2].min_width = 5, 10
    for facts in report.processes:
        table.add_row(
            str(facts.rank),
            escape(facts.host),
            f"{escape(facts.interface)}\n{facts.address}",
            facts.torch,
            facts.unlocked,
            facts.python,
            f"{facts.threads} of {min(len(facts.cores), facts.core_quota or math.inf):.2g}",
            in_bytes(facts.memory_free),
            in_bytes(facts.shared_memory_free),
        )
    return table


def _links(report: Report) -> Table:
    table = _table("Links", "from→to", "through", "latency", "bandwidth", "message")
    for link in report.links:
        ranks = f"{link.source}→{link.target}"
        table.add_row(ranks, link.kind, _short(link.latency), rate_in_words(link.rate), in_bytes(link.message))
    return table


def _clocks(report: Report) -> Table:
    table = _table("Clocks: rank 0's minus the rank's", "rank", "time.time", "time.perf_counter", "±")
    for clock in report.clocks:
        table.add_row(str(clock.rank), _short(clock.wall), _short(clock.counter), _short(clock.uncertainty))
    return table


def _short(seconds: float) -> str:
    """0.00025 → `250 µs`."""
    size = abs(seconds)
    if size < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if size < 1 else f"{seconds:.1f} s"
