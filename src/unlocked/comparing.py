"""Several methods on the same data, from the same weights, in the same order: methods × seeds runs, and a table.

COMPARE/config.json   what was compared
COMPARE/runs/…        one run folder per method and seed
COMPARE/table.json, table.md, report.html
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from .config import Options, RunConfig, cores, require_at_least, resolve, resolve_device
from .errors import InvalidChoice
from .live import LiveComparison, Progress, in_percent
from .method_names import Method, make_consensus, make_credit, parse_method
from .run_files import alone_in, machine, read_json, versions, write_json, write_text
from .running import is_complete, load_sets, refuse_other_run, workers_of
from .simulation.options import in_words
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
    world: str = "in-process"
    processes: int | None = None  # of a distributed run; None: one per worker

    def processes_of(self, config: RunConfig) -> int | None:
        """How many processes a run has of its own, or None."""
        if self.world != "distributed":
            return None
        workers = workers_of(config)
        return workers if self.processes is None else min(self.processes, workers)

    def run_folder(self, method: Method, seed: int) -> Path:
        """Where a run's files are."""
        return self.folder / "runs" / f"{method.slug}-seed{seed}"


def plan(
    texts: Sequence[str],
    options: Options,
    seeds: int,
    jobs: int | None,
    folder: Path,
    command: str,
    world: str = "in-process",
    processes: int | None = None,
    cluster: dict[str, Any] | None = None,
) -> Comparison:
    """Check everything that can be checked before the first step. Raises InvalidChoice, BadData.

    jobs: runs at the same time; None: as many as the cores can serve.
    """
    require_at_least("seeds", seeds, 1)
    require_at_least("jobs", jobs, 1)
    require_at_least("processes", processes, 1)
    if processes is not None and world != "distributed":
        raise InvalidChoice("--processes is for runs on processes of their own; add --world distributed.")
    methods = [parse_method(text) for text in texts]
    slugs = [method.slug for method in methods]
    for method in methods:
        if slugs.count(method.slug) > 1:
            raise InvalidChoice(f"The method {str(method)!r} is given twice; give each once.")
    configs = {
        method: [resolve(options, method, seed, threads=1, cluster=cluster) for seed in range(seeds)]
        for method in methods
    }
    made = Comparison(methods, configs, folder, options, seeds, 1, command, world, processes)
    busiest = max(made.processes_of(config) or 1 for rows in configs.values() for config in rows)
    made = replace(made, jobs=max(1, cores() // busiest) if jobs is None else jobs)
    for method in methods:
        _refuse_in_process(method, configs[method][0], world)
        for config in configs[method]:
            refuse_other_run(made.run_folder(method, config.seed), config)
    for method in methods:
        load_sets(configs[method][0])  # bad data is one sentence here, not one per run
    return made


def _refuse_in_process(method: Method, config: RunConfig, world: str) -> None:
    for rule in (make_credit(method.credit, config.stages), make_consensus(method.consensus, config.stages)):
        if rule.needs_processes and world != "distributed":
            raise InvalidChoice(
                f"{rule.name} leaves the communicating to PyTorch, between processes; add --world distributed."
            )
        if getattr(rule, "free", False) and world == "in-process" and config.cluster is None:
            raise InvalidChoice(
                f"{rule.name}(pairing='available') needs a clock or processes; take --world simulated or distributed, or "
                "pairing='clocks'."
            )


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
    write_text(made.folder / "table.md", as_markdown(rows, made.command, _where(made)))
    return rows


def _where(made: Comparison) -> str:
    """The machine or, if seconds are not its own, the cluster that was simulated."""
    cluster = made.configs[made.methods[0]][0].cluster
    if cluster is not None:
        return f"Seconds are simulated, {in_words(cluster)}."
    real = machine(resolve_device(made.options.device))
    return f"{real['cpu']}, {real['cores']} cores, on {real['device']}."


def _described(made: Comparison) -> dict[str, Any]:
    first = made.configs[made.methods[0]][0].to_json()
    per_run = ("credit", "consensus", "replicas", "seed")
    return {
        "command": made.command,
        "methods": [str(method) for method in made.methods],
        "seeds": made.seeds,
        **{name: entry for name, entry in first.items() if name not in per_run},
        "jobs": made.jobs,
        "world": made.world,
        "processes": made.processes,
        "machine": machine(first["device"]),
        "versions": versions(),
    }


def _tasks(made: Comparison) -> list[Task]:
    """Seed by seed, so that a comparison stopped early has all methods; the longest first, so that no worker idles."""
    rows = [
        (
            config.seed,
            -method.replicas,
            Task(config, made.run_folder(method, config.seed), made.command, made.processes_of(config)),
        )
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
