"""Several methods on the same data, from the same weights, in the same order: methods × seeds runs, and a table.

COMPARE/config.json   what was compared
COMPARE/runs/…        one run folder per method and seed
COMPARE/table.json, table.md, report.html
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .config import Options, RunConfig, require_at_least, resolve, resolve_device
from .errors import InvalidChoice
from .live import LiveComparison, Progress, in_percent
from .method_names import Method, parse_method
from .run_files import alone_in, machine, read_json, versions, write_json, write_text
from .running import is_complete, load_data, refuse_other_run
from .table import as_markdown, row_of
from .workers import Outcome, Pool, Task

MAIN_JOB = (
    "backprop",
    "greedy",
    "dgl",
    "predsim(budget=0.2)",  # its head cannot be made smaller than 15.5 % of so small a stage
    "interlocking(d=1)",
    "interlocking(d=J-1)",
    "backprop/all-reduce@3",
    "dgl/all-reduce@3",
    "backprop/wash(p=0.01)@3",  # so few updates: at the paper's 0.001 the mean of the BatchNorm statistics fits dgl badly
    "dgl/wash(p=0.01)@3",
)


@dataclass(frozen=True)
class Comparison:
    """What is to be compared, and where."""

    methods: list[Method]
    configs: dict[Method, list[RunConfig]]  # one per seed
    folder: Path
    options: Options
    seeds: int
    jobs: int
    command: str

    def run_folder(self, method: Method, seed: int) -> Path:
        """Where a run's files are."""
        return self.folder / "runs" / f"{method.slug}-seed{seed}"


def plan(texts: Sequence[str], options: Options, seeds: int, jobs: int, folder: Path, command: str) -> Comparison:
    """Check everything that can be checked before the first step. Raises InvalidChoice, BadData."""
    require_at_least("seeds", seeds, 1)
    require_at_least("jobs", jobs, 1)
    methods = [parse_method(text) for text in texts]
    slugs = [method.slug for method in methods]
    for method in methods:
        if slugs.count(method.slug) > 1:
            raise InvalidChoice(f"The method {str(method)!r} is given twice; give each once.")
    configs = {method: [resolve(options, method, seed, threads=1) for seed in range(seeds)] for method in methods}
    made = Comparison(methods, configs, folder, options, seeds, jobs, command)
    for method in methods:
        for config in configs[method]:
            refuse_other_run(made.run_folder(method, config.seed), config)
    load_data(configs[methods[0]][0])  # bad data is one sentence here, not one per run
    return made


def compare(made: Comparison, console: Console, as_json: bool) -> list[dict[str, Any]]:
    """Make all runs that are not there yet, print and write the table; returns its rows.

    A method that fails becomes a row with its sentence. Raises KeyboardInterrupt after Ctrl-C, when all is saved.
    """
    with alone_in(made.folder):
        return _compare(made, console, as_json)


def _compare(made: Comparison, console: Console, as_json: bool) -> list[dict[str, Any]]:
    write_json(made.folder / "config.json", _described(made))
    outcomes = _made_before(made)
    known = {outcome.task.folder for outcome in outcomes}
    tasks = [task for task in _tasks(made) if task.folder not in known]
    outcomes += _make(made, tasks, outcomes, console, as_json)
    rows = _rows(made, outcomes)
    write_json(made.folder / "table.json", rows)
    write_text(made.folder / "table.md", as_markdown(rows, made.command, machine(resolve_device(made.options.device))))
    return rows


def _described(made: Comparison) -> dict[str, Any]:
    first = made.configs[made.methods[0]][0].to_json()
    per_run = ("credit", "consensus", "replicas", "seed")
    return {
        "command": made.command,
        "methods": [str(method) for method in made.methods],
        "seeds": made.seeds,
        **{name: entry for name, entry in first.items() if name not in per_run},
        "jobs": made.jobs,
        "machine": machine(first["device"]),
        "versions": versions(),
    }


def _tasks(made: Comparison) -> list[Task]:
    """Seed by seed, so that a comparison stopped early has all methods; the longest first, so that no worker idles."""
    rows = [
        (config.seed, -method.replicas, Task(config, made.run_folder(method, config.seed), made.command))
        for method in made.methods
        for config in made.configs[method]
    ]
    return [task for _, _, task in sorted(rows, key=lambda row: row[:2])]


def _made_before(made: Comparison) -> list[Outcome]:
    return [
        Outcome(task, summary=read_json(task.folder / "summary.json"))
        for task in _tasks(made)
        if is_complete(task.folder, task.config)
    ]


def _make(made: Comparison, tasks: list[Task], before: list[Outcome], console: Console, as_json: bool) -> list[Outcome]:
    """Run the tasks, showing how far they are."""
    names = {made.run_folder(m, c.seed): str(m) for m in made.methods for c in made.configs[m]}
    rows = {str(m): Progress(str(m), [made.run_folder(m, c.seed) for c in made.configs[m]]) for m in made.methods}
    for outcome in before:
        rows[names[outcome.task.folder]].ends(failed=False)
    outcomes: list[Outcome] = []
    jobs = min(made.jobs, max(1, len(tasks)))
    with Pool(jobs) as pool, LiveComparison(Console(quiet=True) if as_json else console, rows, jobs) as view:
        for news in pool.run(tasks):
            if isinstance(news, Task):
                rows[names[news.folder]].begins(news.folder)
            elif isinstance(news, Outcome):
                outcomes.append(news)
                name, seed = names[news.task.folder], news.task.config.seed
                if news.summary is None and news.failed is None:
                    raise KeyboardInterrupt
                rows[name].ends(news.failed is not None)
                view.finished(name, seed, news.failed or in_percent((news.summary or {})["accuracy"]))
                if as_json:
                    print(json.dumps(_line(name, news)), flush=True)
            view.refresh()
    return outcomes


def _line(name: str, outcome: Outcome) -> dict[str, Any]:
    line: dict[str, Any] = {"event": "run", "method": name, "seed": outcome.task.config.seed}
    return line | {"folder": str(outcome.task.folder), "failed": outcome.failed} | (outcome.summary or {})


def _rows(made: Comparison, outcomes: list[Outcome]) -> list[dict[str, Any]]:
    summaries: dict[Path, dict[str, Any]] = {o.task.folder: o.summary for o in outcomes if o.summary is not None}
    sentences = {o.task.folder: o.failed for o in outcomes if o.failed is not None}
    found: dict[Method, tuple[list[dict[str, Any]], list[str]]] = defaultdict(lambda: ([], []))
    for method in made.methods:
        for config in made.configs[method]:
            folder = made.run_folder(method, config.seed)
            if folder in summaries:
                found[method][0].append(summaries[folder])
            elif folder in sentences:
                found[method][1].append(sentences[folder])
    return [row_of(str(method), method.replicas, *found[method]) for method in made.methods]


def default_folder() -> Path:
    """runs/compare-<time>."""
    import time

    return Path("runs") / f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
